"""A plain JAX loop with the structure of JaxMARL's: QMIX on SMAX, for speed comparisons only.

Per iteration it does the work of JaxMARL's recurrent QMIX, with the same parts (JaxMARL's environment with its
automatic resets, flax's GRU cell in a scan that resets at an episode's start, a flashbax buffer of float32 sequences,
optax's RAdam, autodiff) and the sizes of its configuration for SMAX. It was written for this comparison: JaxMARL's own
script may be faster or slower.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.plain_learner import Mixer
from wqmix_jax.envs.base import without_weak_types
from wqmix_jax.types import Array, PRNGKey, PyTree

NUM_ENVS, NUM_STEPS, LEARNER_CALLS, BATCH_SIZE = 16, 128, 8, 32
HIDDEN_DIM, MIXER_DIM, HYPERNET_DIM = 64, 64, 256
EPSILON, GAMMA, LEARNING_RATE, MAX_GRAD_NORM = 0.5, 0.99, 5e-5, 10.0
TARGET_INTERVAL = 10  # iterations
BUFFER_SIZE = 1024  # sequences; JaxMARL's 5000 need 5 GB on 3s5z, and the work is the same


class Steps(NamedTuple):
    """The stored steps of a sequence; ``first`` is true for the first step of an episode."""

    obs: Array
    state: Array
    avail_actions: Array
    joint_action: Array
    reward: Array
    first: Array


class PlainState(NamedTuple):
    """The training state of one seed."""

    params: PyTree
    target: PyTree
    opt_state: PyTree
    buffer: Any
    iterations: Array
    key: PRNGKey


class PlainQmix(NamedTuple):
    """The loop: ``init(key)``, and ``iterate(state) -> (state, loss)``, which plays and then learns."""

    init: Callable[[PRNGKey], PlainState]
    iterate: Callable[[PlainState], tuple[PlainState, Array]]


class _ResetGRU(nn.Module):
    @nn.compact
    def __call__(self, carry: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        features, first = inputs
        return nn.GRUCell(HIDDEN_DIM)(jnp.where(first[:, None], 0.0, carry), features)


class _Agent(nn.Module):
    """Maps ``[T, F, obs]`` and ``first`` ``[T, F]`` to utilities ``[T, F, A]``."""

    num_actions: int

    @nn.compact
    def __call__(self, carry: Array, obs: Array, first: Array) -> tuple[Array, Array]:
        scanned = nn.scan(_ResetGRU, variable_broadcast="params", split_rngs={"params": False})()
        carry, hidden = scanned(carry, (nn.relu(nn.Dense(HIDDEN_DIM)(obs)), first))
        return carry, nn.Dense(self.num_actions)(hidden)


def make_plain_qmix(game: Any) -> PlainQmix:
    """Binds the loop to JaxMARL's environment."""
    agent, mixer, num_agents = _Agent(game.num_ally_actions), Mixer(MIXER_DIM, HYPERNET_DIM), len(game.agents)
    optimiser = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.radam(LEARNING_RATE))
    buffer = flashbax.make_trajectory_buffer(
        add_batch_size=NUM_ENVS,
        sample_batch_size=BATCH_SIZE,
        sample_sequence_length=1,
        period=1,
        min_length_time_axis=1,
        max_length_time_axis=BUFFER_SIZE // NUM_ENVS,
    )

    def utilities(params: PyTree, carry: Array, steps: Steps) -> tuple[Array, Array]:
        return _utilities(agent, params["agent"], carry, steps)

    def mix(params: PyTree, qs: Array, state: Array) -> Any:
        return mixer.apply(params["mixer"], qs, state)

    def init(key: PRNGKey) -> PlainState:
        agent_key, mixer_key, play_key, key = jax.random.split(key, 4)
        obs, state = jnp.zeros((1, 1, game.obs_size + num_agents)), jnp.zeros((1, 1, game.state_size))
        params = {
            "agent": agent.init(agent_key, jnp.zeros((1, HIDDEN_DIM)), obs, jnp.zeros((1, 1), bool)),
            "mixer": mixer.init(mixer_key, jnp.zeros((1, 1, num_agents)), state),
        }
        template = jax.eval_shape(lambda: _play(game, utilities, params, play_key))
        one = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], *leaf.shape[2:]), leaf.dtype), template)
        return PlainState(params, params, optimiser.init(params), buffer.init(one), jnp.int32(0), key)

    def loss(params: PyTree, target: PyTree, steps: Steps) -> Array:
        carry = jnp.zeros((BATCH_SIZE * num_agents, HIDDEN_DIM))
        online, old = (utilities(p, carry, steps)[1] for p in (params, target))
        best = jnp.where(steps.avail_actions, online, -jnp.inf).argmax(-1)
        chosen, following = (_pick(qs, actions) for qs, actions in ((online, steps.joint_action), (old, best)))
        q_tot = mix(params, chosen, steps.state)[:-1]
        next_q = mix(target, following, steps.state)[1:]
        td_target = steps.reward[:-1] + GAMMA * ~steps.first[1:] * next_q
        return jnp.square(q_tot - jax.lax.stop_gradient(td_target)).mean()

    def iterate(state: PlainState) -> tuple[PlainState, Array]:
        key, play_key, learn_key = jax.random.split(state.key, 3)
        played = jax.tree.map(
            lambda leaf: jnp.swapaxes(leaf, 0, 1)[:, None], _play(game, utilities, state.params, play_key)
        )
        stored = buffer.add(state.buffer, played)

        def learn(carry: tuple[PyTree, PyTree], key: PRNGKey) -> tuple[tuple[PyTree, PyTree], Array]:
            params, opt_state = carry
            sampled = buffer.sample(stored, key).experience
            steps = jax.tree.map(lambda leaf: jnp.swapaxes(leaf[:, 0], 0, 1), sampled)
            value, grads = jax.value_and_grad(loss)(params, state.target, steps)
            updates, opt_state = optimiser.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        learner = (state.params, state.opt_state)
        (params, opt_state), losses = jax.lax.scan(learn, learner, jax.random.split(learn_key, LEARNER_CALLS))
        iterations = state.iterations + 1
        target = jax.lax.cond(iterations % TARGET_INTERVAL == 0, lambda: params, lambda: state.target)
        return PlainState(params, target, opt_state, stored, iterations, key), losses.mean()

    return PlainQmix(init, iterate)


def _play(game: Any, utilities: Callable[..., Any], params: PyTree, key: PRNGKey) -> Steps:
    """Returns epsilon-greedy steps of all environments after a reset, leaves ``[T, E, ..]``."""

    def advance(carry: tuple[Any, ...], key: PRNGKey) -> tuple[tuple[Any, ...], Steps]:
        hidden, obs, dones, env_state = carry
        seen = _observe(game, obs, dones, env_state)
        hidden, qs = utilities(params, hidden, jax.tree.map(lambda leaf: leaf[None], seen))
        greedy_key, random_key, step_key = jax.random.split(key, 3)
        best = jnp.where(seen.avail_actions, qs[0], -jnp.inf).argmax(-1)
        drawn = jax.random.categorical(random_key, jnp.where(seen.avail_actions, 0.0, -jnp.inf))
        joint_action = jnp.where(jax.random.uniform(greedy_key, best.shape) < EPSILON, drawn, best)
        actions = {name: joint_action[:, index] for index, name in enumerate(game.agents)}
        step_keys = jax.random.split(step_key, NUM_ENVS)
        obs, env_state, rewards, dones, _ = jax.vmap(game.step)(step_keys, env_state, actions)
        steps = seen._replace(joint_action=joint_action, reward=rewards[game.agents[0]])
        return (hidden, obs, dones, without_weak_types(env_state)), steps

    reset_key, key = jax.random.split(key)
    obs, env_state = jax.vmap(game.reset)(jax.random.split(reset_key, NUM_ENVS))
    dones = {name: jnp.zeros(NUM_ENVS, bool) for name in (*game.agents, "__all__")}
    hidden = jnp.zeros((NUM_ENVS * len(game.agents), HIDDEN_DIM))
    start = (hidden, obs, dones, without_weak_types(env_state))
    return jax.lax.scan(advance, start, jax.random.split(key, NUM_STEPS))[1]


def _observe(game: Any, obs: dict[str, Array], dones: dict[str, Array], env_state: Any) -> Steps:
    """Returns observations of all environments, leaves ``[E, ..]``; action and reward are filled in later."""
    num_agents, avail = len(game.agents), jax.vmap(game.get_avail_actions)(env_state)
    features, dead, avail_actions = (
        jnp.stack([by_agent[name] for name in game.agents], axis=1) for by_agent in (obs, dones, avail)
    )
    ids = jnp.broadcast_to(jnp.eye(num_agents), (NUM_ENVS, num_agents, num_agents))
    return Steps(
        obs=jnp.where(dead[..., None], 0.0, jnp.concatenate([features, ids], axis=-1)),
        state=obs["world_state"],
        avail_actions=avail_actions > 0,
        joint_action=jnp.zeros((NUM_ENVS, num_agents), jnp.int32),
        reward=jnp.zeros(NUM_ENVS),
        first=dones["__all__"],
    )


def _utilities(agent: Any, params: PyTree, carry: Array, steps: Steps) -> tuple[Array, Array]:
    """Returns the utilities ``[T, B, N, A]``, with all agents in the batch of one network."""
    num_steps, batch_size, num_agents, _ = steps.obs.shape
    obs = steps.obs.reshape(num_steps, batch_size * num_agents, -1)
    carry, qs = agent.apply(params, carry, obs, jnp.repeat(steps.first, num_agents, axis=1))
    return carry, qs.reshape(num_steps, batch_size, num_agents, -1)


def _pick(qs: Array, actions: Array) -> Array:
    return jnp.take_along_axis(qs, actions[..., None], axis=-1)[..., 0]
