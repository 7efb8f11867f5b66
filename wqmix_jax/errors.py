"""Errors that end a command with one line, and its exit codes."""

import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn


class ConfigError(ValueError):
    """A refused configuration; the message is one line that names the key, the value and what is allowed."""


FAULT, REFUSED, SEEDS_FAILED = 1, 2, 3
"""Exit codes: a fault outside the run stopped it; an option was refused; the run is over but some seeds failed."""

CLOSED_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
"""Exit code of a command whose output is no longer read, as a shell reports it."""


def refuse(message: str, exit_code: int = REFUSED) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


class RunError(Exception):
    """A run that had to stop; the message is one line that says why and what to do.

    Attributes:
        exit_code: the exit code of the process.
    """

    def __init__(self, message: str, exit_code: int = FAULT) -> None:
        super().__init__(message, exit_code)  # both, so that it can be pickled
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


def exit_code_of(signum: int) -> int:
    """Returns the exit code that a shell reports for a process ended by a signal: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + signum


def install_extra(extra: str) -> str:
    """Returns the command that installs an extra: make in the environment of a checkout, otherwise pip."""
    checkout = Path(__file__).parent.parent
    if (checkout / "Makefile").is_file() and Path(sys.prefix) == checkout / ".venv":
        return f"make setup EXTRAS={extra}"
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    return f"pip install 'wqmix_jax[{extra}]'"


def error_line(error: Exception) -> str:
    """Returns the first line of another library's error, with its type where the text alone says little."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, ValueError | AssertionError) and text else f"{type(error).__name__}: {text}"
