"""A run with its folder: it starts or is resumed, and between chunks it logs, shows progress and saves checkpoints."""

import contextlib
import dataclasses
import errno
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import wqmix_jax
from wqmix_jax.callbacks import Callbacks
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
from wqmix_jax.runs.initial import load_initial, read_initial, save_initial, with_arrays
from wqmix_jax.runs.loggers import Loggers, refuse_missing_packages
from wqmix_jax.runs.memory import (
    compile_within_memory,
    host_memory_left,
    memory_faults_in_one_line,
    refuse_small_memory,
)
from wqmix_jax.runs.output import lasting_output, report
from wqmix_jax.runs.progress import Display, make_display
from wqmix_jax.runs.saved_policies import BEST, LAST, POLICY_DIR, Policy, better, no_policy, save_policy
from wqmix_jax.runs.signals import StopSignals
from wqmix_jax.runs.startup import checkpoint_lines, command_to_continue, device_lines, plan_lines, refuse_full_disk
from wqmix_jax.runs.trust import Named, open_config, refuse_foreign_callbacks
from wqmix_jax.training.compile_cache import use_compilation_cache
from wqmix_jax.training.compiled_loop import (
    Compilation,
    Trainer,
    TrainRecord,
    TrainState,
    abstract_interval,
    abstract_state,
    make_trainer,
    train_sharding,
)
from wqmix_jax.training.devices import claim_cores, refuse_missing_backend
from wqmix_jax.training.host_loop import (
    Line,
    Loop,
    advance,
    begin,
    env_steps,
    failures,
    is_finished,
    slowest_steps,
    sound_steps,
)
from wqmix_jax.training.learner import has_schedule
from wqmix_jax.training.members import Member, labels_of, make_members, member_name

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
        config_dir: the folder of the user's yamls and modules, for the command that continues the run.

    Returns:
        The run's folder.

    Raises:
        ConfigError: if an option is not allowed; nothing was written then.
        RunError: if the run had to stop, or seeds of it failed.
        SystemExit: if a signal ended it.
    """
    refuse_missing_packages(config.logger)
    use_compilation_cache(config.compilation_cache)
    members = make_members(config.algo, config.seeds, config.sweep)
    run_dir = new_run_dir(_folder_of_host(config), algo=algo, env=env)
    trainer = _make_trainer(config, members)
    initial = None
    if config.init_from is not None:
        initial = read_initial(config, members, abstract_state(trainer, members).learner)
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
        simulator=config.env.external.versions(),
    )
    values = {**with_checked_numbers(values, config), "run_dir": str(run_dir)}
    if initial is not None:  # before the options, without which the folder is no run yet
        with _faults(run_dir, "nothing was trained"):
            save_initial(run_dir, initial)
        _print_lines(initial.lines)
    save_config(run_dir, values)
    Session(config, values, run_dir, trainer, members, command_to_continue(run_dir, config_dir)).run()
    return run_dir


def resume(run_dir: Path, changes: Mapping[str, Any], *, config_dir: str | os.PathLike[str] | None = None) -> Path:
    """Continues a run from its last checkpoint, or from the start where there is none yet.

    Args:
        run_dir: the run's folder.
        changes: nested mappings. ``total_env_steps``, ``distributed``, ``compilation_cache``, ``checkpoint``,
            ``logger`` and ``callbacks`` may differ from the run's ``config.yaml``; ``env`` repeats the programs that
            it may start (`config.PROGRAMS`).
        config_dir: a folder of the user's yamls, from which modules may be imported, see `wqmix_jax.runs.trust`.

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
    old = _open_options(run_dir, recorded["env"], changes.get("env", {}), config_dir)
    if "callbacks" not in changes:
        refuse_foreign_callbacks(run_dir, old["callbacks"], Named(config_dir))
    values = _trusted_cache(_merged(old, changes), changes)
    values = connected(values, os.environ)
    refuse_missing_backend()
    config = run_config(values)
    values = with_checked_numbers(values, config)
    refuse_missing_packages(config.logger)
    if config.total_env_steps < old["total_env_steps"]:
        least = f"at least {old['total_env_steps']}, what the run was started with, is needed"
        raise ConfigError(f"total_env_steps={config.total_env_steps} is not allowed with resume: {least}")
    if config.total_env_steps > old["total_env_steps"] and has_schedule(config.algo):
        schedules = "algo.lr_schedule and algo.importance_exponent reach their end at total_env_steps"
        report(f"warning: {schedules}, so the result will not equal that of an uninterrupted run")
    _refuse_other_game(run_dir, header, config.env.external.versions())
    use_compilation_cache(config.compilation_cache)
    members = make_members(config.algo, config.seeds, config.sweep)
    trainer = _make_trainer(config, members)
    Session(config, values, run_dir, trainer, members, command_to_continue(run_dir, config_dir)).run()
    return run_dir


def _trusted_cache(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options without a folder of compiled programs that only the run names: programs are code."""
    folder = values["compilation_cache"]
    if not isinstance(folder, str) or "compilation_cache" in changes:
        return dict(values)
    repeat = f"add {shlex.quote(f'compilation_cache={folder}')} if you trust it"
    report(f"warning: the run's folder of compiled programs is not used, because programs are code; {repeat}")
    return {**values, "compilation_cache": True}


def _open_options(
    run_dir: Path, recorded: Mapping[str, Any], programs: Mapping[str, str], config_dir: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """Returns the run's options.

    Raises:
        ConfigError: if they name code that may not be executed, or another interpreter than ``programs``.
    """
    for name, value in programs.items():
        if recorded.get(name) != value:
            raise ConfigError(f"env.{name}={value} is not allowed with resume: the run has {recorded.get(name)}")
    return open_config(run_dir, Named(config_dir, **programs), option="resume")


def _refuse_other_game(run_dir: Path, header: Mapping[str, Any], installed: Mapping[str, str]) -> None:
    """Refuses another version of the game: versions can't be compared, so one curve must not mix them."""
    try:
        for line in refuse_other_games({str(run_dir): header.get("simulator", {}), "this installation": installed}):
            report(line)
    except ConfigError as error:
        raise ConfigError(f"resume={run_dir} is not allowed: {error}") from None


def refuse_lost_checkpoints(run_dir: Path) -> None:
    """Refuses to resume a run whose checkpoints were deleted: a start from scratch would erase its records.

    Raises:
        ConfigError: if there was a checkpoint and there is none now, not even an unfinished one.
    """
    begun = bool(read_summary(run_dir))  # written with the first checkpoint
    if begun and not any((run_dir / CHECKPOINT_DIR).glob("[0-9]*")):
        ways = "a new run_dir=FOLDER starts over, and the records can still be read"
        raise ConfigError(f"resume={run_dir} is not allowed: its checkpoints are gone; {ways}")


@contextlib.contextmanager
def _faults(run_dir: Path, hint: str) -> Iterator[None]:
    """Turns an error that stops a run from outside into one line, with the ``hint`` how to continue."""
    try:
        with memory_faults_in_one_line():
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{error.filename or run_dir}: {error.strerror}; {hint}") from error
    except RunError as error:
        raise RunError(f"{error}; {hint}") from error


@dataclasses.dataclass
class Session:
    """A run in this process: the trainer, and the files that it writes.

    Attributes:
        config: the options.
        values: the same as nested mappings, which ``config.yaml`` keeps.
        run_dir: the run's folder.
        trainer: compiled when `run` begins.
        members: the trainings, one per seed and combination of swept values.
        hint: the command that continues the run, see `command_to_continue`.
        interval: the shapes of the records of an evaluation interval.
        best: the policies of the best evaluations so far.
        callbacks: the run's callbacks, with their states.
        compilation: facts about the trainer's compilation.
        seconds_before: wall-clock seconds that earlier processes spent on the run.
    """

    config: RunConfig
    values: Mapping[str, Any]
    run_dir: Path
    trainer: Trainer
    members: tuple[Member, ...]
    hint: str
    interval: TrainRecord = dataclasses.field(init=False)
    best: Policy = dataclasses.field(init=False)
    callbacks: Callbacks = dataclasses.field(init=False)
    signals: StopSignals = dataclasses.field(init=False)
    checkpoints: Checkpoints = dataclasses.field(init=False)
    metrics: MetricsFile = dataclasses.field(init=False)
    loggers: Loggers = dataclasses.field(init=False)
    compilation: Compilation = dataclasses.field(default_factory=lambda: Compilation(0.0, from_cache=False))
    reported_failures: list[Line] = dataclasses.field(default_factory=list)
    seconds_before: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        # Here and not where checkpoints are opened: this is where a resumed run is first traced.
        self.interval = abstract_interval(self.trainer, self.members)
        self.best = _no_policy(self.config, self.trainer, self.members)
        self.callbacks = Callbacks(self.config)

    def run(self) -> None:
        """Trains to the end, or until a signal asks to stop, and saves; every way out of a run leads through here.

        The trainer is compiled in this function itself, so that few frames are above those that JAX traces.

        Raises:
            RunError: if the run had to stop, or seeds failed.
            SystemExit: if a signal ended it.
        """
        with self._opened_files() as restored:
            with make_display(self.config.total_env_steps, live=self.config.logger.progress) as display:
                with self.signals.immediate():
                    if restored is None or not is_finished(restored.loop):
                        print("compiling", flush=True)
                        self.trainer, self.compilation, notes = compile_within_memory(
                            self.config, self.trainer, self.members, fresh=restored is None
                        )
                        _print_lines((str(self.compilation), *notes))
                    loop, lines = self._begun() if restored is None else (restored.loop, [])
                loop = self._run_chunks(loop, lines, display)
            self._write_summary(loop, self._status(loop))
        self._conclude(loop)

    @contextlib.contextmanager
    def _opened_files(self) -> Iterator[Restored | None]:
        """Locks the folder, handles signals, opens the files and yields what the last checkpoint holds, if any."""
        stopping = StopSignals(lambda: report(f"ended immediately, without saving; {self.hint}"))
        with lasting_output(), held(self.run_dir), stopping as self.signals, _faults(self.run_dir, self.hint):
            print(f"run: {self.run_dir}")
            _print_lines((*device_lines(self.trainer), *plan_lines(self.config, self.trainer, len(self.members))))
            with self.signals.immediate():
                self.checkpoints = self._open_checkpoints()
                _print_lines(checkpoint_lines(self.config, self.run_dir, self.checkpoints.num_bytes))
                restored = self.checkpoints.restore(self.config.total_env_steps)
            save_config(self.run_dir, self.values)  # a resumed run may have changed some options
            num_bytes = restored.metrics_bytes if restored else 0
            with (
                _closing(self.checkpoints),
                MetricsFile(self.run_dir, num_bytes=num_bytes) as self.metrics,
                Loggers(self.run_dir, self.config.logger, self.values) as self.loggers,
                self.config.env.external.running([member.seed for member in self.members]),
            ):
                if restored is not None:
                    self._take_over(restored)
                yield restored

    def _open_checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self.run_dir / CHECKPOINT_DIR,
            self.trainer,
            self.members,
            self.interval,
            self.best,
            Origin(load_header(self.run_dir)["run"], kept_options(self.values), _machine(self.trainer)),
            keep=self.config.checkpoint.keep,
            memory_left=host_memory_left,
        )

    def _begun(self) -> tuple[Loop, list[Line]]:
        """Makes the first state, with the parameters of another run if the options say so, and its records."""
        if self.config.init_from is None:
            return begin(self.trainer, self.members)

        def prepare(state: TrainState) -> TrainState:
            return with_arrays(state, load_initial(self.run_dir, state.learner))

        return begin(self.trainer, self.members, prepare=prepare)

    def _take_over(self, restored: Restored) -> None:
        """Continues the counts of the process that wrote the checkpoint."""
        self.seconds_before, self.best = restored.wall_seconds, restored.best
        self.callbacks.restore(restored.callbacks)
        print(f"resumed at {slowest_steps(restored.loop):,} environment steps", flush=True)
        if is_finished(restored.loop):
            print("this run has already finished; pass a larger total_env_steps=N to extend it", flush=True)

    def _run_chunks(self, loop: Loop, lines: list[Line], display: Display) -> Loop:
        """Runs compiled chunks; after each it writes records, shows progress and saves a checkpoint if one is due."""
        before: tuple[np.ndarray, int] | None = None
        while True:
            self._end_if_failed(None if before is None else loop)
            lines = self._with_callbacks(loop, lines)
            self._record(loop, lines)
            display.update(sound_steps(loop), lines)
            self._save_if_due(loop, before)
            if self._status(loop) != "running":
                break
            before = env_steps(loop), slowest_steps(loop)
            loop, lines = advance(self.trainer, loop)
        self._save(loop)
        self.checkpoints.wait()
        return loop

    def _status(self, loop: Loop) -> str:
        """Returns ``finished``, ``stopped`` by a callback, ``interrupted`` by a signal, or ``running``."""
        if is_finished(loop):
            return "finished"
        if self.callbacks.stopped is not None:
            return "stopped"
        return "running" if self.signals.received is None else "interrupted"

    def _conclude(self, loop: Loop) -> None:
        """Reports how the run ended.

        Raises:
            RunError: if seeds failed.
            SystemExit: if a signal ended the run.
        """
        if self._status(loop) == "interrupted":
            report(f"interrupted; {self.hint}")
            sys.exit(exit_code_of(self.signals.received or 0))
        if self._status(loop) == "stopped" and self.callbacks.stopped is not None:
            print(f"stopped by {self.callbacks.stopped.callback}: {self.callbacks.stopped.reason}", flush=True)
        if failures(loop):
            failed = f"{len(failures(loop))} of {len(self.members)} seeds failed"
            raise RunError(f"{failed}, see {self.run_dir / SUMMARY_FILE}", SEEDS_FAILED)
        print(f"done: {self.run_dir}", flush=True)

    def _end_if_failed(self, loop: Loop | None) -> None:
        """Saves what was trained and ends the run if the environment can't continue.

        Raises:
            RunError: the reason, or ``KeyboardInterrupt``.
        """
        failure = self.trainer.failure()
        if failure is None:
            return
        if loop is not None:
            self._save_unevaluated(loop)
        raise failure

    def _save_unevaluated(self, loop: Loop) -> None:
        """Saves a run that ends before an evaluation that is due, which is made when the run is resumed."""
        if not is_finished(loop):  # otherwise the evaluation would not be made
            with _warning_of_faults("the checkpoint can't be written"):
                self._save(loop)
                self.checkpoints.wait()
        with _warning_of_faults(f"{SUMMARY_FILE} can't be written"):
            self._write_summary(loop, "failed")

    def _with_callbacks(self, loop: Loop, lines: list[Line]) -> list[Line]:
        """Shows an evaluation to the callbacks and returns the records with their metrics.

        Raises:
            RunError: if a callback fails; the run is saved then as before the evaluation.
        """
        if not lines:
            return lines
        try:
            return self.callbacks.see(loop, lines)
        except RunError:
            if loop.before_evaluation is not None:
                self._save_unevaluated(loop.before_evaluation)
            raise

    def _record(self, loop: Loop, lines: list[Line]) -> None:
        """Writes the records, and keeps the policies that are better than before."""
        self._report_failures(loop)
        self.checkpoints.check()
        if not lines:
            return
        self.metrics.write(lines)
        self.loggers.sync()
        self.best = better(self.best, self._policy(loop, _new_returns(self.members, lines)))

    def _report_failures(self, loop: Loop) -> None:
        for failure in failures(loop):
            if failure not in self.reported_failures:
                self.reported_failures.append(failure)
                seed = f"seed {member_name(labels_of(failure))}"
                cause = f"diverged (non-finite loss or parameters) at {failure['env_steps']:,} environment steps"
                report(f"warning: {seed} {cause} and is frozen; the other seeds continue")

    def _policy(self, loop: Loop, returns: np.ndarray) -> Policy:
        """Copies the current policies to the host; ``returns`` ``[S]``."""
        params = self.config.algo.acting_params(loop.state.learner.params)
        return Policy(jax.tree.map(np.array, params), env_steps(loop), returns)

    def _save_if_due(self, loop: Loop, before: tuple[np.ndarray, int] | None) -> None:
        """Saves after every ``checkpoint.every`` steps, and when a seed may end in the next chunk.

        If the run is extended later, it continues from the last checkpoint of the second kind, and its numbers are
        those of a run that was longer from the start, see `Checkpoints.restore`.
        """
        now, every = slowest_steps(loop), self.config.checkpoint.every
        due = before is not None and now // every > before[1] // every
        may_end = self._may_end_soon(env_steps(loop)) and (before is None or not self._may_end_soon(before[0]))
        if (due or may_end) and not is_finished(loop):
            self._save(loop)
            self._write_summary(loop, "running")

    def _save(self, loop: Loop) -> None:
        self.metrics.sync()
        self.checkpoints.save(
            loop,
            self.best,
            metrics_bytes=self.metrics.num_bytes,
            wall_seconds=self._wall_seconds(),
            callbacks=self.callbacks.states,
        )
        last = self._policy(loop, np.full(len(self.members), np.nan, np.float32))
        for name, policy in ((BEST, self.best), (LAST, last)):
            save_policy(self.run_dir / POLICY_DIR / f"{name}.npz", policy, self.members)

    def _write_summary(self, loop: Loop, status: str) -> None:
        """Writes the summary, and the picture if there is something to draw."""
        header, stopped = load_header(self.run_dir), self.callbacks.stopped
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
            **({} if stopped is None else {"stopped": stopped._asdict()}),
        )
        if load_metrics(self.run_dir, kind="eval"):
            with _warning_of_faults(f"{CURVE_FILE} can't be drawn"):
                plot_run(self.run_dir)

    def _may_end_soon(self, steps: np.ndarray) -> bool:
        """Returns True if some seed may reach its total in the next chunk; ``steps`` ``[S]``."""
        most = self.trainer.chunk_iterations * self.config.steps_per_iteration
        return int(steps.max()) + most >= self.config.total_env_steps

    def _wall_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


def _new_returns(members: Sequence[Member], lines: Sequence[Line]) -> np.ndarray:
    """Returns the episode return of each member whose nets were evaluated and are new, float32 ``[S]``; nan otherwise.

    Nets that have not learned since step 0 are those of step 0, whose policy is kept already.
    """
    labels, returns = [member.labels for member in members], np.full(len(members), np.nan, np.float32)
    for line in lines:
        if line["kind"] == "eval" and (line["learner_steps"] > 0 or line["env_steps"] == 0):
            returns[labels.index(labels_of(line))] = line["episode_return"]
    return returns


def _folder_of_host(config: RunConfig) -> str | None:
    """Returns the run's folder; if several hosts share a run, the folder of this host inside it."""
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
    """Closes the checkpoints at the end; an error there doesn't replace the one that ended the run."""
    try:
        yield
    except BaseException:
        with _warning_of_faults("the last checkpoint can't be written"):
            checkpoints.close()
        raise
    checkpoints.close()


@contextlib.contextmanager
def _warning_of_faults(message: str) -> Iterator[None]:
    """Turns an exception into a warning: a file that can't be written must not hide how the run itself ends."""
    try:
        yield
    except Exception as error:  # matplotlib, say, may raise anything
        reason = " ".join(str(error).split())
        report(f"warning: {message} ({type(error).__name__}: {reason})")


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``values`` with ``changes`` applied, one level deep for groups."""
    merged = {
        key: {**values[key], **change} if isinstance(change, Mapping) else change for key, change in changes.items()
    }
    return {**values, **merged}
