"""A run with its folder: it starts or goes on, and between chunks it logs, shows progress and saves checkpoints."""

import contextlib
import dataclasses
import errno
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import wqmix_jax
from wqmix_jax.config import RunConfig, run_config, with_checked_numbers
from wqmix_jax.envs.checks import check_environment
from wqmix_jax.errors import SEEDS_FAILED, ConfigError, RunError, exit_code_of
from wqmix_jax.ops.randomness import numeric_settings
from wqmix_jax.records.metrics import MetricsFile, create_metrics, load_header, load_metrics
from wqmix_jax.records.plotting import CURVE_FILE, plot_run
from wqmix_jax.records.run_dir import (
    CHECKPOINT_DIR,
    SUMMARY_FILE,
    held,
    kept_options,
    make_run_dir,
    new_run_dir,
    read_config,
    read_summary,
    refuse_other_games,
    save_config,
    save_summary,
)
from wqmix_jax.runs.checkpoints import Checkpoints, Origin, Restored, checkpoint_bytes
from wqmix_jax.runs.hosts import connected
from wqmix_jax.runs.loggers import WandbRuns, refuse_missing_wandb
from wqmix_jax.runs.memory import (
    compile_within_memory,
    host_memory_left,
    memory_faults_in_one_line,
    refuse_small_memory,
)
from wqmix_jax.runs.output import lasting_output
from wqmix_jax.runs.progress import make_display
from wqmix_jax.runs.saved_policies import BEST, LAST, POLICY_DIR, Policy, better, no_policy, save_policy
from wqmix_jax.runs.signals import StopSignals
from wqmix_jax.runs.startup import checkpoint_lines, device_lines, how_to_go_on, plan_lines, refuse_full_disk
from wqmix_jax.runs.trust import Named, open_config
from wqmix_jax.training.compile_cache import use_compilation_cache
from wqmix_jax.training.compiled_loop import Trainer, make_trainer, train_sharding
from wqmix_jax.training.devices import claim_cores, refuse_missing_backend
from wqmix_jax.training.host_loop import (
    Compilation,
    Line,
    Loop,
    abstract_state,
    advance,
    begin,
    env_steps,
    failures,
    is_finished,
    slowest_steps,
    sound_steps,
)
from wqmix_jax.training.members import Member, labels_of, make_members

SETTINGS = "configuration of jax"
"""Name of `numeric_settings` in a checkpoint."""


def start(
    config: RunConfig,
    values: Mapping[str, Any],
    *,
    algo: str,
    env: str,
    config_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Trains a new run to its end.

    Args:
        config: the options.
        values: the same as nested mappings, from which `run_config` built ``config``.
        algo: the algorithm's name, for labels.
        env: the environment's.
        config_dir: the folder of own yamls and modules, for the command that continues the run.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if an option is not allowed; nothing was written then.
        RunError: if the run had to stop, or seeds of it failed.
        SystemExit: if a signal ended it.
    """
    refuse_missing_wandb(config.logger)
    use_compilation_cache(config.compilation_cache)
    members = make_members(config.algo, config.seeds, config.sweep)
    run_dir = new_run_dir(_folder_of_host(config), algo=algo, env=env)
    trainer = _make_trainer(config, members)
    refuse_small_memory(trainer, members)
    refuse_full_disk(run_dir, checkpoint_bytes(trainer, members, _no_policy(config, trainer, members)))
    run_dir = make_run_dir(run_dir, numbered=config.run_dir is None)
    create_metrics(
        run_dir,
        version=wqmix_jax.__version__,
        algo=algo,
        env=env,
        members=[member.labels for member in members],
        map_name=values["env"].get("map"),
        simulator=config.env.host.versions(),
    )
    values = {**with_checked_numbers(values, config), "run_dir": str(run_dir)}
    save_config(run_dir, values)
    _train(config, values, run_dir, trainer, members, how_to_go_on(run_dir, config_dir))
    return run_dir


def resume(run_dir: Path, changes: Mapping[str, Any], *, config_dir: str | os.PathLike[str] | None = None) -> Path:
    """Continues a run from its last checkpoint, or from the start where there is none yet.

    Args:
        run_dir: the run's folder.
        changes: ``total_env_steps``, ``distributed``, ``compilation_cache``, ``checkpoint`` and ``logger`` may differ
            from the run's ``config.yaml``; nested mappings. ``env`` repeats the programs that it may start
            (`config.PROGRAMS`).
        config_dir: a folder of own yamls, from which modules may be imported, see `wqmix_jax.runs.trust`.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if the folder holds no run, another process trains it, its checkpoints were deleted or a change is
            not allowed.
        RunError: if the run had to stop, or seeds of it failed.
        SystemExit: if a signal ended it.
    """
    claim_cores()  # before an environment's library starts the backend
    recorded, header = read_config(run_dir), load_header(run_dir)
    if "merged" in header:
        raise ConfigError(f"resume={run_dir} is not allowed: it was merged from {', '.join(header['merged'])}")
    refuse_lost_checkpoints(run_dir)
    old = _opened(run_dir, recorded["env"], changes.get("env", {}), config_dir)
    values = _trusted_cache(_merged(old, changes), changes)
    values = connected(values, os.environ)
    refuse_missing_backend()
    config = run_config(values)
    values = with_checked_numbers(values, config)
    refuse_missing_wandb(config.logger)
    if config.total_env_steps < old["total_env_steps"]:
        longer = f"at least {old['total_env_steps']}, what the run was started with, is needed"
        raise ConfigError(f"total_env_steps={config.total_env_steps} is not allowed with resume: {longer}")
    _refuse_other_game(run_dir, header, config.env.host.versions())
    use_compilation_cache(config.compilation_cache)
    members = make_members(config.algo, config.seeds, config.sweep)
    _train(config, values, run_dir, _make_trainer(config, members), members, how_to_go_on(run_dir, config_dir))
    return run_dir


def _trusted_cache(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options without a folder of compiled programs that only the run names: programs are code."""
    folder = values["compilation_cache"]
    if not isinstance(folder, str) or "compilation_cache" in changes:
        return dict(values)
    repeat = f"add {shlex.quote(f'compilation_cache={folder}')} if you trust it"
    _tell(f"warning: the run's folder of compiled programs is not used, because programs are code; {repeat}")
    return {**values, "compilation_cache": True}


def _opened(
    run_dir: Path, recorded: Mapping[str, Any], programs: Mapping[str, str], config_dir: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """The run's options.

    Raises:
        ConfigError: if they name code that may not be executed, or another interpreter than ``programs``.
    """
    for name, value in programs.items():
        if recorded.get(name) != value:
            raise ConfigError(f"env.{name}={value} is not allowed with resume: the run has {recorded.get(name)}")
    return open_config(run_dir, Named(config_dir, **programs), option="resume")


def _train(
    config: RunConfig,
    values: Mapping[str, Any],
    run_dir: Path,
    trainer: Trainer,
    members: tuple[Member, ...],
    to_go_on: str,
) -> None:
    """Trains to the end or to a signal, and says how ``to_go_on``. Every way out of a run leads through here."""
    nothing = _no_policy(config, trainer, members)
    origin = Origin(load_header(run_dir)["run"], kept_options(values), _machine(trainer))
    stopping = StopSignals(lambda: _tell(f"ended immediately, without saving; {to_go_on}"))
    with lasting_output(), held(run_dir), stopping as signals, _faults(run_dir, to_go_on):
        print(f"run: {run_dir}")
        for line in (*device_lines(trainer), *plan_lines(config, trainer, len(members))):
            print(line, flush=True)
        with signals.at_once():
            checkpoints = Checkpoints(
                run_dir / CHECKPOINT_DIR,
                trainer,
                members,
                nothing,
                origin,
                keep=config.checkpoint.keep,
                memory_left=host_memory_left,
            )
            for line in checkpoint_lines(config, run_dir, checkpoints.num_bytes):
                print(line, flush=True)
            restored = checkpoints.restore(config.total_env_steps)
        save_config(run_dir, values)  # what a resumed run may have changed
        num_bytes = restored.metrics_bytes if restored else 0
        with (
            _closing(checkpoints),
            MetricsFile(run_dir, num_bytes=num_bytes) as metrics,
            WandbRuns(run_dir, config.logger, values) as wandb_runs,
        ):
            session = _Session(config, run_dir, trainer, members, nothing, metrics, checkpoints, wandb_runs, signals)
            with config.env.host.running([member.seed for member in members]):
                loop = session.run(restored)
    if not is_finished(loop):
        _tell(f"interrupted; {to_go_on}")
        sys.exit(exit_code_of(signals.received or 0))
    if failures(loop):
        told = f"{len(failures(loop))} of {len(members)} seeds failed, see {run_dir / SUMMARY_FILE}"
        raise RunError(told, SEEDS_FAILED)
    print(f"done: {run_dir}", flush=True)


def _refuse_other_game(run_dir: Path, header: Mapping[str, Any], installed: Mapping[str, str]) -> None:
    """Different versions of a game can't be compared, so one curve must not mix them."""
    try:
        for line in refuse_other_games({str(run_dir): header.get("simulator", {}), "this installation": installed}):
            _tell(line)
    except ConfigError as error:
        raise ConfigError(f"resume={run_dir} is not allowed: {error}") from None


def refuse_lost_checkpoints(run_dir: Path) -> None:
    """Keeps the records of a run whose checkpoints were deleted: to go on from the start would erase them.

    Raises:
        ConfigError: if there was a checkpoint, and there is none, not even one in the making.
    """
    begun = bool(read_summary(run_dir))  # written with the first checkpoint
    if begun and not any((run_dir / CHECKPOINT_DIR).glob("[0-9]*")):
        told = "its checkpoints are gone; a new run_dir=FOLDER starts over, and the records can still be read"
        raise ConfigError(f"resume={run_dir} is not allowed: {told}")


@contextlib.contextmanager
def _faults(run_dir: Path, to_go_on: str) -> Iterator[None]:
    """Turns what stops a run from outside into one line that says how to go on."""
    try:
        with memory_faults_in_one_line():
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{error.filename or run_dir}: {error.strerror}; {to_go_on}") from error
    except RunError as error:
        raise RunError(f"{error}; {to_go_on}") from error


@dataclasses.dataclass
class _Session:
    """One process's part of a run."""

    config: RunConfig
    run_dir: Path
    trainer: Trainer
    members: tuple[Member, ...]
    best: Policy
    metrics: MetricsFile
    checkpoints: Checkpoints
    wandb_runs: WandbRuns
    signals: StopSignals
    told_failures: list[Line] = dataclasses.field(default_factory=list)
    compilation: Compilation = dataclasses.field(default_factory=lambda: Compilation(0.0, from_cache=False))
    seconds_before: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def run(self, restored: Restored | None) -> Loop:
        """Trains to the end, or until a signal asks to stop, and saves."""
        config = self.config
        with make_display(config.total_env_steps, live=config.logger.progress) as display:
            with self.signals.at_once():
                loop, lines = self._open(restored)
            self._end_if_failed(None)
            self._record(loop, lines)
            display.update(sound_steps(loop), lines)
            self._save_if_due(loop, None)
            while not is_finished(loop) and self.signals.received is None:
                before = env_steps(loop), slowest_steps(loop)
                loop, lines = advance(self.trainer, loop)
                self._end_if_failed(loop)
                self._record(loop, lines)
                display.update(sound_steps(loop), lines)
                self._save_if_due(loop, before)
            self._save(loop)
            self.checkpoints.wait()
        self._report(loop, "finished" if is_finished(loop) else "interrupted")
        return loop

    def _open(self, restored: Restored | None) -> tuple[Loop, list[Line]]:
        """Where the run starts or goes on, with everything compiled that is still needed."""
        if restored is not None:
            self.seconds_before, self.best = restored.wall_seconds, restored.best
            print(f"resumed at {slowest_steps(restored.loop):,} environment steps", flush=True)
            if is_finished(restored.loop):
                print("nothing is left to do; total_env_steps=N makes the run longer", flush=True)
                return restored.loop, []
        self._compile(fresh=restored is None)
        return begin(self.trainer, self.members) if restored is None else (restored.loop, [])

    def _regrouped(self, learner_groups: int) -> Trainer:
        return make_trainer(self.config, sharding=self.trainer.sharding, learner_groups=learner_groups)

    def _compile(self, *, fresh: bool) -> None:
        print("compiling", flush=True)
        self.trainer, self.compilation, lines = compile_within_memory(
            self.trainer, self.members, self._regrouped, fresh=fresh
        )
        for line in (str(self.compilation), *lines):
            print(line, flush=True)

    def _end_if_failed(self, loop: Loop | None) -> None:
        """Saves what was trained and ends the run where the environment can't go on.

        Raises:
            RunError: what ended it, or ``KeyboardInterrupt``.
        """
        failure = self.trainer.failure()
        if failure is None:
            return
        if loop is not None:
            if not is_finished(loop):  # its last evaluation must still be made
                with _warning_of_faults("the checkpoint can't be written"):
                    self._save(loop)
                    self.checkpoints.wait()
            with _warning_of_faults(f"{SUMMARY_FILE} can't be written"):
                self._report(loop, "failed")
        raise failure

    def _record(self, loop: Loop, lines: list[Line]) -> None:
        """Writes the records, and keeps the policies that are better than before."""
        self._tell_failures(loop)
        self.checkpoints.check()
        if not lines:
            return
        self.metrics.write(lines)
        self.wandb_runs.sync()
        self.best = better(self.best, self._policy(loop, _new_returns(self.members, lines)))

    def _tell_failures(self, loop: Loop) -> None:
        for failure in failures(loop):
            if failure not in self.told_failures:
                self.told_failures.append(failure)
                told = ", ".join(f"{name} {value:,}" for name, value in failure.items())
                _tell(f"warning: a loss or parameter is not finite ({told}): it is frozen, the others go on")

    def _policy(self, loop: Loop, returns: np.ndarray) -> Policy:
        """The policies of this moment."""
        params = self.config.algo.acting_params(loop.state.learner.params)
        return Policy(jax.tree.map(np.array, params), env_steps(loop), returns)

    def _save_if_due(self, loop: Loop, before: tuple[np.ndarray, int] | None) -> None:
        """Saves after every ``checkpoint.every`` steps, and when a seed may end in the next chunk.

        From the last of these a longer run goes on as if it had never been cut.
        """
        now, every = slowest_steps(loop), self.config.checkpoint.every
        due = before is not None and now // every > before[1] // every
        may_end = self._may_end_soon(env_steps(loop)) and (before is None or not self._may_end_soon(before[0]))
        if (due or may_end) and not is_finished(loop):
            self._save(loop)
            self._report(loop, "running")

    def _save(self, loop: Loop) -> None:
        self.metrics.sync()
        self.checkpoints.save(
            loop,
            self.best,
            metrics_bytes=self.metrics.num_bytes,
            wall_seconds=self._wall_seconds(),
        )
        last = self._policy(loop, np.full(len(self.members), np.nan, np.float32))
        for name, policy in ((BEST, self.best), (LAST, last)):
            save_policy(self.run_dir / POLICY_DIR / f"{name}.npz", policy, self.members)

    def _report(self, loop: Loop, status: str) -> None:
        """Writes the summary, and the picture where there is something to draw."""
        header = load_header(self.run_dir)
        save_summary(
            self.run_dir,
            self.config,
            self.trainer,
            status=status,
            failed=failures(loop),
            algo=header["algo"],
            env=header["env"],
            compile_seconds=round(self.compilation.seconds, 2),
            compiled_from_cache=self.compilation.from_cache,
            wall_seconds=round(self._wall_seconds(), 2),
        )
        if load_metrics(self.run_dir, kind="eval"):
            with _warning_of_faults(f"{CURVE_FILE} can't be drawn"):
                plot_run(self.run_dir)

    def _may_end_soon(self, steps: np.ndarray) -> bool:
        """Whether some seed may reach its total in the next chunk."""
        most = self.trainer.chunk_iterations * self.config.steps_per_iteration
        return int(steps.max()) + most >= self.config.total_env_steps

    def _wall_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


def _new_returns(members: Sequence[Member], lines: Sequence[Line]) -> np.ndarray:
    """The return of each member whose nets were evaluated and are new, float32 ``[S]``; nan for the others.

    Nets that have not learned since step 0 are those of step 0, whose policy is kept already.
    """
    labels, returns = [member.labels for member in members], np.full(len(members), np.nan, np.float32)
    for line in lines:
        if line["kind"] == "eval" and (line["learner_steps"] > 0 or line["env_steps"] == 0):
            returns[labels.index(labels_of(line))] = line["episode_return"]
    return returns


def _folder_of_host(config: RunConfig) -> str | None:
    """The run's folder; where several hosts share a run, each has its own inside."""
    if (config.hosts or 1) == 1:
        return config.run_dir
    if config.run_dir is None:
        raise ConfigError(f"run_dir is missing: hosts={config.hosts} need one folder, in which each makes its own")
    return str(Path(config.run_dir) / f"host_{config.host}")


def _make_trainer(config: RunConfig, members: tuple[Member, ...]) -> Trainer:
    check_environment(config.env)
    return make_trainer(config, sharding=train_sharding(config, len(members)))


def _no_policy(config: RunConfig, trainer: Trainer, members: tuple[Member, ...]) -> Policy:
    return no_policy(config.algo.acting_params(abstract_state(trainer, members).learner.params))


def _machine(trainer: Trainer) -> dict[str, Any]:
    devices = list(trainer.sharding.device_set)
    kind, count = devices[0].device_kind, len(devices)
    return {"jax": jax.__version__, "device kind": kind, "device count": count, SETTINGS: numeric_settings()}


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Closes them at the end; an error there doesn't replace the one that ended the run."""
    try:
        yield
    except BaseException:
        with _warning_of_faults("the last checkpoint can't be written"):
            checkpoints.close()
        raise
    checkpoints.close()


@contextlib.contextmanager
def _warning_of_faults(told: str) -> Iterator[None]:
    """Turns an exception into a warning: what is only kept or shown of a run must not hide how the run itself ends."""
    try:
        yield
    except Exception as error:  # matplotlib, say, may raise anything
        reason = " ".join(str(error).split())
        _tell(f"warning: {told} ({type(error).__name__}: {reason})")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes`` in their place, one level deep for groups."""
    merged = {
        key: {**values[key], **change} if isinstance(change, Mapping) else change for key, change in changes.items()
    }
    return {**values, **merged}
