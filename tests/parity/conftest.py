"""Runs the case files in separate processes, and prints at the end what was compared."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.parity.comparison import Report
from tests.parity.harness import FOLDER, GOLDEN, case_files, precisions, run, set_up_worker

REPORTS = pytest.StashKey[dict[Path, dict[str, Report]]]()

MAIN_FORMS = ("exact", "float64")
"""The forms in which every recording is compared in the fast tests."""

ALL_FORMS = ("learner_cw_qmix_public_0", "learner_ow_qmix_public_0", "learner_qtran_public_0", "learner_sac_public_0")
"""Recordings that are compared in every form there; the other forms of the project's others are slow tests."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recording" not in metafunc.fixturenames:
        return
    every = [(path, precision) for path in case_files(FOLDER) for precision in precisions(path)]
    params = [
        pytest.param(
            (path, precision),
            id=f"{path.stem}-{precision}",
            marks=() if precision in MAIN_FORMS or path.stem in ALL_FORMS or FOLDER != GOLDEN else pytest.mark.slow,
        )
        for path, precision in every
    ]
    metafunc.parametrize("recording", params)


@pytest.fixture(scope="session")
def ran(request: pytest.FixtureRequest) -> Iterator[Callable[[Path, str], Report]]:
    """Returns a case file's report. All selected files start together: most of the time goes into compiling them."""
    spawned = multiprocessing.get_context("spawn")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Each of pytest's workers selects all files and runs a part of them, one after another.
        with ProcessPoolExecutor(1, mp_context=spawned, initializer=set_up_worker) as pool:
            yield lambda path, precision: pool.submit(run, path, precision).result()
        return
    here = [item for item in request.session.items if Path(__file__).parent in item.path.parents]
    selected = [item.callspec.params for item in here if hasattr(item, "callspec")]
    recordings = [params["recording"] for params in selected if "recording" in params]
    workers = min(os.cpu_count() or 1, 8, len(recordings))
    with ProcessPoolExecutor(workers, mp_context=spawned, initializer=set_up_worker) as pool:
        reports: dict[tuple[Path, str], Future[Report]] = {each: pool.submit(run, *each) for each in recordings}
        yield lambda path, precision: reports[path, precision].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def keep_report(request: pytest.FixtureRequest) -> Callable[[Path, str, Report], None]:
    """Keeps a report for the summary."""
    reports = request.config.stash.setdefault(REPORTS, {})
    return lambda path, precision, report: reports.setdefault(path, {}).update({precision: report})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = config.stash.get(REPORTS, {})
    if not reports:
        return
    terminalreporter.section(f"parity with the authors' code: {FOLDER}")
    for path, by_precision in reports.items():
        [*every] = by_precision.values()
        terminalreporter.write_line(f"{path.name}: {every[0].contents()}")
        for precision, report in by_precision.items():
            terminalreporter.write_line(f"    {precision}: {report.errors()}")
