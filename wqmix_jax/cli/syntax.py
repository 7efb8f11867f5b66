"""The syntax of ``key=value`` texts.

Hydra's grammar takes ``1e3`` for a number, ``true`` for a boolean and a comma for a choice. A path or a name is none of
these: `as_text` quotes its value where hydra would read something else than what was written.
"""

import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException

from wqmix_jax.errors import ConfigError

FOLDERS = ("run_dir", "resume", "policy_file", "pymarl", "render", "out", "compilation_cache")
"""Options of a file or a folder. A comma in one makes no sweep."""

NAMES = (
    "logger.project", "logger.group", "env.map", "env.name", "env.difficulty", "env.game_version", "env.worker_python",
    "env.simulator", "env.module", "init_from",
)  # fmt: skip
"""Options of a name, or of a file that a sweep may vary."""

_TEXT = re.compile(rf"(\+{{0,2}}({'|'.join(map(re.escape, (*FOLDERS, *NAMES)))}))=(.*)", re.DOTALL)

_PLAIN_CHOICE = re.compile(r"[^,'\"()\[\]{}$]+(,[^,'\"()\[\]{}$]+)+")


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parses ``key=value`` texts as hydra does.

    Raises:
        ConfigError: at the first that can't be read.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        reason = [line for line in str(error).splitlines()[1:] if not line.startswith("See http")]
        message = f"{error.override!r} can't be read: options are written key=value"
        raise ConfigError(f"{message} ({' '.join(reason)})" if reason else message) from None


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Returns the dotted names of the options that are set."""
    return [override.key_or_group for override in parse_overrides(overrides)]


def as_text(arguments: Iterable[str]) -> list[str]:
    """Quotes the values of paths and names that hydra would read as something else.

    ``null`` stays the absence of a value, a quoted value is taken without its quotes, and ``${..}`` is interpolated.

    Args:
        arguments: of a command line, flags included.

    Raises:
        ConfigError: if a path starts with the ``~`` of a home folder, which only a shell replaces.
    """
    return [_as_text(argument) for argument in arguments]


def quoted(text: str) -> str:
    """Writes ``text`` so that hydra reads it as a string, whatever it holds."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _as_text(argument: str) -> str:
    found = _TEXT.fullmatch(argument)
    if found is None:
        return argument
    written, key, value = found.groups()
    if key in FOLDERS and re.match("~(/|$)", value):
        raise ConfigError(f"{argument} is not allowed: the shell didn't replace ~; write the path of the home folder")
    if key == "compilation_cache" and value.lower() in ("true", "false"):
        return argument
    if value == "null" or _is_read_as_written(written, key, value):
        return argument
    if key in NAMES and _PLAIN_CHOICE.fullmatch(value):
        return f"{written}={','.join(map(quoted, value.split(',')))}"
    return f"{written}={quoted(value)}"


def _is_read_as_written(written: str, key: str, value: str) -> bool:
    """Returns True if hydra reads the same string, a quoted one or, of a name, a choice or a range of values."""
    try:
        override = OverridesParser.create().parse_override(f"{written}={value}")
    except HydraException:
        return False
    if override.key_or_group != key:
        return False
    parsed = override._value
    if isinstance(parsed, ChoiceSweep):
        return key in NAMES and (
            not parsed.simple_form or all(isinstance(one, (str, QuotedString)) for one in parsed.list)
        )
    if override.is_sweep_override():
        return key in NAMES
    return isinstance(parsed, QuotedString) or parsed == value
