"""Worker processes that step simulators side by side: shared memory for the data, a byte on a socket per command.

Nothing here knows JAX, nor does a worker (``worker.py``). The memory has no name and a worker ends with its socket, so
nothing needs to be found and removed after a crash; what hangs is killed by a reaper that outlives this process.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from wqmix_jax.envs.host import worker

PROGRAM = Path(worker.__file__)
SECONDS_TO_CLOSE = 5.0
LOG_BYTES = 1 << 20

REAPER = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""
"""Kills the groups that are still on its list when its input ends, which it does however the parent dies."""


class Program(NamedTuple):
    """What a worker runs.

    Attributes:
        python: the interpreter.
        simulator: ``FILE.py:NAME`` or ``module:NAME`` of a `wqmix_jax.envs.host.simulator.Simulator`.
        options: of its constructor, as JSON can tell them.
    """

    python: str
    simulator: str
    options: Mapping[str, Any]


class WorkerError(RuntimeError):
    """A worker failed; the message says how."""


def ask(program: Program, timeout: float) -> dict[str, Any]:
    """What a simulator says of itself, its ``info`` and ``versions``, from a worker that ends again.

    Raises:
        WorkerError: where it can't be made, ends before it has answered, or takes longer than ``timeout`` seconds.
    """
    asked = Worker(program, {"seed": 0, "memory": None, "layout": [], "row": 0, "metrics": []})
    try:
        asked.send(worker.INFO)
        if not _readable(asked.channel, timeout):
            raise WorkerError(f"it did not answer within {timeout:g} s")
        if cause := asked.receive():
            raise WorkerError(cause)
        answer = asked.receive_text()
        if answer is None:
            raise WorkerError(asked.death())
        return json.loads(answer)
    finally:
        asked.hang_up()
        asked.end(time.monotonic() + SECONDS_TO_CLOSE)


class Interrupt:
    """Ctrl-C, seen from any thread.

    Python's own handler runs in the main thread alone, which waits inside a compiled program: only the C handler's byte
    in a pipe (`signal.set_wakeup_fd`) arrives at once.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
            weakref.finalize(self, os.close, fd)
        self._happened = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches for it, where this is the main thread and nobody else does (`wqmix_jax.runs.signals.StopSignals`)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)

    def trigger(self) -> None:
        """Makes it happen."""
        self._happened = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, bytes([signal.SIGINT]))

    def happened(self) -> bool:
        """Whether it has happened, since this was made, as far as `read` has seen."""
        return self._happened

    def read(self) -> None:
        """Looks which signals have come."""
        with contextlib.suppress(BlockingIOError):
            self._happened |= signal.SIGINT in os.read(self._read, 4096)

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._read


class Worker:
    """One process in a group of its own, with the socket to it and what it writes to stderr."""

    def __init__(self, program: Program, described: Mapping[str, Any]) -> None:
        """Starts it; it makes its simulator at once and waits.

        Raises:
            WorkerError: if the interpreter can't be started.
        """
        self.channel, theirs = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (`end` closes it)
        argument = {**program._asdict(), **described, "socket": theirs.fileno()}
        passed = [fd for fd in (theirs.fileno(), described["memory"]) if fd is not None]
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [program.python, str(PROGRAM), json.dumps(argument)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._log,
                    pass_fds=passed,
                    start_new_session=True,
                    env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
                )
            except OSError as error:  # not a program after all, or no process or memory is left
                self.channel.close()
                self._log.close()
                raise WorkerError(f"{program.python} can't be started: {error.strerror}") from error
        self.fresh = True

    def send(self, command: bytes) -> None:
        """Sends a command; that the worker is dead shows when it doesn't answer."""
        with contextlib.suppress(OSError):
            self.channel.sendall(command)

    def receive(self) -> str | None:
        """The cause of a failure, None where the command was carried out."""
        try:
            status = self.channel.recv(1)
        except OSError:  # as of a worker that ended before it had read its command
            return self.death()
        if status == worker.FAILED:
            return self.receive_text() or self.death()
        return None if status == worker.DONE else self.death()

    def receive_text(self) -> str | None:
        """The text that follows a status; None where the worker ended before it was complete."""
        self.channel.settimeout(SECONDS_TO_CLOSE)  # an answer that has begun comes at once
        with contextlib.suppress(OSError), self.channel.makefile("rb") as stream:
            length = int.from_bytes(stream.read(4), "little")
            text = stream.read(length)
            if length and len(text) == length:
                return text.decode(errors="replace")
        return None

    def trim_log(self) -> None:
        """Forgets what was written to stderr once it is much."""
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)

    def hang_up(self) -> None:
        """Tells it to close its simulator and end."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_WR)

    def end(self, deadline: float) -> None:
        """Kills its whole group, once it has ended by itself or at the deadline (`time.monotonic`)."""
        with contextlib.suppress(OSError, WorkerError):
            while _readable(self.channel, deadline - time.monotonic()):
                if not self.channel.recv(4096):
                    break
        # Before `wait`: until then the process, even a dead one, keeps the group's number from being used again.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()
        self._log.close()

    def death(self) -> str:
        """Describes how the process ended, with the last line that it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=SECONDS_TO_CLOSE)
        code = self.process.returncode
        if code is None:
            how = "closed its connection without ending"
        else:
            how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(max(0, os.fstat(self._log.fileno()).st_size - 4000))
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        return " ".join([f"worker {how}", *(f"({line[-400:].strip()})" for line in last)])


class Pool:
    """As many workers as rows, each with its row of the arrays.

    Attributes:
        arrays: by name, ``[rows, ..]``, in memory that the workers write to.
    """

    def __init__(self, program: Program, fields: Mapping[str, tuple[Any, tuple[int, ...]]], metrics: list[str]) -> None:
        """Makes the memory; `start` makes the workers.

        Args:
            program: what they run.
            fields: dtype and shape of each array, its first axis the rows; the widest dtypes come first.
            metrics: what the simulator measures.
        """
        self._program, self._metrics = program, metrics
        self._layout, num_bytes = _layout(fields)
        self._memory = _unnamed_memory(num_bytes)
        self._block = mmap.mmap(self._memory, num_bytes)
        self.arrays = {
            name: np.ndarray(shape, dtype, buffer=self._block, offset=offset)
            for name, dtype, shape, offset in self._layout
        }
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", REAPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._workers: dict[int, Worker] = {}

    def flat(self, names: Sequence[str]) -> np.ndarray:
        """Arrays of one dtype that lie one after another, as one."""
        first = self.arrays[names[0]]
        size = sum(self.arrays[name].size for name in names)
        offset = next(offset for name, _, _, offset in self._layout if name == names[0])
        return np.ndarray(size, first.dtype, buffer=self._block, offset=offset)

    def __contains__(self, row: int) -> bool:
        return row in self._workers

    def start(self, row: int, seed: int) -> None:
        """Starts the worker of a row, in the place of the one that is there."""
        self.kill(row)
        described = {
            "seed": seed,
            "memory": self._memory,
            "layout": self._layout,
            "row": row,
            "metrics": self._metrics,
        }
        self._workers[row] = Worker(self._program, described)
        self._tell_reaper("+", self._workers[row])

    def kill(self, row: int) -> None:
        """Ends the worker of a row, with all that it has started."""
        if row in self._workers:
            ended = self._workers.pop(row)
            ended.end(deadline=0.0)
            self._tell_reaper("-", ended)

    def command(
        self, command: bytes, rows: Iterable[int], *, timeout: float, launch_timeout: float, interrupt: "Interrupt"
    ) -> dict[int, str]:
        """Has the workers of ``rows`` carry out a command, all at once, and waits for them.

        Args:
            command: ``worker.RESET`` or ``worker.STEP``.
            rows: whose workers.
            timeout: seconds.
            launch_timeout: seconds where a worker carries out its first command.
            interrupt: once it has happened, nobody is waited for any longer.

        Returns:
            By row, the causes of what failed.
        """
        waiting = {row: self._workers[row] for row in rows}
        for asked in waiting.values():
            asked.send(command)
        started, causes = time.monotonic(), {}
        deadlines = {row: launch_timeout if asked.fresh else timeout for row, asked in waiting.items()}
        poller = select.poll()
        row_of = {asked.channel.fileno(): row for row, asked in waiting.items()}
        for fd in (*row_of, interrupt.fileno()):
            poller.register(fd, select.POLLIN)
        while waiting:
            left = started + min(deadlines[row] for row in waiting) - time.monotonic()
            ready = [fd for fd, _ in poller.poll(max(0.0, left) * 1000)]
            if interrupt.fileno() in ready:
                interrupt.read()
            if interrupt.happened():
                return causes | dict.fromkeys(waiting, "interrupted")
            for row in [row_of[fd] for fd in ready if fd in row_of]:
                fd = waiting[row].channel.fileno()
                poller.unregister(fd)
                asked = waiting.pop(row)
                asked.fresh = False
                if cause := asked.receive():
                    causes[row] = cause
            if not ready:
                late = [row for row in waiting if time.monotonic() - started >= deadlines[row]]
                causes |= {row: f"hung for {deadlines[row]:g} s" for row in late}
                for row in late:
                    poller.unregister(waiting.pop(row).channel.fileno())
        return causes

    def trim_logs(self) -> None:
        """See `Worker.trim_log`."""
        for held in self._workers.values():
            held.trim_log()

    def close(self) -> None:
        """Ends all workers, those first that have still to end their games, and leaves nothing behind."""
        for held in self._workers.values():
            held.hang_up()
        deadline = time.monotonic() + SECONDS_TO_CLOSE
        for held in self._workers.values():
            held.end(deadline)
        self._workers.clear()
        self._reaper.kill()  # nothing is left on its list
        self._reaper.wait()
        if self._reaper.stdin is not None:
            with contextlib.suppress(OSError):
                self._reaper.stdin.close()
        os.close(self._memory)

    def pids(self) -> Collection[int]:
        """Of the workers, in the order of their rows."""
        return [self._workers[row].process.pid for row in sorted(self._workers)]

    def _tell_reaper(self, sign: str, of: Worker) -> None:
        with contextlib.suppress(OSError):
            os.write(self._reaper.stdin.fileno(), f"{sign}{of.process.pid}\n".encode())  # type: ignore[union-attr]


def _readable(channel: socket.socket, timeout: float) -> bool:
    """Waits for at most ``timeout`` seconds until something arrives; `select.select` takes no descriptor above 1023."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(max(0.0, timeout) * 1000))


def _layout(fields: Mapping[str, tuple[Any, tuple[int, ...]]]) -> tuple[list[tuple[str, str, list[int], int]], int]:
    """Where each array lies in the memory, as JSON can tell it, and how long that is."""
    placed, end = [], 0
    for name, (dtype, shape) in fields.items():
        placed.append((name, np.dtype(dtype).str, list(shape), end))
        end += int(np.prod(shape)) * np.dtype(dtype).itemsize
    return placed, end


def _unnamed_memory(num_bytes: int) -> int:
    """The descriptor of memory that is gone with the last process that has it; no file can be left behind."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("wqmix_jax")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, num_bytes)
    return memory
