"""Every recording of a folder, by default `tests/golden`; ``WQMIX_PARITY_DIR=FOLDER`` takes another one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.comparison import Report
from tests.parity.harness import FOLDER, case_files
from tests.parity.learner_cases import NotYetCovered


def test_there_are_recordings() -> None:
    assert FOLDER.is_dir(), f"{FOLDER} is not a folder"
    assert case_files(FOLDER), f"there is no .npz in {FOLDER}"


def test_recording(
    recording: tuple[Path, str],
    ran: Callable[[Path, str], Report],
    keep_report: Callable[[Path, str, Report], None],
) -> None:
    path, precision = recording
    try:
        report = ran(path, precision)
    except NotYetCovered as reason:
        pytest.skip(str(reason))
    keep_report(path, precision, report)
    assert not report.failures, "\n".join(report.failures)
