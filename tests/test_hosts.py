"""Which host this is, and which seeds are its."""

from pathlib import Path

import jax
import pytest

from tests.running import TINY, main
from wqmix_jax import load_config
from wqmix_jax.config import ConfigError
from wqmix_jax.hosts import with_host

STEP = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3"}
ARRAY = {
    f"SLURM_ARRAY_TASK_{key}": value
    for key, value in {"ID": "7", "COUNT": "3", "MIN": "5", "MAX": "9", "STEP": "2"}.items()
}


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "expected"),
    [
        (None, None, {}, (1, 0)),
        (1, None, STEP, (1, 0)),
        (4, 3, {}, (4, 3)),
        (4, 3, STEP, (4, 3)),
        (None, None, STEP, (3, 2)),
        (3, None, STEP, (3, 2)),
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 0)),
        (None, None, ARRAY, (3, 1)),
        (None, None, ARRAY | STEP, (9, 5)),
        (None, None, {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, (2, 1)),
    ],
)
def test_what_is_given_counts_and_slurm_fills_in(hosts, host, environ, expected) -> None:
    values = with_host({"hosts": hosts, "host": host}, environ)
    assert (values["hosts"], values["host"]) == expected


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "told"),
    [
        (None, 1, {}, "hosts is missing: host=1 is one of how many"),
        (2, None, {}, "host is missing: SLURM runs 1 task.s. here and not hosts=2; write host=0 .. host=1"),
        (2, None, STEP, "host is missing: SLURM runs 3 task"),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_MAX": "11"}, "job array has gaps"),
    ],
)
def test_what_can_not_be_known_is_refused(hosts, host, environ, told) -> None:
    with pytest.raises(ConfigError, match=told):
        with_host({"hosts": hosts, "host": host}, environ)


def test_every_seed_is_one_hosts() -> None:
    slices = [load_config("+algo=iql", "num_seeds=8", "seed=10", "hosts=3", f"host={host}").seeds for host in range(3)]
    assert [list(part) for part in slices] == [[10, 11], [12, 13, 14], [15, 16, 17]]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["hosts=2", "host=2", "num_seeds=2"], "host=2 is not allowed: hosts=2 are counted from 0"),
        (["hosts=3", "host=0", "num_seeds=2"], "hosts=3 is not allowed: there are only num_seeds=2"),
    ],
)
def test_impossible_hosts_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config("+algo=iql", *overrides)


def test_processes_that_jax_connects_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert main(*TINY, f"run_dir={tmp_path / 'run'}") == 2
    assert capsys.readouterr().err.startswith("error: a run of 4 processes that JAX connects is not allowed: hosts=N")
    assert not (tmp_path / "run").exists()
