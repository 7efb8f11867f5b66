"""Small runs of the command line in this process, with a custom algorithm and environment."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest

from wqmix_jax import train
from wqmix_jax.config import RunConfig
from wqmix_jax.runs import session
from wqmix_jax.runs.startup import command_to_continue
from wqmix_jax.training.compiled_loop import Trainer
from wqmix_jax.training.host_loop import Loop

ROOT = Path(__file__).parent.parent

USER_FOLDER = Path(__file__).parent / "user_folder"

TINY = (
    "+algo=huber_iql",
    "env=coin",
    "env.episode_limit=2",
    "algo.batch_size=3",
    "algo.buffer_size=8",
    "algo.hidden_dim=4",
    "algo.epsilon_anneal_steps=30",
    "num_seeds=2",
    "seed=3",
    "total_env_steps=37",
    "eval_interval=12",
    "eval_episodes=4",
    "chunk_iterations=2",
    "checkpoint.every=15",
)
"""Episodes of one or two steps, evaluated every six iterations and saved in between."""


FILES = (
    "run_dir", "resume", "checkpoint", "logger", "sweep", "callbacks",
    "init_from", "init_from_nets", "init_from_seed", "init_from_policy", "init_from_optimizer",
)  # fmt: skip
"""Options that no compiled program depends on."""


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Runs of the same options share one trainer and its compiled programs: tracing takes most of a small run."""
    trainers, compiled = {}, {}

    def make(config: RunConfig, *, sharding: Any, real: Any = session.make_trainer) -> Any:
        files = dict.fromkeys(FILES)
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | files
        key = repr((options, sharding))
        if key not in trainers:
            trainers[key] = real(config, sharding=sharding)
        return trainers[key]

    def compile_once(
        config: Any, trainer: Any, members: Any, *, fresh: bool, real: Any = session.compile_within_memory
    ) -> Any:
        del fresh
        key = id(trainer), len(members)
        if key not in compiled:
            compiled[key] = real(config, trainer, members)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "make_trainer", make)
        patch.setattr(session, "compile_within_memory", compile_once)
        yield


class Killed(BaseException):
    """Ends a run immediately."""


@contextlib.contextmanager
def killed_after(chunks: int) -> Iterator[None]:
    """Ends the run in the block after some chunks, as if its process had been killed."""
    left = iter(range(chunks))

    def advance(trainer: Trainer, loop: Loop, *, real: Any = session.advance) -> Any:
        if next(left, None) is None:
            raise Killed
        return real(trainer, loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "advance", advance)
        with pytest.raises(Killed):
            yield


WALL_CLOCK = "steps_per_second"


def main(*arguments: str, config_dir: Path = USER_FOLDER / "configs") -> int:
    """Runs the command line and returns its exit code."""
    before = sys.argv, list(sys.path)
    sys.argv = ["train", "--config-dir", str(config_dir), *arguments]
    try:
        train.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv, sys.path[:] = before
    return 0


def popen(*arguments: str, first: str = "", **options: Any) -> subprocess.Popen[str]:
    """Starts the command line in a separate process, after the statement ``first``."""
    code = f"{first}\nfrom wqmix_jax import train; train.main()"
    command = [sys.executable, "-c", code, "--config-dir", str(USER_FOLDER / "configs"), *arguments]
    as_here = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(jax.config.read("jax_disable_most_optimizations"))}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | as_here
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def process(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line in a separate process."""
    running = popen(*arguments, first=first)
    out, err = running.communicate(timeout=1500)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def copy_user_folder(folder: Path) -> Path:
    """Copies the user's files: yamls in ``configs``, and modules next to it."""
    return Path(shutil.copytree(USER_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__")))


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs make as from a shell, also where the tests run inside of make, which hands its state to its children."""
    own = ("ALGO", "ARGS", "EXTRAS", "PIP_ARGS", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environ = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def to_continue(run_dir: Path) -> str:
    """Returns the hint that a run of `main` or `process` prints when it can be resumed."""
    return command_to_continue(run_dir, USER_FOLDER / "configs")


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    """Reads the newest checkpoint of a run: its arrays by name, and the entries of its item ``host``."""
    step = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as reader:
        warnings.filterwarnings("ignore", "Sharding info not provided")
        arrays = reader.restore(step.absolute() / "arrays")
    return arrays | json.loads((step / "host" / "metadata").read_text())


def timeless(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records without the measured speed."""
    return [{key: value for key, value in record.items() if key != WALL_CLOCK} for record in records]
