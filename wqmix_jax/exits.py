"""How a run ends: its exit codes, and the signals that ask it to end.

Python's own handlers wait until the main thread is back from compiled code, which may take minutes. So a thread of its
own hears of every signal the moment it comes.
"""

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Self, TextIO

FAULT, REFUSED, SEEDS_FAILED = 1, 2, 3
"""Exit codes: something outside the run stopped it; an option was refused; the run is over but some seeds failed."""

CLOSED_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code of a command whose reader is gone, as a shell reports it."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ONE_SIGNAL = 1.0
"""Seconds in which signals count as one: ``timeout`` and some launchers signal a process, then its whole group."""


class OneLineParser(argparse.ArgumentParser):
    """Tells what is wrong in one line, where argparse would add its usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the process as an option that is refused does."""
        refuse(message)


def out_file(text: str) -> Path:
    """An argument's type: a file that is written in the end, so that what forbids it is told before the work.

    Raises:
        ArgumentTypeError: if it can't be written.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not allowed: it is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not allowed: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} is not allowed: it can't be written")
    return path


def count(text: str) -> int:
    """An argument's type: a whole number above 0, ``1e3`` and the like included.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    number = integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: choose a whole number above 0")
    return number


def integer(text: str) -> int:
    """An argument's type: a whole number, ``1e3`` and the like included.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(f"{text} is not allowed: choose a whole number")


def refuse(message: str, exit_code: int = REFUSED) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


def is_broken(stream: TextIO) -> bool:
    """Flushes a stream and reports whether its reader is gone."""
    try:
        stream.flush()
        number = stream.fileno()
    except BrokenPipeError:
        return True
    except OSError:  # no file is behind it
        return False
    poll = select.poll()  # what is written without a buffer is lost, and can't fail once more
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard(*streams: TextIO) -> None:
    """Sends what broken streams have yet to write nowhere: Python writes it at exit, and fails once more."""
    for stream in filter(is_broken, streams):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Lets the process go on when nobody reads its output any more, after ``| head`` say."""
    streams = _Lasting(sys.stdout), _Lasting(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield


class _Lasting:
    """A stream that takes text for ever; once nobody reads it, the text goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            discard(self._stream)
            return len(text)

    def flush(self) -> None:
        """See `io.IOBase.flush`."""
        discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RunError(Exception):
    """A run that had to stop; the message is one line that says why and what to do.

    Attributes:
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int = FAULT) -> None:
        super().__init__(message, exit_code)  # both, so that it can be pickled
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


def exit_code_of(signum: int) -> int:
    """What a shell reports of a process that a signal ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum


class StopSignals:
    """SIGTERM and SIGINT as a wish that the run looks at between two chunks; a second one ends the process at once.

    Only the main thread may handle signals; used in another it does nothing.

    Attributes:
        received: the first signal, or None so far.
    """

    def __init__(self, before_exit: Callable[[], None]) -> None:
        """``before_exit`` is called, in another thread, before the process ends at once."""
        self.received: int | None = None
        self._before_exit = before_exit
        self._at_once = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While nothing is worth saving: the first signal ends the process."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Self:
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old = {signum: signal.signal(signum, lambda *_: None) for signum in SIGNALS}
            self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            signal.set_wakeup_fd(self._old_wakeup)
            for signum, handler in self._old.items():
                signal.signal(signum, handler)
            self._writer.close()  # ends the thread
            self._thread.join()
            self._reader.close()

    def _watch(self) -> None:
        first = 0.0
        while data := self._reader.recv(1):
            signum = data[0]
            if signum not in SIGNALS:
                continue
            now = time.monotonic()
            if self._at_once or (self.received is not None and now - first >= ONE_SIGNAL):
                self._before_exit()
                sys.stderr.flush()
                os._exit(exit_code_of(signum))
            if self.received is not None:
                continue
            self.received, first = signum, now
            name = signal.Signals(signum).name
            print(f"{name}: saving at the end of this chunk; a second signal ends the run at once", file=sys.stderr)
