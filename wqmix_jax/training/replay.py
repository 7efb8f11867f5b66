"""A replay of whole episodes on the device, each stored as one flat row of bytes.

An environment chooses the compact form in which a step is stored (`Environment.compress`); observations, state and
availability are recomputed from it when an episode is sampled. flashbax's item buffer keeps the rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import jax
import jax.numpy as jnp

from wqmix_jax.envs.base import Environment
from wqmix_jax.ops.action_selection import with_idle_action
from wqmix_jax.ops.byte_rows import from_row, row_bytes, to_row
from wqmix_jax.training.rollout import stored_template
from wqmix_jax.training.row_packing import RowLayout
from wqmix_jax.types import Array, Episode, Observation, PRNGKey, PyTree, StoredEpisode

ReplayState = Any


class Replay(NamedTuple):
    """The replay of one seed as pure functions; the compiled loop maps them over seeds.

    Attributes:
        init: ``() -> state``, empty.
        add: ``(state, episodes, is_active) -> state``, stores ``StoredEpisode`` leaves ``[E, ..]`` if ``is_active`` (a
            scalar bool) is true and otherwise leaves the state unchanged, in place in both cases.
        sample: ``(state, key) -> rows``, a batch ``[B, row_bytes]`` drawn uniformly with replacement.
        next_indices: ``(state, count) -> [count]`` int32, where the next ``count`` episodes will be stored.
        rows_at: ``(state, indices) -> rows``, the episodes at ``[B]``.
        lengths: ``rows -> [B]`` int32, the episodes' lengths.
        rewards: ``rows -> [B, T]``, their rewards.
        decode: ``(rows, num_steps) -> Episode``, cut to the first ``num_steps`` (static) steps, or padded to them.
        decode_packed: ``(rows, layout) -> Episode``, in the places of a `RowLayout` ``[R, T+1]``.
        row_bytes: bytes of one stored episode.
        num_bytes: bytes of a seed's whole replay.
    """

    init: Callable[[], ReplayState]
    add: Callable[[ReplayState, StoredEpisode, Array], ReplayState]
    sample: Callable[[ReplayState, PRNGKey], Array]
    next_indices: Callable[[ReplayState, int], Array]
    rows_at: Callable[[ReplayState, Array], Array]
    lengths: Callable[[Array], Array]
    rewards: Callable[[Array], Array]
    decode: Callable[[Array, int], Episode]
    decode_packed: Callable[[Array, RowLayout], Episode]
    row_bytes: int
    num_bytes: int


def make_replay(env: Environment, *, buffer_size: int, batch_size: int, latent: PyTree = ()) -> Replay:
    """Returns a replay of ``buffer_size`` episodes of ``env`` from which batches of ``batch_size`` are sampled.

    Args:
        env: the environment.
        buffer_size: the most episodes.
        batch_size: ``B``.
        latent: the shapes and dtypes of an episode's latent, see `wqmix_jax.algos.base.latent_template`.
    """
    template = stored_template(env, latent)
    num_bytes = row_bytes(template)
    buffer = flashbax.make_item_buffer(
        max_length=buffer_size, min_length=batch_size, sample_batch_size=batch_size, add_batches=True
    )

    def init() -> ReplayState:
        # flashbax promises no contents; zeros let equal runs have equal checkpoints.
        state = buffer.init(jnp.zeros(num_bytes, jnp.uint8))
        return state.replace(experience=jnp.zeros(state.experience.shape, jnp.uint8))

    def next_indices(state: ReplayState, count: int) -> Array:
        return (state.current_index + jnp.arange(count)) % buffer_size

    def add(state: ReplayState, episodes: StoredEpisode, is_active: Array) -> ReplayState:
        rows = jax.vmap(to_row)(episodes)  # [E, row_bytes]
        # The replay is by far the largest array of a run, and it must stay in place: a select between the replay before
        # and after would copy all of it in every iteration. So rows are written in any case, either the new ones or
        # those that are already there, and only the two small counters are selected.
        indices = next_indices(state, len(rows))
        added = buffer.add(state, jnp.where(is_active, rows, state.experience[0, indices]))
        return added.replace(
            current_index=jnp.where(is_active, added.current_index, state.current_index),
            is_full=jnp.where(is_active, added.is_full, state.is_full),
        )

    def sample(state: ReplayState, key: PRNGKey) -> Array:
        with jax.numpy_rank_promotion("allow"):  # flashbax broadcasts its indices
            return buffer.sample(state, key).experience

    def rows_at(state: ReplayState, indices: Array) -> Array:
        return state.experience[0, indices]

    def lengths(rows: Array) -> Array:
        return jax.vmap(functools.partial(from_row, template=template))(rows).length

    def rewards(rows: Array) -> Array:
        return jax.vmap(functools.partial(from_row, template=template))(rows).reward

    def decode(rows: Array, num_steps: int) -> Episode:
        stored = jax.vmap(functools.partial(from_row, template=template))(rows)
        return _first_steps(env, stored, num_steps)

    def decode_packed(rows: Array, layout: RowLayout) -> Episode:
        stored = jax.vmap(functools.partial(from_row, template=template))(rows)
        return _packed_rows(env, stored, layout)

    return Replay(
        init=init,
        add=add,
        sample=sample,
        next_indices=next_indices,
        rows_at=rows_at,
        lengths=lengths,
        rewards=rewards,
        decode=decode,
        decode_packed=decode_packed,
        row_bytes=num_bytes,
        num_bytes=num_bytes * buffer_size,
    )


def _first_steps(env: Environment, stored: StoredEpisode, num_steps: int) -> Episode:
    """Returns the first ``num_steps`` steps, one episode per row: leaves ``[B, ..]`` -> ``[B, num_steps(+1), ..]``.

    More steps than an episode can have are padding. It is added to compact states, before anything large exists.
    """
    steps = jnp.arange(num_steps + 1)[None, :]
    compact = jax.tree.map(lambda leaf: with_length(leaf, num_steps + 1), stored.steps), steps <= stored.length[:, None]
    batch = _episode(
        _seen(env, *compact),
        joint_action=with_length(stored.joint_action, num_steps),
        reward=with_length(stored.reward, num_steps),
        terminated=stored.terminated[:, None] & (steps[:, :-1] == stored.length[:, None] - 1),
        mask=steps[:, :-1] < stored.length[:, None],
    )
    each_place = lambda leaf: jnp.broadcast_to(leaf[:, None], (*compact[1].shape, *leaf.shape[1:]))  # noqa: E731
    latent = _where_filled(compact[1], jax.tree.map(each_place, stored.latent))
    return batch._replace(compact=jax.tree_util.Partial(functools.partial(_obs, env), *compact), latent=latent)


def _obs(env: Environment, steps: PyTree, is_filled: Array) -> Array:
    """Returns the observations of `_seen` alone, ``[R, T+1, N, O]``."""
    return _seen(env, steps, is_filled).obs


def with_length(leaf: Array, length: int, axis: int = 1) -> Array:
    """Cuts an axis to the first ``length`` entries, or pads it to them with zeros."""
    leaf = jax.lax.slice_in_dim(leaf, 0, min(length, leaf.shape[axis]), axis=axis)
    widths = [(0, length - size if place == axis else 0) for place, size in enumerate(leaf.shape)]
    return jnp.pad(leaf, widths) if length > leaf.shape[axis] else leaf


def _packed_rows(env: Environment, stored: StoredEpisode, layout: RowLayout) -> Episode:
    """Returns rows that episodes share: leaves ``[B, ..]``, a layout ``[R, T+1]`` -> ``[R, T(+1), ..]``.

    Observations are at all ``T+1`` places; actions and rewards at the first ``T``, where the place after an episode's
    last step, which has an observation only, is masked.
    """
    # Compact states are gathered first and observed afterwards, so that observations are computed for rows that are
    # nearly full, and not for the padding of whole episodes.
    episode, step = layout.episode[:, :-1], layout.step[:, :-1]
    mask = layout.filled[:, :-1] & (step < stored.length[episode])
    packed = _episode(
        _seen(env, jax.tree.map(lambda leaf: leaf[layout.episode, layout.step], stored.steps), layout.filled),
        joint_action=jnp.where(mask[..., None], stored.joint_action[episode, step], 0),
        reward=jnp.where(mask, stored.reward[episode, step], 0.0),
        terminated=mask & stored.terminated[episode] & (step == stored.length[episode] - 1),
        mask=mask,
    )
    latent = _where_filled(layout.filled, jax.tree.map(lambda leaf: leaf[layout.episode], stored.latent))
    return packed._replace(starts=layout.filled & (layout.step == 0), latent=latent)


def _seen(env: Environment, steps: PyTree, is_filled: Array) -> Observation:
    """Returns the observations of compact states, leaves ``[R, T+1, ..]``, zero where not ``is_filled`` ``[R, T+1]``.

    An agent without an available action gets action 0, see `with_idle_action`; in padding nothing is available.
    """
    seen = jax.vmap(jax.vmap(env.decompress))(steps)
    seen = seen._replace(avail_actions=with_idle_action(seen.avail_actions))
    return _where_filled(is_filled, seen)


def _where_filled(is_filled: Array, tree: PyTree) -> PyTree:
    """Returns leaves ``[R, T+1, ..]``, zero where not ``is_filled`` ``[R, T+1]``."""
    return jax.tree.map(lambda leaf: jax.vmap(jax.vmap(jnp.where))(is_filled, leaf, jnp.zeros_like(leaf)), tree)


def _episode(seen: Observation, *, joint_action: Array, reward: Array, terminated: Array, mask: Array) -> Episode:
    """Builds rows of an `Episode`, with the dtypes that losses get.

    Args:
        seen: leaves ``[.., T+1, ..]``.
        joint_action: ``[.., T, N]``.
        reward: ``[.., T]``.
        terminated: ``[.., T]`` bool, at the last step of an episode that the task ended.
        mask: ``[.., T]`` bool.
    """
    return Episode(
        obs=seen.obs,
        state=seen.state,
        avail_actions=seen.avail_actions,
        joint_action=joint_action.astype(jnp.int32),
        reward=reward,
        discount=1.0 - terminated.astype(jnp.float32),
        mask=mask.astype(jnp.float32),
    )
