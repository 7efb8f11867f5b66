"""Checks an environment against its spec before anything is compiled.

Without the checks, a wrong size ends in an error deep inside a network, and the replay silently loses features that its
dtype can't hold.
"""

import functools
import inspect
import operator
import os
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.envs.base import Environment, draws_ahead, is_inside_jax
from wqmix_jax.errors import ConfigError
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.types import EnvSpec, Observation, PRNGKey, PyTree, StepOutcome

RESERVED_METRICS = (
    *("episode_return", "episode_return_std", "episode_length", "episode_length_std"),
    *("kind", "seed", "env_steps", "learner_steps", "episodes"),
)
"""Names that every record contains already, so that metrics of an environment can't have them."""

RENAMED = {"pack": "compress", "unpack": "decompress", "host": "external"}
"""Members of `Environment` by their former names: what overrides one of these would never be called."""

STEPS_COMPRESSED = 16
"""The number of steps whose states are compressed and decompressed as a trial."""

CLOSE = 1e-5
"""The relative difference allowed between decompressed and observed features: compiled programs round differently."""

_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), Path(__file__).parents[1])
)
"""Folders of code whose lines an error message doesn't name: the cause is in the code that calls it."""


class _Field(NamedTuple):
    """The required form of an array.

    Attributes:
        sizes: names of `EnvSpec` fields, one for each axis.
        kinds: the kinds of dtypes that are allowed, by numpy's letters.
        dtype: the dtype that messages ask for.
    """

    sizes: tuple[str, ...]
    kinds: str
    dtype: str


_OBSERVATION = {
    "obs": _Field(("num_agents", "obs_dim"), "fiub", "float32"),  # a number of another dtype is converted
    "state": _Field(("state_dim",), "fiub", "float32"),
    "avail_actions": _Field(("num_agents", "num_actions"), "b", "bool"),
}
_OUTCOME = {
    "reward": _Field((), "fiub", "float32"),  # a number of another dtype is converted
    "terminated": _Field((), "b", "bool"),
    "truncated": _Field((), "b", "bool"),
}


class _Fault(Exception):
    """A breach of an environment's contract; the message names the function and the field."""


@pinned_draws()
def check_environment(env: Environment) -> None:
    """Refuses an environment whose functions don't return what its spec and `Environment` promise.

    The functions are traced and nothing is compiled, with one exception: if an environment from outside this package
    stores anything but float32 observations, a small program compresses and decompresses a few of its states.

    Raises:
        ConfigError: with one line that names the function, the field, and what was expected and found.
    """
    try:
        _check_names(env)
        spec = _checked_spec(env)
        _check_shapes(env, spec)
        if _stores_its_own_way(env):
            _check_compression(env)
    except _Fault as fault:
        raise ConfigError(f"env={type(env).__name__} is not allowed: {fault}") from fault.__cause__


def _check_names(env: Environment) -> None:
    """Refuses methods and properties with the former names; an option may have such a name."""
    for former, name in RENAMED.items():
        found = inspect.getattr_static(type(env), former, None)
        if callable(found) or isinstance(found, property | functools.cached_property):
            raise _Fault(f"it defines {former}, which is called {name} now; rename it to {name}")


def _checked_spec(env: Environment) -> EnvSpec:
    spec = _called("spec", lambda: env.spec)
    if not isinstance(spec, EnvSpec):
        raise _Fault(f"spec is a {type(spec).__name__}; return a wqmix_jax.types.EnvSpec")
    for name, size in spec._asdict().items():
        if not _is_positive_integer(size):
            raise _Fault(f"spec.{name}={size!r}; return a positive integer")
    return spec


def _is_positive_integer(size: Any) -> bool:
    try:
        return operator.index(size) > 0 and not isinstance(size, bool)
    except TypeError:
        return False


def _check_shapes(env: Environment, spec: EnvSpec) -> None:
    """Traces every function once, the observation first: with a wrong size, `step` may fail for no visible reason."""
    # `eval_shape` runs the functions on shapes alone: no simulator is started and nothing is compiled.
    key = jax.eval_shape(_key)
    env_state = _traced("reset", env.reset, key)
    _check_fields("observe", _traced("observe", env.observe, env_state), Observation, _OBSERVATION, spec)
    compressed = _traced("compress", env.compress, env_state)
    _check_compressed(compressed)
    _check_fields("decompress", _traced("decompress", env.decompress, compressed), Observation, _OBSERVATION, spec)
    joint_action = jax.ShapeDtypeStruct((spec.num_agents,), jnp.int32)
    _check_step("step", env_state, _traced("step", env.step, env_state, joint_action, key), spec)
    if draws_ahead(env) and not _is_ours(env):
        noise = _traced("sample_noise", env.sample_noise, key)
        stepped = _traced("transition", env.transition, env_state, joint_action, noise)
        _check_step("transition", env_state, stepped, spec)
    _check_metrics(_traced("metrics", env.metrics, env_state))


def _check_step(name: str, env_state: PyTree, found: Any, spec: EnvSpec) -> None:
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], StepOutcome):
        raise _Fault(
            f"{name} returns {_described(found)}; return a pair, the next state and a wqmix_jax.types.StepOutcome"
        )
    _check_fields(name, found[1], StepOutcome, _OUTCOME, spec)
    _check_same_state(name, env_state, found[0])


def _check_fields(name: str, found: Any, kind: type, fields: dict[str, _Field], spec: EnvSpec) -> None:
    if not isinstance(found, kind):
        raise _Fault(f"{name} returns {_described(found)}; return a wqmix_jax.types.{kind.__name__}")
    for field, expected in fields.items():
        leaf = getattr(found, field)
        shape = tuple(getattr(spec, size) for size in expected.sizes)
        sizes = "".join(f", spec.{size}={getattr(spec, size)}" for size in expected.sizes)
        if not hasattr(leaf, "shape") or leaf.shape != shape or _kind(leaf) not in expected.kinds:
            needed = f"{expected.dtype}{list(shape)} is needed{sizes}"
            raise _Fault(f"{name} returns {field} of {_described(leaf)}, but {needed}")


def _check_compressed(compressed: PyTree) -> None:
    """Refuses leaves without bytes, such as `jax.random` keys: the replay stores bytes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(compressed):
        if not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_):
            needed = "integers, floats or bools are needed"
            raise _Fault(f"compress returns {_name(path)} of {_described(leaf)}, but {needed}")


def _check_same_state(name: str, first: PyTree, following: PyTree) -> None:
    """Refuses states whose structure, shapes or dtypes change in a step: a compiled loop needs states of one kind."""
    if jax.tree.structure(first) != jax.tree.structure(following):
        structures = f"{jax.tree.structure(following)}, but reset returns {jax.tree.structure(first)}"
        raise _Fault(f"{name} returns a state of another structure than reset: {structures}")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(first)]
    for path, one, other in zip(paths, jax.tree.leaves(first), jax.tree.leaves(following), strict=True):
        if one.shape != other.shape or not _becomes(other.dtype, one.dtype):
            differs = f"{_described(other)}, but reset returns it of {_described(one)}"
            raise _Fault(f"{name} returns the state's {_name(path)} of {differs}")


def _becomes(dtype: Any, other: Any) -> bool:
    """Returns True if arrays of ``dtype`` are promoted to ``other`` where the two meet."""
    if dtype == other:
        return True
    numbers = (jnp.issubdtype(each, np.number) or each == np.bool_ for each in (dtype, other))
    return all(numbers) and jnp.promote_types(dtype, other) == other


def _check_metrics(found: Any) -> None:
    if not isinstance(found, dict):
        raise _Fault(f"metrics returns {_described(found)}; return a dict of scalars")
    for name, leaf in found.items():
        if name in RESERVED_METRICS:
            raise _Fault(f"metrics returns {name!r}, which every record has already; choose another name")
        if getattr(leaf, "shape", None) != () or _kind(leaf) not in "fiub":
            raise _Fault(f"metrics returns {name!r} of {_described(leaf)}, but a scalar is needed: float32[]")


def _stores_its_own_way(env: Environment) -> bool:
    """Returns True if compression needs a trial: it may lose something, and playing starts no simulator.

    The environments of this package are exempt, because their tests cover it.
    """
    lossless = _compresses_by_default(env) and np.dtype(env.storage_dtype) == np.float32
    return not lossless and not _is_ours(env) and is_inside_jax(env)


def _is_ours(env: Environment) -> bool:
    return type(env).__module__.split(".")[0] == __name__.split(".")[0]


def _check_compression(env: Environment) -> None:
    """Plays a few random steps and compares each observation with the decompressed one."""
    seen, decompressed = jax.device_get(_called("step", lambda: jax.jit(lambda: _observed_twice(env))()))
    for name in Observation._fields:
        one, other = getattr(seen, name), getattr(decompressed, name)
        differs = ~np.isclose(one, other, rtol=CLOSE, atol=CLOSE, equal_nan=True)
        if differs.any():
            step, *where = (int(index) for index in np.argwhere(differs)[0])
            values = f"is {one[step, *where]} after {step} steps, but {other[step, *where]}"
            raise _Fault(f"{name}{where} {values} after compress and decompress; {_advice(env)}")


def _compresses_by_default(env: Environment) -> bool:
    return type(env).compress is Environment.compress and type(env).decompress is Environment.decompress


def _advice(env: Environment) -> str:
    if _compresses_by_default(env):
        return f"storage_dtype={np.dtype(env.storage_dtype)} can't hold it, choose a wider one"
    return "decompress must be the exact inverse of compress"


def _observed_twice(env: Environment) -> tuple[Observation, Observation]:
    """Returns the observations of an episode's first states, as they are and once compressed and decompressed.

    Leaves are ``[T, ..]``, the first state included.
    """
    reset_key, *keys = jax.random.split(_key(), 1 + min(STEPS_COMPRESSED, env.spec.episode_limit))

    def both(env_state: PyTree) -> tuple[Observation, Observation]:
        return env.observe(env_state), env.decompress(env.compress(env_state))

    def play(carry: tuple[PyTree, Any], key: PRNGKey) -> tuple[tuple[PyTree, Any], Any]:
        env_state, ended = carry
        action_key, step_key = jax.random.split(key)
        allowed = jnp.where(env.observe(env_state).avail_actions, 0.0, -jnp.inf)
        joint_action = jax.random.categorical(action_key, allowed).astype(jnp.int32)
        following, outcome = env.step(env_state, joint_action, step_key)
        # From its end on, an episode keeps its last state: an environment never resets by itself.
        following = jax.tree.map(lambda old, new: jnp.where(ended, old, new), env_state, following)
        return (following, ended | outcome.terminated | outcome.truncated), both(following)

    first = env.reset(reset_key)
    _, later = jax.lax.scan(play, (first, jnp.bool_(False)), jnp.stack(keys))
    return jax.tree.map(lambda one, others: jnp.concatenate([one[None], others]), both(first), later)


def _key() -> PRNGKey:
    return jax.random.key(0, impl="threefry2x32")


def _traced(name: str, function: Callable[..., Any], *args: Any) -> Any:
    return _called(name, lambda: jax.eval_shape(function, *args))


def _called(name: str, call: Callable[[], Any]) -> Any:
    """Calls a function of the environment; an error inside becomes one line that names the code."""
    try:
        return call()
    except (ConfigError, _Fault):
        raise
    except Exception as error:  # the user's code may raise anything
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise _Fault(f"{name} raises {type(error).__name__}: {text}{_where(error)}") from error


def _where(error: Exception) -> str:
    """Describes the line that raised ``error``: the deepest outside of Python's library and installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", *_LIBRARIES))]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def _kind(leaf: Any) -> str:
    """Returns numpy's letter for an array's kind of dtype; ``-`` for a dtype that numpy lacks, such as random keys."""
    if jnp.issubdtype(leaf.dtype, np.floating):  # bfloat16, too
        return "f"
    return getattr(leaf.dtype, "kind", "-")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "value"


def _described(found: Any) -> str:
    """Returns ``float32[2, 5]`` for an array, the type's name for anything else."""
    if hasattr(found, "shape") and hasattr(found, "dtype"):
        return f"{found.dtype}{list(found.shape)}"
    return type(found).__name__
