"""Comparing arrays with recorded ones, and what is printed of it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

FLOAT32_STEP = float(np.finfo(np.float32).eps)


class Tolerance(NamedTuple):
    """An entry passes if its error is at most one of these.

    Attributes:
        absolute: of the error itself.
        relative: of the error over the recorded entry.
        of_largest: of the error over the recorded tensor's largest magnitude.
    """

    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0


EXACT = Tolerance()


@dataclass
class Report:
    """What was compared in one case file, in one precision.

    Attributes:
        compared: names of recorded tensors.
        absent: names of what such a file may hold and this one doesn't.
        other: names of recorded tensors with no counterpart of ours.
        failures: one line for each tensor that differs by more than its tolerance.
        worst: the largest errors: absolute, relative to the entry, relative to the tensor's largest magnitude.
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
            where: bool, the entries that count, of the leading axes of ``recorded``.
        """
        self.compared.append(name)
        got, recorded = np.asarray(got), np.asarray(recorded)
        if got.shape != recorded.shape:
            self.failures.append(f"{name} has shape {got.shape}, recorded is {recorded.shape}")
            return
        if where is not None:
            got, recorded = got[where], recorded[where]
        if not np.issubdtype(recorded.dtype, np.floating):
            tolerance = EXACT
        self._compare_entries(name, got.astype(np.float64), recorded.astype(np.float64), tolerance)

    def _compare_entries(self, name: str, got: np.ndarray, recorded: np.ndarray, tolerance: Tolerance) -> None:
        if recorded.size == 0:
            return
        error, magnitude = np.abs(got - recorded), np.abs(recorded)
        largest = magnitude.max()
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(error == 0, 0.0, error / magnitude)
            of_largest = np.where(error == 0, 0.0, error / largest)
        passed = (error <= tolerance.absolute) | (relative <= tolerance.relative) | (of_largest <= tolerance.of_largest)
        errors = Tolerance(*(float(np.nan_to_num(each, nan=np.inf).max()) for each in (error, relative, of_largest)))
        self.worst = Tolerance(*(max(pair) for pair in zip(self.worst, errors, strict=True)))
        if not passed.all():
            first = tuple(int(index) for index in np.argwhere(~passed)[0])
            self.failures.append(
                f"{name}: {(~passed).sum()} of {passed.size} entries differ by up to {errors.absolute:.1e} absolute, "
                f"{errors.relative:.1e} relative; the first, {first}, is {got[first]!r}, recorded is {recorded[first]!r}"
            )

    def lines(self) -> list[str]:
        """What is printed."""
        groups: dict[str, list[str]] = {}
        for name in self.compared:
            group, _, rest = name.partition("/")
            groups.setdefault(group, []).append(rest)
        few = {"expected", "trace", "step", "init"}  # the others hold one tensor for each of the nets'
        listed = [
            f"{group} ({', '.join(names)})" if group in few else f"{group} ({len(names)} tensors)"
            for group, names in groups.items()
        ]
        shown = [
            f"largest error {self.worst.absolute:.1e} absolute, {self.worst.relative:.1e} relative, "
            f"{self.worst.of_largest:.1e} of the tensor's largest magnitude",
            f"compared: {'; '.join(listed)}",
        ]
        shown += [f"absent: {', '.join(self.absent)}"] if self.absent else []
        shown += [f"recorded, but not a value of ours: {', '.join(self.other)}"] if self.other else []
        return shown
