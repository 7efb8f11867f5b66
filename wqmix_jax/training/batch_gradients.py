"""Every seed's gradient on a batch of its replay, without the padding that can be left out."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from wqmix_jax.algos.base import Algorithm, Context, Hyperparams, is_mean_over_steps
from wqmix_jax.envs.base import Environment
from wqmix_jax.training.devices import BATCH_AXIS
from wqmix_jax.training.learner import LearnerState, gradients
from wqmix_jax.training.replay import Replay
from wqmix_jax.training.row_packing import Slots, pack
from wqmix_jax.types import Array, PRNGKey, PyTree

MAX_LENGTHS, MIN_LENGTH = 4, 16
"""A batch is cut to the shortest of a few static lengths that holds its longest episode. Each costs compile time."""

LARGE_TILE, SMALL_TILE = 64, 16
"""On a CPU, where a learner step costs what it computes, short episodes share rows, and the rows are learned from in
tiles, as many as there are. These are rows times agents: of OW-QMIX on predator-prey tiles larger than the large one
cost no less per row; small ones cost more, but leave less of the last one empty."""

Batches = Literal["whole", "cut", "packed"]

CPU_CACHE_BYTES = 4 * 2**20
"""On a CPU, seeds learn together while their decoded batches are no larger: eight seeds of predator-prey that learn one
after the other take three quarters of the time that they take at once, and an eighth of its temporaries."""


class Batching(NamedTuple):
    """How batches are learned from, see `make_batching`.

    Attributes:
        algo: whose loss is minimised.
        replay: what decodes a batch.
        episode_limit: ``T``.
        lengths: those that a batch may be cut to, ascending.
        tiles: rows of a large and of a small tile where batches are packed.
        parts: how many devices share a batch.
        groups: in at least how many groups the seeds of a device learn, one after the other.
        cache_bytes: that a group's decoded batches may take, more than one seed's; None where it doesn't matter.
    """

    algo: Algorithm
    replay: Replay
    episode_limit: int
    lengths: list[int]
    tiles: tuple[int, int] | None
    parts: int
    groups: int
    cache_bytes: int | None


def make_batching(
    env: Environment, algo: Algorithm, replay: Replay, sharding: Sharding, *, groups: int, batches: Batches | None
) -> Batching:
    """What becomes of padding on these devices.

    Args:
        env: whose episodes are learned from.
        algo: whose loss is minimised.
        replay: what decodes a batch.
        sharding: the devices; those along the batch axis share a batch.
        groups: in at least how many equal groups the seeds of a device learn, one after the other, so that only one
            group's intermediate arrays are there at a time. On a CPU they are as small as `CPU_CACHE_BYTES` asks for.
        batches: ``packed`` into few rows, see `LARGE_TILE`, needs a loss that is marked by `mean_over_steps`, and is
            the default with one on a CPU, unless even the longest episodes are too short to be cut. ``cut`` to one of a
            few lengths, see `MAX_LENGTHS`, is the default elsewhere, where a loop costs by its length. Both save time,
            and tie a seed's rounding to the seeds beside it; ``whole`` batches are for comparison.

    Raises:
        ValueError: ``batches`` are to be packed for a loss that isn't marked.
    """
    limit, on_cpu = env.spec.episode_limit, next(iter(sharding.device_set)).platform == "cpu"
    lengths = _static_lengths(limit)
    if batches is None:
        batches = "packed" if on_cpu and is_mean_over_steps(algo) and len(lengths) > 1 else "cut"
    elif batches == "packed" and not is_mean_over_steps(algo):
        raise ValueError(
            f"batches={batches} is not allowed: the loss of {type(algo).__name__} isn't marked `mean_over_steps`"
        )
    parts = sharding.mesh.shape[BATCH_AXIS] if isinstance(sharding, NamedSharding) else 1
    return Batching(
        algo=algo,
        replay=replay,
        episode_limit=limit,
        lengths=[limit] if batches == "whole" else lengths,
        tiles=_tiles(env.spec.num_agents, algo.batch_size // parts) if batches == "packed" else None,
        parts=parts,
        groups=groups,
        cache_bytes=CPU_CACHE_BYTES if on_cpu else None,
    )


def batch_gradients(
    batching: Batching,
    learner: LearnerState,
    rows: Array,
    keys: PRNGKey,
    hp: Hyperparams,
    ctx: Context,
    ready: Array,
) -> tuple[PyTree, dict[str, Array]]:
    """Each seed's gradient on its batch, and the loss's metrics.

    How much padding is left out is the same for all seeds of a group, since its branches are real ones.

    Args:
        batching: see `make_batching`.
        learner: leaves ``[S, ..]``.
        rows: ``[S, B, row_bytes]``, what the replay gave.
        keys: ``[S]``, for what a loss draws.
        hp: leaves ``[S]``.
        ctx: leaves ``[S]``.
        ready: ``[S]`` bool. Nobody wants what the others learn: their batch counts as empty, and so as short as can be.
    """
    whole = jax.eval_shape(lambda row: batching.replay.decode(row, batching.episode_limit), rows[0])
    shapes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), whole)
    noise = jax.vmap(lambda key: batching.algo.sample_noise(key, shapes))(keys)
    lengths = jnp.where(ready[:, None], jax.vmap(batching.replay.lengths)(rows), 0)
    if batching.tiles is None:
        lengths, rows, noise = _own_part(batching, (lengths, rows, noise))
    seeds = (lengths, learner, rows, noise, hp, ctx)
    num_groups = _num_groups(batching, rows[:, : batching.algo.batch_size // batching.parts])
    if batching.tiles is None:
        means = _in_groups(functools.partial(_cut_gradients, batching), num_groups, seeds)
        return _averaged(batching, means, lengths.sum(-1))
    terms = _in_groups(functools.partial(_packed_gradients, batching, batching.tiles), num_groups, seeds)
    return terms if batching.parts == 1 else jax.lax.psum(terms, BATCH_AXIS)


def _cut_gradients(batching: Batching, lengths: Array, *seeds: PyTree) -> tuple[PyTree, dict[str, Array]]:
    """On the batches cut to the shortest static length that holds their longest episode."""
    limit = batching.episode_limit

    def on_first(num_steps: int) -> Callable[..., tuple[PyTree, dict[str, Array]]]:
        def one_seed(
            learner: LearnerState, rows: Array, noise: PyTree, hp: Hyperparams, ctx: Context
        ) -> tuple[PyTree, dict[str, Array]]:
            noise = jax.tree.map(lambda leaf: leaf[:, : leaf.shape[1] - limit + num_steps], noise)
            return gradients(batching.algo, learner, batching.replay.decode(rows, num_steps), hp, ctx, noise)

        return jax.vmap(one_seed)

    choice = (lengths.max() > jnp.asarray(batching.lengths[:-1], jnp.int32)).sum()
    return jax.lax.switch(choice, [on_first(length) for length in batching.lengths], *seeds)


def _packed_gradients(
    batching: Batching, tiles: tuple[int, int], lengths: Array, *seeds: PyTree
) -> tuple[PyTree, dict[str, Array]]:
    """On the batches packed into few rows: the mean over one tile of rows after the other, by their real steps.

    Devices that share a batch take its rows in turn, and what is returned are their terms of the mean.
    """
    limit, (large, small) = batching.episode_limit, tiles
    slots, num_rows = _own_rows(batching, *jax.vmap(lambda of_seed: pack(of_seed, limit))(lengths))
    # Tiles may reach past the last row.
    slots = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, large), (0, 0))), slots)
    num_steps = jnp.maximum(lengths.sum(-1), 1)

    def of_tile(
        num_places: Array,
        slots: Slots,
        all_steps: Array,
        learner: LearnerState,
        rows: Array,
        noise: PyTree,
        hp: Hyperparams,
        ctx: Context,
    ) -> tuple[PyTree, dict[str, Array]]:
        batch = batching.replay.decode_packed(rows, slots)._replace(num_places=num_places)
        noise = jax.tree.map(
            lambda leaf: leaf[slots.episode[:, : leaf.shape[1]], slots.step[:, : leaf.shape[1]]], noise
        )
        share = batch.mask.sum() / all_steps
        means = gradients(batching.algo, learner, batch, hp, ctx, noise)
        # A seed that has no step in this tile may have no mean either.
        return jax.tree.map(lambda mean: jnp.where(share > 0, share * mean, 0), means)

    def tile_means(first: Array, size: int) -> tuple[PyTree, dict[str, Array]]:
        tile = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size, axis=1), slots)
        num_places = jnp.where(tile.filled.any((0, 1)), jnp.arange(1, limit + 2), 0).max()
        return jax.vmap(functools.partial(of_tile, num_places))(tile, num_steps, *seeds)

    def add_tiles(size: int, while_left: int, so_far: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        def add(so_far: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            first, sums = so_far
            return first + size, jax.tree.map(jnp.add, sums, tile_means(first, size))

        return jax.lax.while_loop(lambda so_far: num_rows.max() - so_far[0] >= while_left, add, so_far)

    shapes = jax.eval_shape(lambda: tile_means(jnp.int32(0), small))
    nothing = jnp.int32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # A large tile is taken where small ones would cover about as many rows.
    so_far = add_tiles(large, large - small + 1, nothing)
    return (add_tiles(small, 1, so_far) if small < large else so_far)[1]


def _num_groups(batching: Batching, rows: Array) -> int:
    """In how many groups the seeds of ``rows`` ``[S, B, ..]`` learn, a divisor of ``S``."""
    num_seeds, wanted = rows.shape[0], batching.groups
    if batching.cache_bytes is not None:
        batch = jax.eval_shape(lambda row: batching.replay.decode(row, batching.episode_limit), rows[0])
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
        at_once = max(1, min(num_seeds, batching.cache_bytes // num_bytes))
        wanted = max(wanted, math.ceil(num_seeds / at_once))
    return next(number for number in range(wanted, num_seeds + 1) if num_seeds % number == 0)


def _in_groups(function: Callable[..., PyTree], num_groups: int, args: tuple[PyTree, ...]) -> PyTree:
    """``function(*args)`` for leaves ``[S, ..]``, a part of the seeds after the other."""
    if num_groups == 1:
        return function(*args)
    grouped = jax.tree.map(lambda leaf: leaf.reshape(num_groups, -1, *leaf.shape[1:]), args)
    results = jax.lax.map(lambda group: function(*group), grouped)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)


def _own_part(batching: Batching, batch: PyTree) -> PyTree:
    """This device's episodes, where several share a batch: leaves ``[S, B, ..]`` to ``[S, B / parts, ..]``."""
    if batching.parts == 1:
        return batch
    size = batching.algo.batch_size // batching.parts
    start = jax.lax.axis_index(BATCH_AXIS) * size
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1), batch)


def _own_rows(batching: Batching, slots: Slots, num_rows: Array) -> tuple[Slots, Array]:
    """This device's rows, where several share a batch: leaves ``[S, B, ..]`` to ``[S, B / parts, ..]``.

    And how many of them aren't empty, ``[S]``, of ``num_rows`` in all.
    """
    if batching.parts == 1:
        return slots, num_rows
    device = jax.lax.axis_index(BATCH_AXIS)

    def in_turn(leaf: Array) -> Array:
        dealt = leaf.reshape(leaf.shape[0], -1, batching.parts, *leaf.shape[2:])
        return jax.lax.dynamic_index_in_dim(dealt, device, axis=2, keepdims=False)

    return jax.tree.map(in_turn, slots), (num_rows - device + batching.parts - 1) // batching.parts


def _averaged(batching: Batching, means: PyTree, num_steps: Array) -> PyTree:
    """The means over whole batches, leaves ``[S, ..]``, of means over parts that have ``num_steps`` ``[S]`` each."""
    if batching.parts == 1:
        return means
    share = num_steps / jnp.maximum(jax.lax.psum(num_steps, BATCH_AXIS), 1)
    return jax.lax.psum(jax.tree.map(functools.partial(jax.vmap(jnp.multiply), share), means), BATCH_AXIS)


def _tiles(num_agents: int, batch_size: int) -> tuple[int, int]:
    """Rows of a large and of a small tile."""
    large, small = (min(max(1, size // num_agents), batch_size) for size in (LARGE_TILE, SMALL_TILE))
    return large, small


def _static_lengths(episode_limit: int) -> list[int]:
    """Ascending, evenly spaced; the last is the limit itself."""
    num_lengths = max(1, min(MAX_LENGTHS, episode_limit // MIN_LENGTH))
    return [-(-episode_limit * part // num_lengths) for part in range(1, num_lengths + 1)]
