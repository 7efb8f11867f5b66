"""Several runs by one command, one after the other, and the table of them."""

from pathlib import Path

import pytest

from tests.running import TINY, main
from wqmix_jax import load_metrics
from wqmix_jax.records.run_dir import find_runs, read_config
from wqmix_jax.runs import session
from wqmix_jax.table import table

SHORT = (*(option for option in TINY if not option.startswith("total_env_steps")), "total_env_steps=9")


@pytest.mark.slow  # each run compiles its own program
def test_runs_of_a_sweep_share_a_folder_and_a_table(tmp_path: Path) -> None:
    assert main("-m", *SHORT, "algo.lr=0.001,0.1", f"run_dir={tmp_path}") == 0
    runs = find_runs([tmp_path])
    assert [run.relative_to(tmp_path).as_posix() for run in runs] == ["0", "1"]
    assert [read_config(run)["algo"]["lr"] for run in runs] == [0.001, 0.1]
    assert load_metrics(runs[0], kind="eval") != load_metrics(runs[1], kind="eval")
    assert [(row["algo.lr"], row["seeds"]) for row in table(runs)] == [("0.001", 2), ("0.1", 2)]


def test_a_refused_sweep_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("-m", *SHORT, "algo.lr=0.001,-1", f"run_dir={tmp_path / 'sweep'}") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_over_algorithms_takes_options_of_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra by itself would look for them before an algorithm is chosen."""
    seen = []
    monkeypatch.setattr(session, "start", lambda config, values, *, algo, **_: seen.append((algo, config.algo.lr)))
    assert main("-m", "+algo=qmix,ow_qmix", "algo.lr=0.25", "env.episode_limit=7", f"run_dir={tmp_path}") == 0
    assert seen == [("qmix", 0.25), ("ow_qmix", 0.25)]
