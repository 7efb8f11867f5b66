"""Coordinate ascent against brute force, who controls which episodes, and the central Q's targets."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import Clock, by_seed
from wqmix_jax import load_config
from wqmix_jax.algos.base import AgentInputs, Context, hyperparams, latent_template
from wqmix_jax.algos.central_iql import CentralIQL
from wqmix_jax.errors import ConfigError
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.q_star import FeedForwardQStar
from wqmix_jax.ops.action_selection import coordinate_ascent
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import rollout
from wqmix_jax.types import Array

CLOCK = Clock(episode_limit=4, ends_from=9)
CTX = Context(jnp.float32(0.5), jnp.int32(0), jnp.int32(0))


def central_iql(*options: str) -> CentralIQL:
    return load_config("+algo=cen_iql", "algo.hidden_dim=6", "algo.q_star_dim=8", *options).algo  # type: ignore[return-value]


def ascend(payoff: np.ndarray, start: Any, avail: np.ndarray, num_sweeps: int) -> np.ndarray:
    table = jnp.asarray(payoff)

    def values(agent: Array, joint_action: Array) -> Array:
        rows = [[joint_action.at[agent].set(action) for action in range(payoff.shape[0])]]
        return jnp.stack([table[tuple(row)] for row in rows[0]])

    return np.array(coordinate_ascent(values, jnp.asarray(start, jnp.int32), jnp.asarray(avail), num_sweeps))


def test_coordinate_ascent_ascends_and_finds_the_best_where_no_agent_is_in_the_others_way() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        payoff, avail = generator.normal(size=(3, 3, 3)), np.ones((3, 3), bool)
        avail[generator.integers(3), generator.integers(3)] = False
        start = avail.argmax(-1)
        reached = [payoff[tuple(start)]] + [payoff[tuple(ascend(payoff, start, avail, sweeps))] for sweeps in (1, 2, 6)]
        assert (np.diff(reached) >= 0).all()
        local = ascend(payoff, start, avail, 6)  # no agent alone can do better
        for agent, action in itertools.product(range(3), range(3)):
            other = np.where(np.arange(3) == agent, action, local)
            assert not avail[agent, action] or payoff[tuple(other)] <= payoff[tuple(local)]
        parts = generator.normal(size=(3, 3))
        additive = parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None, :]
        joint_actions = [u for u in itertools.product(range(3), repeat=3) if avail[np.arange(3), list(u)].all()]
        best = max(joint_actions, key=lambda u: additive[u])
        np.testing.assert_array_equal(ascend(additive, start, avail, 1), best)


def test_coordinate_ascent_stops_at_a_joint_action_that_needs_two_agents_to_leave() -> None:
    """The penalty game: from the safe joint action no agent alone gets more; from another start the best is found."""
    payoff = np.array([[11.0, -30, 0], [-30, 7, 6], [0, 0, 5]])
    avail = np.ones((2, 3), bool)
    np.testing.assert_array_equal(ascend(payoff, [1, 1], avail, 3), [1, 1])
    np.testing.assert_array_equal(ascend(payoff, [2, 0], avail, 3), [0, 0])
    avail[0, 0] = False
    np.testing.assert_array_equal(ascend(payoff, [2, 0], avail, 3), [1, 1])


def test_the_values_of_one_agents_deviations_are_those_of_the_whole_net() -> None:
    net = FeedForwardQStar(7)
    qs, state = jax.random.normal(jax.random.key(0), (5, 3, 4)), jax.random.normal(jax.random.key(1), (5, 2))
    params = init_net(net, jax.random.key(2), qs[..., 0], state)
    whole = apply_net(net, params, qs, qs[..., 1], state, method="deviations")
    for agent in range(3):
        one = apply_net(net, params, jnp.int32(agent), qs, qs[..., 1], state, method="deviations_of")
        np.testing.assert_allclose(one, whole[:, agent], rtol=1e-5, atol=1e-6)
        direct = apply_net(net, params, qs[..., 1].at[:, agent].set(qs[:, agent, 2]), state)
        np.testing.assert_allclose(one[:, 2], direct, rtol=1e-5, atol=1e-6)


def play(algo: CentralIQL, params: Any, epsilon: float) -> Any:
    one_seed = by_seed((params, hyperparams(algo), CTX._replace(epsilon=jnp.float32(epsilon))))
    keys = jax.random.split(jax.random.key(3), 1)
    return jax.tree.map(
        lambda leaf: leaf[0], jax.jit(lambda: rollout(CLOCK, algo, *one_seed, keys, num_envs=40).episodes)()
    )


def test_the_central_q_plays_its_share_of_training_episodes_and_none_of_evaluation() -> None:
    """With next to no exploration each episode's actions are those of whoever controls it."""
    algo = central_iql("algo.ascent_sweeps=2")
    params = algo.init(jax.random.key(5), CLOCK.spec)
    episodes = play(algo, params, epsilon=1e-9)
    controls = np.array(episodes.latent)
    assert 10 < controls.sum() < 30
    replay = make_replay(CLOCK, buffer_size=40, batch_size=40, latent=latent_template(algo, CLOCK.spec))
    batch = replay.decode(replay.add(replay.init(), episodes, jnp.bool_(True)).experience[0], 4)

    @jax.jit
    def choices() -> tuple[Array, Array]:
        own, central = algo.unroll_nets(batch, [params["agent"], params["q_star_agent"]])
        greedy = jnp.where(batch.avail_actions, own.utilities, -jnp.inf).argmax(-1).astype(jnp.int32)
        return greedy, algo.maximiser(params, central.utilities, greedy, batch.state, batch.avail_actions)

    greedy, best = (np.array(choice)[:, :-1] for choice in choices())
    assert (greedy[controls] != best[controls]).any()
    np.testing.assert_array_equal(batch.joint_action, np.where(controls[:, None, None], best, greedy))
    evaluated = play(algo, params, epsilon=0.0)
    assert not np.array(evaluated.latent).any()
    # Saved policies have the agents' parameters alone, and no state.
    acting = algo.acting_params(params)
    assert acting.keys() == {"agent"}
    np.testing.assert_array_equal(play(algo, acting, epsilon=0.0).joint_action, evaluated.joint_action)
    inputs = AgentInputs(batch.obs[:, 0], jnp.full((40, 2), -1), batch.avail_actions[:, 0], episodes.latent)
    ctx = CTX._replace(epsilon=jnp.float32(0))
    carry = algo.initial_carry((40, 2))
    chosen, _ = algo.act(acting, carry, inputs, hyperparams(algo), ctx, jax.random.key(0))
    np.testing.assert_array_equal(chosen, greedy[:, 0])


def test_the_central_target_bootstraps_from_the_ascents_joint_action() -> None:
    """Two agents: from all joint actions of the last state, the value of the one that the ascent found."""
    algo = central_iql("algo.ascent_sweeps=2")
    params, target = (algo.init(jax.random.key(seed), CLOCK.spec) for seed in (5, 6))
    episodes = play(algo, params, epsilon=1.0)
    replay = make_replay(CLOCK, buffer_size=40, batch_size=40, latent=latent_template(algo, CLOCK.spec))
    batch = replay.decode(replay.add(replay.init(), episodes, jnp.bool_(True)).experience[0], 4)
    aux = jax.jit(lambda: algo.loss(params, target, batch, hyperparams(algo), CTX, ())[1])()

    @jax.jit
    def values(tree: Any) -> Array:
        utilities = algo.unroll(tree["q_star_agent"], batch)
        pairs = [jnp.full((40, 5, 2), jnp.array(u)) for u in itertools.product(range(3), repeat=2)]
        return jnp.stack([algo.q_star(tree, utilities, u, batch.state) for u in pairs], -1)  # [B, T+1, 9]

    best = np.array(aux.values["maximiser"])
    index = (best[..., 0] * 3 + best[..., 1])[:, 1:, None]
    next_value = np.take_along_axis(np.array(values(target))[:, 1:], index, -1)[..., 0]
    y = np.array(batch.reward) + 0.99 * np.array(batch.discount) * next_value
    np.testing.assert_allclose(aux.values["q_star_target"], y, rtol=1e-4, atol=1e-5)
    # The ascent is on the online net, and no agent alone can do better there.
    online = np.array(values(params)).reshape(40, 5, 3, 3)
    online = np.where(
        np.array(batch.avail_actions)[..., 0, :, None] & np.array(batch.avail_actions)[..., 1, None, :], online, -np.inf
    )
    b, t = np.indices((40, 5))
    found = online[b, t, best[..., 0], best[..., 1]]
    assert (online[b, t, :, best[..., 1]].max(-1) <= found + 1e-5).all()
    assert (online[b, t, best[..., 0]].max(-1) <= found + 1e-5).all()
    taken = np.array(values(params))[:, :-1][
        np.arange(40)[:, None], np.arange(4)[None], np.array(batch.joint_action) @ [3, 1]
    ]
    np.testing.assert_allclose(aux.values["q_star"], taken, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux.metrics["q_star_loss"], np.square(taken - y).mean(), rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["loss"], aux.metrics["agents_loss"] + aux.metrics["q_star_loss"], rtol=1e-5)


def test_an_epsilon_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"algo\.epsilon_finish=0.*greater than 0"):
        central_iql("algo.epsilon_finish=0.0")
