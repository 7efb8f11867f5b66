"""Output for the user: lines on stderr, and streams whose reader may end first."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def report(line: str) -> None:
    """Prints a line on stderr immediately."""
    print(line, file=sys.stderr, flush=True)


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
    """Sends the pending text of broken streams nowhere: Python would write it at exit, and fail once more."""
    for stream in filter(is_broken, streams):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Lets the process continue when its output has no reader any more, for example after ``| head``."""
    streams = _Lasting(sys.stdout), _Lasting(sys.stderr)
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield


class _Lasting:
    """A stream that accepts text for ever; once it has no reader, the text is dropped."""

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
