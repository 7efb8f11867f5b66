"""Worker processes that step simulators in parallel: shared memory for the data, one byte on a socket per command.

Neither this module nor a worker (``worker.py``) uses JAX. The memory has no name and a worker ends with its socket, so
nothing is left to remove after a crash; workers that hang are killed by a reaper that outlives this process.
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
"""The time that workers have to end by themselves."""
LOG_BYTES = 1 << 20
"""The size at which a worker's stderr is truncated."""

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
"""A program that kills the process groups on its list when its input ends, which happens however the parent dies."""


class Program(NamedTuple):
    """The program that a worker runs.

    Attributes:
        python: the interpreter.
        simulator: ``FILE.py:NAME`` or ``module:NAME`` of a `wqmix_jax.envs.host.simulator.Simulator`.
        options: the arguments of its constructor, as JSON can hold them.
    """

    python: str
    simulator: str
    options: Mapping[str, Any]


class WorkerError(RuntimeError):
    """A worker failed; the message describes the failure."""


def ask(program: Program, timeout: float) -> dict[str, Any]:
    """Returns a simulator's ``info`` and ``versions``, from a worker that is started for this question alone.

    Raises:
        WorkerError: if the simulator can't be made, ends before it has answered, or takes longer than ``timeout``
            seconds.
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
    """Notices Ctrl-C in any thread.

    Python's signal handlers run only in the main thread, which waits inside a compiled program. The byte that the C
    handler writes to a pipe (`signal.set_wakeup_fd`) arrives immediately.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
            weakref.finalize(self, os.close, fd)
        self._happened = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches for Ctrl-C inside this context, in the main thread.

        Does nothing where something else watches already, as `wqmix_jax.runs.signals.StopSignals` does.
        """
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
        """Interrupts whoever waits, as Ctrl-C does."""
        self._happened = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, bytes([signal.SIGINT]))

    def happened(self) -> bool:
        """Returns True if an interrupt has arrived that `read` or `trigger` has noticed."""
        return self._happened

    def read(self) -> None:
        """Reads the signals that have arrived."""
        with contextlib.suppress(BlockingIOError):
            self._happened |= signal.SIGINT in os.read(self._read, 4096)

    def fileno(self) -> int:
        """Returns a file descriptor that is readable when a signal has arrived."""
        return self._read


class Worker:
    """One process in its own process group, with the socket to it and the file of its stderr."""

    def __init__(self, program: Program, described: Mapping[str, Any]) -> None:
        """Starts the process, which makes its simulator and waits for commands.

        Args:
            program: what the process runs.
            described: the row, the seed, and the layout of the shared memory; see ``worker.py``.

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
        """Sends a command; a dead worker is noticed later, when it doesn't answer."""
        with contextlib.suppress(OSError):
            self.channel.sendall(command)

    def receive(self) -> str | None:
        """Receives the answer to a command: None if it was carried out, otherwise the cause of the failure."""
        try:
            status = self.channel.recv(1)
        except OSError:  # the worker ended before it read its command, say
            return self.death()
        if status == worker.FAILED:
            return self.receive_text() or self.death()
        return None if status == worker.DONE else self.death()

    def receive_text(self) -> str | None:
        """Receives the text that follows a status; None if the worker ended before the text was complete."""
        self.channel.settimeout(SECONDS_TO_CLOSE)  # the rest of an answer that has begun arrives soon
        with contextlib.suppress(OSError), self.channel.makefile("rb") as stream:
            length = int.from_bytes(stream.read(4), "little")
            text = stream.read(length)
            if length and len(text) == length:
                return text.decode(errors="replace")
        return None

    def trim_log(self) -> None:
        """Empties the file of stderr once it is longer than `LOG_BYTES`."""
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)

    def hang_up(self) -> None:
        """Closes the connection, so that the worker closes its simulator and ends."""
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_WR)

    def end(self, deadline: float) -> None:
        """Kills the whole process group once the worker has ended, at the latest at the deadline (`time.monotonic`)."""
        with contextlib.suppress(OSError, WorkerError):
            while _readable(self.channel, deadline - time.monotonic()):
                if not self.channel.recv(4096):
                    break
        # Before `wait`: until then the process, even a dead one, reserves its number, which no other group can get.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.close()
        self._log.close()

    def death(self) -> str:
        """Describes how the process ended, with the last line of its stderr."""
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
    """One worker for each row of the arrays.

    Attributes:
        arrays: ``[rows, ..]`` by name, in memory that the workers write to.
    """

    def __init__(self, program: Program, fields: Mapping[str, tuple[Any, tuple[int, ...]]], metrics: list[str]) -> None:
        """Makes the memory; `start` makes the workers.

        Args:
            program: what the workers run.
            fields: dtype and shape of each array, whose first axis is the rows; the widest dtypes come first, so that
                every array is aligned.
            metrics: names of the simulator's metrics.
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
        """Returns arrays of one dtype that are stored one after another as one flat array."""
        first = self.arrays[names[0]]
        size = sum(self.arrays[name].size for name in names)
        offset = next(offset for name, _, _, offset in self._layout if name == names[0])
        return np.ndarray(size, first.dtype, buffer=self._block, offset=offset)

    def __contains__(self, row: int) -> bool:
        return row in self._workers

    def start(self, row: int, seed: int) -> None:
        """Starts the worker of a row, after ending the row's present worker."""
        self.kill(row)
        described = {
            "seed": seed,
            "memory": self._memory,
            "layout": self._layout,
            "row": row,
            "metrics": self._metrics,
        }
        self._workers[row] = Worker(self._program, described)
        self._notify_reaper("+", self._workers[row])

    def kill(self, row: int) -> None:
        """Ends the worker of a row with all processes that it has started."""
        if row in self._workers:
            ended = self._workers.pop(row)
            ended.end(deadline=0.0)
            self._notify_reaper("-", ended)

    def command(
        self, command: bytes, rows: Iterable[int], *, timeout: float, launch_timeout: float, interrupt: "Interrupt"
    ) -> dict[int, str]:
        """Lets the workers of ``rows`` carry out a command in parallel, and waits for them.

        Args:
            command: ``worker.RESET`` or ``worker.STEP``.
            rows: rows whose workers carry it out.
            timeout: seconds.
            launch_timeout: seconds for the first command of a worker, which starts its game.
            interrupt: ends the waiting when it happens.

        Returns:
            The cause of each failure, by row.
        """
        waiting = {row: self._workers[row] for row in rows}
        for asked in waiting.values():
            asked.send(command)
        started, causes = time.monotonic(), {}
        deadlines = {row: launch_timeout if asked.fresh else timeout for row, asked in waiting.items()}
        poller = select.poll()
        row_by_fd = {asked.channel.fileno(): row for row, asked in waiting.items()}
        for fd in (*row_by_fd, interrupt.fileno()):
            poller.register(fd, select.POLLIN)
        while waiting:
            left = started + min(deadlines[row] for row in waiting) - time.monotonic()
            ready = [fd for fd, _ in poller.poll(max(0.0, left) * 1000)]
            if interrupt.fileno() in ready:
                interrupt.read()
            if interrupt.happened():
                return causes | dict.fromkeys(waiting, "interrupted")
            for row in [row_by_fd[fd] for fd in ready if fd in row_by_fd]:
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
        """Ends all workers and frees the memory."""
        # All workers are asked to end their games before the first is waited for, so that they do it in parallel.
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
        """Returns the process numbers of the workers, in the order of their rows."""
        return [self._workers[row].process.pid for row in sorted(self._workers)]

    def _notify_reaper(self, sign: str, member: Worker) -> None:
        """Adds ("+") or removes ("-") a worker's process group on the reaper's list."""
        with contextlib.suppress(OSError):
            os.write(self._reaper.stdin.fileno(), f"{sign}{member.process.pid}\n".encode())  # type: ignore[union-attr]


def _readable(channel: socket.socket, timeout: float) -> bool:
    """Waits for at most ``timeout`` seconds until something arrives; returns True if it has."""
    # `poll` and not `select`, which accepts no descriptor above 1023.
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(max(0.0, timeout) * 1000))


def _layout(fields: Mapping[str, tuple[Any, tuple[int, ...]]]) -> tuple[list[tuple[str, str, list[int], int]], int]:
    """Returns name, dtype, shape and offset of each array, as JSON can hold them, and the size of the memory."""
    placed, end = [], 0
    for name, (dtype, shape) in fields.items():
        placed.append((name, np.dtype(dtype).str, list(shape), end))
        end += int(np.prod(shape)) * np.dtype(dtype).itemsize
    return placed, end


def _unnamed_memory(num_bytes: int) -> int:
    """Returns the descriptor of memory that vanishes with the last process that holds it and leaves no file behind."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("wqmix_jax")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, num_bytes)
    return memory
