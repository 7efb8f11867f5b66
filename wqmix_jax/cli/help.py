"""The text of ``--help``: every option with its value and the description in the docstring of its class."""

import dataclasses
import inspect
import itertools
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from wqmix_jax.config import RunConfig, names
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR, target_class

COLUMN = 34
"""The column of descriptions, unless a value reaches further."""

WIDTH = 120

_TRAIN = """\
Trains one algorithm on one environment, all seeds in one compiled call.

  python -m wqmix_jax.train +algo=NAME [env=NAME] [+preset=NAME] [key=value ..]
  python -m wqmix_jax.train resume=RUN_DIR [total_env_steps=N]
  python -m wqmix_jax.train --multirun +algo=NAME,NAME key=value,value

algo: {algo}
env:  {env}
preset: {preset}, options that are set together; those on the command line override them
--config-dir DIR   adds DIR/algo/*.yaml, DIR/env/*.yaml and DIR/preset/*.yaml, whose classes may be your own
--cfg job          shows the options instead of training

The options of a run, with their defaults; write a key with its dots, as in checkpoint.every=50000:

{options}

The options of the environment, and with +algo=NAME of the algorithm:

{groups}"""


def train_help(values: Mapping[str, Any], config_dir: str | os.PathLike[str] | None) -> str:
    """Returns the help of ``wqmix_jax.train``.

    Args:
        values: the options of a run, maybe without an algorithm.
        config_dir: a folder with the user's yamls.
    """
    chosen = [described_group(group, values[group]) for group in ("env", "algo") if group in values]
    run = {name: value for name, value in values.items() if name not in ("env", "algo")}
    listed = {group: names(group, config_dir) for group in ("algo", "env", "preset")}
    return _TRAIN.format(**listed, options="\n".join(described(RunConfig, run)), groups="\n\n".join(chosen))


def described_group(group: str, values: Mapping[str, Any]) -> str:
    """Returns an algorithm's or environment's options as yaml, with descriptions as comments.

    Args:
        group: ``algo`` or ``env``.
        values: its options, the class in ``_target_``; the options of one that can't be imported have no descriptions.
    """
    try:
        cls = target_class(group, values.get("_target_"))
    except ConfigError:
        cls = object
    return "\n".join([f"{group}:", *described(cls, values, indent="  ")])


def with_options(head: str, cls: type, file: str) -> str:
    """Returns a command's help: ``head``, and the options of ``cls`` with their defaults in the yaml ``file``."""
    values = yaml.safe_load((CONFIG_DIR / file).read_text())
    del values["defaults"]
    return head + "".join(f"{line}\n" for line in described(cls, values, indent="  "))


def described(cls: type, values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yields the lines of options as yaml, with descriptions as comments.

    Args:
        cls: the class of the options.
        values: their values; those of a field whose type is a class of options are a group.
        indent: precedes each line.
    """
    descriptions = {"_target_": "the class of these options", **attributes(cls)}
    fields = getattr(cls, "__dataclass_fields__", {})
    for name, value in values.items():
        declared = fields[name].type if name in fields else None
        if isinstance(value, Mapping) and dataclasses.is_dataclass(declared):
            yield f"{indent}{name}:"
            yield from described(declared, value, indent=f"{indent}  ")  # type: ignore[arg-type]
        else:
            yield from _lines(f"{indent}{name}: {_flow(value)}", descriptions.get(name, ""))


def attributes(cls: type) -> dict[str, str]:
    """Returns the descriptions of a class's attributes, from its docstring and those of its parents."""
    found = {}
    for base in reversed(getattr(cls, "__mro__", ())):  # a function's name is refused when the run starts
        section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        section = re.split(r"\n(?=\S)", section)[0]
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split()).replace("`", "").removesuffix(".")
    return found


def _flow(value: Any) -> str:
    """Writes a value as yaml on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


def _lines(option: str, text: str) -> list[str]:
    """Returns an option with its description, wrapped in a column."""
    column = max(COLUMN, len(option) + 2)
    wrapped = textwrap.wrap(text, WIDTH - column - 2)
    pairs = itertools.zip_longest([option], wrapped, fillvalue="")
    return [f"{left:{column}}# {part}" for left, part in pairs] if wrapped else [option]
