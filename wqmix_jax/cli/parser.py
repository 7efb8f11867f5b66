"""Argument parsing whose errors are one line."""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from wqmix_jax.errors import refuse


class OneLineParser(argparse.ArgumentParser):
    """Prints an error as one line, where argparse would add its usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        refuse(message)


def overrides_parser(prog: str, help_text: Callable[[], str]) -> OneLineParser:
    """Returns the parser of a command whose arguments are overrides, ``KEY=VALUE``, and ``--config-dir``.

    Args:
        prog: the command.
        help_text: makes the text of ``--help``.
    """
    parser = OneLineParser(prog=prog)
    parser.format_help = help_text
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir")
    return parser


def out_file(text: str) -> Path:
    """An argument's type: a file to be written, checked before the work begins.

    Raises:
        ArgumentTypeError: if the file can't be written.
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
        ArgumentTypeError: if ``text`` is no whole number above 0.
    """
    number = integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: choose a whole number above 0")
    return number


def integer(text: str) -> int:
    """An argument's type: a whole number, ``1e3`` and the like included.

    Raises:
        ArgumentTypeError: if ``text`` is no whole number.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(f"{text} is not allowed: choose a whole number")
