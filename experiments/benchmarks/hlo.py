"""Compiled programs as text: XLA's optimised HLO, its loops and kernels, and the buffers that it assigned.

A kernel is one operation of the scheduled program that a device executes: a fusion, a copy, a library call. They run
one after another, so the number on the longest way through a program bounds its speed where each is small.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "domain", "get-tuple-element", "opt-barrier", "parameter",
    "partition-id", "replica-id", "tuple",
}  # fmt: skip
"""Operations that execute nothing."""

FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "SPMDFullToShardShape", "SPMDShardToFullShape", "Sharding"}
"""Targets of custom calls that execute nothing."""

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ALLOCATION = re.compile(r"allocation \d+: size \d+")
_VALUE = re.compile(
    r" value: <\d+ (?P<name>[\w.\-]+)\S* @\d+> \(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<shape>.*)"
)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: its name, unique in the program.
        opcode: for example ``fusion``, ``while`` or ``copy-start``.
        shape: of its result, with the layout.
        arguments: the text between the brackets after the opcode.
        attributes: the text after the brackets.
        is_root: whether it is the result of the computation.
    """

    name: str
    opcode: str
    shape: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def op_name(self) -> str:
        """The function and the scopes that it was traced in, if XLA has kept them."""
        return _first(r'op_name="([^"]*)"', self.attributes)

    def computations(self, *attributes: str) -> list[str]:
        """Returns the computations that the first of these attributes that is there names."""
        for attribute in attributes:
            names = _first(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if names:
                return re.findall(r"[\w.\-]+", names)
        return []


Computations = dict[str, list[Instruction]]
"""The computations of a program by name; the one that runs first has the name `ENTRY`."""

ENTRY = "ENTRY"


def parse(text: str) -> Computations:
    """Reads a program as ``jax.stages.Compiled.as_text`` prints it."""
    computations: Computations = {}
    body: list[Instruction] | None = None
    for line in text.splitlines():
        if not line.startswith(" "):
            found = _COMPUTATION.match(line)
            if found:
                body = computations[found[2]] = []
                if found[1]:
                    computations[ENTRY] = body
        elif body is not None and (found := _INSTRUCTION.match(line)):
            body.append(_instruction(found[2], found[3], bool(found[1])))
    if ENTRY not in computations:
        raise ValueError("the text has no entry computation")
    return computations


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    """Splits ``SHAPE OPCODE(ARGUMENTS), ATTRIBUTES``; shapes of tuples contain spaces, layouts contain brackets."""
    shape_end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:shape_end], text[shape_end:].lstrip()
    opcode, end = rest.partition("(")[0], _closing(rest, rest.index("("))
    return Instruction(name, opcode, shape, rest[len(opcode) + 1 : end], rest[end + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text) - 1


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


class Part(NamedTuple):
    """A piece of a program with the loops and branches in it.

    Attributes:
        kind: a ``loop``; a ``choice`` between branches, of which one runs; or a ``block`` that runs once.
        op_name: of the loop or conditional, see `Instruction.op_name`.
        kernels: that its own computations execute, once per trip, in addition to the ``inner`` parts.
        check: kernels of the condition of a loop; 0 if the number of trips is known, for then it isn't evaluated.
        trips: of a loop, None if unknown; 1 for others.
        inner: parts in the order of the program.
        role: a name that a caller gives, see `with_trips`.
    """

    kind: Literal["block", "loop", "choice"]
    op_name: str
    kernels: int
    check: int
    trips: int | None
    inner: tuple["Part", ...]
    role: str = ""

    @property
    def once(self) -> int:
        """Kernels of one trip, with the longest branch of each choice."""
        totals = [part.total for part in self.inner]
        return max(totals, default=0) if self.kind == "choice" else self.kernels + sum(totals)

    @property
    def total(self) -> int:
        """Kernels of all trips; a loop whose number of trips is unknown counts as one trip."""
        trips = 1 if self.trips is None else self.trips
        return trips * self.once + (trips + 1) * self.check

    def lines(self, indent: int = 0) -> Iterator[str]:
        """Yields a line for this part and for each part in it."""
        times = {None: "? times ", 1: ""}.get(self.trips, f"{self.trips} times ")
        role = f" [{self.role}]" if self.role else ""
        count = f"{times}{self.once} kernels" + (f", {self.check} to check" if self.check else "")
        yield f"{'  ' * indent}{self.kind}{role}: {count} = {self.total}  {self.op_name}"
        for part in self.inner:
            yield from part.lines(indent + 1)


def structure(computations: Computations, *, scalars_are_free: bool = False, name: str = ENTRY) -> Part:
    """Counts the kernels of a program by its loops and branches.

    Args:
        computations: see `parse`.
        scalars_are_free: whether operations with a scalar result outside of fusions execute no kernel, as on a TPU,
            whose scalar unit runs them.
        name: the computation to begin with.
    """
    kernels, inner = 0, []
    for instruction in computations[name]:
        below = [
            structure(computations, scalars_are_free=scalars_are_free, name=called) for called in _called(instruction)
        ]
        match instruction.opcode:
            case "while":
                (condition, body), trips = below, known_trips(computations, instruction, computations[name])
                # A device with a known number of trips counts them, and doesn't evaluate the condition.
                check = condition.once if trips is None else 0
                inner.append(Part("loop", instruction.op_name, body.kernels, check, trips, body.inner))
            case "conditional":
                inner.append(Part("choice", instruction.op_name, 0, 0, 1, tuple(below)))
            case "call" | "call-start" | "async-start":
                kernels += sum(part.kernels for part in below)
                inner += [part for called in below for part in called.inner]
            case _:
                kernels += _is_kernel(instruction, scalars_are_free)
    return Part("block", "", kernels, 0, 1, tuple(inner))


def _called(instruction: Instruction) -> list[str]:
    """Returns the computations that run as parts of the program, not those that a kernel applies to elements."""
    match instruction.opcode:
        case "while":
            return [*instruction.computations("condition"), *instruction.computations("body")]
        case "conditional":
            two = [*instruction.computations("true_computation"), *instruction.computations("false_computation")]
            return two or instruction.computations("branch_computations")
        case "call" | "call-start" | "async-start":
            return instruction.computations("to_apply", "calls", "called_computations")
    return []


def known_trips(computations: Computations, loop: Instruction, around: list[Instruction]) -> int | None:
    """Returns the number of executions of a loop's body, None if it is decided when the program runs.

    XLA notes the number for GPUs. For TPUs it doesn't: there, a loop is known if its condition compares a counter with
    a constant, and the counter begins with a constant.

    Args:
        computations: the whole program.
        loop: the instruction.
        around: the computation that contains it.
    """
    noted = _first(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted)
    condition, body = (computations[name] for name in _called(loop))
    first = _result(around, loop.operands[0])
    compare, after = _result(condition), _result(body)
    if first is None or after is None or compare is None or "direction=LT" not in compare.attributes:
        return None
    counter, bound = (_result(condition, name) for name in compare.operands)
    index = _index(counter)
    if index is None or not len(first.operands) == len(after.operands) > index:
        return None
    start, stop = _constant(around, first.operands[index]), _constant(condition, bound.name if bound else "")
    if (place := _index(bound)) is not None and _index(_result(body, after.operands[place])) == place:
        stop = _constant(around, first.operands[place])  # the loop passes the bound on as it is
    step = _result(body, after.operands[index])
    steps = [_constant(body, name) for name in step.operands] if step and step.opcode == "add" else []
    by = next((number for number in steps if number), 1)
    return None if start is None or stop is None else max(0, -(-(stop - start) // by))


def _result(computation: list[Instruction], name: str = "") -> Instruction | None:
    """Returns the instruction of this name, or else the root, without the copies of its result."""
    found = next((each for each in computation if (each.name == name if name else each.is_root)), None)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = next((each for each in computation if each.name == found.operands[0]), None)
    return found


def _index(instruction: Instruction | None) -> int | None:
    """Returns the index of the element that ``get-tuple-element`` reads."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(_first(r"index=(\d+)", instruction.attributes))


def _constant(computation: list[Instruction], name: str) -> int | None:
    found = _result(computation, name) if name else None
    is_number = found is not None and found.opcode == "constant" and re.fullmatch(r"-?\d+", found.arguments)
    return int(found.arguments) if found is not None and is_number else None


def _is_kernel(instruction: Instruction, scalars_are_free: bool) -> bool:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return False
    if opcode == "custom-call":
        return _first(r'custom_call_target="([^"]*)"', instruction.attributes) not in FREE_CALLS
    is_scalar = re.match(r"\w+\[\]", instruction.shape) is not None
    return not (scalars_are_free and is_scalar and opcode != "fusion")


def with_trips(part: Part, assume: Callable[[Part, tuple[Part, ...]], tuple[str, int]]) -> Part:
    """Replaces the unknown numbers of trips.

    Args:
        part: a whole program.
        assume: returns the role and the number of trips of a loop whose number is unknown, from the loop and the parts
            around it, the program first.
    """

    def replaced(part: Part, around: tuple[Part, ...]) -> Part:
        if part.kind == "loop" and part.trips is None:
            role, trips = assume(part, around)
            part = part._replace(role=role, trips=trips)
        return part._replace(inner=tuple(replaced(inner, (*around, part)) for inner in part.inner))

    return replaced(part, ())


def parts(part: Part) -> Iterator[Part]:
    """Yields a part and all parts in it."""
    yield part
    for inner in part.inner:
        yield from parts(inner)


class Buffer(NamedTuple):
    """One value in a program's temporary memory; the memory of several values may overlap.

    Attributes:
        size: bytes.
        shape: dtype and sizes of its axes.
        name: of the instruction that writes it.
        op_name: see `Instruction.op_name`; that of a copy may be the name of the copied value.
    """

    size: int
    shape: str
    name: str
    op_name: str

    @property
    def num_elements(self) -> int:
        """The number of elements of the array; 0 for a tuple."""
        axes = re.fullmatch(r"\w+\[([\d,]*)\]", self.shape)
        return 0 if axes is None else math.prod(map(int, filter(None, axes[1].split(","))))

    @property
    def num_bytes(self) -> int:
        """The bytes of the array without padding."""
        bits = int(_first(r"^[a-z]+(\d+)", self.shape) or 8)
        return self.num_elements * bits // 8


def temporaries(assignment: str, computations: Computations) -> list[Buffer]:
    """Returns the arrays in a program's temporary memory, the largest first, one per place in the memory.

    Args:
        assignment: XLA's dump of its buffer assignment.
        computations: of the same program.
    """
    writers = {each.name: each for body in computations.values() for each in body}
    found: dict[tuple[int, str, str], Buffer] = {}
    allocation, is_temporary = "", False
    for line in assignment.splitlines():
        if _ALLOCATION.match(line):
            # Colours other than 0 are memories on the chip.
            allocation, is_temporary = line, "preallocated-temp" in line and not re.search(r"color [1-9]", line)
        elif is_temporary and (value := _VALUE.match(line)):
            if value["shape"].startswith("("):
                continue  # of pointers to arrays, each of which has another line
            shape, size = re.sub(r"\{[^}]*\}", "", value["shape"]), int(value["size"])
            writer = writers.get(value["name"])
            origin, is_copy = "", False
            if writer is not None:
                is_copy = writer.opcode.startswith("copy")
                origin = writer.op_name or (f"copy of {writer.operands[0]}" if is_copy else "")
            buffer, place = Buffer(size, shape, value["name"], origin), (size, value["offset"], allocation)
            # A value that a loop passes on appears several times, and so do values that use the place in turn.
            found[place] = buffer if is_copy else found.get(place, buffer)
    return sorted(found.values(), reverse=True)
