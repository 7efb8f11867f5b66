"""Run folders without training: records that are known."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wqmix_jax.records.metrics import MetricsFile, create_metrics
from wqmix_jax.records.run_dir import SUMMARY_FILE, save_config
from wqmix_jax.training.members import labels_of


def evaluated(seed: int, returns: Mapping[int, float], **more: Any) -> list[dict[str, Any]]:
    """Eval records of one seed, its returns by environment steps."""
    counters = {"learner_steps": 0, "episodes": 0, "episode_length": 1.0}
    return [
        {"kind": "eval", "seed": seed, "env_steps": steps, **counters, "episode_return": value, **more}
        for steps, value in returns.items()
    ]


def record_run(
    folder: Path,
    values: Mapping[str, Any],
    lines: Sequence[dict[str, Any]],
    *,
    algo: str = "iql",
    env: str = "coin",
    failed: Sequence[int] = (),
    status: str = "finished",
    simulator: Mapping[str, str] | None = None,
    version: str = "0",
) -> Path:
    """A run's folder with the options ``values`` and the records ``lines``."""
    folder.mkdir(parents=True)
    members = [dict(label) for label in dict.fromkeys(tuple(labels_of(line).items()) for line in lines)]
    create_metrics(folder, version=version, algo=algo, env=env, members=members, simulator=simulator)
    save_config(folder, {**values, "run_dir": str(folder)})
    with MetricsFile(folder, num_bytes=0) as metrics:
        metrics.write(lines)
    failures = [{"seed": seed, "env_steps": 70, "learner_steps": 1} for seed in failed]
    (folder / SUMMARY_FILE).write_text(json.dumps({"status": status, "failed": failures}))
    return folder
