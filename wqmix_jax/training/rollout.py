"""Plays whole episodes, for training and greedy ones for evaluation: all seeds and environments in one batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.algos.base import Acting, AgentInputs, Algorithm, Context, Hyperparams, acting_of, draws_latent
from wqmix_jax.envs.base import Environment, EnvState, Step, is_inside_jax, step_of
from wqmix_jax.ops.action_selection import with_idle_action
from wqmix_jax.ops.byte_rows import from_row, row_bytes, to_row
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
        length: ``[F]`` int32, the number of recorded steps.
        terminated: ``[F]`` bool, whether the task ended after the last of them.
        rows: ``[T, F, row_bytes]`` uint8, the steps, see `_Recorded`, with ``T`` rounded up to whole blocks. Time comes
            first, so that a step writes one contiguous slice.
    """

    step: Array
    env_state: EnvState
    carry: PyTree
    last_action: Array
    done: Array
    length: Array
    terminated: Array
    rows: Array


class _Recorded(NamedTuple):
    """The recorded part of a step: its action and reward, and the state after it; zeros where an episode has ended.

    Attributes:
        state: in the environment's compact form, leaves ``[..]``.
        joint_action: ``[.., N]`` in the narrowest unsigned integer.
        reward: ``[..]`` float32.
    """

    state: PyTree
    joint_action: Array
    reward: Array


class _Noise(NamedTuple):
    """The random numbers of one step, leaves ``[S, ..]`` and ``[F, ..]``; those of a block have an axis ``K`` first."""

    act: PyTree
    env: PyTree


class _Keys(NamedTuple):
    """Random keys: ``act`` one per seed ``[S]``, ``env`` one per environment ``[F]``."""

    act: PRNGKey
    env: PRNGKey


class _Game(NamedTuple):
    """The values that are constant during episodes.

    Leaves of ``params``, ``hp`` and ``ctx`` are ``[S, ..]``, those of ``latent`` ``[S, E, ..]``.
    """

    env: Environment
    acting: Acting
    stepping: Step
    params: PyTree
    hp: Hyperparams
    ctx: Context
    keys: _Keys
    num_envs: int
    latent: PyTree = ()


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
    limit, block = env.spec.episode_limit, block_length(env)
    reset_keys, play_keys = _split_keys(keys, num_envs)
    game = _Game(env, acting_of(algo), step_of(env), params, hp, ctx, play_keys, num_envs)

    def unfinished(play: _Play) -> Array:
        return (play.step < limit) & ~play.done.all()

    num_blocks = -(-limit // block)
    first = _first(game, algo, reset_keys, num_blocks * block)
    game = game._replace(latent=_latents(game, algo, first.env_state, keys))
    with jax.named_scope(f"steps_at_most_{num_blocks}"):  # in blocks; for a reader of the compiled program
        play = jax.lax.while_loop(unfinished, functools.partial(_play_block, game, block), first)
    by_seed = functools.partial(_by_seed, len(keys))
    episodes = jax.tree.map(by_seed, _episodes(env, first.env_state, play))
    episodes = episodes._replace(latent=game.latent)
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


def stored_template(env: Environment, latent: PyTree = ()) -> StoredEpisode:
    """Returns the shapes and dtypes of one stored episode of ``env``, leaves ``[T(+1), ..]`` or scalars.

    Args:
        env: the environment.
        latent: the shapes and dtypes of its latent, see `wqmix_jax.algos.base.latent_template`.
    """
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
        return jax.eval_shape(empty)._replace(latent=latent)


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


def _play_block(game: _Game, block: int, play: _Play) -> _Play:
    """Plays ``block`` steps; their random numbers are drawn before the first of them."""
    # Drawn by the number of the step, so that the numbers don't depend on the length of a block.
    noise = jax.vmap(functools.partial(_noise_at, game))(play.step + jnp.arange(block))

    def play_one(state: tuple[Array, _Play]) -> tuple[Array, _Play]:
        index, play = state
        at = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        return index + 1, _play_step(game, play, play.step + index, jax.tree.map(at, noise))

    def is_left(state: tuple[Array, _Play]) -> Array:
        return (state[0] < block) & _is_worth_playing(state[1].done)

    _, play = jax.lax.while_loop(is_left, play_one, (jnp.int32(0), play))
    return play._replace(step=play.step + block)


def _noise_at(game: _Game, step: Array) -> _Noise:
    """Draws the random numbers of one step."""
    spec, keys = game.env.spec, game.keys
    shape = game.num_envs, spec.num_agents, spec.num_actions
    act = jax.vmap(lambda key: game.acting.sample_noise(key, shape))(fold_in(keys.act, step))
    return _Noise(act, jax.vmap(game.stepping.sample_noise)(fold_in(keys.env, step)))


def _play_step(game: _Game, play: _Play, step: Array, noise: _Noise) -> _Play:
    """Plays and records one step of all environments."""
    env, limit = game.env, game.env.spec.episode_limit
    seen = jax.vmap(env.observe)(play.env_state)
    inputs = AgentInputs(seen.obs, play.last_action, with_idle_action(seen.avail_actions))
    inputs = inputs._replace(state=seen.state) if game.acting.sees_state else inputs
    inputs = jax.tree.map(functools.partial(_by_seed, len(game.keys.act)), inputs)._replace(latent=game.latent)
    act = jax.vmap(game.acting.act)
    joint_action, carry = act(game.params, play.carry, inputs, game.hp, game.ctx, noise.act)  # [S, E, N]
    joint_action = joint_action.reshape(play.last_action.shape)  # [F, N]
    env_state, outcome = game.stepping.play(play.env_state, joint_action, noise.env)
    # Environments that have ended are stepped all the same, in the one batch, and keep their last state. So do all of
    # them in the rest of a block that reaches past the time limit.
    ended = play.done | (step >= limit) if len(play.rows) > limit else play.done
    env_state = jax.tree.map(functools.partial(jax.vmap(jnp.where), ended), play.env_state, env_state)
    stopped = ended | jax.vmap(env.failed)(env_state)
    row = _row(env, stopped, env_state, joint_action, outcome)
    return play._replace(
        env_state=env_state,
        carry=carry,
        last_action=joint_action,
        done=stopped | outcome.terminated | outcome.truncated,
        length=play.length + ~stopped,
        terminated=play.terminated | (outcome.terminated & ~stopped),
        rows=jax.lax.dynamic_update_index_in_dim(play.rows, row, step, 0),
    )


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


def _first(game: _Game, algo: Algorithm, reset_keys: PRNGKey, num_steps: int) -> _Play:
    """Returns the loop's state before the first step, with room for ``num_steps`` steps."""
    env = game.env
    env_state = env.reset_batch(reset_keys)
    num_flat, num_agents = len(reset_keys), env.spec.num_agents
    return _Play(
        step=jnp.int32(0),
        env_state=env_state,
        carry=algo.initial_carry((len(game.keys.act), game.num_envs, num_agents)),
        last_action=jnp.full((num_flat, num_agents), -1, jnp.int32),
        done=jax.vmap(env.failed)(env_state),
        length=jnp.zeros(num_flat, jnp.int32),
        terminated=jnp.zeros(num_flat, jnp.bool_),
        # As long as the longest episode: its shape can't depend on when episodes end.
        rows=jnp.zeros((num_steps, num_flat, row_bytes(_step_template(env))), jnp.uint8),
    )


def _latents(game: _Game, algo: Algorithm, env_state: EnvState, keys: PRNGKey) -> PyTree:
    """Draws the latent of each episode from its first state, leaves ``[S, E, ..]``; ``()`` if there is none."""
    if not draws_latent(algo):
        return ()
    state = _by_seed(len(keys), jax.vmap(game.env.observe)(env_state).state)
    # A count after those of `_split_keys`: the other draws are the same with and without a latent.
    return jax.vmap(algo.draw_latent)(game.params, state, game.hp, game.ctx, fold_in(keys, jnp.int32(3)))


def _step_template(env: Environment) -> _Recorded:
    """Returns the shapes and dtypes of what is recorded of one step, without any axes before them."""
    episode = stored_template(env)
    timed = _Recorded(episode.steps, episode.joint_action, episode.reward)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), timed)


def _row(env: Environment, stopped: Array, env_state: EnvState, joint_action: Array, outcome: StepOutcome) -> Array:
    """Returns the step of every environment as a row of bytes, ``[F, row_bytes]``.

    A row is zero for those that have ``stopped``, bool ``[F]``: that have ended before this step, or failed in it.
    """
    # One array of bytes rather than one for each leaf: it is written by one kernel.
    step = _Recorded(jax.vmap(env.compress)(env_state), joint_action, outcome.reward)
    step = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), step, _step_template(env))
    return jnp.where(stopped[:, None], jnp.uint8(0), jax.vmap(to_row)(step))


def _episodes(env: Environment, first: EnvState, play: _Play) -> StoredEpisode:
    """Returns what was recorded, leaves ``[F, ..]``, from the first states and the last state of the loop."""
    rows = jnp.moveaxis(play.rows[: env.spec.episode_limit], 0, 1)  # [F, T, row_bytes]
    recorded = jax.vmap(jax.vmap(functools.partial(from_row, template=_step_template(env))))(rows)
    compressed = jax.vmap(env.compress)(first)
    return StoredEpisode(
        steps=jax.tree.map(lambda one, others: jnp.concatenate([one[:, None], others], 1), compressed, recorded.state),
        joint_action=recorded.joint_action,
        reward=recorded.reward,
        length=play.length,
        terminated=play.terminated,
    )
