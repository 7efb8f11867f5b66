"""A replay of whole episodes on the device, each stored as one flat row of bytes.

An environment says how a step lies in the replay (`Environment.compress`); observations, state and availability are
recomputed from it when an episode is sampled. flashbax's item buffer keeps the rows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.envs.base import Environment
from wqmix_jax.ops.action_selection import with_idle_action
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.training.row_packing import Slots
from wqmix_jax.types import Array, Episode, Observation, PRNGKey, PyTree

ReplayState = Any


class StoredEpisode(NamedTuple):
    """An episode as an environment packs it.

    Attributes:
        steps: the packed environment states, leaves ``[.., T+1, ..]``; zero past the end.
        joint_action: ``[.., T, N]`` in the narrowest unsigned integer.
        reward: ``[.., T]`` float32.
        length: ``[..]`` int32, how many steps are real.
        terminated: ``[..]`` bool, whether the task ended after the last of them.
    """

    steps: PyTree
    joint_action: Array
    reward: Array
    length: Array
    terminated: Array


class Replay(NamedTuple):
    """The replay of one seed as pure functions; the trainer maps them over seeds.

    Attributes:
        init: ``() -> state``, empty.
        add: ``(state, episodes, keep) -> state``, stores ``StoredEpisode`` leaves ``[E, ..]`` where ``keep`` (a scalar
            bool) is true and leaves the state as it was elsewhere, in place in both cases.
        sample: ``(state, key) -> rows``, a batch ``[B, row_bytes]`` drawn uniformly with replacement.
        lengths: ``rows -> [B]`` int32, the episodes' lengths.
        decode: ``(rows, num_steps) -> Episode``, cut to the first ``num_steps`` (static) steps.
        decode_packed: ``(rows, slots) -> Episode``, the steps of these episodes that `Slots` ``[R, T+1]`` name.
        row_bytes: bytes of one stored episode.
        num_bytes: bytes of a seed's whole replay.
    """

    init: Callable[[], ReplayState]
    add: Callable[[ReplayState, StoredEpisode, Array], ReplayState]
    sample: Callable[[ReplayState, PRNGKey], Array]
    lengths: Callable[[Array], Array]
    decode: Callable[[Array, int], Episode]
    decode_packed: Callable[[Array, Slots], Episode]
    row_bytes: int
    num_bytes: int


def make_replay(env: Environment, *, buffer_size: int, batch_size: int) -> Replay:
    """A replay of ``buffer_size`` episodes of ``env`` that gives batches of ``batch_size``."""
    template = stored_template(env)
    row_bytes = sum(_num_bytes(leaf) for leaf in jax.tree.leaves(template))
    buffer = flashbax.make_item_buffer(
        max_length=buffer_size, min_length=batch_size, sample_batch_size=batch_size, add_batches=True
    )

    def init() -> ReplayState:
        state = buffer.init(jnp.zeros(row_bytes, jnp.uint8))
        return state.replace(experience=jnp.zeros(state.experience.shape, jnp.uint8))

    def add(state: ReplayState, episodes: StoredEpisode, keep: Array) -> ReplayState:
        rows = jax.vmap(_to_row)(episodes)
        # What lies there is written again where nothing may change: a select over the whole replay would copy it.
        places = (state.current_index + jnp.arange(rows.shape[0])) % buffer_size
        added = buffer.add(state, jnp.where(keep, rows, state.experience[0, places]))
        return added.replace(
            current_index=jnp.where(keep, added.current_index, state.current_index),
            is_full=jnp.where(keep, added.is_full, state.is_full),
        )

    def sample(state: ReplayState, key: PRNGKey) -> Array:
        with jax.numpy_rank_promotion("allow"):  # flashbax broadcasts its indices
            return buffer.sample(state, key).experience

    def lengths(rows: Array) -> Array:
        return jax.vmap(functools.partial(_from_row, template=template))(rows).length

    def decode(rows: Array, num_steps: int) -> Episode:
        stored = jax.vmap(functools.partial(_from_row, template=template))(rows)
        return _unpack(env, stored, num_steps)

    def decode_packed(rows: Array, slots: Slots) -> Episode:
        stored = jax.vmap(functools.partial(_from_row, template=template))(rows)
        return _unpack_slots(env, stored, slots)

    return Replay(init, add, sample, lengths, decode, decode_packed, row_bytes, row_bytes * buffer_size)


def stored_template(env: Environment) -> StoredEpisode:
    """Shapes and dtypes of one stored episode of ``env``."""
    spec = env.spec
    limit = spec.episode_limit

    def empty() -> StoredEpisode:
        step = env.compress(env.reset(jax.random.key(0, impl="threefry2x32")))
        return StoredEpisode(
            steps=jax.tree.map(lambda leaf: jnp.zeros((limit + 1, *leaf.shape), leaf.dtype), step),
            joint_action=jnp.zeros((limit, spec.num_agents), np.min_scalar_type(spec.num_actions - 1)),
            reward=jnp.zeros(limit, jnp.float32),
            length=jnp.int32(0),
            terminated=jnp.bool_(False),
        )

    with pinned_draws():
        return jax.eval_shape(empty)


def _unpack(env: Environment, stored: StoredEpisode, num_steps: int) -> Episode:
    """``StoredEpisode`` leaves ``[B, ..]`` to the `Episode` of their first ``num_steps`` steps, padding all zero."""
    steps = jnp.arange(num_steps + 1)[None, :]
    return _episode(
        _seen(env, jax.tree.map(lambda leaf: leaf[:, : num_steps + 1], stored.steps), steps <= stored.length[:, None]),
        joint_action=stored.joint_action[:, :num_steps],
        reward=stored.reward[:, :num_steps],
        ends=stored.terminated[:, None] & (steps[:, :-1] == stored.length[:, None] - 1),
        mask=steps[:, :-1] < stored.length[:, None],
    )


def _unpack_slots(env: Environment, stored: StoredEpisode, slots: Slots) -> Episode:
    """``StoredEpisode`` leaves ``[B, ..]`` to the `Episode` of what lies in ``slots``, padding all zero."""
    episode, step = slots.episode[:, :-1], slots.step[:, :-1]
    mask = slots.filled[:, :-1] & (step < stored.length[episode])
    packed = _episode(
        _seen(env, jax.tree.map(lambda leaf: leaf[slots.episode, slots.step], stored.steps), slots.filled),
        joint_action=jnp.where(mask[..., None], stored.joint_action[episode, step], 0),
        reward=jnp.where(mask, stored.reward[episode, step], 0.0),
        ends=mask & stored.terminated[episode] & (step == stored.length[episode] - 1),
        mask=mask,
    )
    return packed._replace(starts=slots.filled & (slots.step == 0))


def _seen(env: Environment, steps: PyTree, real: Array) -> Observation:
    """What was seen at packed states, leaves ``[R, T+1, ..]``, zero where they aren't ``real`` ``[R, T+1]``.

    An agent without an available action gets action 0, see `with_idle_action`; in padding nothing is available.
    """
    seen = jax.vmap(jax.vmap(env.decompress))(steps)
    seen = seen._replace(avail_actions=with_idle_action(seen.avail_actions))
    return jax.tree.map(lambda leaf: jax.vmap(jax.vmap(jnp.where))(real, leaf, jnp.zeros_like(leaf)), seen)


def _episode(seen: Observation, *, joint_action: Array, reward: Array, ends: Array, mask: Array) -> Episode:
    return Episode(
        obs=seen.obs,
        state=seen.state,
        avail_actions=seen.avail_actions,
        joint_action=joint_action.astype(jnp.int32),
        reward=reward,
        discount=1.0 - ends.astype(jnp.float32),
        mask=mask.astype(jnp.float32),
    )


def _num_bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _to_row(tree: PyTree) -> Array:
    """All leaves' bytes, one after another: ``[row_bytes]`` uint8."""

    def as_bytes(leaf: Array) -> Array:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
        return jax.lax.bitcast_convert_type(leaf, jnp.uint8).reshape(-1)

    return jnp.concatenate([as_bytes(leaf) for leaf in jax.tree.leaves(tree)])


def _from_row(row: Array, template: PyTree) -> PyTree:
    """The inverse of `_to_row` for a tree of the template's shapes and dtypes."""
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        flat = row[start : start + _num_bytes(leaf)]
        start += _num_bytes(leaf)
        if leaf.dtype == jnp.bool_:
            leaves.append(flat.reshape(leaf.shape).astype(jnp.bool_))
            continue
        width = () if leaf.dtype.itemsize == 1 else (leaf.dtype.itemsize,)
        leaves.append(jax.lax.bitcast_convert_type(flat.reshape(leaf.shape + width), leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
