"""Comparing arrays with recorded ones, and what is printed of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]
"""A recording, or a part of it."""


class Tolerance(NamedTuple):
    """An entry passes if its error is at most one of these.

    Attributes:
        absolute: of the error itself.
        relative: of the error over the recorded entry.
        relative_to_largest: of the error over the recorded tensor's largest magnitude.
    """

    absolute: float = 0.0
    relative: float = 0.0
    relative_to_largest: float = 0.0


EXACT = Tolerance()


@dataclass
class Report:
    """The result of comparing one case file in one precision.

    Attributes:
        compared: names of recorded tensors, ``GROUP/NAME``.
        absent: names of what such a file may hold and this one doesn't.
        other: names of recorded tensors that are no value of ours.
        failures: one line for each tensor that differs by more than its tolerance.
        worst: the largest errors, of each kind that a `Tolerance` has.
    """

    compared: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    worst: Tolerance = EXACT

    def compare(
        self, name: str, got: Any, recorded: Any, tolerance: Tolerance = EXACT, where: np.ndarray | None = None
    ) -> None:
        """Compares two arrays.

        Args:
            name: the tensor's.
            got: ours.
            recorded: the reference's; its shape is taken.
            tolerance: see `Tolerance`; booleans and integers are compared exactly whatever it says.
            where: bool, which entries count, along the leading axes of ``recorded``.
        """
        self.compared.append(name)
        got, recorded = np.asarray(got), np.asarray(recorded)
        if got.shape != recorded.shape:
            self.failures.append(f"{name} has shape {got.shape}, recorded is {recorded.shape}")
            return
        if where is not None:
            got, recorded = got[where], recorded[where]
        if recorded.size == 0:
            return
        if not np.issubdtype(recorded.dtype, np.floating):
            tolerance = EXACT
        self._compare_entries(name, got.astype(np.float64), recorded.astype(np.float64), tolerance)

    def _compare_entries(self, name: str, got: np.ndarray, recorded: np.ndarray, tolerance: Tolerance) -> None:
        error, magnitude = np.abs(got - recorded), np.abs(recorded)
        errors = Tolerance(error, _ratio(error, magnitude), _ratio(error, magnitude.max()))
        passed = np.any([each <= bound for each, bound in zip(errors, tolerance, strict=True)], axis=0)
        largest = Tolerance(*(float(np.nan_to_num(each, nan=np.inf).max()) for each in errors))
        self.worst = Tolerance(*map(max, self.worst, largest))
        if not passed.all():
            first = tuple(np.argwhere(~passed)[0].tolist())
            self.failures.append(
                f"{name}: {(~passed).sum()} of {passed.size} entries differ, by up to {_format(largest)}; the first, "
                f"{list(first)}, is {got[first]}, recorded is {recorded[first]}"
            )

    def errors(self) -> str:
        """The largest errors of all."""
        return f"largest error {_format(self.worst)}{', DIFFERS' if self.failures else ''}"

    def contents(self) -> str:
        """Lists the arrays that were compared and those that were not."""
        groups: dict[str, list[str]] = {}
        for name in self.compared:
            group, _, rest = name.partition("/")
            groups.setdefault(group, []).append(rest)
        parts = []
        for group, names in groups.items():
            are_nets = all("/" in name for name in names)
            parts.append(f"{group} ({f'{len(names)} tensors' if are_nets else ', '.join(names)})")
        parts += [f"absent: {', '.join(self.absent)}"] if self.absent else []
        parts += [f"recorded, but no value of ours: {', '.join(self.other)}"] if self.other else []
        return "; ".join(parts)


def _ratio(error: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / magnitude)


def _format(errors: Tolerance) -> str:
    return (
        f"{errors.absolute:.1e} absolute, {errors.relative:.1e} relative, "
        f"{errors.relative_to_largest:.1e} of the tensor's largest magnitude"
    )
