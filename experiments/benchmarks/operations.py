"""Counts of a traced program's operations, which need no compiler: those that decide how many kernels run in sequence.

A compiler fuses many of them into one kernel, so the numbers are no counts of kernels, but grow and shrink with them.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

LONG = 100
"""Loops with more trips are long: each of their operations costs its time as often."""

_LOOPS = {"scan", "while"}
_DRAWS = {"random_bits", "random_fold_in", "random_split", "threefry2x32"}


class Operations(NamedTuple):
    """Operations in sequence, each counted as often as it runs.

    Attributes:
        total: all of them.
        dots: matrix products.
        draws_in_loops: operations inside loops that draw random numbers or make keys.
        long_loops: loops with more than `LONG` trips.
    """

    total: int = 0
    dots: int = 0
    draws_in_loops: int = 0
    long_loops: int = 0

    def plus(self, other: "Operations") -> "Operations":
        """Returns the sums."""
        return Operations(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def count_sequential(function: Callable[..., Any], *args: Any, unknown_trips: int = 1) -> Operations:
    """Counts a function's operations in sequence; of several branches, the one with the most operations.

    Args:
        function: is traced, and not run.
        args: its arguments, or their shapes.
        unknown_trips: the trips of a loop whose number is decided when the program runs, unless a scope around it,
            `jax.named_scope("blocks_at_most_7")`, names the most.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, unknown_trips, in_loop=False)


def _count(jaxpr: Any, unknown_trips: int, *, in_loop: bool) -> Operations:
    counts = Operations()
    for eqn in jaxpr.eqns:
        counts = counts.plus(_count_one(eqn, unknown_trips, in_loop=in_loop))
    return counts


def _count_one(eqn: Any, unknown_trips: int, *, in_loop: bool) -> Operations:
    name, params = eqn.primitive.name, eqn.params
    if name in _LOOPS:
        trips = params["length"] if name == "scan" else _most_trips(eqn, unknown_trips)
        inside = _count_bodies(eqn, unknown_trips)
        return Operations(*(trips * each for each in inside)).plus(Operations(long_loops=trips > LONG))
    if name == "cond":
        branches = [_count(branch.jaxpr, unknown_trips, in_loop=in_loop) for branch in params["branches"]]
        return max(branches).plus(Operations(total=1))
    within = [inner for value in params.values() if hasattr(inner := getattr(value, "jaxpr", value), "eqns")]
    if within:
        return _count(within[0], unknown_trips, in_loop=in_loop)
    return Operations(1, name == "dot_general", in_loop and name in _DRAWS, 0)


def _count_bodies(eqn: Any, unknown_trips: int) -> Operations:
    counts = Operations()
    for body in _bodies(eqn):
        counts = counts.plus(_count(body, unknown_trips, in_loop=True))
    return counts


def _most_trips(eqn: Any, unknown_trips: int) -> int:
    # Scopes around an outer loop are not those of the loops in its body.
    found = re.findall(r"_at_most_(\d+)", str(eqn.source_info.name_stack))
    return int(found[-1]) if found else unknown_trips


class Loop(NamedTuple):
    """A loop of a traced program.

    Attributes:
        trips: None if their number is decided when the program runs.
        inline: trips that are compiled as straight-line code.
        dots: matrix products of one trip; those of loops inside aren't counted.
        once: all operations of one trip, with those of loops inside, see `count_sequential`.
    """

    trips: int | None
    inline: int
    dots: int
    once: Operations


def sequential_loops(function: Callable[..., Any], *args: Any) -> list[Loop]:
    """Returns all loops of a function, each before those inside it; arguments as in `count_sequential`."""
    return list(_loops(jax.make_jaxpr(function)(*args).jaxpr))


def _loops(jaxpr: Any) -> Iterator[Loop]:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in _LOOPS:
            dots = sum(_dots_outside_of_loops(body) for body in _bodies(eqn))
            yield Loop(params.get("length"), params.get("unroll", 1), dots, _count_bodies(eqn, 1))
        for body in _bodies(eqn):
            yield from _loops(body)


def _dots_outside_of_loops(jaxpr: Any) -> int:
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        count += 0 if eqn.primitive.name in _LOOPS else sum(map(_dots_outside_of_loops, _bodies(eqn)))
    return count


def _bodies(eqn: Any) -> list[Any]:
    """Returns the programs inside an operation: of a loop, a call or the branches of a choice."""
    values = [each for value in eqn.params.values() for each in (value if isinstance(value, tuple | list) else [value])]
    return [inner for value in values if hasattr(inner := getattr(value, "jaxpr", value), "eqns")]
