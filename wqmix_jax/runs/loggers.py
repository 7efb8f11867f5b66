"""Loggers that receive the records in addition to ``metrics.jsonl``: Weights & Biases."""

import glob
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from wqmix_jax.config import LoggerOptions
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.metrics import COUNTERS, IDENTITY, METRICS_FILE, load_header, record_from_json
from wqmix_jax.training.host_loop import Line
from wqmix_jax.training.members import labels_of, member_name

WANDB_DIR, SUPERSEDED = "wandb", "superseded"


class WandbRuns:
    """The runs of Weights & Biases, one per seed in one group, fed from ``metrics.jsonl``.

    A record's step in W&B is computed from its counters, so it is the same however often a run is resumed. Each process
    hands over every record from the first on, except those below the step at which an online run continues. An offline
    run can't be continued: the new one holds everything, and the folder of the previous one moves to `SUPERSEDED`,
    where ``wandb sync`` doesn't look.

    An error of W&B is reported once on stderr, ends this logging and never stops training.
    """

    def __init__(self, run_dir: Path, options: LoggerOptions, config: Mapping[str, Any]) -> None:
        """Starts the runs if ``options`` ask for them.

        Args:
            run_dir: the run's folder; W&B writes to `WANDB_DIR` in it.
            options: see `LoggerOptions`.
            config: the run's options, which W&B shows with the runs.
        """
        self._run_dir, self._options, self._config = run_dir, options, config
        self._num_bytes = 0
        self._runs: dict[str, Any] = {}
        self._active = options.wandb != "disabled"
        self._guarded(self._start)

    def sync(self) -> None:
        """Hands over the lines that were written since the last call."""
        self._guarded(self._hand_over)

    def close(self) -> None:
        """Hands over the rest and ends the runs."""
        self._guarded(self._hand_over)
        self._guarded(lambda: [run.finish() for run in self._runs.values()])
        self._active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guarded(self, step: Callable[[], object]) -> None:
        if not self._active:
            return
        try:
            step()
        except Exception as error:  # anything: the run itself matters more
            self._active = False
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: W&B logging stopped ({reason}); {METRICS_FILE} has every record", file=sys.stderr)

    def _start(self) -> None:
        import wandb  # slow to load, and only needed here

        header = load_header(self._run_dir)
        group = self._options.group or _group_of(self._run_dir)
        online = self._options.wandb == "online"
        for member in header["members"]:
            name = member_name(member)
            run_id = f"{header['run']}-{name}"
            _supersede(self._run_dir / WANDB_DIR, run_id)
            settings = wandb.Settings(silent=True, console="off", x_disable_stats=bool(self._runs))
            run = wandb.init(
                project=self._options.project,
                group=group,
                name=f"{group}_seed{name}",
                id=run_id,
                dir=self._run_dir,
                mode=self._options.wandb,
                resume="allow" if online else None,
                config={**self._config, **member},
                reinit="create_new",
                settings=settings,
            )
            run.define_metric("env_steps")
            run.define_metric("*", step_metric="env_steps")
            self._runs[name] = run

    def _hand_over(self) -> None:
        with open(self._run_dir / METRICS_FILE, "rb") as file:
            file.seek(self._num_bytes)
            data = file.read()
        self._num_bytes += len(data)
        for line in map(record_from_json, data.decode().splitlines()):
            labels = labels_of(line)
            measured = {name: value for name, value in line.items() if name not in (*IDENTITY, *COUNTERS, *labels)}
            values = {f"{line['kind']}/{name}": value for name, value in measured.items()}
            run, step = self._runs[member_name(labels)], _step_of(line)
            if step >= run.starting_step:  # not 0 if W&B has earlier records of an online run
                run.log({name: line[name] for name in COUNTERS} | values, step=step, commit=True)


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


def refuse_missing_wandb(options: LoggerOptions) -> None:
    """Refuses a run, before anything starts, that asks for W&B where it isn't installed.

    Raises:
        ConfigError: if W&B is not installed, but was asked for.
    """
    if options.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"logger.wandb={options.wandb} is not allowed here: pip install wandb first")
