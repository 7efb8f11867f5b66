"""Plays whole episodes: seeds and environments side by side, until the last of them has ended."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wqmix_jax.algos.base import AgentInputs, Algorithm, Context, Hyperparams
from wqmix_jax.envs.base import Environment, EnvState
from wqmix_jax.ops.action_selection import with_idle_action
from wqmix_jax.training.replay import StoredEpisode, stored_template
from wqmix_jax.types import Array, PRNGKey, PyTree, StepOutcome


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


class _Play(NamedTuple):
    """The loop's state; environments lie flat in one axis ``F = S * E``, the record's leaves are ``[T(+1), F, ..]``."""

    step: Array
    env_state: EnvState
    carry: PyTree
    last_action: Array
    done: Array
    record: StoredEpisode


class _Keys(NamedTuple):
    """``act`` one per seed ``[S]``, ``env`` one per environment ``[F]``."""

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
    num_seeds = keys.shape[0]

    def by_seed(leaf: Array) -> Array:
        return leaf.reshape(num_seeds, num_envs, *leaf.shape[1:])

    def flat(leaf: Array) -> Array:
        return leaf.reshape(num_seeds * num_envs, *leaf.shape[2:])

    reset_keys, play_keys = _split_keys(keys, num_envs)

    def advance(play: _Play) -> _Play:
        seen = jax.vmap(env.observe)(play.env_state)
        avail_actions = with_idle_action(seen.avail_actions)
        inputs = jax.tree.map(by_seed, AgentInputs(seen.obs, play.last_action, avail_actions))
        act_keys = jax.vmap(jax.random.fold_in, (0, None))(play_keys.act, play.step)
        joint_action, carry = jax.vmap(algo.act)(params, play.carry, inputs, hp, ctx, act_keys)
        joint_action = flat(joint_action)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(play_keys.env, play.step)
        env_state, outcome = env.step_batch(play.env_state, joint_action, step_keys)
        env_state = jax.tree.map(functools.partial(jax.vmap(jnp.where), play.done), play.env_state, env_state)
        stopped = play.done | jax.vmap(env.failed)(env_state)
        record = _write(env, play, stopped, env_state, joint_action, outcome)
        done = stopped | outcome.terminated | outcome.truncated
        return _Play(play.step + 1, env_state, carry, joint_action, done, record)

    def unfinished(play: _Play) -> Array:
        return (play.step < env.spec.episode_limit) & ~play.done.all()

    play = jax.lax.while_loop(unfinished, advance, _first(env, algo, reset_keys, num_seeds, num_envs))
    record = play.record
    time_last = jax.tree.map(
        lambda leaf: by_seed(jnp.moveaxis(leaf, 0, 1)), (record.steps, record.joint_action, record.reward)
    )
    episodes = StoredEpisode(*time_last, length=by_seed(record.length), terminated=by_seed(record.terminated))
    metrics = jax.tree.map(by_seed, jax.vmap(env.metrics)(play.env_state))
    whole = by_seed(~jax.vmap(env.failed)(play.env_state))
    return Rollout(episodes, episodes.reward.sum(-1), metrics, whole)


def _split_keys(keys: PRNGKey, num_envs: int) -> tuple[PRNGKey, _Keys]:
    """Per seed one key to act, per environment one to reset and one to step."""
    reset, act, env = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    each_env = jax.vmap(lambda key: jax.random.split(key, num_envs))
    return each_env(reset).reshape(-1), _Keys(act=act, env=each_env(env).reshape(-1))


def _first(env: Environment, algo: Algorithm, reset_keys: PRNGKey, num_seeds: int, num_envs: int) -> _Play:
    env_state = env.reset_batch(reset_keys)
    num_flat, num_agents = num_seeds * num_envs, env.spec.num_agents
    empty = stored_template(env)
    timed = jax.tree.map(
        lambda leaf: jnp.zeros((leaf.shape[0], num_flat, *leaf.shape[1:]), leaf.dtype),
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
    env: Environment, play: _Play, stopped: Array, env_state: EnvState, joint_action: Array, outcome: StepOutcome
) -> StoredEpisode:
    """Records the step of every environment that had not stopped before it: the action at t, the state at t + 1."""
    record, step = play.record, play.step

    def put(all_: Array, index: Array, new: Array) -> Array:
        return all_.at[index].set(jax.vmap(jnp.where)(stopped, jnp.zeros_like(all_[0]), new.astype(all_.dtype)))

    packed = jax.vmap(env.compress)(env_state)
    return StoredEpisode(
        steps=jax.tree.map(lambda all_, new: put(all_, step + 1, new), record.steps, packed),
        joint_action=put(record.joint_action, step, joint_action),
        reward=put(record.reward, step, outcome.reward),
        length=record.length + ~stopped,
        terminated=record.terminated | (outcome.terminated & ~stopped),
    )
