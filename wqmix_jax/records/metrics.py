"""The records of a run: ``run.json`` and ``metrics.jsonl``, their schema, and how they are written and read.

The schema, version 1. ``run.json`` identifies the run:

    ``schema``          1
    ``version``         the version of wqmix_jax that started the run
    ``algo``, ``env``   the names of their yamls
    ``seeds``           all seeds of the run
    ``members``         for each training its ``seed``, and the values that a sweep gives it (``algo.alpha``, ..)
    ``map``             the environment's map, if it has several
    ``simulator``       the versions of the game, if it is not part of this package (`External.versions`)
    ``run``             a random name that the run keeps when it is moved or resumed

``metrics.jsonl`` holds one JSON object per line, each a record of one member. A value that is not finite is ``null``,
which `load_metrics` reads as nan. Returns are sums of undiscounted rewards, lengths are in environment steps.

eval, one per seed and evaluation, the first before any learning:
    ``kind``                    ``"eval"``
    ``seed``                    in a sweep followed by the swept options: ``algo.alpha``, ..
    ``env_steps``               environment steps of training so far
    ``learner_steps``           optimiser steps so far
    ``episodes``                training episodes so far, including those that a failing environment cut
    ``episode_return``          mean over the evaluation's greedy episodes
    ``episode_return_std``      standard deviation over these episodes
    ``episode_length``          mean over these episodes
    ``episode_length_std``      standard deviation over these episodes
    and the environment's own metrics, means over the episodes (``captures``, ``win_rate``, ..)

train, one per seed and evaluation interval, means over the interval's iterations:
    ``kind``                    ``"train"``
    ``seed``, ``env_steps``, ``learner_steps``, ``episodes``, as above
    ``episode_return``, ``episode_length``      means over the exploring episodes, without those that a failing
                                                environment cut; null if no episode was whole
    ``epsilon``                 exploration
    ``steps_per_second``        this seed's environment steps per second of wall-clock time, without evaluation and
                                compilation
    and, over the iterations with a learner step (absent if there was none):
    ``loss``, ``grad_norm`` (before clipping), and the algorithm's own metrics (``weight_mean``, ``q_tot_mean``, ..)

Callbacks may add metrics to both.
"""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from wqmix_jax.errors import ConfigError

if TYPE_CHECKING:
    from wqmix_jax.training.host_loop import Line  # its import loads jax, which reading records doesn't need

SCHEMA = 1
"""Version of the lines' keys and meanings; raised when one of them changes."""


METRICS_FILE, HEADER_FILE = "metrics.jsonl", "run.json"


IDENTITY, COUNTERS = ("kind", "seed"), ("env_steps", "learner_steps", "episodes")


class MetricsFile:
    """The file ``metrics.jsonl`` of a run, written in whole lines.

    Attributes:
        num_bytes: the size of the file.
    """

    def __init__(self, run_dir: Path, *, num_bytes: int) -> None:
        """Opens the file to append to it, cut to its first ``num_bytes``.

        Raises:
            ConfigError: if the file is shorter than that.
        """
        path = run_dir / METRICS_FILE
        self.num_bytes = num_bytes
        if path.stat().st_size < self.num_bytes:
            raise ConfigError(
                f"{path} is damaged: it is shorter than when the last checkpoint was written: lines are missing"
            )
        os.truncate(path, self.num_bytes)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (`close` closes it)

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line per record, all in one write."""
        data = "".join(_to_json(line) + "\n" for line in lines).encode()
        written = self._file.write(data)
        while written < len(data):  # a disk that is nearly full takes a part first, and fails at the rest
            written += self._file.write(data[written:])
        self.num_bytes += len(data)

    def sync(self) -> None:
        """Returns once the lines would survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create_metrics(
    run_dir: Path,
    *,
    version: str,
    algo: str,
    env: str,
    members: "Sequence[Line]",
    map_name: Any = None,
    simulator: Mapping[str, str] | None = None,
) -> None:
    """Writes ``run.json`` and starts an empty ``metrics.jsonl``.

    Args:
        run_dir: the run's folder.
        version: the version of this library.
        algo: the algorithm's name.
        env: the environment's name.
        members: the labels of the trainings, see `Member.labels`.
        map_name: the environment's map, if it has several.
        simulator: the versions of the game, if it is not part of this package.

    Raises:
        ConfigError: if another run has started there in the meantime.
    """
    try:
        (run_dir / METRICS_FILE).touch(exist_ok=False)
    except FileExistsError:
        raise ConfigError(f"run_dir={run_dir} is not allowed: another run has just begun there") from None
    seeds = sorted({member["seed"] for member in members})
    header = {"schema": SCHEMA, "version": version, "algo": algo, "env": env, "seeds": seeds, "members": list(members)}
    header |= ({} if map_name is None else {"map": map_name}) | ({"simulator": simulator} if simulator else {})
    (run_dir / HEADER_FILE).write_text(_to_json(header | {"run": uuid.uuid4().hex[:8]}) + "\n")


def load_header(run_dir: str | os.PathLike[str]) -> "Line":
    """Reads ``run.json`` of a run.

    Raises:
        ConfigError: if it is missing, damaged, or has another schema.
    """
    path = Path(run_dir) / HEADER_FILE
    header = read_mapping(path)
    if header.get("schema") != SCHEMA:
        raise ConfigError(f"{path} has schema={header.get('schema')}; this version of wqmix_jax reads schema {SCHEMA}")
    for name, kind in {"version": str, "algo": str, "env": str, "seeds": list}.items():
        if not isinstance(header.get(name), kind):
            raise ConfigError(f"{path} is damaged: {name}={header.get(name)!r} is no {kind.__name__}")
    return {"members": [{"seed": seed} for seed in header["seeds"]], **header}  # runs older than sweeps list only seeds


def load_metrics(
    run_dir: str | os.PathLike[str], *, kind: str | None = None, seed: int | None = None
) -> list[dict[str, Any]]:
    """Reads the records of a run, in the order they were written.

    Args:
        run_dir: the run's folder.
        kind: only ``"eval"`` or only ``"train"`` records.
        seed: only this seed's.

    Returns:
        One dict per record, as this module's docstring describes. With pandas,
        ``pandas.DataFrame(load_metrics(run_dir, kind="eval"))`` makes a table of them.

    Raises:
        ConfigError: if the file is missing, damaged, or has another schema.
    """
    return [
        line
        for line in _read(Path(run_dir))
        if (kind is None or line["kind"] == kind) and (seed is None or line["seed"] == seed)
    ]


def _read(run_dir: Path) -> "list[Line]":
    """Reads all whole lines; a last line without its end is still being written, or was cut when the run was killed."""
    load_header(run_dir)
    path = run_dir / METRICS_FILE
    with _named(path):
        *texts, _ = path.read_text().split("\n")
        return [record_from_json(text) for text in texts]


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a mapping from a JSON file.

    Raises:
        ConfigError: if it is missing or damaged.
    """
    with _named(path):
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
        return found


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file's name to errors of reading it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _to_json(line: Mapping[str, Any]) -> str:
    return json.dumps({key: None if _not_finite(value) else value for key, value in line.items()}, allow_nan=False)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def record_from_json(text: str) -> "Line":
    """Reads one line of ``metrics.jsonl``; a null is read as nan.

    Raises:
        ValueError: if ``text`` is not a record.
    """
    line = json.loads(text)
    if not isinstance(line, dict) or not line.keys() >= {"kind", "seed"}:
        raise ValueError(f"{text[:40]!r} is no record")
    return {key: math.nan if value is None else value for key, value in line.items()}
