"""Small runs of the command line in this process, on a user's own algorithm and environment."""

import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from wqmix_jax import train

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


def copy_user_folder(folder: Path) -> Path:
    """A copy of the user's files, yamls in ``configs`` and modules beside it."""
    return Path(shutil.copytree(USER_FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__")))


def last_checkpoint(run_dir: Path) -> dict[str, Any]:
    """All that the newest checkpoint of a run holds: its arrays by name, and what is beside them."""
    step = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as reader:
        warnings.filterwarnings("ignore", "Sharding info not provided")
        arrays = reader.restore(step.absolute() / "arrays")
    return arrays | json.loads((step / "host" / "metadata").read_text())


def timeless(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock measured."""
    return [{key: value for key, value in record.items() if key != WALL_CLOCK} for record in records]
