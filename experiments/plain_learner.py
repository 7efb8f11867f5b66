"""OW-QMIX's learner call in plain JAX, as a stopwatch's counterpart: flax's GRU cell in its own scan, autodiff, optax.

It does the work of a learner step, a gradient and `wqmix_jax.training.learner.apply_gradients`, for ``+algo=ow_qmix``
on a batch that is already decoded, on one device, with the layers that flax brings, whose initial values and biases
differ.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.types import Array, Episode, PyTree


class Agent(nn.Module):
    """``[T, R, F]`` to the utilities ``[T, R, A]``."""

    hidden_dim: int
    num_actions: int

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        hidden = nn.RNN(nn.GRUCell(self.hidden_dim), time_major=True)(nn.relu(nn.Dense(self.hidden_dim)(inputs)))
        return nn.Dense(self.num_actions)(hidden)


class Mixer(nn.Module):
    """QMIX's: ``[.., N]`` and ``[.., D]`` to ``[..]``."""

    embed_dim: int
    hypernet_dim: int

    @nn.compact
    def __call__(self, qs: Array, state: Array) -> Array:
        def hypernet(hidden_dim: int, out_dim: int) -> Array:
            return nn.Dense(out_dim)(nn.relu(nn.Dense(hidden_dim)(state)))

        w_1 = jnp.abs(hypernet(self.hypernet_dim, qs.shape[-1] * self.embed_dim)).reshape(*qs.shape, self.embed_dim)
        w_2 = jnp.abs(hypernet(self.hypernet_dim, self.embed_dim))
        hidden = nn.elu((qs[..., None] * w_1).sum(-2) + nn.Dense(self.embed_dim)(state))
        return (hidden * w_2).sum(-1) + hypernet(self.embed_dim, 1)[..., 0]


class QStar(nn.Module):
    """The feed-forward Q*: ``[.., N]`` and ``[.., D]`` to ``[..]``."""

    hidden_dim: int

    @nn.compact
    def __call__(self, qs: Array, state: Array) -> Array:
        hidden = jnp.concatenate([state, qs], axis=-1)
        for _ in range(3):
            hidden = nn.relu(nn.Dense(self.hidden_dim)(hidden))
        v = nn.Dense(1)(nn.relu(nn.Dense(self.hidden_dim)(state)))
        return (nn.Dense(1)(hidden) + v)[..., 0]


class PlainLearner(NamedTuple):
    """What a call changes."""

    params: PyTree
    target: PyTree
    opt_state: PyTree


def make_plain_learner(
    algo: WQMIX, batch: Episode
) -> tuple[PlainLearner, Callable[[PlainLearner, Episode], tuple[PlainLearner, Array]]]:
    """The learner at its start, and ``call(learner, batch) -> (learner, loss)``."""
    agent = Agent(algo.hidden_dim, batch.avail_actions.shape[-1])
    mixer, q_star = Mixer(algo.mixer_embed_dim, algo.hypernet_dim), QStar(algo.q_star_dim)
    optimiser = optax.chain(
        optax.clip_by_global_norm(algo.max_grad_norm), optax.rmsprop(algo.lr, algo.rms_decay, algo.rms_eps)
    )

    def init() -> PlainLearner:
        keys = jax.random.split(jax.random.key(0), 4)
        inputs, state = _inputs(batch)[:1, :1], batch.state[:1, :1]
        qs = jnp.zeros((1, 1, batch.obs.shape[-2]))
        params = {
            "agent": agent.init(keys[0], inputs),
            "q_agent": agent.init(keys[1], inputs),
            "mixer": mixer.init(keys[2], qs, state),
            "q_star": q_star.init(keys[3], qs, state),
        }
        return PlainLearner(params, params, optimiser.init(params))

    def loss(params: PyTree, target: PyTree, batch: Episode) -> Array:
        online, central, old = (
            _by_episode(agent.apply(net, _inputs(batch)), batch)
            for net in (params["agent"], params["q_agent"], target["q_agent"])
        )
        best = jnp.where(batch.avail_actions, online, -jnp.inf).argmax(-1)
        now, after = batch.state[:, :-1], batch.state[:, 1:]
        q_tot: Any = mixer.apply(params["mixer"], _pick(online[:, :-1], batch.joint_action), now)
        central_q: Any = q_star.apply(params["q_star"], _pick(central[:, :-1], batch.joint_action), now)
        next_q: Any = q_star.apply(target["q_star"], _pick(old[:, 1:], best[:, 1:]), after)
        y = jax.lax.stop_gradient(batch.reward + algo.gamma * batch.discount * next_q)
        weights = jnp.where(q_tot < y, 1.0, algo.alpha)
        squares = weights * jnp.square(q_tot - y) + jnp.square(central_q - y)
        return (batch.mask * squares).sum() / batch.mask.sum()

    def call(learner: PlainLearner, batch: Episode) -> tuple[PlainLearner, Array]:
        value, grads = jax.value_and_grad(loss)(learner.params, learner.target, batch)
        updates, opt_state = optimiser.update(grads, learner.opt_state)
        params = optax.apply_updates(learner.params, updates)
        return learner._replace(params=params, opt_state=opt_state), value

    return jax.jit(init)(), call


def _inputs(batch: Episode) -> Array:
    """Observation, last action and id of every agent, ``[T+1, B * N, F]``."""
    num_agents, num_actions = batch.avail_actions.shape[-2:]
    last = jnp.pad(jax.nn.one_hot(batch.joint_action, num_actions), ((0, 0), (1, 0), (0, 0), (0, 0)))
    ids = jnp.broadcast_to(jnp.eye(num_agents), (*batch.obs.shape[:-1], num_agents))
    inputs = jnp.concatenate([batch.obs, last, ids], axis=-1).swapaxes(0, 1)
    return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])


def _by_episode(qs: Any, batch: Episode) -> Array:
    """``[T+1, B * N, A]`` to ``[B, T+1, N, A]``."""
    return qs.reshape(qs.shape[0], -1, *batch.avail_actions.shape[-2:]).swapaxes(0, 1)


def _pick(qs: Array, actions: Array) -> Array:
    return jnp.take_along_axis(qs, actions[..., None], axis=-1)[..., 0]
