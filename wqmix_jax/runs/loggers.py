"""Loggers that receive the records in addition to ``metrics.jsonl``: Weights & Biases, TensorBoard and a CSV file.

They are fed from ``metrics.jsonl`` alone, each process again from the first record on. So it makes no difference how
often a run was interrupted or resumed, and a logger may be switched on later.
"""

import csv
import functools
import glob
import importlib.util
import itertools
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from wqmix_jax.config import LoggerOptions
from wqmix_jax.errors import ConfigError, install_extra
from wqmix_jax.records.atomic import atomic
from wqmix_jax.records.metrics import COUNTERS, IDENTITY, METRICS_FILE, load_header, record_from_json
from wqmix_jax.training.host_loop import Line
from wqmix_jax.training.members import labels_of, member_name

WANDB_DIR, SUPERSEDED = "wandb", "superseded"

TENSORBOARD_DIR, CSV_FILE = "tensorboard", "metrics.csv"


class Logger(Protocol):
    """A receiver of a run's records, made when a process starts the run or resumes it.

    All methods may raise any exception: it is reported once, and the run continues without this logger.
    """

    def write(self, records: Sequence[Line]) -> None:
        """Takes new records, in the order of ``metrics.jsonl``; the first call has all earlier ones, maybe none."""

    def close(self) -> None:
        """Ends the logging."""


class Loggers:
    """The loggers that a run asks for, fed from its ``metrics.jsonl``."""

    def __init__(self, run_dir: Path, options: LoggerOptions, config: Mapping[str, Any]) -> None:
        """Starts the loggers and hands over the records that are there.

        Args:
            run_dir: the run's folder.
            options: see `LoggerOptions`.
            config: the run's options, which W&B shows with the runs.
        """
        self._run_dir, self._num_bytes = run_dir, 0
        self._loggers: dict[str, Logger] = {}
        makers: dict[str, tuple[bool, Callable[[], Logger]]] = {
            "W&B": (options.wandb != "disabled", lambda: WandbRuns(run_dir, options, config)),
            "TensorBoard": (options.tensorboard, lambda: TensorBoardRuns(run_dir)),
            "CSV": (options.csv, lambda: CsvFile(run_dir)),
        }
        for name, (is_used, make) in makers.items():
            if is_used:
                self._guarded(name, lambda name=name, make=make: self._loggers.update({name: make()}))
        self.sync()

    def sync(self) -> None:
        """Hands over the records that were written since the last call."""
        if not self._loggers:
            return
        with open(self._run_dir / METRICS_FILE, "rb") as file:
            file.seek(self._num_bytes)
            data = file.read()
        self._num_bytes += len(data)
        records = [record_from_json(line) for line in data.decode().splitlines()]
        for name, logger in list(self._loggers.items()):
            self._guarded(name, functools.partial(logger.write, records))

    def close(self) -> None:
        """Hands over the rest and ends the logging."""
        self.sync()
        for name, logger in list(self._loggers.items()):
            self._guarded(name, logger.close)
        self._loggers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guarded(self, name: str, step: Callable[[], object]) -> None:
        """Takes a step of a logger; if it fails, the run continues without this logger."""
        try:
            step()
        except Exception as error:  # anything: the run itself matters more
            self._loggers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: {name} logging stopped ({reason}); {METRICS_FILE} has every record", file=sys.stderr)


class WandbRuns:
    """The runs of Weights & Biases, one per seed in one group.

    A record's step in W&B is computed from its counters, so it is the same however often a run is resumed. An online
    run continues at its last step: the records below it are left out. An offline run can't be continued: the new one
    holds everything, and the folder of the previous one moves to `SUPERSEDED`, where ``wandb sync`` doesn't look.
    """

    def __init__(self, run_dir: Path, options: LoggerOptions, config: Mapping[str, Any]) -> None:
        """Starts the runs.

        Args:
            run_dir: the run's folder; W&B writes to `WANDB_DIR` in it.
            options: see `LoggerOptions`.
            config: the run's options, which W&B shows with the runs.
        """
        import wandb  # slow to load, and only needed here

        header, self._runs = load_header(run_dir), dict[str, Any]()
        group = options.group or _group_of(run_dir)
        online = options.wandb == "online"
        for member in header["members"]:
            name = member_name(member)
            run_id = f"{header['run']}-{name}"
            _supersede(run_dir / WANDB_DIR, run_id)
            settings = wandb.Settings(silent=True, console="off", x_disable_stats=bool(self._runs))
            run = wandb.init(
                project=options.project,
                group=group,
                name=f"{group}_seed{name}",
                id=run_id,
                dir=run_dir,
                mode=options.wandb,
                resume="allow" if online else None,
                config={**config, **member},
                reinit="create_new",
                settings=settings,
            )
            run.define_metric("env_steps")
            run.define_metric("*", step_metric="env_steps")
            self._runs[name] = run

    def write(self, records: Sequence[Line]) -> None:
        """See `Logger.write`."""
        for record in records:
            run, step = self._runs[member_name(labels_of(record))], _step_of(record)
            if step >= run.starting_step:  # not 0 if W&B has earlier records of an online run
                run.log({name: record[name] for name in COUNTERS} | _measured(record), step=step, commit=True)

    def close(self) -> None:
        """See `Logger.close`."""
        for run in self._runs.values():
            run.finish()


class TensorBoardRuns:
    """Event files for TensorBoard, one run per member, so that the curves of seeds overlay; steps are ``env_steps``.

    Each process writes one new file per member with all records, and removes the member's earlier files.
    """

    def __init__(self, run_dir: Path) -> None:
        """Starts the files in `TENSORBOARD_DIR` of the run's folder."""
        self._files: dict[str, Path] = {}
        for member in load_header(run_dir)["members"]:
            folder = run_dir / TENSORBOARD_DIR / member_name(member)
            folder.mkdir(parents=True, exist_ok=True)
            for earlier in folder.glob("events.out.tfevents.*"):
                earlier.unlink()
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
            self._files[folder.name] = folder / name
            # A start of a session: TensorBoard then drops what it has read of the earlier files.
            _append_events(folder / name, [{"file_version": "brain.Event:2"}, {"session_log": {"status": "START"}}])

    def write(self, records: Sequence[Line]) -> None:
        """See `Logger.write`."""
        events: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            values = [{"tag": tag, "simple_value": value} for tag, value in _measured(record).items()]
            event = {"step": record["env_steps"], "summary": {"value": values}}
            events.setdefault(member_name(labels_of(record)), []).append(event)
        for name, new in events.items():
            _append_events(self._files[name], new)

    def close(self) -> None:
        """See `Logger.close`."""


def _append_events(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Appends events to a file, each given by the fields of TensorBoard's protocol buffer ``Event``."""
    # Here, because they are of an extra, and slow to load.
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(path, "ab") as file:
        writer = RecordWriter(file)
        for fields in events:
            writer.write(Event(wall_time=time.time(), **fields).SerializeToString())


class CsvFile:
    """A table of the records, one row each; a column that appears later is added at the right.

    A value that is not finite is written ``nan``, and one that a record doesn't have is empty.
    """

    def __init__(self, run_dir: Path) -> None:
        """Starts an empty file `CSV_FILE` in the run's folder."""
        self._path, self._columns = run_dir / CSV_FILE, list[str]()
        self._rewrite([])

    def write(self, records: Sequence[Line]) -> None:
        """See `Logger.write`."""
        known = len(self._columns)
        self._columns = list(dict.fromkeys([*self._columns, *(name for record in records for name in record)]))
        if len(self._columns) > known:
            with open(self._path, newline="") as file:
                earlier = list(csv.DictReader(file))
            self._rewrite([*earlier, *records])
        else:
            with open(self._path, "a", newline="") as file:
                self._writer(file).writerows(records)

    def close(self) -> None:
        """See `Logger.close`."""

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with atomic(self._path) as temporary, open(temporary, "w", newline="") as file:
            writer = self._writer(file)
            if self._columns:
                writer.writeheader()
            writer.writerows(rows)

    def _writer(self, file: Any) -> "csv.DictWriter[str]":
        return csv.DictWriter(file, self._columns, restval="", lineterminator="\n")


def _measured(record: Line) -> dict[str, Any]:
    """Returns a record's metrics by their names in W&B and TensorBoard, ``eval/episode_return``."""
    others = (*IDENTITY, *COUNTERS, *labels_of(record))
    return {f"{record['kind']}/{name}": value for name, value in record.items() if name not in others}


def _step_of(line: Line) -> int:
    """Returns a record's step in W&B, which increases within a member and doesn't depend on when it is handed over."""
    return 2 * line["episodes"] + (line["kind"] == "eval")


def _supersede(wandb_dir: Path, run_id: str) -> None:
    """Moves the folders of a run's earlier offline processes to a place that ``wandb sync`` doesn't search."""
    for folder in wandb_dir.glob(f"offline-run-*-{glob.escape(run_id)}"):
        aside = wandb_dir / SUPERSEDED
        aside.mkdir(exist_ok=True)
        target = next(path for number in itertools.count() if not (path := aside / f"{folder.name}_{number}").exists())
        folder.rename(target)


def _group_of(run_dir: Path) -> str:
    """Returns the name of a run's folder, which its hosts share; with the folder above it for a number: ``sweep/0``."""
    parts = run_dir.resolve().parts
    if re.fullmatch(r"host_\d+", parts[-1]):
        parts = parts[:-1]
    return "/".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]  # one of several with -m: FOLDER/0


def refuse_missing_packages(options: LoggerOptions) -> None:
    """Refuses a run, before anything starts, that asks for a logger whose package isn't installed.

    Raises:
        ConfigError: if a package is missing.
    """
    if options.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"logger.wandb={options.wandb} is not allowed here: pip install wandb first")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(f"logger.tensorboard=true is not allowed here: {install_extra('tensorboard')} first")
