"""Each seed's gradient on a batch of its replay, without the padding that can be left out.

Words for a batch and its parts, from large to small:

- batch: the ``B`` episodes that one seed samples for a learner step;
- group: the seeds that learn simultaneously on a device; the groups of a device take turns (`num_groups`);
- part: the share of each batch that a device learns from, where several devices share it;
- tile: some rows of all packed batches of a group, learned from together;
- row: an episode, or several one after another (`row_packing`), ``T+1`` places long;
- place: a time step of a row.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from wqmix_jax.algos.base import (
    Algorithm,
    Aux,
    Context,
    Hyperparams,
    Trained,
    hyperparams,
    is_mean_over_steps,
    skips_padding,
    takes_own_steps,
    with_values,
)
from wqmix_jax.envs.base import Environment
from wqmix_jax.errors import ConfigError
from wqmix_jax.networks.functional import BlockForm, unroll_in_blocks
from wqmix_jax.ops.moments import Moments
from wqmix_jax.ops.td import masked_mean
from wqmix_jax.training.devices import BATCH_AXIS
from wqmix_jax.training.learner import LearnerState, init_learner, optimizer_step
from wqmix_jax.training.replay import Replay, with_length
from wqmix_jax.training.row_packing import RowLayout, first_fit_rows
from wqmix_jax.types import Array, Episode, PRNGKey, PyTree

MAX_LENGTHS, MIN_LENGTH = 4, 16
"""A batch is cut to the shortest of a few static lengths that holds its longest episode. Each costs compile time."""

LARGE_TILE, SMALL_TILE = 64, 16
"""Sizes of tiles in rows times agents, for a CPU, where a learner step costs what it computes. Measured with OW-QMIX on
predator-prey: tiles above `LARGE_TILE` are no cheaper per row. `SMALL_TILE` costs more per row, but wastes fewer rows
at the end."""

_GPU_BLOCKS, _TPU_BLOCKS = (
    BlockForm(max_steps=32, steps_inline=32),
    BlockForm(12, steps_inline=1, recomputes=True),
)

BLOCK_FORMS = {"gpu": _GPU_BLOCKS, "cuda": _GPU_BLOCKS, "rocm": _GPU_BLOCKS, "tpu": _TPU_BLOCKS}
"""The platforms whose recurrent nets are unrolled in blocks. On a TPU, memory decides the length of a block: 12 steps
take 40 MB less per seed of OW-QMIX on predator-prey than 32."""

Batches = Literal["whole", "cut", "bounded", "packed"]

CPU_CACHE_BYTES = 4 * 2**20
"""On a CPU, seeds learn together while their decoded batches are no larger: for eight seeds of predator-prey, learning
in turn takes 25% less time than together, and an eighth of the temporaries."""


class Batching(NamedTuple):
    """Choices of how batches are learned from, made by `make_batching`.

    Attributes:
        algo: the algorithm.
        loss: `Algorithm.loss`, which is minimised; None if the algorithm overrides `Algorithm.update`.
        replay: decodes a batch.
        whole: shapes and dtypes of a decoded batch, ``[B, T(+1), ..]``.
        metric_names: the names of the loss's metrics.
        mean_names: the names of what `played_means` returns.
        lengths: the numbers of steps that a batch may be cut to, ascending; the last is ``T``. A bounded batch has one
            length, ``T`` or a little more, so that its places fill whole blocks of a `BlockForm`.
        tiles: rows of a large and of a small tile where batches are packed; None where they aren't.
        is_bounded: whether a batch is whole, and its unroll bounded by `Episode.num_places`.
        block_form: see `wqmix_jax.networks.functional.unroll_in_blocks`.
        num_parts: how many devices share a batch.
        memory_groups: the least number of groups, so that the temporaries fit into the memory; see `num_groups`.
        cache_seeds: the most seeds of a group whose decoded batches fit into a CPU's caches; None elsewhere.
    """

    algo: Algorithm
    loss: Callable[..., tuple[Array, Aux]] | None
    replay: Replay
    whole: Episode
    metric_names: tuple[str, ...]
    mean_names: tuple[str, ...]
    lengths: list[int]
    tiles: tuple[int, int] | None
    is_bounded: bool
    block_form: BlockForm | None
    num_parts: int
    memory_groups: int
    cache_seeds: int | None


class LearnerInputs(NamedTuple):
    """The input of one learner step of several seeds, leaves ``[S, ..]``.

    Attributes:
        learner: their learners.
        rows: ``[S, B, row_bytes]`` uint8, the sampled episodes as the replay stores them.
        lengths: ``[S, B]`` int32, the steps of each episode; all 0 for a seed that doesn't learn.
        importance: ``[S, B]``, the weight of each episode; None if they are all the same.
        noise: ``[S, B, T(+1), ..]``, the random numbers of the loss.
        hp: the traced options.
        ctx: the progress of training.
    """

    learner: LearnerState
    rows: Array
    lengths: Array
    importance: Array | None
    noise: PyTree
    hp: Hyperparams
    ctx: Context


class Gradients(NamedTuple):
    """The results of `batch_gradients`; while they are summed up, terms of them.

    Attributes:
        grads: each seed's gradient, leaves ``[S, ..]``; or, of an algorithm that overrides `Algorithm.update`, the
            `Trained` that this returned.
        metrics: the loss's metrics, ``[S]`` float32.
        errors: ``[S, B]``, the sum of the absolute TD errors of each episode; None unless episodes are prioritised.
    """

    grads: PyTree
    metrics: dict[str, Array]
    errors: Array | None


def make_batching(
    env: Environment,
    algo: Algorithm,
    replay: Replay,
    sharding: Sharding,
    *,
    memory_groups: int = 1,
    batches: Batches | None = None,
    platform: str | None = None,
) -> Batching:
    """Chooses how padded steps are skipped and how many seeds learn simultaneously on these devices.

    Args:
        env: the environment of the episodes.
        algo: the algorithm whose loss is minimised.
        replay: decodes a batch.
        sharding: the devices; those along the batch axis share a batch.
        memory_groups: the least number of groups, see `num_groups`.
        batches: ``packed`` into few rows is the default on a CPU, unless even the longest episodes are too short to be
            cut. ``bounded`` is the default elsewhere: whole batches, whose unroll ends with the longest episode. Both
            need a loss that is marked by `mean_over_steps`; for an algorithm that overrides `Algorithm.update`, that
            override must be marked, and its batches are never packed. In all other cases batches are ``cut`` to one of
            a few lengths, see `MAX_LENGTHS`. All of these save time, and make the rounding of a seed's numbers depend
            on the other seeds; ``whole`` batches are for tests and benchmarks.
        platform: decides the form of the recurrent part, see `BLOCK_FORMS`, and the defaults; that of the devices if
            absent.

    Raises:
        ValueError: ``batches`` are to be packed or bounded for a loss that isn't marked.
        ConfigError: the loss has no metric ``loss``.
    """
    limit, platform = env.spec.episode_limit, platform or next(iter(sharding.device_set)).platform
    lengths, on_cpu, block_form = _static_lengths(limit), platform == "cpu", BLOCK_FORMS.get(platform)
    if batches is None:
        allows = is_mean_over_steps if on_cpu else skips_padding
        batches = "cut" if len(lengths) == 1 or not allows(algo) else "packed" if on_cpu else "bounded"
    elif batches == "packed" and takes_own_steps(algo):
        raise ValueError(f"batches=packed is not allowed: {type(algo).__name__} has its own `update`")
    elif batches in ("packed", "bounded") and not skips_padding(algo):
        raise ValueError(
            f"batches={batches} is not allowed: the loss of {type(algo).__name__} isn't marked `mean_over_steps`"
        )
    if batches == "whole":
        lengths = [limit]
    elif batches == "bounded":
        lengths = [limit if block_form is None else _whole_blocks(block_form, limit)]
    num_parts = sharding.mesh.shape[BATCH_AXIS] if isinstance(sharding, NamedSharding) else 1
    rows = jax.ShapeDtypeStruct((algo.batch_size, replay.row_bytes), jnp.uint8)
    whole = jax.eval_shape(lambda rows: replay.decode(rows, limit), rows)
    part_bytes = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole._replace(compact=None))) // num_parts
    )
    metric_names, mean_names = _metric_names(env, algo, whole)
    return Batching(
        algo=algo,
        loss=None if takes_own_steps(algo) else algo.loss,
        replay=replay,
        whole=whole,
        metric_names=metric_names,
        mean_names=mean_names,
        lengths=lengths,
        tiles=_tiles(env.spec.num_agents, algo.batch_size // num_parts) if batches == "packed" else None,
        is_bounded=batches == "bounded",
        block_form=block_form,
        num_parts=num_parts,
        memory_groups=memory_groups,
        cache_seeds=max(1, CPU_CACHE_BYTES // part_bytes) if on_cpu else None,
    )


def batch_gradients(
    batching: Batching,
    learner: LearnerState,
    rows: Array,
    keys: PRNGKey,
    hp: Hyperparams,
    ctx: Context,
    ready: Array,
    importance: Array | None = None,
) -> Gradients:
    """Computes each seed's gradient on its batch, and the loss's metrics.

    How much padding is skipped is the same for all seeds of a group, so that it is a real branch and not a select.

    Where devices share a batch, all of them hold it undecoded and know all lengths. Each learns from one part and
    returns its terms of the mean over the batch: the means over its own steps, times their share of all steps.

    Args:
        batching: see `make_batching`.
        learner: leaves ``[S, ..]``.
        rows: ``[S, B, row_bytes]``, sampled from the replay.
        keys: ``[S]``, for the loss's random numbers.
        hp: leaves ``[S]``.
        ctx: leaves ``[S]``.
        ready: ``[S]`` bool. The batch of a seed that is not ready counts as empty, so that it takes the least time; its
            gradient is to be discarded.
        importance: see `LearnerInputs`; needed where episodes are prioritised.
    """
    # Noise is drawn for whole episodes, from their shapes alone, before any of them is decoded: then the random numbers
    # of an episode's step are the same however the batch is cut, packed, grouped or shared afterwards. `sample_noise`
    # takes an `Episode`, so it gets one of zeros, which the compiler removes.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batching.whole)
    noise = jax.vmap(lambda key: batching.algo.sample_noise(key, zeros))(keys)
    lengths = jnp.where(ready[:, None], jax.vmap(batching.replay.lengths)(rows), 0)
    inputs = LearnerInputs(learner, rows, lengths, importance, noise, hp, ctx)
    gradients = functools.partial(_packed_gradients if batching.tiles is not None else _cut_gradients, batching)
    groups = num_groups(batching, len(rows))
    if groups == 1:
        terms = gradients(inputs)
    else:  # [S, ..] -> [groups, S / groups, ..], one group after another, and back
        grouped = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), inputs)
        terms = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), jax.lax.map(gradients, grouped))
    return terms if batching.num_parts == 1 else jax.lax.psum(terms, BATCH_AXIS)


def played_means(
    batching: Batching, learner: LearnerState, rows: Array, keys: PRNGKey, hp: Hyperparams, ctx: Context, ready: Array
) -> dict[str, Array]:
    """Averages `Algorithm.played_means` over all steps of the episodes just played.

    Args:
        batching: see `make_batching`.
        learner: leaves ``[S, ..]``; its targets have played.
        rows: ``[S, E, row_bytes]``, all episodes, of which a batch is a part.
        keys: ``[S]``, from which nothing is drawn that has an effect.
        hp: leaves ``[S]``.
        ctx: leaves ``[S]``.
        ready: see `batch_gradients`.

    Returns:
        ``[S]`` float32 by name.
    """

    def no_loss(params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, *others: Any) -> tuple[Array, Aux]:
        return jnp.float32(0), batching.algo.played_means(target, batch, hp)

    batches = rows.reshape(len(rows), -1, batching.algo.batch_size, rows.shape[-1]).swapaxes(0, 1)  # [E / B, S, B, ..]
    averaging = batching._replace(loss=no_loss, metric_names=batching.mean_names)

    def sums(rows: Array) -> tuple[dict[str, Array], Array]:
        means = batch_gradients(averaging, learner, rows, keys, hp, ctx, ready).metrics
        num_steps = jax.vmap(batching.replay.lengths)(rows).sum(-1).astype(jnp.float32)
        return jax.tree.map(lambda mean: mean * num_steps, means), num_steps

    totals, num_steps = jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(sums, batches))
    return jax.tree.map(lambda total: total / jnp.maximum(num_steps, 1), totals)


def num_groups(batching: Batching, num_seeds: int) -> int:
    """Returns the number of equal groups in which the ``num_seeds`` seeds of a device learn, one after another.

    The least divisor of ``num_seeds`` that is enough for two reasons: at least ``memory_groups``, because the
    intermediate arrays of one group exist at a time (`wqmix_jax.runs.memory` raises it until they fit), and at least
    ``cache_groups``, because small groups are faster on a CPU (`CPU_CACHE_BYTES`).
    """
    cache_groups = 1 if batching.cache_seeds is None else math.ceil(num_seeds / batching.cache_seeds)
    least = max(batching.memory_groups, cache_groups)
    return next(number for number in range(least, num_seeds + 1) if num_seeds % number == 0)


def _cut_gradients(batching: Batching, inputs: LearnerInputs) -> Gradients:
    """Learns from the batches cut to the shortest static length that holds their longest episode.

    Bounded batches have one length, the whole one, and the unroll ends with their longest episode.
    """
    limit = batching.whole.reward.shape[1]
    own = inputs.rows, inputs.lengths, inputs.importance, inputs.noise
    rows, lengths, importance, noise = _own_episodes(batching, own)

    def at_length(num_steps: int, rows: Array, noise: PyTree) -> Gradients:
        batch = jax.vmap(lambda rows: batching.replay.decode(rows, num_steps))(rows)
        batch = batch._replace(num_places=lengths.max() + 1 if batching.is_bounded else None)
        if importance is not None:
            batch = batch._replace(importance=jnp.broadcast_to(importance[..., None], batch.mask.shape))
        # [S, B, T(+1), ..]: noise of a leaf with T+1 steps keeps one more than that of a leaf with T.
        noise = jax.tree.map(lambda leaf: with_length(leaf, leaf.shape[2] - limit + num_steps, axis=2), noise)
        gradient = _seeds_gradient(batching, batch)
        grads, aux = gradient(inputs.learner, batch, inputs.hp, inputs.ctx, noise)
        metrics = {name: metric.astype(jnp.float32) for name, metric in aux.metrics.items()}
        return Gradients(grads, metrics, None if importance is None else _errors(batch, aux).sum(-1))

    # One compiled copy of the loss per length. The longest episode of any seed chooses: a branch can't depend on the
    # seed, since under `vmap` all copies would run.
    choice = (lengths.max() > jnp.asarray(batching.lengths[:-1], jnp.int32)).sum()
    branches = [functools.partial(at_length, length) for length in batching.lengths]
    means = jax.lax.switch(choice, branches, rows, noise)
    if batching.num_parts == 1:
        return means
    share = lengths.sum(-1) / jnp.maximum(inputs.lengths.sum(-1), 1)
    grads, metrics = jax.tree.map(functools.partial(jax.vmap(jnp.multiply), share), means[:2])
    errors = None if means.errors is None else _at_own_episodes(batching, means.errors)
    return Gradients(grads, metrics, errors)


def _packed_gradients(batching: Batching, inputs: LearnerInputs) -> Gradients:
    """Learns from the batches packed into few rows, one tile of rows after another.

    A mean over steps is the sum of the tiles' means, each times the tile's share of the steps. The number of tiles is
    that of the fullest batch, a dynamic length, so that short episodes save their part of the work; the sizes of tiles
    are static. Rows are decoded inside the loop: only one tile's observations exist at a time.
    """
    assert batching.tiles is not None
    limit, (large, small) = batching.whole.reward.shape[1], batching.tiles
    pack = jax.vmap(functools.partial(first_fit_rows, episode_limit=limit))
    layout, num_rows = _own_rows(batching, *pack(inputs.lengths))  # [S, R, T+1] and [S], R = B / parts
    # The last tile may reach past the last row.
    layout = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, large), (0, 0))), layout)
    num_steps = jnp.maximum(inputs.lengths.sum(-1), 1)

    def add_tile(size: int, so_far: tuple[Array, Gradients]) -> tuple[Array, Gradients]:
        first, sums = so_far
        tile = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size, axis=1), layout)
        # The unroll ends after the last place that is filled in any row of any seed.
        num_places = jnp.where(tile.filled.any((0, 1)), jnp.arange(1, limit + 2), 0).max()
        batch = jax.vmap(batching.replay.decode_packed)(inputs.rows, tile)._replace(num_places=num_places)
        episode = tile.episode[..., :-1]
        if inputs.importance is not None:
            batch = batch._replace(importance=jax.vmap(lambda each, at: each[at])(inputs.importance, episode))
        noise = jax.vmap(_noise_at)(inputs.noise, tile)
        gradient = _seeds_gradient(batching, batch)
        grads, aux = gradient(inputs.learner, batch, inputs.hp, inputs.ctx, noise)
        terms = jax.vmap(_times_share)(batch.mask.sum((1, 2)) / num_steps, (grads, aux.metrics))
        errors = sums.errors
        if errors is not None:  # a row's places are of several episodes
            errors = jax.vmap(lambda sums, at, more: sums.at[at].add(more))(errors, episode, _errors(batch, aux))
        grads, metrics = jax.tree.map(jnp.add, sums[:2], terms)
        return first + size, Gradients(grads, metrics, errors)

    def is_left(least: int, so_far: tuple[Array, Gradients]) -> Array:
        return num_rows.max() - so_far[0] >= least

    metrics = dict.fromkeys(batching.metric_names, jnp.zeros(len(inputs.rows), jnp.float32))
    errors = None if inputs.importance is None else jnp.zeros_like(inputs.importance)
    so_far = jnp.int32(0), Gradients(jax.tree.map(jnp.zeros_like, inputs.learner.params), metrics, errors)
    stages = [(large, large - small + 1)]  # large tiles, until small ones would cover the rest with fewer empty rows
    if small < large:  # where the sizes are equal, the large tiles cover all rows
        stages.append((small, 1))
    for size, least in stages:
        so_far = jax.lax.while_loop(functools.partial(is_left, least), functools.partial(add_tile, size), so_far)
    return so_far[1]


def _seeds_gradient(batching: Batching, batch: Episode) -> Callable[..., tuple[PyTree, Aux]]:
    """Returns the loss's gradient and `Aux` of all seeds; every argument has the seed axis but `Episode.num_places`."""
    axes = jax.tree.map(lambda _: 0, batch)._replace(num_places=None)
    algo = batching.algo

    def gradient(
        learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[PyTree, Aux]:
        batch, hp = standardised_inputs(algo, learner.moments, batch, hp)
        with unroll_in_blocks(batching.block_form):
            if batching.loss is None:
                grads, aux = _updated(algo, learner, batch, hp, ctx, noise)
            else:
                loss = jax.grad(batching.loss, has_aux=True)
                grads, aux = loss(learner.params, learner.target, batch, hp, ctx, noise)
        return grads, _with_target_square(learner.moments, batch, aux)

    return jax.vmap(gradient, in_axes=(0, axes, 0, 0, 0))


def _updated(
    algo: Algorithm, learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
) -> tuple[Trained, Aux]:
    """Takes an algorithm's own steps of one seed."""
    trained = Trained(learner.params, learner.opt_state)
    return algo.update(trained, learner.target, batch, hp, ctx, noise, optimizer_step(algo, hp))


def standardised_inputs(
    algo: Algorithm, moments: dict[str, Moments], batch: Episode, hp: Hyperparams
) -> tuple[Episode, Hyperparams]:
    """Returns a loss's inputs with scaled or standardised rewards and, if returns are standardised, their moments."""
    if "rewards" in moments:
        rewards = moments["rewards"]
        batch = batch._replace(reward=(batch.reward - rewards.mean) / rewards.deviation * batch.mask)
    elif algo.reward_scale != 1:
        batch = batch._replace(reward=batch.reward * algo.reward_scale)
    if "returns" in moments:
        hp = with_values(hp, return_moments(moments))
    return batch, hp


def return_moments(moments: dict[str, Moments], prefix: str = "") -> dict[str, Array]:
    """Returns the moments of standardised returns by the names that a loss reads; none if they aren't."""
    if "returns" not in moments:
        return {}
    returns = moments["returns"]
    return {f"{prefix}return_mean": returns.mean, f"{prefix}return_deviation": returns.deviation}


def _with_target_square(moments: dict[str, Moments], batch: Episode, aux: Aux) -> Aux:
    """Adds the targets' mean square to the metrics, ``td_target_square_mean``, if returns are standardised."""
    if "returns" not in moments:
        return aux
    y = aux.values["td_target"]
    mask = jnp.broadcast_to(batch.mask.reshape(*batch.mask.shape, *(1,) * (y.ndim - batch.mask.ndim)), y.shape)
    return aux._replace(metrics=aux.metrics | {"td_target_square_mean": masked_mean(jnp.square(y), mask)})


def _errors(batch: Episode, aux: Aux) -> Array:
    """Returns the absolute TD errors of real steps, the mean over agents where each has one: ``[S, B, T]``."""
    errors = jnp.abs(aux.values["td_error"])
    return (errors if errors.ndim == batch.mask.ndim else errors.mean(-1)) * batch.mask


def _noise_at(noise: PyTree, layout: RowLayout) -> PyTree:
    """Returns the noise of each place: ``[B, T(+1), ..]`` and a layout ``[R, T+1]`` -> ``[R, T(+1), ..]``."""

    def at(leaf: Array) -> Array:
        num_places = leaf.shape[1]
        return leaf[layout.episode[:, :num_places], layout.step[:, :num_places]]

    return jax.tree.map(at, noise)


def _times_share(share: Array, means: PyTree) -> PyTree:
    """Returns ``share * means``; zero where a seed has no step in the tile, and so perhaps no finite mean."""
    return jax.tree.map(lambda mean: jnp.where(share > 0, share * mean, 0), means)


def _own_episodes(batching: Batching, batch: PyTree) -> PyTree:
    """Returns this device's episodes of batches to be cut, in a row: ``[S, B, ..]`` -> ``[S, B / parts, ..]``."""
    if batching.num_parts == 1:
        return batch
    size = batching.algo.batch_size // batching.num_parts
    start = jax.lax.axis_index(BATCH_AXIS) * size
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1), batch)


def _at_own_episodes(batching: Batching, errors: Array) -> Array:
    """Returns values of this device's episodes in their places among all, zero elsewhere: ``[S, B / parts]``."""
    size = batching.algo.batch_size // batching.num_parts
    everywhere = jnp.zeros((len(errors), batching.algo.batch_size), errors.dtype)
    start = jax.lax.axis_index(BATCH_AXIS) * size
    return jax.lax.dynamic_update_slice_in_dim(everywhere, errors, start, axis=1)


def _own_rows(batching: Batching, layout: RowLayout, num_rows: Array) -> tuple[RowLayout, Array]:
    """Returns this device's part of packed batches, and how many of its rows aren't empty.

    The fullest rows come first, so they are dealt out in turn: ``[S, B, T+1]`` -> ``[S, B / parts, T+1]``. Of
    ``num_rows`` ``[S]`` rows in all, a device has as many as the others or one less.
    """
    if batching.num_parts == 1:
        return layout, num_rows
    device = jax.lax.axis_index(BATCH_AXIS)

    def in_turn(leaf: Array) -> Array:
        dealt = leaf.reshape(leaf.shape[0], -1, batching.num_parts, *leaf.shape[2:])
        return jax.lax.dynamic_index_in_dim(dealt, device, axis=2, keepdims=False)

    return jax.tree.map(in_turn, layout), (num_rows - device + batching.num_parts - 1) // batching.num_parts


def _metric_names(env: Environment, algo: Algorithm, whole: Episode) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the loss's metrics and of `played_means`: loops need them for zeros to start from.

    The loss is traced on shapes, which costs less than a trace of the loop in each place that needs them.

    Raises:
        ConfigError: ``loss`` is not among them.
    """

    def metrics(batch: Episode) -> tuple[dict[str, Array], dict[str, Array]]:
        key = jax.random.key(0, impl="threefry2x32")
        learner, hp = init_learner(algo, algo.init(key, env.spec)), jax.tree.map(jnp.asarray, hyperparams(algo))
        ctx = Context(epsilon=jnp.float32(0), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
        batch, hp = standardised_inputs(algo, learner.moments, batch, hp)
        noise = algo.sample_noise(key, batch)
        means: dict[str, Array] = {}
        if algo.target_has_played:
            hp = with_values(hp, return_moments(learner.moments, "played_"))
            means = _with_target_square(learner.moments, batch, algo.played_means(learner.params, batch, hp)).metrics
            hp = with_values(hp, means)
        if takes_own_steps(algo):
            _, aux = _updated(algo, learner, batch, hp, ctx, noise)
        else:
            _, aux = algo.loss(learner.params, learner.params, batch, hp, ctx, noise)
        return _with_target_square(learner.moments, batch, aux).metrics, means

    found, means = map(tuple, jax.eval_shape(metrics, whole))
    if "loss" not in found:
        name = f"{type(algo).__module__}.{type(algo).__qualname__}"
        raise ConfigError(
            f"algo._target_={name} is not allowed: its Aux.metrics lacks loss, in which a run looks for divergence"
        )
    return found, means


def _tiles(num_agents: int, batch_size: int) -> tuple[int, int]:
    """Returns the rows of a large and of a small tile."""
    large, small = (min(max(1, size // num_agents), batch_size) for size in (LARGE_TILE, SMALL_TILE))
    return large, small


def _whole_blocks(form: BlockForm, episode_limit: int) -> int:
    """Returns the least number of steps, at least the limit, whose places, one more, fill blocks."""
    block = form.block_length(episode_limit + 1)
    return -(-(episode_limit + 1) // block) * block - 1


def _static_lengths(episode_limit: int) -> list[int]:
    """Returns the lengths to which a batch may be cut: ascending, evenly spaced; the last is the limit itself."""
    num_lengths = max(1, min(MAX_LENGTHS, episode_limit // MIN_LENGTH))
    return [-(-episode_limit * part // num_lengths) for part in range(1, num_lengths + 1)]
