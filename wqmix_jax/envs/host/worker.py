"""The program of one worker: a simulator in a separate process, which obeys one-byte commands.

It is run by its path, by the interpreter that has the simulator: Python 3.7 or newer with numpy. So it imports nothing
else, not even this package. Arrays are in memory that it shares with its parent; the socket transports commands and
answers only. It ends when the parent closes the socket.
"""

import contextlib
import importlib
import json
import mmap
import operator
import os
import random
import socket
import struct
import sys
import types

import numpy as np

INFO, RESET, STEP = b"i", b"r", b"s"
DONE, FAILED = b".", b"!"

OBSERVED = ("obs", "state", "avail_actions")
BY_AGENT = ("obs", "avail_actions")

HERE = os.path.dirname(os.path.abspath(__file__))
"""The folder of this file and of the adapters, which must not hide a simulator's modules."""


def main():
    """Serves the simulator that the command line describes as JSON, until the parent hangs up."""
    described = json.loads(sys.argv[1])
    channel = socket.socket(fileno=described["socket"])
    simulator, steps = None, 0
    try:
        simulator, arrays = make(described), share(described)
        while True:
            command = channel.recv(1)
            if not command:
                break
            steps = steps + 1 if command == STEP else 0
            answer(channel, DONE, obey(command, simulator, arrays, described["metrics"], steps))
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent may be gone
            answer(channel, FAILED, described_error(error))
    finally:
        getattr(simulator, "close", lambda: None)()


def make(described):
    """Makes the simulator; the global generators, from which some simulators draw, are seeded, too."""
    np.random.seed(described["seed"])  # noqa: NPY002
    random.seed(described["seed"])
    return load(described["simulator"])(seed=described["seed"], **described["options"])


def load(target):
    """Imports the class that ``FILE.py:NAME`` or ``module:NAME`` names."""
    where, _, name = target.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    folder = os.path.dirname(os.path.abspath(where))
    if folder != HERE:
        sys.path.insert(0, folder)  # a user's file may import its neighbours
    module = types.ModuleType("__simulator__")
    module.__file__ = where
    sys.modules[module.__name__] = module  # for what looks classes up by their module, as pickle does
    with open(where, "rb") as source:
        exec(compile(source.read(), where, "exec"), module.__dict__)
    return getattr(module, name)


def share(described):
    """Returns this worker's row of each array in the shared memory, by name."""
    if described["memory"] is None:
        return {}
    memory = mmap.mmap(described["memory"], 0)
    arrays = {}
    for name, dtype, shape, offset in described["layout"]:
        flat = np.frombuffer(memory, dtype, int(np.prod(shape)), offset)
        row = described["row"]
        arrays[name] = flat.reshape(shape)[row : row + 1].reshape(shape[1:])  # a view, also of a single number
    return arrays


def obey(command, simulator, arrays, metrics, steps):
    """Carries out one command, after which the episode has ``steps`` steps; returns the answer's text."""
    if command == INFO:
        versions = simulator.versions() if hasattr(simulator, "versions") else {}
        return json.dumps({"info": simulator.info(), "versions": versions}, default=plain)
    if command == RESET:
        simulator.reset(int(arrays["seed"]))
    else:
        # Plain integers in plain lists: some simulators accept nothing else.
        reward, terminated, truncated = simulator.step(arrays["joint_action"].tolist())
        put(arrays, "reward", reward)
        put(arrays, "terminated", terminated)
        put(arrays, "truncated", truncated)
    observed = simulator.observe()
    for name, value in zip(OBSERVED, observed):
        put(arrays, name, value)
    if command == RESET or not (arrays["terminated"] or arrays["truncated"]):
        refuse_idle(arrays["avail_actions"], steps)
    if metrics:
        measured = simulator.metrics()
        put(arrays, "metrics", [measured[name] for name in metrics])
    return ""


def plain(value):
    """Converts numbers and arrays of numpy to what JSON can hold.

    Raises:
        TypeError: for anything else.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    try:
        return operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"info() or versions() holds a {kind}: only numbers, text and lists are allowed") from None


def put(arrays, name, value):
    """Writes a value of exactly the right shape; any number but zero is True in an array of bools."""
    target = arrays[name]
    found = fitting(name, value, target.shape)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds a {type(value).__name__} of dtype {found.dtype}, but numbers are needed")
    finite = np.isfinite(found)
    if not finite.all():
        where = f" of agent {np.argwhere(~finite)[0][0]}" if name in BY_AGENT else ""
        raise ValueError(f"{name}{where} holds a value that is not finite")
    target[...] = found


def fitting(name, value, shape):
    """Returns the value as an array of ``shape``.

    Raises:
        ValueError: if it has another shape; the message names the first agent whose row is wrong.
    """
    try:
        found = np.asarray(value)
    except ValueError:  # its rows differ
        found = None
    if found is None or found.shape != shape:
        raise ValueError(misfit(name, value, shape))
    return found


def misfit(name, value, shape):
    """Describes a value whose shape is not ``shape``."""
    try:
        shapes = [shape_of(row) for row in value] if name in BY_AGENT else []
    except TypeError:  # it has no rows at all
        shapes = []
    if len(set(shapes)) > 1:
        agent = next(agent for agent, found in enumerate(shapes) if found != shape[1:])
        return f"{name} of agent {agent} has shape {shapes[agent]}, but {shape[1:]} is needed"
    return f"{name} has shape {shape_of(value)}, but {shape} is needed"


def shape_of(value):
    """Returns the shape of the value as an array, "ragged" if it has none."""
    try:
        return np.asarray(value).shape
    except ValueError:
        return "ragged"


def refuse_idle(avail_actions, steps):
    """Refuses an agent that has no available action although the episode isn't over."""
    idle = np.flatnonzero(~avail_actions.any(axis=-1))
    if len(idle):
        raise ValueError(f"agent {idle[0]} has no available action after {steps} steps of the episode")


def described_error(error):
    """Describes an error and the line that raised it, in one line."""
    where, trace = "", error.__traceback__
    while trace is not None:
        where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = " ".join(str(error).split())
    if type(error).__name__ == "SetupError":  # its sentence is complete
        return text
    return f"{type(error).__name__}: {text} ({where})"


def answer(channel, status, text):
    """Sends a status byte, followed by the text's length and the text if there is a text or a failure."""
    data = text.encode()
    channel.sendall(status + struct.pack("<I", len(data)) + data if data or status == FAILED else status)


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]
    main()
