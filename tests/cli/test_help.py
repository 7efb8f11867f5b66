"""Descriptions of options in ``--help``."""

import pytest

from wqmix_jax import load_config
from wqmix_jax.cli.help import attributes, described_group
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR, names_of, options, target_class

GROUPS = [
    (group, path.stem)
    for group in ("algo", "env")
    for path in sorted((CONFIG_DIR / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]


@options
class Parent:
    """Shared options.

    Attributes:
        width: in `cells`.
        depth: how far down.
    """

    width: int
    depth: int


@options
class Child(Parent):
    """A class that inherits options.

    Attributes:
        depth: how far down
            a child goes: to ``width``, say.
        names: whatever they are.

    Raises:
        width: nothing; this is no attribute.
    """

    names: list[str]


def test_attributes_are_read_from_the_class_and_its_parents() -> None:
    assert attributes(Child) == {
        "width": "in cells",
        "depth": "how far down a child goes: to width, say",
        "names": "whatever they are",
    }
    assert attributes(int) == {}


def test_values_stand_beside_what_they_mean() -> None:
    values = {"_target_": f"{__name__}.Child", "width": 3, "depth": 1e-05, "names": ["a", "b"], "other": None}
    assert described_group("env", values).splitlines() == [
        "env:",
        f"  _target_: {__name__}.Child  # the class of these options",
        "  width: 3                        # in cells",
        "  depth: 1.0e-05                  # how far down a child goes: to width, say",
        "  names: [a, b]                   # whatever they are",
        "  other: null",
    ]


def test_a_long_description_is_wrapped_in_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wqmix_jax.cli.help.WIDTH", 50)
    assert described_group("algo", {"_target_": f"{__name__}.Child", "depth": 2}).splitlines()[-3:] == [
        "  depth: 2                        # how far down a",
        "                                  # child goes: to",
        "                                  # width, say",
    ]


def test_options_of_a_class_that_is_not_here_are_shown_without_a_word() -> None:
    for target in ("nowhere.Game", "os.getcwd"):
        assert described_group("env", {"_target_": target, "size": 3}).splitlines()[2:] == ["  size: 3"]


@pytest.mark.parametrize(("group", "name"), GROUPS, ids="/".join)
def test_every_option_is_described(group: str, name: str) -> None:
    chosen = [f"+algo={name}"] if group == "algo" else ["+algo=iql", f"env={name}"]
    values = load_values(*chosen)[group]
    try:
        cls = target_class(group, values["_target_"])
    except ConfigError as error:
        pytest.skip(str(error))
    assert set(values) - set(attributes(cls)) == {"_target_"}


def test_what_is_described_is_an_option() -> None:
    config = load_config("+algo=ow_qmix")
    for part in (config.algo, config.env):
        described = set(attributes(type(part)))
        assert set(names_of(type(part))) <= described <= set(type(part).__dataclass_fields__)
