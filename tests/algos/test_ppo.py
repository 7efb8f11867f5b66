"""MAPPO and IPPO against numbers that are worked out by hand."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algos.test_algorithms import small_hunt
from tests.environments import hp_of_loss, tiny_ppo
from tests.running import main, timeless
from tests.training.test_learner import CTX, ENV, batch_of
from wqmix_jax import evaluate, load_metrics
from wqmix_jax.algos.base import AgentInputs, Context, hyperparams, with_values
from wqmix_jax.ops.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy,
    has_choice,
    log_probabilities,
)

PLAIN = {"standardise_returns": False, "standardise_advantages": False, "entropy_weight": 0.0, "layer_norm": False}
"""Without what changes the scale of a loss."""


def gae(reward, values, *, length, bootstraps, gamma, lam):
    """The recursion of Schulman et al. (arXiv 1506.02438), last step first; ``values`` has one more entry."""
    advantages, following = np.zeros(length), 0.0
    for t in reversed(range(length)):
        is_last = t == length - 1
        next_value = values[t + 1] if not is_last or bootstraps else 0.0
        delta = reward[t] + gamma * next_value - values[t]
        following = delta + (0.0 if is_last else gamma * lam * following)
        advantages[t] = following
    return advantages


@pytest.mark.parametrize("limit_is_end", [False, True])
def test_advantages_are_those_of_gae_at_an_end_and_at_a_time_limit(limit_is_end):
    """Row 0 is cut by the limit after four steps, row 1 ended by the task after three."""
    algo, batch = tiny_ppo(**PLAIN, limit_is_end=limit_is_end), batch_of([4, 3], [False, True])
    old_values = jax.random.normal(jax.random.key(3), (2, 5, 1))
    y, advantages = algo.returns(batch, hyperparams(algo), old_values)
    for row, (length, ended) in enumerate(((4, limit_is_end), (3, True))):
        values, reward = np.array(old_values[row, :, 0]), np.array(batch.reward[row])
        known = gae(reward, values, length=length, bootstraps=not ended, gamma=0.9, lam=0.95)
        np.testing.assert_allclose(advantages[row, :length, 0], known, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(y[row, :length, 0], known + values[:length], rtol=1e-5, atol=1e-5)


def test_a_critic_of_standardised_returns_is_read_by_the_moments_when_it_played():
    algo, batch = tiny_ppo(), batch_of([4, 3], [False, True])
    old_values = jax.random.normal(jax.random.key(3), (2, 5, 1))
    moments = {"return_mean": 7.0, "return_deviation": 9.0, "played_return_mean": 2.0, "played_return_deviation": 3.0}
    y, _ = algo.returns(batch, with_values(hyperparams(algo), moments), old_values)
    plain = tiny_ppo(**PLAIN)
    expected, _ = plain.returns(batch, hyperparams(plain), 3 * old_values + 2)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_a_policys_loss_stops_where_the_ratio_leaves_its_interval_to_the_better():
    ratio = jnp.array([0.5, 0.5, 1.1, 1.5, 1.5])
    advantages = jnp.array([1.0, -1.0, 2.0, 1.0, -1.0])
    loss = functools.partial(clipped_policy_loss, advantages=advantages, clip_ratio=jnp.float32(0.2))
    np.testing.assert_allclose(loss(jnp.log(ratio)), [-0.5, 0.8, -2.2, -1.2, 1.5], rtol=1e-6)
    slopes = jax.grad(lambda log_ratio: loss(log_ratio).sum())(jnp.log(ratio))
    np.testing.assert_allclose(slopes, [-0.5, 0, -2.2, 0, 1.5], rtol=1e-6)


def test_a_values_loss_is_the_larger_one_with_and_without_the_clip():
    """Old value 0, clip 0.2, Huber loss of delta 1."""
    values, y = jnp.array([0.5, 0.5, 0.1, -3.0]), jnp.array([1.0, 0.4, 0.3, 0.0])
    loss = clipped_value_loss(values, jnp.zeros(4), y, jnp.float32(0.2), jnp.float32(1.0))
    near = [0.8**2 / 2, 0.2**2 / 2, 0.2**2 / 2, 0.2**2 / 2]
    here = [0.5**2 / 2, 0.1**2 / 2, 0.2**2 / 2, 3.0 - 0.5]
    np.testing.assert_allclose(loss, np.maximum(near, here), rtol=1e-5)


def test_probabilities_are_a_softmax_over_what_is_available():
    logits, avail = jnp.array([[1.0, 2.0, 9.0], [5.0, 0.0, 0.0]]), jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    log_policy = log_probabilities(logits, avail)
    policy = np.array([1.0, math.e]) / (1 + math.e)
    np.testing.assert_allclose(jnp.exp(log_policy), [[*policy, 0], [1, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(entropy(log_policy), [-(policy * np.log(policy)).sum(), 0], rtol=1e-5, atol=1e-7)
    assert has_choice(avail).tolist() == [1, 0]


def some_nets(algo):
    return algo.init(jax.random.key(1), ENV.spec), algo.init(jax.random.key(2), ENV.spec)


@pytest.mark.parametrize("critic", ["state", "obs"])
def test_the_first_gradient_of_an_iteration_is_the_policy_gradient(critic):
    """With the parameters that played the ratio is 1: the gradient of -A log pi, and of the values' squared error."""
    algo, batch = tiny_ppo(**PLAIN, critic=critic, huber_delta=100.0, value_clip=100.0), batch_of([4, 3], [False, True])
    params, _ = some_nets(algo)
    hp = hp_of_loss(algo, params, batch)
    [old] = algo.critic_values(batch, [], [params["critic"]])
    y, advantages = algo.returns(batch, hp, old)

    def plain(params):
        logits = algo.unroll(params["agent"], batch)[:, :-1]
        log_policy = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_policy, batch.joint_action[..., None], -1)[..., 0]
        [values] = algo.critic_values(batch, [params["critic"]])
        each = -advantages * taken + (values[:, :-1] - y) ** 2 / 2
        return (each * batch.mask[..., None]).sum() / (batch.mask.sum() * ENV.spec.num_agents)

    got = jax.jit(jax.grad(lambda p: algo.loss(p, params, batch, hp, CTX, ())[0]))(params)
    for one, other in zip(*map(jax.tree.leaves, (got, jax.jit(jax.grad(plain))(params))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_agents_without_a_choice_are_left_out_of_the_policys_loss_and_of_the_advantages_moments():
    """Agent 1 has one action from the second step on; every number here is a mean over the others' steps."""
    algo, batch = tiny_ppo(entropy_weight=0.5), batch_of([4, 3], [False, True])
    only_first = jnp.arange(ENV.spec.num_actions) == 0
    batch = batch._replace(
        avail_actions=batch.avail_actions.at[:, 1:, 1].set(only_first),
        joint_action=batch.joint_action.at[:, 1:, 1].set(0),
    )
    params, target = some_nets(algo)
    hp = hp_of_loss(algo, target, batch)
    active = np.array(batch.mask)[..., None] * np.array([[1, 1], [1, 0], [1, 0], [1, 0]])
    loss, aux = jax.jit(lambda p: algo.loss(p, target, batch, hp, CTX, ()))(params)
    advantages = np.broadcast_to(np.array(aux.values["advantages"]), active.shape)[active > 0]
    normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-5)
    ratio = np.exp(np.array(aux.values["log_ratio"])[active > 0])
    surrogate = np.minimum(ratio * normalised, np.clip(ratio, 0.8, 1.2) * normalised).mean()
    policy = np.exp(np.array(aux.values["log_policy"]))
    spread = -(policy * np.log(np.maximum(policy, 1e-30))).sum(-1)[active > 0].mean()
    np.testing.assert_allclose(aux.metrics["policy_loss"], -surrogate, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["policy_entropy"], spread, rtol=1e-4)
    np.testing.assert_allclose(loss, -surrogate - 0.5 * spread + aux.metrics["value_loss"], rtol=1e-4)


def test_the_critic_sees_the_state_or_the_observations_of_its_own_agent():
    """And gives one value for all agents if nothing distinguishes them."""
    batch = batch_of([4, 3], [False, True])
    other_state = batch._replace(state=batch.state + 1)
    other_obs = batch._replace(obs=batch.obs.at[:, :, 0].add(1))
    for options, shape in (
        ({"critic": "state"}, 2),
        ({"critic": "state", "critic_agent_id": False}, 1),
        ({"critic": "state", "critic_agent_id": False, "share_parameters": "none"}, 2),
        ({"critic": "obs", "critic_agent_id": False}, 2),
    ):
        algo = tiny_ppo(**options)
        params, _ = some_nets(algo)
        values, by_state, by_obs = (
            np.array(algo.critic_values(each, [params["critic"]])[0]) for each in (batch, other_state, other_obs)
        )
        assert values.shape == (2, 5, shape)
        sees_state = options["critic"] == "state"
        assert np.allclose(values, by_state) == (not sees_state)
        assert np.allclose(values[..., -1], by_obs[..., -1])
        assert np.allclose(values[..., 0], by_obs[..., 0]) == sees_state


def test_actions_are_drawn_from_the_policy_and_evaluation_takes_its_mode():
    algo = tiny_ppo()
    params, shape = some_nets(algo)[0], (4000, 2)
    params["agent"]["head"]["bias"] = jnp.log(jnp.array([0.2, 0.7, 0.1]))
    params["agent"]["head"]["kernel"] *= 0
    inputs = AgentInputs(jnp.zeros((*shape, ENV.spec.obs_dim)), jnp.full(shape, -1), jnp.ones((*shape, 3), bool))

    def played(epsilon):
        ctx = Context(jnp.float32(epsilon), jnp.int32(0), jnp.int32(0))
        carry = algo.initial_carry(shape)
        chosen, _ = algo.act(params, carry, inputs, hyperparams(algo), ctx, jax.random.key(0))
        return np.bincount(np.array(chosen).ravel(), minlength=3) / chosen.size

    np.testing.assert_allclose(played(0.5), [0.2, 0.7, 0.1], atol=0.02)
    np.testing.assert_array_equal(played(0.0), [0, 1, 0])


@pytest.mark.slow
def test_a_run_is_swept_resumed_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The resumed run has the records of the uninterrupted one, and a swept value acts on its own member."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (
        "+algo=mappo",
        *small_hunt("mappo"),
        "sweep.clip_ratio=[0.01,0.2]",
        "algo.lr=0.01",
        "checkpoint.every=15",
    )
    assert main(*options, "total_env_steps=60", f"run_dir={whole}") == 0
    assert main(*options, f"run_dir={parts}") == 0
    assert main(f"resume={parts}", "total_env_steps=60") == 0
    records, resumed = timeless(load_metrics(whole)), timeless(load_metrics(parts))
    assert [line for line in records if line in resumed] == records
    assert len({line["loss"] for line in records if line["kind"] == "train" and line["env_steps"] >= 60}) == 4
    capsys.readouterr()
    evaluate.main([f"run_dir={whole}", "policy=last", "episodes=2"])
    assert capsys.readouterr().out.count("seed 1-clip_ratio0.2: ") >= 2
