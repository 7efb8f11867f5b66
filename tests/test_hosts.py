"""Which host this is, and which seeds are its."""

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
from wqmix_jax.config import ConfigError
from wqmix_jax.hosts import ADDRESS, connected, with_host
from wqmix_jax.logger import load_header
from wqmix_jax.merge import merge

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
    values = with_host({"hosts": hosts, "host": host, "distributed": False}, environ)
    assert (values["hosts"], values["host"]) == expected


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "told"),
    [
        (None, 1, {}, "hosts is missing: host=1 is one of how many"),
        (2, None, {}, "host is missing: SLURM runs 1 task.s. here and not hosts=2; write host=0 .. host=1"),
        (2, None, STEP, "host is missing: SLURM runs 3 task"),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_MAX": "11"}, "job array has gaps"),
        (None, None, {"SLURM_NTASKS": "2(x3)"}, r"SLURM_NTASKS=2\(x3\) is not a number, so hosts=N host=i must be"),
    ],
)
def test_what_can_not_be_known_is_refused(hosts, host, environ, told) -> None:
    with pytest.raises(ConfigError, match=told):
        with_host({"hosts": hosts, "host": host, "distributed": False}, environ)


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
    for name, value in {"process_count": 4, "process_index": 3, "distributed.is_initialized": True}.items():
        monkeypatch.setattr(f"jax.{name}", lambda value=value: value)
    assert connected(asked, {}) == {"distributed": True, "hosts": 4, "host": 3}
    assert connected(asked | {"host": 1}, {})["host"] == 1
    with pytest.raises(ConfigError, match="hosts=2 is not allowed with distributed: JAX connects 4 process"):
        connected(asked | {"hosts": 2}, {})


@pytest.mark.parametrize(
    ("hosts", "host", "environ", "told"),
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
    hosts: Any, host: Any, environ: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wqmix_jax.hosts.CONNECT_SECONDS", 0)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)  # as in a fresh process
    with pytest.raises(ConfigError, match=told):
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
from wqmix_jax import checkpoint, hosts
import orbax.checkpoint as ocp
hosts.connected({{"distributed": True, "hosts": 2, "host": {host}}}, {{hosts.ADDRESS: "{address}"}})
folder = Path("{folder}") / "{host}"
folder.mkdir()
manager = checkpoint._manager(folder, 2)
client = jax._src.distributed.global_state.client
for step in range(60):
    client.wait_at_barrier(f"step {{step}}", 60_000)  # both at once
    arrays = {{"a.b": np.full((50, 50), step + {host}, np.float32)}}
    manager.save(step, args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(arrays), host=ocp.args.JsonSave({{}})))
    manager.wait_until_finished()
restored = manager.restore(59, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore()))["arrays"]
assert (restored["a.b"] == 59 + {host}).all()
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
    """Runs hosts to their ends, all at once."""
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
