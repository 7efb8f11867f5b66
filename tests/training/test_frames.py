"""The path from the command to the learning target is short enough to be read."""

import traceback
from pathlib import Path
from typing import Any

import pytest

import wqmix_jax
from tests.running import main
from wqmix_jax.algos import q_learning

PACKAGE = Path(wqmix_jax.__file__).parent

LIMIT = 16
"""The most frames of this package from `train.main` to `td_target`, both ends included."""

LOOP, ALGORITHM = 8, 4
"""The most of them from the compiled loop's first to the loss, and from the loss on."""

START = "training/compiled_loop.py: _run_iterations"


def test_few_frames_lead_from_the_command_to_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run is traced, and resumed; OW-QMIX and the long episodes lead through every layer of the loop."""
    stacks, td_target = [], q_learning.td_target

    def spied(*args: Any) -> Any:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        stack = [f"{Path(frame.filename).relative_to(PACKAGE)}: {frame.name}" for frame in frames]
        stacks.append([*stack, "ops/td.py: td_target"])
        return td_target(*args)

    monkeypatch.setattr(q_learning, "td_target", spied)
    sizes = ("algo.batch_size=2", "algo.buffer_size=2", "algo.hidden_dim=4", "env.episode_limit=32")
    few = ("num_seeds=1", "total_env_steps=1", "eval_episodes=1")
    new, resumed = ["+algo=ow_qmix", *sizes, *few, f"run_dir={tmp_path / 'run'}"], [f"resume={tmp_path / 'run'}"]
    for arguments in (new, [*resumed, "total_env_steps=40"]):
        stacks.clear()
        assert main(*arguments) == 0
        in_the_loop = [stack for stack in stacks if START in stack]
        assert in_the_loop
        check(in_the_loop)


def check(stacks: list[list[str]]) -> None:
    for stack in stacks:
        inside = stack[stack.index(START) :]
        assert len(inside) <= LOOP + ALGORITHM, "\n".join(inside)
        from_main = stack[stack.index("train.py: main") :]
        assert len(from_main) <= LIMIT, "\n".join(from_main)
