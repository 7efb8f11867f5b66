"""Plays whole episodes, for training and greedy ones for evaluation: all seeds and environments in one batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.algos.base import AgentInputs, Algorithm, Context, Hyperparams, acting_of
from wqmix_jax.envs.base import Environment, EnvState, is_inside_jax, step_of
from wqmix_jax.ops.action_selection import with_idle_action
from wqmix_jax.ops.randomness import fold_in, pinned_draws
from wqmix_jax.types import Array, PRNGKey, PyTree, StepOutcome, StoredEpisode

MAX_BLOCK = 20
"""The most steps that are played without a look at whether an episode is still running, see `block_length`."""


class Rollout(NamedTuple):
    """One episode of every environment.

    Attributes:
        episodes: leaves ``[S, E, ..]``.
        episode_return: ``[S, E]`` float32, undiscounted.
        metrics: the environment's own scalars at the end, leaves ``[S, E]``.
        whole: ``[S, E]`` bool, False where the environment failed: then an episode stops before the failed step.
    """

    episodes: StoredEpisode
    episode_return: Array
    metrics: dict[str, Array]
    whole: Array


class Figures(NamedTuple):
    """The results of episodes, leaves ``[S, E]``.

    Attributes:
        episode_return: float32, undiscounted.
        episode_length: float32, in steps.
        metrics: the environment's own scalars, by name.
        whole: bool, False where the environment failed.
    """

    episode_return: Array
    episode_length: Array
    metrics: dict[str, Array]
    whole: Array


class _Play(NamedTuple):
    """The state of the loop over time, with all environments in one axis ``F = S * E``.

    Attributes:
        step: scalar int32, the time step, common to all; within a block the first of that block.
        env_state: leaves ``[F, ..]``.
        carry: the agents' recurrent state, leaves ``[S, E, N, ..]``.
        last_action: ``[F, N]`` int32, -1 at the first step.
        done: ``[F]`` bool.
        record: leaves ``[T(+1), F, ..]`` with ``T`` rounded up to whole blocks: time comes first, so that a step writes
            one contiguous slice.
    """

    step: Array
    env_state: EnvState
    carry: PyTree
    last_action: Array
    done: Array
    record: StoredEpisode


class _Noise(NamedTuple):
    """The random numbers of one step, leaves ``[S, ..]`` and ``[F, ..]``; those of a block have an axis ``K`` first."""

    act: PyTree
    env: PyTree


class _Keys(NamedTuple):
    """Random keys: ``act`` one per seed ``[S]``, ``env`` one per environment ``[F]``."""

    act: PRNGKey
    env: PRNGKey


def rollout(
    env: Environment,
    algo: Algorithm,
    params: PyTree,
    hp: Hyperparams,
    ctx: Context,
    keys: PRNGKey,
    *,
    num_envs: int,
) -> Rollout:
    """Plays one episode in each of ``num_envs`` environments of each seed.

    Args:
        env: the environment.
        algo: the algorithm that acts.
        params: parameters, leaves ``[S, ..]``.
        hp: hyperparameters, leaves ``[S]``.
        ctx: leaves ``[S]``; epsilon stays as it is for the whole episode.
        keys: ``[S]``.
        num_envs: ``E``.
    """
    # Agents see ``[S, E, ..]``, since each seed has its own parameters; environments see one flat batch ``[F, ..]``,
    # which a simulator outside of JAX gets in a single call. One loop for all of them: it ends with the longest
    # episode, and environments that have ended keep their state and record nothing more.
    num_seeds, limit, block = keys.shape[0], env.spec.episode_limit, block_length(env)
    by_seed = functools.partial(_by_seed, num_seeds)
    acting, stepping = acting_of(algo), step_of(env)
    reset_keys, play_keys = _split_keys(keys, num_envs)
    act_shape = (num_envs, env.spec.num_agents, env.spec.num_actions)

    def noise_at(step: Array) -> _Noise:
        act = jax.vmap(lambda key: acting.sample_noise(key, act_shape))(fold_in(play_keys.act, step))
        return _Noise(act, jax.vmap(stepping.sample_noise)(fold_in(play_keys.env, step)))

    def play_step(play: _Play, step: Array, noise: _Noise) -> _Play:
        seen = jax.vmap(env.observe)(play.env_state)
        avail_actions = with_idle_action(seen.avail_actions)
        inputs = jax.tree.map(by_seed, AgentInputs(seen.obs, play.last_action, avail_actions))
        joint_action, carry = jax.vmap(acting.act)(params, play.carry, inputs, hp, ctx, noise.act)  # [S, E, N]
        joint_action = joint_action.reshape(play.last_action.shape)  # [F, N]
        env_state, outcome = stepping.play(play.env_state, joint_action, noise.env)
        # Environments that have ended are stepped all the same, in the one batch, and keep their last state. So do all
        # of them in the rest of a block that the time limit cuts.
        ended = play.done if limit % block == 0 else play.done | (step >= limit)
        env_state = jax.tree.map(functools.partial(jax.vmap(jnp.where), ended), play.env_state, env_state)
        stopped = ended | jax.vmap(env.failed)(env_state)
        record = _write(env, play.record, step, stopped, env_state, joint_action, outcome)
        done = stopped | outcome.terminated | outcome.truncated
        return _Play(play.step, env_state, carry, joint_action, done, record)

    def play_block(play: _Play) -> _Play:
        # Drawn by the number of the step, so that the numbers don't depend on the length of a block.
        noise = jax.vmap(noise_at)(play.step + jnp.arange(block))

        def play_one(state: tuple[Array, _Play]) -> tuple[Array, _Play]:
            index, play = state
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            return index + 1, play_step(play, play.step + index, jax.tree.map(at, noise))

        def is_left(state: tuple[Array, _Play]) -> Array:
            return (state[0] < block) & _is_worth_playing(state[1].done)

        with jax.named_scope(f"block_at_most_{block}"):
            _, play = jax.lax.while_loop(is_left, play_one, (jnp.int32(0), play))
        return play._replace(step=play.step + block)

    def unfinished(play: _Play) -> Array:
        return (play.step < limit) & ~play.done.all()

    first = _first(env, algo, reset_keys, num_seeds, num_envs, -(-limit // block) * block)
    with jax.named_scope(f"steps_at_most_{-(-limit // block)}"):  # named for whoever reads the compiled program
        play = jax.lax.while_loop(unfinished, play_block, first)
    record = play.record
    timed = (record.steps, record.joint_action, record.reward)  # [T(+1), F, ..] -> [S, E, T(+1), ..]
    too_many = -limit % block
    timed = jax.tree.map(lambda leaf: by_seed(jnp.moveaxis(leaf[: len(leaf) - too_many], 0, 1)), timed)
    episodes = StoredEpisode(*timed, length=by_seed(record.length), terminated=by_seed(record.terminated))
    metrics = jax.tree.map(by_seed, jax.vmap(env.metrics)(play.env_state))
    whole = by_seed(~jax.vmap(env.failed)(play.env_state))
    return Rollout(episodes, episodes.reward.sum(-1), metrics, whole)


def greedy_episodes(
    env: Environment,
    algo: Algorithm,
    params: PyTree,
    hp: Hyperparams,
    ctx: Context,
    keys: PRNGKey,
    *,
    num_episodes: int,
) -> Figures:
    """Plays ``num_episodes`` greedy episodes of each seed; arguments as in `rollout`.

    A simulator outside of JAX has fewer games than that: then it plays them in several turns, with separate keys.
    """
    greedy = ctx._replace(epsilon=jnp.zeros_like(ctx.epsilon))
    in_parallel = env.episodes_at_once(num_episodes)

    def play(keys: PRNGKey) -> Figures:
        played = rollout(env.for_evaluation(), algo, params, hp, greedy, keys, num_envs=in_parallel)
        return Figures(played.episode_return, played.episodes.length.astype(jnp.float32), played.metrics, played.whole)

    if in_parallel == num_episodes:
        return play(keys)

    def turn(index: Array) -> Figures:
        return play(jax.vmap(jax.random.fold_in, (0, None))(keys, index))

    figures = jax.lax.map(turn, jnp.arange(-(-num_episodes // in_parallel)))  # [turns, S, in_parallel]
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1)[:, :num_episodes], figures)


def mean_metrics(figures: Figures) -> dict[str, Array]:
    """Averages over each seed's episodes, leaves ``[S, E]`` -> ``[S]``.

    Returns:
        ``episode_return`` (undiscounted) and ``episode_length`` with their standard deviations over the episodes, and
        the environment's own metrics. Episodes in which the environment failed are left out.
    """
    episode_return, length, metrics, whole = figures
    return {
        "episode_return": episode_return.mean(-1, where=whole),
        "episode_return_std": episode_return.std(-1, where=whole),
        "episode_length": length.mean(-1, where=whole),
        "episode_length_std": length.std(-1, where=whole),
        **jax.tree.map(lambda leaf: leaf.mean(-1, where=whole), metrics),
    }


def stored_template(env: Environment) -> StoredEpisode:
    """Returns the shapes and dtypes of one stored episode of ``env``, leaves ``[T(+1), ..]`` or scalars."""
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


def block_length(env: Environment) -> int:
    """Returns how many steps are played, and their random numbers drawn, without a look at what they did.

    A GPU or TPU waits for the host wherever a loop may end, and draws the numbers of many steps as fast as those of
    one. But a simulator outside of JAX is never asked for a step after the last episode has ended.

    The number is at most `MAX_BLOCK`; it divides the episode limit, or exceeds it by as few steps as possible.
    """
    limit = env.spec.episode_limit
    if not is_inside_jax(env):
        return 1
    if limit <= MAX_BLOCK:
        return limit
    return min(range(MAX_BLOCK, MAX_BLOCK // 2, -1), key=lambda length: -limit % length)


def _is_worth_playing(done: Array) -> Array:
    """Returns False, on a CPU, once all ``done`` ``[F]`` are true; elsewhere a block is played to its end."""
    return jax.lax.platform_dependent(done, cpu=lambda done: ~done.all(), default=lambda done: jnp.bool_(True))


def _by_seed(num_seeds: int, leaf: Array) -> Array:
    """Splits the axis of all environments: ``[F, ..]`` -> ``[S, E, ..]``."""
    return leaf.reshape(num_seeds, -1, *leaf.shape[1:])


def _split_keys(keys: PRNGKey, num_envs: int) -> tuple[PRNGKey, _Keys]:
    """Returns one key per environment to reset ``[F]``, one per seed to act, and one per environment to step."""
    reset, act, env = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    each_env = jax.vmap(lambda key: jax.random.split(key, num_envs))
    return each_env(reset).reshape(-1), _Keys(act=act, env=each_env(env).reshape(-1))


def _first(
    env: Environment, algo: Algorithm, reset_keys: PRNGKey, num_seeds: int, num_envs: int, num_steps: int
) -> _Play:
    """Returns the loop's state before the first step: reset environments, and a record of their first states alone.

    The record has room for ``num_steps`` steps.
    """
    env_state = env.reset_batch(reset_keys)
    # The record is as long as the longest episode: its shape can't depend on when episodes end.
    num_flat, num_agents = num_seeds * num_envs, env.spec.num_agents
    empty = stored_template(env)
    more = num_steps - env.spec.episode_limit
    timed = jax.tree.map(
        lambda leaf: jnp.zeros((leaf.shape[0] + more, num_flat, *leaf.shape[1:]), leaf.dtype),
        (empty.steps, empty.joint_action, empty.reward),
    )
    record = StoredEpisode(*timed, length=jnp.zeros(num_flat, jnp.int32), terminated=jnp.zeros(num_flat, jnp.bool_))
    first = jax.vmap(env.compress)(env_state)
    return _Play(
        step=jnp.int32(0),
        env_state=env_state,
        carry=algo.initial_carry((num_seeds, num_envs, num_agents)),
        last_action=jnp.full((num_flat, num_agents), -1, jnp.int32),
        done=jax.vmap(env.failed)(env_state),
        record=record._replace(steps=jax.tree.map(lambda all_, new: all_.at[0].set(new), record.steps, first)),
    )


def _write(
    env: Environment,
    record: StoredEpisode,
    step: Array,
    stopped: Array,
    env_state: EnvState,
    joint_action: Array,
    outcome: StepOutcome,
) -> StoredEpisode:
    """Records the action at t and the state at t + 1 of every environment but the ``stopped``, bool ``[F]``.

    Those have ended before this step, or failed in it.
    """

    # Zeros are written for environments that have stopped, so that padding is zero in the replay too.
    def put(all_: Array, index: Array, new: Array) -> Array:
        return all_.at[index].set(jax.vmap(jnp.where)(stopped, jnp.zeros_like(all_[0]), new.astype(all_.dtype)))

    compressed = jax.vmap(env.compress)(env_state)
    return StoredEpisode(
        steps=jax.tree.map(lambda all_, new: put(all_, step + 1, new), record.steps, compressed),
        joint_action=put(record.joint_action, step, joint_action),
        reward=put(record.reward, step, outcome.reward),
        length=record.length + ~stopped,
        terminated=record.terminated | (outcome.terminated & ~stopped),
    )
