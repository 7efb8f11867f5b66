"""The signals that ask a run to end.

Python's own handlers wait until the main thread is back from compiled code, which may take minutes. So a separate
thread receives every signal as soon as it arrives.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from wqmix_jax.errors import exit_code_of

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ONE_SIGNAL = 1.0
"""Seconds in which signals count as one: ``timeout`` and some launchers signal a process, then its whole group."""


class StopSignals:
    """Turns SIGTERM and SIGINT into a request that the run reads between two chunks; a second signal ends the process.

    Only the main thread may handle signals; in another thread this does nothing.

    Attributes:
        received: the number of the first signal, or None if there was none yet.
    """

    def __init__(self, before_exit: Callable[[], None]) -> None:
        """Takes a function that is called, in another thread, before the process ends immediately."""
        self.received: int | None = None
        self._before_exit = before_exit
        self._immediate = False

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Lets the first signal end the process, while there is nothing worth saving."""
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

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
            if self._immediate or (self.received is not None and now - first >= ONE_SIGNAL):
                self._before_exit()
                sys.stderr.flush()
                os._exit(exit_code_of(signum))
            if self.received is not None:
                continue
            self.received, first = signum, now
            name = signal.Signals(signum).name
            print(f"{name}: saving at the end of this chunk; a second signal ends the run immediately", file=sys.stderr)
