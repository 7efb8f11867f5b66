"""The compiled training loop: one scan over iterations whose state carries the seed axis inside.

`make_trainer` binds a run's options into pure, jitted functions. Everything that decides a branch is a scalar over all
seeds, so "has learning started" and "how much of this batch is padding" are real branches, not selects.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike

from wqmix_jax.algos.base import Algorithm, Context, Hyperparams, hyperparams, is_mean_over_steps
from wqmix_jax.config import RunConfig
from wqmix_jax.envs.base import Environment
from wqmix_jax.networks.functional import compute_in
from wqmix_jax.ops.action_selection import linear_epsilon
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.training.batch_gradients import Batches, Batching, batch_gradients, make_batching
from wqmix_jax.training.devices import seed_sharding
from wqmix_jax.training.evaluator import evaluate
from wqmix_jax.training.learner import LearnerState, apply_gradients, copy_targets, init_learner
from wqmix_jax.training.replay import Replay, ReplayState, make_replay
from wqmix_jax.training.rollout import rollout
from wqmix_jax.types import Array, PRNGKey, PyTree


class Keys(NamedTuple):
    """One key per purpose; each use folds in a counter, so nothing drawn depends on how a run was cut into chunks.

    Attributes:
        init: parameters.
        rollout: training episodes, by the count of episodes.
        sample: which episodes are replayed, by the count of learner steps.
        loss: what a loss draws, by the count of learner steps.
        evaluation: evaluation episodes, by the count of episodes.
    """

    init: PRNGKey
    rollout: PRNGKey
    sample: PRNGKey
    loss: PRNGKey
    evaluation: PRNGKey


class Counters(NamedTuple):
    """What has happened to one seed, int32.

    Attributes:
        env_steps: environment steps of training.
        episodes: whole training episodes.
        learner_steps: optimiser steps.
    """

    env_steps: Array
    episodes: Array
    learner_steps: Array


class TrainState(NamedTuple):
    """Everything that training needs to go on; every leaf has a leading seed axis ``S``.

    Attributes:
        learner: parameters, targets and optimiser.
        replay: the stored episodes.
        counters: see `Counters`.
        keys: see `Keys`.
        hp: the traced hyperparameters.
        total_env_steps: int32, where a seed stops: from then on nothing of it changes.
        failed: bool, whether a loss or parameter was not finite: nothing changes from then on either, so the counters
            tell when that was.
    """

    learner: LearnerState
    replay: ReplayState
    counters: Counters
    keys: Keys
    hp: Hyperparams
    total_env_steps: Array
    failed: Array


class TrainRecord(NamedTuple):
    """One iteration of every seed, leaves ``[S]``.

    Attributes:
        counters: after the iteration.
        active: bool, whether the seed was still training.
        updates: int32, learner steps taken in this iteration.
        epsilon: exploration of its episodes.
        episode_return: their mean undiscounted return, without the episodes that a failure of the environment cut;
            nan where it cut all of them.
        episode_length: their mean length, over the same episodes.
        losses: scalars of the learner steps, their mean; zero where there were none.
    """

    counters: Counters
    active: Array
    updates: Array
    epsilon: Array
    episode_return: Array
    episode_length: Array
    losses: dict[str, Array]


class EvalRecord(NamedTuple):
    """One evaluation of every seed, leaves ``[S]``.

    Attributes:
        counters: when it was made.
        metrics: see `wqmix_jax.training.evaluator.evaluate`.
    """

    counters: Counters
    metrics: dict[str, Array]


class Trainer(NamedTuple):
    """A run as functions.

    Attributes:
        init: ``seeds -> TrainState``, for a sequence of non-negative integers.
        train: ``(TrainState, num_iterations) -> (TrainState, TrainRecord)``, at most `chunk_iterations` iterations,
            ``num_iterations`` int32 and traced, so that one program runs any number of them; records ``[K, S]`` with
            ``K = chunk_iterations``, zeros from row ``num_iterations`` on; the state's buffers are donated.
        evaluate: ``TrainState -> EvalRecord``; draws from keys of its own.
        learn: ``TrainState -> (LearnerState, losses)``, one learner step of every seed on a batch of its replay, apart
            from the loop: what a benchmark times.
        chunk_iterations: the most iterations of one `train`, and those of a `train_chunk`.
        eval_iterations: iterations between two evaluations, a multiple of `chunk_iterations`.
        replay_bytes: bytes of replay per seed.
        sharding: where the leaves of a `TrainState` lie.
        learner_groups: in how many groups a device's seeds learn, one after the other; see `make_batching`.
        batch_size: stored episodes from which on a seed learns.
        num_envs: episodes of one iteration and seed.
        failure: what ended the environment, see `wqmix_jax.envs.base.External.failure`.
    """

    init: Callable[[Sequence[int]], TrainState]
    train: Callable[[TrainState, ArrayLike], tuple[TrainState, TrainRecord]]
    evaluate: Callable[[TrainState], EvalRecord]
    learn: Callable[[TrainState], tuple[LearnerState, dict[str, Array]]]
    chunk_iterations: int
    eval_iterations: int
    replay_bytes: int
    sharding: Sharding
    learner_groups: int = 1
    batch_size: int = 1
    num_envs: int = 1
    failure: Callable[[], BaseException | None] = lambda: None

    def train_chunk(self, state: TrainState) -> tuple[TrainState, TrainRecord]:
        """Runs `chunk_iterations` iterations; records ``[chunk_iterations, S]``. Donates the buffers of ``state``."""
        return self.train(state, np.int32(self.chunk_iterations))


class _Parts(NamedTuple):
    """What the loop's functions close over."""

    env: Environment
    algo: Algorithm
    replay: Replay
    batching: Batching
    num_envs: int
    updates_per_iteration: int


def train_sharding(config: RunConfig, num_seeds: int) -> Sharding:
    """The devices that train ``num_seeds``; see `seed_sharding`, and `External.sharding` for what may forbid that."""
    batch_size = config.algo.batch_size if is_mean_over_steps(config.algo) else 1
    return config.env.external.sharding() or seed_sharding(num_seeds, batch_size=batch_size)


def make_trainer(
    config: RunConfig, *, sharding: Sharding | None = None, learner_groups: int = 1, batches: Batches | None = None
) -> Trainer:
    """Binds a run's options; nothing is compiled before the returned functions are called.

    Args:
        config: the options.
        sharding: over which devices the seeds are spread, see `train_sharding`; each runs a loop of its own, whose
            branches go by its own seeds. Devices that share seeds all do the same, but learn from parts of a batch. The
            first device alone when absent.
        learner_groups: in at least how many equal groups the seeds of a device take their learner steps, see
            `make_batching`.
        batches: what becomes of a batch's padding, see `make_batching`.

    Raises:
        ValueError: ``batches`` are to be packed for a loss that isn't marked.
    """
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    env, algo = config.env, config.algo
    replay = make_replay(env, buffer_size=algo.buffer_size, batch_size=algo.batch_size)
    batching = make_batching(env, algo, replay, sharding, groups=learner_groups, batches=batches)
    parts = _Parts(env, algo, replay, batching, config.num_envs, config.updates_per_iteration)
    eval_iterations = max(1, config.eval_interval // (config.num_envs * env.spec.episode_limit))
    chunk_iterations = max(k for k in range(1, config.chunk_iterations + 1) if eval_iterations % k == 0)

    def init(seeds: Array) -> TrainState:
        with pinned_draws():
            return _init(parts, hyperparams(algo), config.total_env_steps, seeds)

    def train(state: TrainState, num_iterations: Array) -> tuple[TrainState, TrainRecord]:
        with _numerics(config):
            return _iterations(functools.partial(_iteration, parts), state, num_iterations, most=chunk_iterations)

    def learn(state: TrainState) -> tuple[LearnerState, dict[str, Array]]:
        with _numerics(config):
            ready = jnp.ones(state.failed.shape, bool)
            return _update(parts, state, state.learner, _context(state), state.counters.episodes, ready)

    def evaluation(state: TrainState) -> EvalRecord:
        with _numerics(config):
            return _evaluate(parts, state, config.eval_episodes)

    jitted_init = jax.jit(_spread(init, sharding), out_shardings=sharding)
    return Trainer(
        init=lambda seeds: jitted_init(jnp.asarray(seeds, jnp.uint32)),
        train=jax.jit(_spread_training(train, sharding), donate_argnums=0),
        evaluate=jax.jit(_spread(evaluation, sharding)),
        learn=jax.jit(_spread(learn, sharding)),
        chunk_iterations=chunk_iterations,
        eval_iterations=eval_iterations,
        replay_bytes=replay.num_bytes,
        sharding=sharding,
        learner_groups=learner_groups,
        batch_size=algo.batch_size,
        num_envs=config.num_envs,
        failure=env.external.failure,
    )


@contextlib.contextmanager
def _numerics(config: RunConfig) -> Iterator[None]:
    with pinned_draws(), jax.default_matmul_precision(config.matmul_precision), compute_in(config.compute_dtype):
        yield


def _spread(function: Callable[..., Any], sharding: Sharding) -> Callable[..., Any]:
    """``function`` of leaves ``[S, ..]``, run by each device on its own seeds."""
    if not isinstance(sharding, NamedSharding):
        return function
    return _shard_map(function, sharding.mesh, sharding.spec, sharding.spec)


def _spread_training(function: Callable[..., Any], sharding: Sharding) -> Callable[..., Any]:
    """The same for `Trainer.train`: every device does as many iterations, and records have the seed axis second."""
    if not isinstance(sharding, NamedSharding):
        return function
    of_records = PartitionSpec(None, *sharding.spec)
    return _shard_map(function, sharding.mesh, (sharding.spec, PartitionSpec()), (sharding.spec, of_records))


def _shard_map(function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    # Devices along the batch axis hold equal copies because they do equal work, which the check can't know.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _iterations(
    iteration: Callable[[TrainState], tuple[TrainState, TrainRecord]],
    state: TrainState,
    num_iterations: Array,
    *,
    most: int,
) -> tuple[TrainState, TrainRecord]:
    """A scan whose length is traced, at most ``most``: records ``[most, S]``, zeros from ``num_iterations`` on."""
    _, record = jax.eval_shape(iteration, state)
    records = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), record)

    def one(index: Array, carry: tuple[TrainState, TrainRecord]) -> tuple[TrainState, TrainRecord]:
        state, records = carry
        state, record = iteration(state)
        return state, jax.tree.map(functools.partial(_set_row, index=index), records, record)

    return jax.lax.fori_loop(0, jnp.minimum(num_iterations, most), one, (state, records))


def _set_row(rows: Array, row: Array, *, index: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(rows, row, index, axis=0)


def _init(parts: _Parts, hp: Hyperparams, total_env_steps: int, seeds: Array) -> TrainState:
    def one_seed(seed: Array) -> TrainState:
        keys = Keys(*jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(Keys._fields)))
        zero = jnp.int32(0)
        return TrainState(
            learner=init_learner(parts.algo.init(keys.init, parts.env.spec)),
            replay=parts.replay.init(),
            counters=Counters(zero, zero, zero),
            keys=keys,
            hp=jax.tree.map(jnp.asarray, hp),
            total_env_steps=jnp.int32(total_env_steps),
            failed=jnp.bool_(False),
        )

    return jax.vmap(one_seed)(seeds)


def _iteration(parts: _Parts, state: TrainState) -> tuple[TrainState, TrainRecord]:
    """Plays one episode per environment, stores it, and learns once enough episodes are stored.

    A seed that has reached its total or has failed keeps its state to the bit, whatever the others still do; so does
    one that could play nothing.
    """
    counters = state.counters
    ctx = _context(state)
    keys = _fold_in(state.keys.rollout, counters.episodes)
    played = rollout(parts.env, parts.algo, state.learner.params, state.hp, ctx, keys, num_envs=parts.num_envs)
    trains = (counters.env_steps < state.total_env_steps) & ~state.failed
    active = trains & (played.episodes.length > 0).any(-1)
    replay = jax.vmap(parts.replay.add)(state.replay, played.episodes, active)
    played_counters = counters._replace(
        env_steps=counters.env_steps + jnp.where(active, played.episodes.length.sum(-1), 0),
        episodes=counters.episodes + jnp.where(active, parts.num_envs, 0),
    )
    ready = active & (played_counters.episodes >= parts.algo.batch_size)
    state = state._replace(replay=replay, counters=played_counters)
    learner, losses = _learn_if_any(parts, state, ready, counters.episodes, ctx.epsilon)
    updates = jnp.where(ready, parts.updates_per_iteration, 0)
    counters = played_counters._replace(learner_steps=played_counters.learner_steps + updates)
    record = TrainRecord(
        counters=counters,
        active=active,
        updates=updates,
        epsilon=ctx.epsilon,
        episode_return=_mean_where(played.whole, played.episode_return),
        episode_length=_mean_where(played.whole, played.episodes.length),
        losses=losses,
    )
    failed = state.failed | (ready & ~_is_finite((learner.params, losses.get("loss", ()))))
    return state._replace(learner=learner, counters=counters, failed=failed), record


def _mean_where(whole: Array, values: Array) -> Array:
    """The mean over whole episodes: ``[S, E]`` bool, ``[S, E]`` -> ``[S]`` float32, nan where none is whole."""
    values = values.astype(jnp.float32)
    # The plain mean where all are whole, as nearly always: a sum divided by a count may round differently.
    return jnp.where(whole.all(-1), values.mean(-1), values.mean(-1, where=whole))


def _is_finite(tree: PyTree) -> Array:
    """Whether every number of a seed is finite: leaves ``[S, ..]`` -> ``[S]``."""
    finite = [jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(finite).all(0)


def _learn_if_any(
    parts: _Parts, state: TrainState, ready: Array, episodes_before: Array, epsilon: Array
) -> tuple[LearnerState, dict[str, Array]]:
    """The learner steps of one iteration where any seed is ready; the others' learners stay as they are.

    A loss sees the epsilon of the episodes that were just played, as in PyMARL, where it moves on when an agent acts.
    """

    def learn(state: TrainState) -> tuple[LearnerState, dict[str, Array]]:
        def update(learner: LearnerState, index: Array) -> tuple[LearnerState, dict[str, Array]]:
            learner_steps = state.counters.learner_steps + index
            ctx = Context(epsilon, state.counters.env_steps, learner_steps)
            return _update(parts, state, learner, ctx, episodes_before, ready)

        learner, losses = jax.lax.scan(update, state.learner, jnp.arange(parts.updates_per_iteration))
        learner = jax.tree.map(functools.partial(jax.vmap(jnp.where), ready), learner, state.learner)
        return learner, jax.tree.map(lambda loss: jnp.where(ready, loss.mean(0), 0.0), losses)

    _, losses = jax.eval_shape(learn, state)

    def skip(state: TrainState) -> tuple[LearnerState, dict[str, Array]]:
        return state.learner, jax.tree.map(lambda loss: jnp.zeros(loss.shape, loss.dtype), losses)

    return jax.lax.cond(ready.any(), learn, skip, state)


def _update(
    parts: _Parts, state: TrainState, learner: LearnerState, ctx: Context, episodes_before: Array, ready: Array
) -> tuple[LearnerState, dict[str, Array]]:
    """Samples a batch per seed, takes one learner step on it, and copies targets when due."""
    rows = jax.vmap(parts.replay.sample)(state.replay, _fold_in(state.keys.sample, ctx.learner_steps))
    loss_keys = _fold_in(state.keys.loss, ctx.learner_steps)
    grads, metrics = batch_gradients(parts.batching, learner, rows, loss_keys, state.hp, ctx, ready)
    learner, grad_norm = jax.vmap(apply_gradients)(learner, grads, state.hp)
    return copy_targets(learner, state.hp, episodes_before), metrics | {"grad_norm": grad_norm}


def _evaluate(parts: _Parts, state: TrainState, num_episodes: int) -> EvalRecord:
    keys = _fold_in(state.keys.evaluation, state.counters.episodes)
    metrics = evaluate(
        parts.env, parts.algo, state.learner.params, state.hp, _context(state), keys, num_episodes=num_episodes
    )
    return EvalRecord(state.counters, metrics)


def _context(state: TrainState) -> Context:
    hp, counters = state.hp, state.counters
    epsilon = linear_epsilon(counters.env_steps, hp.epsilon_start, hp.epsilon_finish, hp.epsilon_anneal_steps)
    return Context(epsilon, counters.env_steps, counters.learner_steps)


def _fold_in(keys: PRNGKey, counts: Array) -> PRNGKey:
    return jax.vmap(jax.random.fold_in)(keys, counts)
