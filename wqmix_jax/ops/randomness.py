"""Random draws: the settings of JAX on which numbers depend, pinned or recorded, and draws ahead of many steps."""

import contextlib
import os
from collections.abc import Iterator

import jax

from wqmix_jax.types import Array, PRNGKey

_RECORDED = {
    "jax_enable_x64": False,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_softmax_custom_jvp": False,
    "jax_disable_most_optimizations": False,
}

_NO_NUMBERS = ("--xla_force_host_platform_device_count", "--xla_dump")
"""Flags of XLA that change no number, or whose effect is recorded elsewhere."""


@contextlib.contextmanager
def pinned_draws() -> Iterator[None]:
    """Makes draws inside the context independent of the user's settings of JAX's random number generator.

    Also a decorator. A key's implementation is pinned where it is made; ``jax_threefry_partitionable`` decides what is
    drawn from it, and ``jax_default_prng_impl`` how libraries read raw key data. The pinned values are JAX's defaults
    since 0.5.
    """
    with jax.threefry_partitionable(True), jax.default_prng_impl("threefry2x32"):
        yield


def fold_in(keys: PRNGKey, count: Array) -> PRNGKey:
    """Folds one count into each of the keys ``[..]``."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, count)


def defines_last(cls: type, name: str, *, over: tuple[str, ...]) -> bool:
    """Returns True if ``cls`` or a base defines the method ``name``, and no class that is nearer to it one of ``over``.

    A method that gets random numbers can replace one that gets a key. A subclass may override either of them, and must
    not be played by the one that it inherits.
    """
    definer = next((base for base in cls.__mro__ if {name, *over} & vars(base).keys()), None)
    return definer is not None and name in vars(definer)


def numeric_settings() -> str:
    """Returns, in one line, the other settings of JAX and XLA that change numbers and are not the defaults."""
    known = jax.config.values
    found = {name: getattr(jax.config, name, known.get(name, default)) for name, default in _RECORDED.items()}
    changed = [f"{name}={value}" for name, value in found.items() if value != _RECORDED[name]]
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_NO_NUMBERS)]
    return ", ".join([*changed, *sorted(flags)]) or "the default"
