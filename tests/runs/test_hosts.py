"""The number of this host, and its seeds."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.running import ROOT, TINY, last_checkpoint, main, popen, process, timeless
from wqmix_jax import load_config, load_metrics
from wqmix_jax.errors import ConfigError
from wqmix_jax.merge import merge
from wqmix_jax.records.metrics import load_header
from wqmix_jax.runs.hosts import ADDRESS, connected, refuse_step_of_tasks, unused_tasks, with_host

BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
"""Variables of ``sbatch --ntasks=4`` without srun: one process, and no step."""

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3"}
"""Variables of the third of three tasks of srun."""

ONE_TASK = BATCH | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}
"""Variables of ``srun --ntasks=1`` in a larger allocation, as submitit starts its jobs."""

INTERACTIVE = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
"""Variables of the shell that salloc opens on a node."""

ARRAY = {
    f"SLURM_ARRAY_TASK_{key}": value
    for key, value in {"ID": "7", "COUNT": "3", "MIN": "5", "MAX": "9", "STEP": "2"}.items()
}
"""Variables of the second of three elements of ``sbatch --array=5-9:2``."""

SUBMITIT = ONE_TASK | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "expected"),
    [
        (None, None, {}, (1, 0)),
        (1, None, STEP, (1, 0)),
        (4, 3, {}, (4, 3)),
        (4, 3, STEP, (4, 3)),
        (4, 3, ARRAY, (4, 3)),
        (None, None, BATCH, (1, 0)),
        (None, None, BATCH | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "4"}, (1, 0)),
        (None, None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2(x3)"}, (1, 0)),
        (None, None, INTERACTIVE, (1, 0)),
        (None, None, ONE_TASK, (1, 0)),
        (None, None, SUBMITIT, (1, 0)),
        (None, None, STEP, (3, 2)),
        (3, None, STEP, (3, 2)),
        ("slurm", None, STEP, (3, 2)),
        ("slurm", None, ONE_TASK, (1, 0)),
        (None, None, ARRAY, (1, 0)),
        (None, None, ARRAY | BATCH, (1, 0)),
        (None, None, ARRAY | STEP, (3, 2)),
        (3, None, ARRAY, (3, 1)),
        ("slurm", None, ARRAY, (3, 1)),
        ("slurm", None, ARRAY | BATCH, (3, 1)),
        ("slurm", None, ARRAY | STEP, (9, 5)),
        ("slurm", None, SUBMITIT, (2, 1)),
        ("slurm", None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, (1, 0)),
    ],
)
def test_seeds_are_split_where_asked_or_over_the_tasks_of_a_step(hosts, host, environ, expected) -> None:
    values = with_host({"hosts": hosts, "host": host, "distributed": False, "num_seeds": 9}, environ)
    assert (values["hosts"], values["host"]) == expected


@pytest.mark.parametrize(
    ("given", "environ", "line"),
    [
        ({}, {}, None),
        ({}, STEP, None),
        ({}, ONE_TASK, None),
        ({}, {"SLURM_NTASKS": "1"}, None),
        ({"hosts": 1}, BATCH, None),
        ({"hosts": 4, "host": 1}, BATCH | ARRAY, None),
        ({"hosts": "slurm"}, ARRAY, None),
        ({"num_seeds": 1}, ARRAY, None),
        ({}, BATCH, "SLURM_NTASKS=4, but this process is not an srun task: it trains all 8 seeds; start it with srun"),
        ({"num_seeds": 1}, INTERACTIVE, "SLURM_NTASKS=4, but .* it trains its one seed; start it with srun"),
        ({}, ARRAY, "SLURM_ARRAY_TASK_COUNT=3: each element trains all 8 seeds; hosts=slurm splits them"),
        ({}, SUBMITIT, "SLURM_ARRAY_TASK_COUNT=2: each element trains all 8 seeds"),
    ],
)
def test_tasks_that_are_not_used_are_reported(given, environ, line) -> None:
    reported = unused_tasks({"hosts": None, "host": None, "distributed": False, "num_seeds": 8} | given, environ)
    assert reported is None if line is None else re.match(line, str(reported))


def test_a_batch_script_without_srun_trains_all_seeds_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    assert main(*TINY, f"run_dir={tmp_path / 'run'}") == 0
    line = "SLURM_NTASKS=4, but this process is not an srun task: it trains all 2 seeds; start it with srun"
    assert capsys.readouterr().err.startswith(line)
    assert load_header(tmp_path / "run")["seeds"] == [3, 4]


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "message"),
    [
        (None, 1, {}, "hosts is missing: host=1 is one of how many"),
        (2, None, {}, "host is missing: SLURM runs 1 task.s. here and not hosts=2; write host=0 .. host=1"),
        (2, None, STEP, "host is missing: SLURM runs 3 task"),
        (4, None, BATCH, "host is missing: SLURM runs 1 task"),
        ("all", None, STEP, "hosts=all is not allowed: a positive integer is needed, or slurm"),
        ("slurm", None, {}, "hosts=slurm is not allowed: this process is neither an srun task nor an element of a job"),
        ("slurm", None, BATCH, "hosts=slurm is not allowed: .*; start it with srun, or write hosts=N host=i"),
        ("slurm", 1, STEP, "hosts=slurm is not allowed with host=1: SLURM numbers the hosts"),
        ("slurm", None, ARRAY | {"SLURM_ARRAY_TASK_MAX": "11"}, "job array has gaps"),
        (
            None,
            None,
            STEP | {"SLURM_STEP_NUM_TASKS": "2(x3)"},
            r"SLURM_STEP_NUM_TASKS=2\(x3\) is not a number, so host",
        ),
        (None, None, STEP | {"SLURM_PROCID": ""}, "SLURM_PROCID= is not a number, so hosts=N host=i must be"),
        (None, None, STEP | {"SLURM_PROCID": "3"}, "SLURM_PROCID=3 is not allowed: SLURM_STEP_NUM_TASKS=3 are counted"),
    ],
)
def test_what_can_not_be_known_is_refused(hosts, host, environ, message) -> None:
    with pytest.raises(ConfigError, match=message):
        with_host({"hosts": hosts, "host": host, "distributed": False, "num_seeds": 9}, environ)


def test_a_task_without_a_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_seeds=2 is not allowed: SLURM runs 3 tasks here, each of which needs"):
        with_host({"hosts": None, "host": None, "distributed": False, "num_seeds": 2}, STEP)


def test_every_seed_is_one_hosts() -> None:
    slices = [load_config("+algo=iql", "num_seeds=8", "seed=10", "hosts=3", f"host={host}").seeds for host in range(3)]
    assert [list(part) for part in slices] == [[10, 11], [12, 13, 14], [15, 16, 17]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hosts=2", "host=2", "num_seeds=2"], "host=2 is not allowed: hosts=2 are counted from 0"),
        (["hosts=3", "host=0", "num_seeds=2"], "hosts=3 is not allowed: there are only num_seeds=2"),
    ],
)
def test_impossible_hosts_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("+algo=iql", *overrides)


def test_processes_that_jax_connects_unasked_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert main(*TINY, f"run_dir={tmp_path / 'run'}") == 2
    assert capsys.readouterr().err == "error: distributed=false is not allowed: JAX connects 4 processes\n"
    assert not (tmp_path / "run").exists()


def test_jax_numbers_the_hosts_where_it_connects_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"distributed": True, "hosts": None, "host": None}
    assert with_host(asked, STEP) == asked  # what SLURM says, JAX finds itself
    with pytest.raises(ConfigError, match="hosts=slurm is not allowed with distributed=true: JAX numbers the hosts"):
        with_host(asked | {"hosts": "slurm"}, STEP)
    for name, value in {"process_count": 4, "process_index": 3, "distributed.is_initialized": True}.items():
        monkeypatch.setattr(f"jax.{name}", lambda value=value: value)
    assert connected(asked, {}) == {"distributed": True, "hosts": 4, "host": 3}
    assert connected(asked | {"host": 1}, {})["host"] == 1
    with pytest.raises(ConfigError, match="hosts=2 is not allowed with distributed: JAX connects 4 process"):
        connected(asked | {"hosts": 2}, {})


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "message"),
    [
        (2, None, {}, "distributed=true is not possible: coordinator_address should be defined.; where JAX doesn't"),
        (2, 2, {}, "host=2 is not allowed: hosts=2 are counted from 0"),
        (0, None, {}, "hosts=0 is not allowed: an integer of at least 1 is needed"),
        (2.5, 0, {}, "hosts=2.5 is not allowed: an integer"),
        (2, -1, {}, "host=-1 is not allowed: an integer of at least 0 is needed"),
        (2, 0, {ADDRESS: "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1 is not allowed: HOST:PORT of host 0 is needed"),
        (2, 1, {ADDRESS: "127.0.0.1:1"}, "JAX_COORDINATOR_ADDRESS=127.0.0.1:1 is not allowed: host 0 doesn't answer"),
        (None, None, ARRAY, "hosts is missing: JAX can't number SLURM's job array"),
    ],
)
def test_hosts_that_can_not_be_connected_are_refused(
    hosts: Any, host: Any, environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wqmix_jax.runs.hosts.CONNECT_SECONDS", 0)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)  # as in a fresh process
    with pytest.raises(ConfigError, match=message):
        connected({"distributed": True, "hosts": hosts, "host": host}, environ)


def test_a_refusal_before_the_backend_starts_writes_nothing(tmp_path: Path) -> None:
    ended = process(*TINY, "distributed=true", "hosts=2", f"run_dir={tmp_path / 'run'}")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: distributed=true is not possible: ")
    assert ended.stderr.endswith("set JAX_COORDINATOR_ADDRESS=HOST:PORT and write hosts=N host=i\n")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_several_runs_are_not_distributed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("-m", *TINY, "distributed=true") == 2
    assert capsys.readouterr().err == "error: distributed=true is not allowed with -m: connected hosts train one run\n"
    assert main("-m", *TINY, "hosts=slurm") == 2
    message = "each run of a sweep trains all its seeds"
    assert capsys.readouterr().err == f"error: hosts=slurm is not allowed with -m: {message}\n"


@pytest.mark.slow
def test_connected_hosts_train_resume_and_merge_as_hosts_apart(tmp_path: Path) -> None:
    """Two processes that `jax.distributed` connects over loopback: exit codes, numbers and checkpoints of both."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    new = (*TINY, "num_seeds=3", "hosts=2")
    for host in range(2):
        ended = process(*new, f"host={host}", f"run_dir={apart}", "total_env_steps=61")
        assert ended.returncode == 0, ended.stderr

    both_connected([(*new, f"host={host}", f"run_dir={together}") for host in range(2)])
    assert [len(last_checkpoint(together / f"host_{host}")["env_steps"]) for host in range(2)] == [1, 2]
    both_connected([(f"resume={together / f'host_{host}'}", "total_env_steps=61") for host in range(2)])

    for host in ("host_0", "host_1"):
        assert timeless(load_metrics(together / host)) == timeless(load_metrics(apart / host))
        assert last_checkpoint(together / host)["crc32"] == last_checkpoint(apart / host)["crc32"]  # of all arrays
    merge([together / "host_0", together / "host_1"], tmp_path / "merged")
    assert sorted(load_header(tmp_path / "merged")["seeds"]) == [3, 4, 5]


SAVES = """
from pathlib import Path
import time
from types import SimpleNamespace
import jax, numpy as np
from wqmix_jax.runs import checkpoint_pieces, checkpoints, hosts
import orbax.checkpoint as ocp
hosts.connected({{"distributed": True, "hosts": 2, "host": {host}}}, {{hosts.ADDRESS: "{address}"}})
folder = Path("{folder}") / "{host}"
folder.mkdir()
manager = checkpoints._manager(folder, 2)
client = jax._src.distributed.global_state.client
for step in range(60):
    client.wait_at_barrier(f"step {{step}}", 60_000)  # both simultaneously
    arrays = {{"a.b": checkpoint_pieces.Pieces(np.full((50, 50), step + {host}, np.float32))}}
    manager.save(step, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), host=ocp.args.JsonSave({{}})))
    manager.wait_until_finished()
restored = manager.restore(59, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore()))["arrays"]
assert (checkpoint_pieces.assemble_on_host(restored["a.b"], restored["a.b"]) == 59 + {host}).all()
manager.close()
time.sleep({lasts})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("last", "lasts"), [(0, 5), (1, 330)])
def test_connected_hosts_save_at_once_and_wait_for_each_other(last: int, lasts: int, tmp_path: Path) -> None:
    """One is done before the other, once by more than five minutes, after which JAX alone would end them both."""
    address, started = free_address(), time.monotonic()
    hosts = [
        python(SAVES.format(host=host, address=address, folder=tmp_path, lasts=lasts if host == last else 0))
        for host in range(2)
    ]
    end_well(hosts)
    assert time.monotonic() - started > lasts


@pytest.mark.slow
def test_a_connected_host_that_is_refused_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "run" / "host_1").mkdir(parents=True)
    (tmp_path / "run" / "host_1" / "thesis.txt").write_text("precious")
    first = f"import os; os.environ['JAX_COORDINATOR_ADDRESS'] = '{free_address()}'"
    hosts = [
        popen(*TINY, "hosts=2", f"host={host}", "distributed=true", f"run_dir={tmp_path / 'run'}", first=first)
        for host in range(2)
    ]
    _, err = hosts[1].communicate(timeout=100)
    hosts[0].kill()
    hosts[0].communicate()
    assert hosts[1].returncode == 2
    assert "host_1 is not allowed: it isn't empty" in err


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def both_connected(hosts: Sequence[Sequence[str]]) -> None:
    """Runs hosts to their ends, all simultaneously."""
    first = f"import os; os.environ['JAX_COORDINATOR_ADDRESS'] = '{free_address()}'"
    end_well([popen(*arguments, "distributed=true", first=first) for arguments in hosts])


def end_well(hosts: Sequence[subprocess.Popen[str]]) -> None:
    """Waits for all of them."""
    try:
        for host in hosts:
            _, err = host.communicate(timeout=600)
            assert host.returncode == 0, err
    finally:
        for host in hosts:
            host.kill()
            host.communicate()


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE)


def test_a_sweep_is_not_repeated_by_each_task_of_a_step() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
    with pytest.raises(ConfigError, match=r"^-m is not allowed under srun with 4 tasks, each of which would run"):
        refuse_step_of_tasks(step)
    refuse_step_of_tasks(step | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    refuse_step_of_tasks({"SLURM_NTASKS": "4"})
