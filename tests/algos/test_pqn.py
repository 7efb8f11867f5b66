"""PQN-VDN against numbers that are worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import QMIX
from tests.training.test_learner import CTX, ENV, batch_of
from wqmix_jax import load_config
from wqmix_jax.algos.base import hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build


def tiny_pqn(**changes):
    own = {"mixer": "vdn", "returns": "td_lambda", "layer_norm": True, "batch_size": 2, "buffer_size": 2}
    return build("algo", {"_target_": "wqmix_jax.algos.pqn.PQN", **QMIX, **own, **changes})


def test_the_target_is_the_lambda_return_of_the_online_nets_maxima():
    """Row 0 is cut by the limit after four steps and bootstraps; row 1 is ended by the task after three."""
    algo, batch = tiny_pqn(), batch_of([4, 3], [False, True])
    batch = batch._replace(avail_actions=batch.avail_actions.at[:, :, 0, 1].set(False))
    params = algo.init(jax.random.key(1), ENV.spec)
    absent = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)  # no target net is read
    loss, aux = jax.jit(lambda p: algo.loss(p, absent, batch, hyperparams(algo), CTX, ()))(params)
    agent_qs = np.array(algo.unroll(params["agent"], batch))
    best = np.where(batch.avail_actions, agent_qs, -np.inf).max(-1).sum(-1)
    errors = []
    for row, (length, ended) in enumerate(((4, False), (3, True))):
        y = 0.0 if ended else best[row, length]
        for t in reversed(range(length)):
            is_last = t == length - 1
            following = y if is_last else 0.2 * best[row, t + 1] + 0.8 * y
            y = float(batch.reward[row, t]) + 0.9 * following
            np.testing.assert_allclose(aux.values["td_target"][row, t], y, rtol=1e-5, atol=1e-5)
            taken = agent_qs[row, t, range(2), np.array(batch.joint_action[row, t])].sum()
            errors.append(taken - y)
    np.testing.assert_allclose(loss, np.mean(np.square(errors)), rtol=1e-5)


def test_the_target_is_a_constant_to_the_gradient():
    algo, batch = tiny_pqn(), batch_of([4, 3], [False, True])
    params = algo.init(jax.random.key(1), ENV.spec)
    hp = hyperparams(algo)
    y = algo.loss(params, params, batch, hp, CTX, ())[1].values["td_target"]

    def plain(params):
        agent_qs = algo.unroll(params["agent"], batch)[:, :-1]
        taken = jnp.take_along_axis(agent_qs, batch.joint_action[..., None], -1)[..., 0].sum(-1)
        return (jnp.square(taken - y) * batch.mask).sum() / batch.mask.sum()

    got = jax.jit(jax.grad(lambda p: algo.loss(p, params, batch, hp, CTX, ())[0]))(params)
    for one, other in zip(*map(jax.tree.leaves, (got, jax.jit(jax.grad(plain))(params))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_prioritised_episodes_are_refused():
    message = "^algo.prioritised=True is not allowed: PQN learns from the num_envs=64 episodes just played"
    with pytest.raises(ConfigError, match=message):
        load_config("+algo=pqn_vdn", "algo.prioritised=true")
