"""The compiled training loop: one loop over iterations whose state carries the seed axis ``S`` inside.

`make_trainer` binds a run's options into pure, jitted functions, and `compile_trainer` compiles them. Everything that
decides a branch or the length of a loop is a scalar over all seeds, so "has learning started" and "how much of this
batch is padding" are real branches, not selects; a `vmap` over whole runs would turn each of them into a select that
computes both sides.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike

from wqmix_jax.algos.base import (
    Algorithm,
    Context,
    Hyperparams,
    hyperparams,
    is_mean_over_steps,
    latent_template,
    takes_own_steps,
    with_values,
)
from wqmix_jax.config import RunConfig
from wqmix_jax.networks.functional import compute_in
from wqmix_jax.ops.action_selection import linear_epsilon
from wqmix_jax.ops.moments import Moments, add_moments, masked_moments
from wqmix_jax.ops.randomness import pinned_draws
from wqmix_jax.training.batch_gradients import (
    Batches,
    Batching,
    Gradients,
    batch_gradients,
    make_batching,
    played_means,
    return_moments,
)
from wqmix_jax.training.compile_cache import compile_program
from wqmix_jax.training.devices import jax_precision, seed_sharding
from wqmix_jax.training.learner import (
    LearnerState,
    add_returns,
    apply_gradients,
    init_learner,
    joint_sum,
    update_targets,
    with_scheduled_lr,
)
from wqmix_jax.training.members import Member
from wqmix_jax.training.priorities import (
    Priorities,
    add_episodes,
    draw_episodes,
    is_prioritised,
    no_priorities,
    set_priorities,
)
from wqmix_jax.training.replay import Replay, ReplayState, make_replay
from wqmix_jax.training.rollout import greedy_episodes, mean_metrics, rollout
from wqmix_jax.types import Array, PRNGKey, PyTree


class Keys(NamedTuple):
    """One key per purpose; each use folds in a counter, so no random number depends on how a run was cut into chunks.

    Attributes:
        init: parameters.
        rollout: training episodes, by the count of episodes.
        sample: which episodes are replayed, by the count of learner steps.
        loss: the random numbers of a loss, by the count of learner steps.
        evaluation: evaluation episodes, by the count of episodes.
    """

    init: PRNGKey
    rollout: PRNGKey
    sample: PRNGKey
    loss: PRNGKey
    evaluation: PRNGKey


class Counters(NamedTuple):
    """The progress of one seed, int32.

    Attributes:
        env_steps: environment steps of training.
        episodes: training episodes, including those that a failing environment cut.
        learner_steps: optimiser steps.
    """

    env_steps: Array
    episodes: Array
    learner_steps: Array


class TrainState(NamedTuple):
    """Everything that training needs to continue; every leaf has a leading seed axis ``S``.

    Attributes:
        learner: parameters, targets and optimiser.
        replay: the stored episodes.
        counters: see `Counters`.
        keys: see `Keys`.
        hp: the traced hyperparameters.
        total_env_steps: int32, the environment steps after which a seed stops: from then on its state stays as it is.
        priorities: those of the stored episodes, see `Priorities`; ``()`` unless episodes are prioritised.
        failed: bool, whether a loss or parameter was not finite after the learner steps of an iteration: from then on
            its state stays as it is too, so that the counters show when that was.
    """

    learner: LearnerState
    replay: ReplayState
    counters: Counters
    keys: Keys
    hp: Hyperparams
    total_env_steps: Array
    failed: Array
    priorities: Priorities | tuple[()]


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
        losses: the metrics of the learner steps, their mean; zero where there were none.
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
        counters: those of the evaluated state.
        metrics: see `wqmix_jax.training.rollout.mean_metrics`.
    """

    counters: Counters
    metrics: dict[str, Array]


class Trainer(NamedTuple):
    """A run as functions, jitted by `make_trainer`; `compile_trainer` replaces the first three by compiled ones.

    Attributes:
        init_program: ``seeds -> TrainState``, for a uint32 array ``[S]``.
        train: ``(TrainState, num_iterations) -> (TrainState, TrainRecord)``, at most `chunk_iterations` iterations,
            ``num_iterations`` int32 and traced, so that one program runs any number of them; records ``[K, S]`` with
            ``K = chunk_iterations``, zeros from row ``num_iterations`` on; the state's buffers are donated.
        evaluate: ``TrainState -> EvalRecord``; draws from separate keys.
        learn: ``TrainState -> (LearnerState, losses)``, the learner steps of one iteration, for every seed, without the
            rest of the iteration: benchmarks measure it.
        chunk_iterations: the most iterations of one `train`, and those of a `train_chunk`.
        eval_iterations: iterations between two evaluations, a multiple of `chunk_iterations`.
        replay_bytes: bytes of replay per seed.
        sharding: the devices of the leaves of a `TrainState`.
        memory_groups: the least number of groups in which a device's seeds learn, one after another; see
            `wqmix_jax.training.batch_gradients.num_groups`.
        batch_size: the number of stored episodes from which on a seed learns.
        num_envs: episodes of one iteration and seed.
        failure: returns the error that ended the environment, see `wqmix_jax.envs.base.External.failure`.
    """

    init_program: Callable[[Array], TrainState]
    train: Callable[[TrainState, ArrayLike], tuple[TrainState, TrainRecord]]
    evaluate: Callable[[TrainState], EvalRecord]
    learn: Callable[[TrainState], tuple[LearnerState, dict[str, Array]]]
    chunk_iterations: int
    eval_iterations: int
    replay_bytes: int
    sharding: Sharding
    memory_groups: int = 1
    batch_size: int = 1
    num_envs: int = 1
    failure: Callable[[], BaseException | None] = lambda: None

    def init(self, seeds: Sequence[int]) -> TrainState:
        """Draws the first state of each seed, a non-negative integer; leaves ``[S, ..]``."""
        return self.init_program(jnp.asarray(seeds, jnp.uint32))

    def train_chunk(self, state: TrainState) -> tuple[TrainState, TrainRecord]:
        """Runs `chunk_iterations` iterations; records ``[chunk_iterations, S]``. Donates the buffers of ``state``."""
        return self.train(state, np.int32(self.chunk_iterations))


class Compilation(NamedTuple):
    """Facts about the compilation of a trainer's programs.

    Attributes:
        seconds: tracing included.
        from_cache: whether the programs that train and evaluate were read from the persistent compilation cache.
    """

    seconds: float
    from_cache: bool

    def __add__(self, other: "Compilation") -> "Compilation":  # type: ignore[override]
        return Compilation(self.seconds + other.seconds, self.from_cache and other.from_cache)

    def __str__(self) -> str:
        return f"compiled in {self.seconds:.1f} s{', from cache' if self.from_cache else ''}"


class _Run(NamedTuple):
    """The static parts of the loop's functions."""

    config: RunConfig
    replay: Replay
    batching: Batching
    matmul_precision: str


def train_sharding(config: RunConfig, num_seeds: int) -> Sharding:
    """Returns the devices that train ``num_seeds``; see `seed_sharding`, and `External.sharding` for restrictions."""
    batch_size = config.algo.batch_size if is_mean_over_steps(config.algo) else 1
    return config.env.external.sharding() or seed_sharding(num_seeds, batch_size=batch_size)


def make_trainer(
    config: RunConfig,
    *,
    sharding: Sharding | None = None,
    memory_groups: int = 1,
    batches: Batches | None = None,
    platform: str | None = None,
) -> Trainer:
    """Binds a run's options and jits its functions; nothing is compiled before one of them is called.

    Args:
        config: the options.
        sharding: the devices over which the seeds are spread, see `train_sharding`; each runs its own loop, whose
            branches depend on its own seeds alone. Devices that share seeds all play the same episodes, but learn from
            parts of a batch. The first device alone if absent.
        memory_groups: the least number of equal groups in which the seeds of a device take their learner steps, see
            `wqmix_jax.training.batch_gradients.num_groups`.
        batches: how padded steps are skipped, see `make_batching`.
        platform: the platform whose form of the learner step is used; tests force one. That of the devices if absent.

    Returns:
        The jitted functions of the run.

    Raises:
        ValueError: ``batches`` are to be packed for a loss that isn't marked.
        ConfigError: the loss has no metric ``loss``.
    """
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    env, algo = config.env, config.algo
    latent = latent_template(algo, env.spec)
    replay = make_replay(env, buffer_size=algo.buffer_size, batch_size=algo.batch_size, latent=latent)
    batching = make_batching(
        env, algo, replay, sharding, memory_groups=memory_groups, batches=batches, platform=platform
    )
    precision = jax_precision(config.matmul_precision, next(iter(sharding.device_set)).platform)
    run = _Run(config, replay, batching, precision)
    # The interval is in environment steps of full episodes. A chunk divides it, so that evaluations are between chunks.
    eval_iterations = max(1, config.eval_interval // (config.num_envs * env.spec.episode_limit))
    chunk_iterations = max(k for k in range(1, config.chunk_iterations + 1) if eval_iterations % k == 0)
    train = functools.partial(_run_iterations, run, chunk_iterations)
    return Trainer(
        init_program=jax.jit(_spread(functools.partial(_init, run), sharding), out_shardings=sharding),
        train=jax.jit(_spread(train, sharding, has_records=True), donate_argnums=0),
        evaluate=jax.jit(_spread(functools.partial(_play_greedily, run), sharding)),
        learn=jax.jit(_spread(functools.partial(_learn_alone, run), sharding)),
        chunk_iterations=chunk_iterations,
        eval_iterations=eval_iterations,
        replay_bytes=replay.num_bytes,
        sharding=sharding,
        memory_groups=memory_groups,
        batch_size=algo.batch_size,
        num_envs=config.num_envs,
        failure=env.external.failure,
    )


def compile_trainer(trainer: Trainer, members: Sequence[Member], *, fresh: bool = True) -> tuple[Trainer, Compilation]:
    """Compiles a trainer's functions ahead of their first call.

    Args:
        trainer: a trainer of `make_trainer`.
        members: as many as will train.
        fresh: whether `Trainer.init` is compiled too; a resumed run doesn't need it.

    Returns:
        The trainer with its functions compiled for this number of members, and facts about the compilation.
    """
    started = time.perf_counter()
    jitted: Any = trainer
    state = abstract_state(trainer, members)
    lowered = [jitted.train.lower(state, jax.ShapeDtypeStruct((), jnp.int32)), jitted.evaluate.lower(state)]
    options = compiler_options(trainer.sharding)
    programs, from_cache = zip(*(compile_program(each, options) for each in lowered), strict=True)
    compiled = trainer._replace(train=programs[0], evaluate=programs[1])
    if fresh:
        seeds = jnp.asarray([member.seed for member in members], jnp.uint32)
        init, _ = compile_program(jitted.init_program.lower(seeds), _once_options())
        compiled = compiled._replace(init_program=init)
    return compiled, Compilation(time.perf_counter() - started, all(from_cache))


def compiler_options(sharding: Sharding) -> dict[str, str | float]:
    """Returns XLA's options for the programs that train and evaluate; none but on a TPU.

    There XLA's least effort compiles float32 products in a tenth of the time, into a third of the code, with a slower
    use of the fast memory. A ``jax_exec_time_optimization_effort`` of the user other than 0 comes first.
    """
    is_tpu = next(iter(sharding.device_set)).platform == "tpu"
    is_default = jax.config.values["jax_exec_time_optimization_effort"] == 0
    return {"exec_time_optimization_effort": -1.0} if is_tpu and is_default else {}


def _once_options() -> dict[str, str | bool]:
    """Returns options for a program that runs once: on a CPU, optimising its draws takes far longer than they do."""
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}


def abstract_state(trainer: Trainer, members: Sequence[Member]) -> TrainState:
    """Returns the shapes, dtypes and devices of the train state."""
    state = jax.eval_shape(trainer.init_program, jax.ShapeDtypeStruct((len(members),), jnp.uint32))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=trainer.sharding), state)


def abstract_interval(trainer: Trainer, members: Sequence[Member]) -> TrainRecord:
    """Returns the shapes and dtypes of the records of one evaluation interval, leaves ``[eval_iterations, S]``."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    _, record = jax.eval_shape(trainer.train, abstract_state(trainer, members), count)
    length = trainer.eval_iterations
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype), record)


@contextlib.contextmanager
def _numerics(run: _Run) -> Iterator[None]:
    """Sets what numbers depend on while a function is traced, so that no setting of the caller changes them."""
    with pinned_draws(), jax.default_matmul_precision(run.matmul_precision), compute_in(run.config.compute_dtype):
        yield


def _spread(function: Callable[..., Any], sharding: Sharding, *, has_records: bool = False) -> Callable[..., Any]:
    """Lets each device run ``function``, of leaves ``[S, ..]``, on its own seeds.

    With ``has_records``, for `Trainer.train`: every device does as many iterations, and the records ``[K, S]``, the
    second result, have the seed axis second.
    """
    if not isinstance(sharding, NamedSharding):
        return function
    in_specs = out_specs = sharding.spec
    if has_records:
        in_specs, out_specs = (sharding.spec, PartitionSpec()), (sharding.spec, PartitionSpec(None, *sharding.spec))
    # Devices along the batch axis hold equal copies because they do equal work, which the check can't know.
    return jax.shard_map(function, mesh=sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _init(run: _Run, seeds: Array) -> TrainState:
    algo, total_env_steps = run.config.algo, run.config.total_env_steps

    def one_seed(seed: Array) -> TrainState:
        keys = Keys(*jax.random.split(jax.random.key(seed, impl="threefry2x32"), len(Keys._fields)))
        zero = jnp.int32(0)
        return TrainState(
            learner=init_learner(algo, algo.init(keys.init, run.config.env.spec)),
            replay=run.replay.init(),
            counters=Counters(zero, zero, zero),
            keys=keys,
            hp=jax.tree.map(jnp.asarray, hyperparams(algo)),
            total_env_steps=jnp.int32(total_env_steps),
            failed=jnp.bool_(False),
            priorities=no_priorities(algo.buffer_size) if is_prioritised(algo) else (),
        )

    with pinned_draws():
        return jax.vmap(one_seed)(seeds)


def _run_iterations(run: _Run, most: int, state: TrainState, num_iterations: Array) -> tuple[TrainState, TrainRecord]:
    """Runs ``num_iterations`` iterations, a traced number of at most ``most``; see `Trainer.train`.

    A loop of traced length instead of a scan: one program runs chunks of all lengths.
    """
    dtypes = _record_dtypes(run)
    rows = jnp.zeros((most, len(jax.tree.leaves(dtypes)), len(state.failed)), jnp.uint32)
    with _numerics(run):
        turns = jnp.minimum(num_iterations, most)
        state, rows = jax.lax.fori_loop(0, turns, functools.partial(_iteration, run), (state, rows))
    return state, _from_words(rows, dtypes)


def _record_dtypes(run: _Run) -> TrainRecord:
    """Returns the dtype of each leaf of a record."""
    dtypes: Any = (jnp.dtype(each) for each in (jnp.int32, jnp.float32, bool))
    count, number, flag = dtypes
    losses: Any = dict.fromkeys(_loss_names(run), number)
    return TrainRecord(
        counters=Counters(count, count, count),
        active=flag,
        updates=count,
        epsilon=number,
        episode_return=number,
        episode_length=number,
        losses=losses,
    )


def _as_words(record: TrainRecord) -> Array:
    """Returns a record's bits, leaves ``[S]`` -> ``[leaves, S]`` uint32, so that one write stores all of it."""

    def bits(leaf: Array) -> Array:
        return leaf.astype(jnp.uint32) if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, jnp.uint32)

    return jnp.stack([bits(leaf) for leaf in jax.tree.leaves(record)])


def _from_words(rows: Array, dtypes: TrainRecord) -> TrainRecord:
    """Inverts `_as_words` for many records: ``[K, leaves, S]`` uint32 -> leaves ``[K, S]``."""
    leaves, structure = jax.tree.flatten(dtypes)

    def values(index: int, dtype: np.dtype) -> Array:
        bits = rows[:, index]
        return bits.astype(bool) if dtype.kind == "b" else jax.lax.bitcast_convert_type(bits, dtype)

    return jax.tree.unflatten(structure, [values(index, dtype) for index, dtype in enumerate(leaves)])


def _iteration(run: _Run, index: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
    """Plays one episode per environment, stores it, and learns once enough episodes are stored.

    The state of a finished or failed seed is left unchanged, and so is that of a seed whose episodes all failed at
    their first step.

    Returns:
        The state after it, and the records' bits ``[K, leaves, S]`` with row ``index`` filled, see `_as_words`.
    """
    state, rows = carry
    config, counters, ctx = run.config, state.counters, _context(state)
    keys = _fold_in(state.keys.rollout, counters.episodes)
    played = rollout(config.env, config.algo, state.learner.params, state.hp, ctx, keys, num_envs=config.num_envs)
    trains = (counters.env_steps < state.total_env_steps) & ~state.failed
    active = trains & (played.episodes.length > 0).any(-1)
    replay = jax.vmap(run.replay.add)(state.replay, played.episodes, active)
    priorities = state.priorities
    if isinstance(priorities, Priorities):
        indices = jax.vmap(lambda replay: run.replay.next_indices(replay, config.num_envs))(state.replay)
        priorities = jax.vmap(add_episodes)(priorities, indices, active)
    # Inactive seeds have played too, with the others, but nothing of that is counted or stored.
    played_counters = counters._replace(
        env_steps=counters.env_steps + jnp.where(active, played.episodes.length.sum(-1), 0),
        episodes=counters.episodes + jnp.where(active, config.num_envs, 0),
    )
    ready = active & (played_counters.episodes >= config.algo.batch_size)
    state = state._replace(replay=replay, counters=played_counters, priorities=priorities)
    # A loss sees the epsilon of the episodes that were just played, as in PyMARL, where acting alone updates it.
    learned = _learn(run, state, ready=ready, epsilon=ctx.epsilon, episodes_before=counters.episodes)
    learner, priorities, losses = learned
    updates = jnp.where(ready, config.updates_per_iteration, 0)
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
    # Checked once per iteration, after all its learner steps: a seed fails in the first iteration that ends with a
    # number that isn't finite, and keeps its parameters from then on.
    failed = state.failed | (ready & ~_is_finite((learner.params, losses["loss"])))
    rows = _set_row(index, rows, _as_words(record))
    return state._replace(learner=learner, counters=counters, failed=failed, priorities=priorities), rows


def _mean_where(whole: Array, values: Array) -> Array:
    """Returns the mean over whole episodes: two ``[S, E]`` -> ``[S]`` float32, nan where none is whole."""
    values = values.astype(jnp.float32)
    # The plain mean where all are whole, as nearly always: a sum divided by a count may round differently.
    return jnp.where(whole.all(-1), values.mean(-1), values.mean(-1, where=whole))


def _set_row(index: Array, rows: Array, row: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(rows, row, index, axis=0)


def _is_finite(tree: PyTree) -> Array:
    """Returns True for seeds all of whose numbers are finite: leaves ``[S, ..]`` -> ``[S]``."""
    not_finite = jax.tree.map(lambda leaf: (~jnp.isfinite(leaf)).astype(jnp.int32), tree)
    return jax.vmap(joint_sum)(not_finite) == 0


def _learn(
    run: _Run, state: TrainState, *, ready: Array, epsilon: Array, episodes_before: Array
) -> tuple[LearnerState, Priorities | tuple[()], dict[str, Array]]:
    """Takes the learner steps of one iteration; the learners of seeds that aren't ``ready`` ``[S]`` stay as they are.

    Each step samples a batch per seed, takes an optimiser step, and copies the targets when that is due.

    Returns:
        The learners and priorities, leaves ``[S, ..]``, and the metrics' means over the steps, ``[S]`` float32, 0 for
        the others.
    """
    # All seeds compute, ready or not: under `vmap` a branch per seed would compute both sides anyway. Batches of seeds
    # that aren't ready count as empty, which makes them cheap where rows are packed.
    algo, num_updates = run.config.algo, run.config.updates_per_iteration
    hp = with_scheduled_lr(algo, state.hp, state.counters.env_steps, state.total_env_steps)
    first = state.learner
    if algo.target_has_played:
        ctx = Context(epsilon, state.counters.env_steps, state.counters.learner_steps)
        first, hp = _with_played_targets(run, state, hp, ctx, ready)

    def update(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        learner, priorities, losses = carry
        ctx = Context(epsilon, state.counters.env_steps, state.counters.learner_steps + index)
        drawn = _draw(run, state, priorities, ctx.learner_steps, index)
        rows = drawn.rows
        before, learner = learner, learner if algo.target_has_played else _with_rewards(run, learner, rows)
        loss_keys = _fold_in(state.keys.loss, ctx.learner_steps)
        found = batch_gradients(run.batching, learner, rows, loss_keys, hp, ctx, ready, drawn.importance)
        stepped, grad_norm = _stepped(algo, learner, found, hp)
        lengths = jax.vmap(run.replay.lengths)(rows)
        stepped = stepped if algo.target_has_played else add_returns(stepped, found.metrics, lengths.sum(-1))
        learner = jax.tree.map(functools.partial(jax.vmap(jnp.where), ready), stepped, before)
        if not algo.target_has_played:
            learner = update_targets(algo, learner, hp, episodes_before, ready)
        if isinstance(priorities, Priorities):
            assert drawn.indices is not None
            assert found.errors is not None
            set_all = jax.vmap(functools.partial(set_priorities, exponent=algo.priority_exponent))
            changed = set_all(priorities, drawn.indices, found.errors, lengths)
            priorities = jax.tree.map(functools.partial(jax.vmap(jnp.where), ready), changed, priorities)
        metrics = found.metrics | {"grad_norm": grad_norm}
        return learner, priorities, jax.tree.map(functools.partial(_set_row, index), losses, metrics)

    # A loop without a turn where no seed is ready, and not a branch: a loop changes the learners in place, whereas a
    # branch would copy all of them in every iteration.
    losses = dict.fromkeys(_loss_names(run), jnp.zeros((num_updates, len(ready)), jnp.float32))
    turns = jnp.where(ready.any(), num_updates, 0)
    with jax.named_scope(f"updates_at_most_{num_updates}"):  # named for whoever reads the compiled program
        learner, priorities, losses = jax.lax.fori_loop(0, turns, update, (first, state.priorities, losses))
    return learner, priorities, jax.tree.map(lambda loss: jnp.where(ready, loss.mean(0), 0.0), losses)


def _stepped(algo: Algorithm, learner: LearnerState, found: Gradients, hp: Hyperparams) -> tuple[LearnerState, Array]:
    """Returns the learners ``[S]`` after the step on their gradients, or after their own steps, and ``grad_norm``."""
    if takes_own_steps(algo):
        return learner._replace(**found.grads._asdict()), found.metrics["grad_norm"]
    return jax.vmap(functools.partial(apply_gradients, algo))(learner, found.grads, hp)


def _with_played_targets(
    run: _Run, state: TrainState, hp: Hyperparams, ctx: Context, ready: Array
) -> tuple[LearnerState, Hyperparams]:
    """Prepares the learners that are ``ready`` for the episodes just played, see `Algorithm.target_has_played`.

    Returns:
        The learners with their parameters as targets, and the moments with what they standardise; and the traced
        options with the values that `Algorithm.played_means` adds for a loss.
    """
    indices = jnp.arange(run.config.num_envs)
    rows = jax.vmap(run.replay.rows_at, (0, None))(state.replay, indices)
    learner = _with_rewards(run, state.learner._replace(target=state.learner.params), rows)
    hp = with_values(hp, return_moments(learner.moments, "played_"))
    means = played_means(run.batching, learner, rows, state.keys.loss, hp, ctx, ready)
    learner = add_returns(learner, means, jax.vmap(run.replay.lengths)(rows).sum(-1))
    select = functools.partial(jax.vmap(jnp.where), ready)
    return jax.tree.map(select, learner, state.learner), with_values(hp, means)


class _Drawn(NamedTuple):
    """A batch of each seed: rows ``[S, B, row_bytes]`` and, where episodes are prioritised, as in `Draw` ``[S, B]``."""

    rows: Array
    indices: Array | None = None
    importance: Array | None = None


def _draw(
    run: _Run, state: TrainState, priorities: Priorities | tuple[()], learner_steps: Array, index: Array
) -> _Drawn:
    """Draws a batch from the replay of each seed, after ``learner_steps`` ``[S]``; the ``index``th of an iteration."""
    if run.config.algo.is_on_policy:
        indices = disjoint_indices(run.config, state.keys.sample, learner_steps, index)
        return _Drawn(jax.vmap(run.replay.rows_at)(state.replay, indices))
    keys = _fold_in(state.keys.sample, learner_steps)
    if not isinstance(priorities, Priorities):
        return _Drawn(jax.vmap(run.replay.sample)(state.replay, keys))
    algo = run.config.algo
    progress = jnp.minimum(state.counters.env_steps / state.total_env_steps, 1)
    beta = algo.importance_exponent + (1 - algo.importance_exponent) * progress
    draw = jax.vmap(functools.partial(draw_episodes, batch_size=algo.batch_size))
    indices, importance = draw(priorities, keys, beta=beta)
    return _Drawn(jax.vmap(run.replay.rows_at)(state.replay, indices), indices, importance)


def disjoint_indices(config: RunConfig, keys: PRNGKey, learner_steps: Array, index: Array) -> Array:
    """Returns the batch of a learner step among the episodes just played, their indices in the replay, ``[S, B]``.

    Each pass over these episodes has its own random order; the batches of the pass are equal parts of it.

    Args:
        config: the options of a run whose algorithm is on-policy.
        keys: ``[S]``.
        learner_steps: ``[S]``, those before this one.
        index: scalar, those before this one in the iteration.
    """
    num_envs, batch_size = config.num_envs, config.algo.batch_size
    part = index % (num_envs // batch_size)
    keys = _fold_in(keys, learner_steps - part)  # the learner steps before the pass
    order = jax.vmap(lambda key: jax.random.permutation(key, num_envs))(keys)
    return jax.lax.dynamic_slice_in_dim(order, part * batch_size, batch_size, axis=1)


def _with_rewards(run: _Run, learner: LearnerState, rows: Array) -> LearnerState:
    """Adds the rewards of a batch, rows ``[S, B, row_bytes]``, to the moments of a learner that standardises them."""
    if "rewards" not in learner.moments:
        return learner

    def batch_moments(rows: Array) -> Moments:
        rewards = run.replay.rewards(rows)
        mask = jnp.arange(rewards.shape[1])[None, :] < run.replay.lengths(rows)[:, None]
        return masked_moments(rewards, mask.astype(rewards.dtype))

    moments = add_moments(learner.moments["rewards"], jax.vmap(batch_moments)(rows))
    return learner._replace(moments=learner.moments | {"rewards": moments})


def _loss_names(run: _Run) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*run.batching.metric_names, "grad_norm")))


def _learn_alone(run: _Run, state: TrainState) -> tuple[LearnerState, dict[str, Array]]:
    with _numerics(run):
        ready, epsilon = jnp.ones(state.failed.shape, bool), _context(state).epsilon
        learner, _, losses = _learn(run, state, ready=ready, epsilon=epsilon, episodes_before=state.counters.episodes)
        return learner, losses


def _play_greedily(run: _Run, state: TrainState) -> EvalRecord:
    """Evaluates the online parameters; see `Trainer.evaluate`."""
    config, params = run.config, state.learner.params
    with _numerics(run):
        keys, ctx = _fold_in(state.keys.evaluation, state.counters.episodes), _context(state)
        figures = greedy_episodes(
            config.env, config.algo, params, state.hp, ctx, keys, num_episodes=config.eval_episodes
        )
        return EvalRecord(state.counters, mean_metrics(figures))


def _context(state: TrainState) -> Context:
    hp, counters = state.hp, state.counters
    epsilon = linear_epsilon(counters.env_steps, hp.epsilon_start, hp.epsilon_finish, hp.epsilon_anneal_steps)
    return Context(epsilon, counters.env_steps, counters.learner_steps)


def _fold_in(keys: PRNGKey, counts: Array) -> PRNGKey:
    return jax.vmap(jax.random.fold_in)(keys, counts)
