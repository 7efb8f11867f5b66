"""A group of options as the help shows it: each value beside what the docstring of its class says of it."""

import inspect
import itertools
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from wqmix_jax.errors import ConfigError
from wqmix_jax.options import target_class

COLUMN = 34
"""Where descriptions begin, unless a value reaches further."""

WIDTH = 120


def described(group: str, values: Mapping[str, Any]) -> str:
    """The group as yaml, descriptions as comments.

    Args:
        group: ``algo`` or ``env``.
        values: its options, the class in ``_target_``; one that can't be imported here leaves them undescribed.
    """
    try:
        told = attributes(target_class(group, values.get("_target_")))
    except ConfigError:
        told = {}
    told["_target_"] = "the class of these options"
    lines = (_lines(f"  {name}: {_flow(value)}", told.get(name, "")) for name, value in values.items())
    return "\n".join([f"{group}:", *itertools.chain.from_iterable(lines)])


def attributes(cls: type) -> dict[str, str]:
    """What a class and those that it subclasses say of their attributes in docstrings of Google's style."""
    found = {}
    for base in reversed(getattr(cls, "__mro__", ())):  # a function's name is refused when the run starts
        section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        section = re.split(r"\n(?=\S)", section)[0]
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split()).replace("`", "").removesuffix(".")
    return found


def _flow(value: Any) -> str:
    """A value as yaml has it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _lines(option: str, text: str) -> list[str]:
    """An option with its description, wrapped below itself."""
    column = max(COLUMN, len(option) + 2)
    wrapped = textwrap.wrap(text, WIDTH - column - 2)
    beside = itertools.zip_longest([option], wrapped, fillvalue="")
    return [f"{left:{column}}# {part}" for left, part in beside] if wrapped else [option]
