"""Workers that never play, and simulators with wrong sizes or versions, are refused in one line that says why."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.envs.host.running import WORKERS, toy
from wqmix_jax.envs.host import supervisor, worker
from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.options import build

HALF = f"""#!{sys.executable}
import json, socket, sys
channel = socket.socket(fileno=json.loads(sys.argv[2])["socket"])
channel.recv(1)
channel.sendall(b".\\x00\\x01\\x00\\x00half")
print("gone in the middle", file=sys.stderr)
sys.exit(3)
"""
"""A worker whose answer of 256 bytes ends after 4."""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Path]:
    """Writes an interpreter."""

    def write(text: str) -> Path:
        path = tmp_path / "python"
        path.write_text(text)
        path.chmod(0o755)
        return path

    return write


WITHOUT_NUMPY = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WITHOUT_NUMPY, r"worker ended with exit code 1 \(ModuleNotFoundError: No module named 'numpy'\)$"),
        ("#!/bin/sh\nexit 0\n", "worker ended with exit code 0$"),
        ("#!/bin/sh\necho no >&2\nkill -11 $$\n", r"worker killed by signal 11 \(no\)$"),
        ("no program", r".*/python can't be started: Exec format error$"),
        (HALF, r"worker ended with exit code 3 \(gone in the middle\)$"),
    ],
    ids=["without numpy", "no Python", "crash", "no program", "half an answer"],
)
def test_an_interpreter_that_cannot_play_is_refused(text: str, message: str, program: Callable[..., Path]) -> None:
    python = program(text)
    with pytest.raises(ConfigError, match=f"^HostEnvironment can't be used with worker_python={python}: {message}"):
        toy(workers={"worker_python": str(python)})


LATER = f'#!/bin/sh\nif mkdir "$0.first" 2>/dev/null; then exec {sys.executable} "$@"; fi\n'
"""Gives the sizes and then does what follows."""


@pytest.mark.parametrize(
    ("then", "cause"),
    [
        (
            f'exec {sys.executable} -S "$@"\n',
            r"worker ended with exit code 1 \(ModuleNotFoundError: No module .* a reset",
        ),
        ("", "worker ended with exit code 0 in a reset; no worker is replaced any more"),
    ],
)
def test_a_worker_that_ends_before_its_first_command_is_reported(
    then: str, cause: str, program: Callable[..., Path]
) -> None:
    env = toy(workers={"worker_python": str(program(LATER + then)), "max_restarts": 0})
    with pytest.raises(RunError, match=f"environment 0 of training: {cause}"), env.external.running([0]):
        env.external.supervisor.reset("training", np.array([2]))


def test_an_interpreter_that_vanishes_ends_the_run_with_one_line(program: Callable[..., Path]) -> None:
    python = program(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    env = toy(workers={"worker_python": str(python)})
    python.unlink()
    with (
        pytest.raises(RunError, match=rf"^{python} can't be started: No such file or directory$"),
        env.external.running([0]),
    ):
        env.external.supervisor.reset("training", np.array([2]))


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """Opens more than 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.dup(0))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_workers_may_be_many(many_open_files: None) -> None:
    """The system limits their number, not `select.select`."""
    env = toy(episode_limit=6)
    with env.external.running([0]):
        env.external.supervisor.reset("training", np.array([2]))
        assert not env.external.supervisor.arrays("training")["failed"].any()


@pytest.mark.parametrize("supervised", [True, False])
def test_a_system_without_room_for_workers_ends_the_run_with_one_line(
    supervised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    env = toy()
    monkeypatch.setattr(supervisor, "Pool", full)
    message = r"^workers can't be started: \[Errno 24\] Too many open files$"
    if not supervised:
        with pytest.raises(RunError, match=message):
            env.external.supervisor.reset("training", np.array([2, 3]))
        return

    def play() -> None:
        with env.external.running([0]):
            floats, flags = env.external.supervisor.reset("training", np.array([2, 3]))
            assert (floats.any(), flags[-2:].tolist()) == (False, [True, True]), "no row of the call has played"

    with pytest.raises(RunError, match=message):
        play()


SIMULATOR = """
import numpy as np

SIZES = dict.fromkeys(["num_agents", "num_actions", "obs_dim", "state_dim", "episode_limit"], 2)


class Game:
    def __init__(self, seed, info, versions="{}"):
        self.info_text, self.versions_text = info, versions

    def info(self):
        return eval(self.info_text)

    def versions(self):
        return eval(self.versions_text)
"""


def game(folder: Path, **options: Any) -> Any:
    (folder / "game.py").write_text(SIMULATOR)
    target = "wqmix_jax.envs.host.bridge.HostEnvironment"
    return build("env", {"_target_": target, **WORKERS, "simulator": f"{folder / 'game.py'}:Game", "options": options})


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("{**SIZES, 'obs_dim': 0}", "its info() gives obs_dim=0: a whole number above 0 is needed"),
        ("{**SIZES, 'obs_dim': 2.5}", "its info() gives obs_dim=2.5: a whole number above 0 is needed"),
        ("{**SIZES, 'obs_dim': np.zeros(2, int)}", "its info() gives obs_dim=[0, 0]: a whole number above 0 is needed"),
        ("dict(num_agents=2)", "its info() lacks num_actions: a whole number above 0 is needed"),
        ("{**SIZES, 'metrics': 'hits'}", "its info() gives metrics='hits': a list of names is needed"),
        ("None", "its info() returns None, but a dict is needed"),
        ("{**SIZES, 'obs_dim': Game}", "TypeError: info() or versions() holds a type: only numbers, text and lists"),
    ],
)
def test_sizes_that_cannot_be_used_are_refused(info: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        game(tmp_path, info=info)
    assert str(refused.value).startswith(f"HostEnvironment can't be used: {message}")
    assert "\n" not in str(refused.value)


def test_sizes_may_be_integers_of_numpy(tmp_path: Path) -> None:
    info = "{**{name: np.int64(size) for name, size in SIZES.items()}, 'metrics': ('hits', np.str_('wins'))}"
    env = game(tmp_path, info=info, versions="{'game': np.float32(1.5)}")
    assert env.spec == (2, 2, 2, 2, 2)
    assert all(type(size) is int for size in env.spec)
    assert env.info["metrics"] == ["hits", "wins"]
    assert env.external.versions() == {"game": 1.5}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("obs", [[1, 2, 3], [1, 2]], r"obs of agent 1 has shape \(2,\), but \(3,\) is needed"),
        ("obs", [[1, [2], 3], [1, 2, 3]], r"obs of agent 0 has shape ragged, but \(3,\) is needed"),
        ("obs", [np.ones(3), None], r"obs of agent 1 has shape \(\), but \(3,\) is needed"),
        ("obs", None, r"obs has shape \(\), but \(2, 3\) is needed"),
        ("reward", "five", r"reward holds a str of dtype <U4, but numbers are needed"),
        ("reward", None, r"reward holds a NoneType of dtype object, but numbers are needed"),
        ("obs", [[1, 2], [1, 2]], r"obs has shape \(2, 2\), but \(2, 3\) is needed"),
        ("obs", [[1, 2, 3]], r"obs has shape \(1, 3\), but \(2, 3\) is needed"),
        ("obs", [[1, 2, 3], [1, np.nan, 3]], "obs of agent 1 holds a value that is not finite"),
        (
            "avail_actions",
            [[1, 1, 0, 0], [1, 1, 0]],
            r"avail_actions of agent 1 has shape \(3,\), but \(4,\) is needed",
        ),
        ("state", [1, [2, 3]], r"state has shape ragged, but \(2,\) is needed"),
        ("state", [1, np.inf], "state holds a value that is not finite"),
        ("reward", [1.0], r"reward has shape \(1,\), but \(\) is needed"),
    ],
)
def test_what_does_not_fit_is_named_by_agent(name: str, value: Any, message: str) -> None:
    arrays = {
        "obs": np.zeros((2, 3)),
        "avail_actions": np.zeros((2, 4), bool),
        "state": np.zeros(2),
        "reward": np.zeros(()),
    }
    with pytest.raises(ValueError, match=f"^{message}$"):
        worker.put(arrays, name, value)
    assert not arrays[name].any()
