"""A run with its folder: it starts or goes on, and between chunks it logs, shows progress and saves checkpoints."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import wqmix_jax
from wqmix_jax.checkpoint import Checkpoints, Restored
from wqmix_jax.config import ConfigError, RunConfig, RunError, run_config
from wqmix_jax.devices import claim_cores
from wqmix_jax.logger import MetricsFile, WandbRuns, create_metrics, load_header, load_metrics, refuse_missing_wandb
from wqmix_jax.loop import Line, Loop, advance, begin, compile_trainer, env_steps, is_finished
from wqmix_jax.plotting import plot_run
from wqmix_jax.progress import make_display
from wqmix_jax.runs import (
    CHECKPOINT_DIR,
    device_lines,
    make_run_dir,
    new_run_dir,
    plan_lines,
    read_config,
    save_config,
    save_summary,
    steps_per_iteration,
)
from wqmix_jax.trainer import Trainer, make_trainer, train_sharding


def start(values: Mapping[str, Any], *, algo: str, env: str) -> Path:
    """Trains a new run to its end.

    Args:
        values: the options as nested mappings.
        algo: the algorithm's name, for labels.
        env: the environment's.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if an option is not allowed; nothing was written then.
    """
    config = run_config(values)
    refuse_missing_wandb(config.logger)
    run_dir = new_run_dir(config.run_dir, algo=algo, env=env)
    trainer = make_trainer(config, sharding=train_sharding(config, config.num_seeds))
    make_run_dir(run_dir)
    simulator = config.env.host.versions()
    create_metrics(
        run_dir, version=wqmix_jax.__version__, algo=algo, env=env, seeds=_seeds(config), simulator=simulator
    )
    values = {**values, "run_dir": str(run_dir)}
    save_config(run_dir, values)
    _train(config, values, run_dir, trainer)
    return run_dir


def resume(run_dir: Path, changes: Mapping[str, Any]) -> Path:
    """Continues a run from its last checkpoint, or from the start where there is none yet.

    Args:
        run_dir: the run's folder.
        changes: ``total_env_steps``, ``checkpoint`` and ``logger`` may differ from the run's ``config.yaml``; nested
            mappings.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if the folder holds no run or a change is not allowed.
    """
    old = read_config(run_dir)
    values = _merged(old, changes)
    claim_cores()  # before an environment's library starts the backend
    config = run_config(values)
    refuse_missing_wandb(config.logger)
    if config.total_env_steps < old["total_env_steps"]:
        longer = f"at least {old['total_env_steps']}, what the run was started with, is needed"
        raise ConfigError(f"total_env_steps={config.total_env_steps} is not allowed with resume: {longer}")
    _train(config, values, run_dir, make_trainer(config, sharding=train_sharding(config, config.num_seeds)))
    return run_dir


def _train(config: RunConfig, values: Mapping[str, Any], run_dir: Path, trainer: Trainer) -> None:
    print(f"run: {run_dir}")
    for line in (*device_lines(trainer), *plan_lines(config, trainer)):
        print(line, flush=True)
    checkpoints = Checkpoints(run_dir / CHECKPOINT_DIR, trainer, _seeds(config), keep=config.checkpoint.keep)
    restored = checkpoints.restore(config.total_env_steps)
    save_config(run_dir, values)  # what a resumed run may have changed
    num_bytes = restored.metrics_bytes if restored else 0
    with (
        checkpoints,
        MetricsFile(run_dir, num_bytes=num_bytes) as metrics,
        WandbRuns(run_dir, config.logger, values, num_bytes=metrics.num_bytes if restored else 0) as wandb_runs,
    ):
        session = _Session(config, run_dir, trainer, metrics, checkpoints, wandb_runs)
        try:
            with config.env.host.running(_seeds(config)):
                session.run(restored)
        except KeyboardInterrupt:
            session.report("interrupted")
            print(f"interrupted; to go on: python -m wqmix_jax.train resume={run_dir}", file=sys.stderr)
            raise
    print(f"done: {run_dir}", flush=True)


class _Session:
    """One process's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        trainer: Trainer,
        metrics: MetricsFile,
        checkpoints: Checkpoints,
        wandb_runs: WandbRuns,
    ) -> None:
        self._config, self._run_dir, self._trainer = config, run_dir, trainer
        self._metrics, self._checkpoints, self._wandb_runs = metrics, checkpoints, wandb_runs
        self._started = time.perf_counter()
        self._seconds_before = 0.0
        self._compile_seconds = 0.0

    def run(self, restored: Restored | None) -> None:
        """Trains to the end."""
        config = self._config
        with make_display(config.total_env_steps, live=config.logger.progress) as display:
            loop, lines = self._open(restored)
            self._end_if_failed(None)
            self._record(lines)
            display.update(env_steps(loop), lines)
            self._save_if_due(loop, None)
            while not is_finished(loop):
                before = env_steps(loop)
                loop, lines = advance(self._trainer, loop)
                self._end_if_failed(loop)
                self._record(lines)
                display.update(env_steps(loop), lines)
                self._save_if_due(loop, before)
        self.report("finished")

    def report(self, status: str) -> None:
        """Writes the summary, and the picture where there is something to draw."""
        header = load_header(self._run_dir)
        save_summary(
            self._run_dir,
            self._config,
            self._trainer,
            status=status,
            algo=header["algo"],
            env=header["env"],
            compile_seconds=round(self._compile_seconds, 2),
            wall_seconds=round(self._wall_seconds(), 2),
        )
        if load_metrics(self._run_dir, kind="eval"):
            plot_run(self._run_dir)

    def _open(self, restored: Restored | None) -> tuple[Loop, list[Line]]:
        """Where the run starts or goes on, with everything compiled that is still needed."""
        if restored is not None:
            self._seconds_before = restored.wall_seconds
            print(f"resumed at {env_steps(restored.loop).min():,} environment steps", flush=True)
            if is_finished(restored.loop):
                print("nothing is left to do; total_env_steps=N makes the run longer", flush=True)
                return restored.loop, []
        seeds, fresh = _seeds(self._config), restored is None
        print("compiling", flush=True)
        self._trainer, self._compile_seconds = compile_trainer(self._trainer, seeds, fresh=fresh)
        print(f"compiled in {self._compile_seconds:.1f} s", flush=True)
        return begin(self._trainer, seeds) if restored is None else (restored.loop, [])

    def _record(self, lines: list[Line]) -> None:
        if lines:
            self._metrics.write(lines)
            self._wandb_runs.sync()

    def _end_if_failed(self, loop: Loop | None) -> None:
        """Saves what was trained and ends the run where the environment can't go on.

        Raises:
            RunError: what ended it, or ``KeyboardInterrupt``.
        """
        failure = self._trainer.failure()
        if failure is None:
            return
        if loop is not None and not is_finished(loop):  # its last evaluation must still be made
            self._save(loop)
        if isinstance(failure, RunError):
            self.report("failed")
        raise failure

    def _save_if_due(self, loop: Loop, before: np.ndarray | None) -> None:
        """Saves after every ``checkpoint.every`` steps, at the end, and when a seed may end in the next chunk.

        From the last of these a longer run goes on as if it had never been cut.
        """
        now, every = env_steps(loop), self._config.checkpoint.every
        due = before is not None and now.min() // every > before.min() // every
        last_moment = self._may_end_soon(now) and (before is None or not self._may_end_soon(before))
        if not (due or last_moment or is_finished(loop)):
            return
        self._save(loop)
        if not is_finished(loop):
            self.report("running")

    def _save(self, loop: Loop) -> None:
        self._metrics.sync()
        self._checkpoints.save(loop, metrics_bytes=self._metrics.num_bytes, wall_seconds=self._wall_seconds())

    def _may_end_soon(self, steps: np.ndarray) -> bool:
        """Whether some seed may reach its total in the next chunk."""
        most = self._trainer.chunk_iterations * steps_per_iteration(self._config)
        return int(steps.max()) + most >= self._config.total_env_steps

    def _wall_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started


def _seeds(config: RunConfig) -> list[int]:
    return list(range(config.seed, config.seed + config.num_seeds))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` in their place, one level deep for groups."""
    merged = {
        key: {**values[key], **change} if isinstance(change, Mapping) else change for key, change in changes.items()
    }
    return {**values, **merged}
