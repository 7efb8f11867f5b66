"""COMA: its baseline, targets and critic's inputs by hand, the steps of a learner call, and that it learns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import tiny_coma
from tests.running import main
from tests.training.test_learner import batch_of, params_and_target
from wqmix_jax.algos.base import AgentInputs, Context, Trained, hyperparams
from wqmix_jax.networks.coma_critic import critic_inputs
from wqmix_jax.ops.policy_gradient import counterfactual_advantages
from wqmix_jax.training.learner import apply_gradients, init_learner, optimizer_step
from wqmix_jax.types import Episode, PyTree

CTX = Context(jnp.float32(0.3), jnp.int32(0), jnp.int32(0))
BATCH = ([2, 3], [True, False])
"""An episode that ended and one that the limit of 4 steps didn't cut: no batch has a fourth real step."""


@functools.partial(jax.jit, static_argnums=0)
def loss_of(algo: Any, params: PyTree, target: PyTree, batch: Episode, noise: Any) -> Any:
    return algo.loss(params, target, batch, hyperparams(algo), CTX, noise)


@functools.partial(jax.jit, static_argnums=0)
def updated(algo: Any, trained: Trained, target: PyTree, batch: Episode, noise: Any) -> Any:
    hp = hyperparams(algo)
    return algo.update(trained, target, batch, hp, CTX, noise, optimizer_step(algo, hp))


def always(action: int, batch: Episode) -> Any:
    """Noise with which every agent draws this action."""
    return jnp.broadcast_to(1e6 * jax.nn.one_hot(action, 3), batch.avail_actions.shape)


def test_the_counterfactual_baseline_by_hand() -> None:
    """Two agents with two actions: 3 - (1/4 * 1 + 3/4 * 3) and 2 - (1/2 * 2 + 1/2 * 6)."""
    qs, policy = jnp.array([[1.0, 3.0], [2.0, 6.0]]), jnp.array([[0.25, 0.75], [0.5, 0.5]])
    advantages = counterfactual_advantages(qs, policy, jax.nn.one_hot(jnp.array([1, 0]), 2))
    np.testing.assert_allclose(advantages, [0.5, -2.0])


def test_a_critic_sees_the_others_actions_and_not_the_agents_own() -> None:
    """Two agents, two actions, two steps; the joint actions are (1, 0) and (0, 1)."""
    obs = jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1)
    actions = jax.nn.one_hot(jnp.array([[[1, 0], [0, 1]]]), 2)
    found = critic_inputs(obs, jnp.array([[[10.0], [20.0]]]), actions)
    first = [10, 1, *(0, 0, 1, 0), *(0, 0, 0, 0)], [10, 2, *(0, 1, 0, 0), *(0, 0, 0, 0)]
    second = [20, 3, *(0, 0, 0, 1), *(0, 1, 1, 0)], [20, 4, *(1, 0, 0, 0), *(0, 1, 1, 0)]
    np.testing.assert_array_equal(found, [[first, second]])


def test_targets_are_lambda_returns_that_bootstrap_from_a_drawn_action_past_a_time_limit() -> None:
    """The target critic's value of action a is 10 a, whatever it sees."""
    algo = tiny_coma()
    params, target = params_and_target(algo)
    target["critic"] = jax.tree.map(jnp.zeros_like, target["critic"])
    target["critic"]["head"]["bias"] = jnp.array([0.0, 10.0, 20.0])
    batch = batch_of(*BATCH)
    reward, values = np.array(batch.reward), 10.0 * np.array(batch.joint_action)
    y, known = (
        np.array(loss_of(algo, params, target, batch, always(2, batch))[1].values["td_target"]),
        np.zeros((2, 4, 2)),
    )
    known[0, 1] = reward[0, 1]
    known[0, 0] = reward[0, 0] + 0.9 * (0.2 * values[0, 1] + 0.8 * known[0, 1])
    known[1, 2] = reward[1, 2] + 0.9 * 20
    for time in (1, 0):
        known[1, time] = reward[1, time] + 0.9 * (0.2 * values[1, time + 1] + 0.8 * known[1, time + 1])
    for row, length in enumerate(BATCH[0]):
        np.testing.assert_allclose(y[row, :length], known[row, :length], rtol=1e-5)


def test_losses_by_hand_and_each_moves_its_own_net() -> None:
    algo = tiny_coma()
    params, target = params_and_target(algo)
    batch = batch_of(*BATCH)
    loss, aux = loss_of(algo, params, target, batch, always(0, batch))
    values, mask = jax.tree.map(np.array, aux.values), np.array(batch.mask)[..., None]
    taken = np.eye(3)[np.array(batch.joint_action)]
    chosen, chances = (values["qs"] * taken).sum(-1), (values["policy"] * taken).sum(-1)
    advantages = chosen - (values["qs"] * values["policy"]).sum(-1)
    actor_loss = -(np.log(chances) * advantages * mask).sum() / 10  # 5 steps of 2 agents
    critic_loss = (np.square(chosen - values["td_target"]) * mask).sum() / 10
    np.testing.assert_allclose([aux.metrics["actor_loss"], aux.metrics["critic_loss"]], [actor_loss, critic_loss], 1e-5)
    np.testing.assert_allclose(loss, actor_loss + critic_loss, rtol=1e-5)
    softmax = np.array(jax.nn.softmax(algo.unroll(params["agent"], batch)[:, :-1]))
    np.testing.assert_allclose(values["policy"], 0.7 * softmax + 0.1, rtol=1e-5)  # the floor is 0.3 / 3
    gradients = jax.jacrev(lambda params: loss_of(algo, params, target, batch, always(0, batch))[1].metrics)(params)
    for name, net in (("actor_loss", "agent"), ("critic_loss", "critic")):
        grads = gradients[name]
        assert [each for each in grads if any((leaf != 0).any() for leaf in jax.tree.leaves(grads[each]))] == [net]


@pytest.mark.parametrize("critic_steps", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_learner_call_takes_all_steps_of_the_critic_and_then_one_of_the_actors(critic_steps: Any) -> None:
    """By plain steps on `loss` of parts of the batch; the fourth time, which has no real step, moves nothing."""
    algo = tiny_coma(critic_steps=critic_steps, critic_lr_factor=2.0, max_grad_norm=0.1)
    (params, target), batch = params_and_target(algo), batch_of(*BATCH)
    noise, hp = always(1, batch), hyperparams(algo)
    learner = init_learner(algo, params)
    found, aux = updated(algo, Trained(*learner[:1], learner.opt_state), target, batch, noise)
    examples = algo.examples(params, target, batch, algo.policy(params["agent"], batch, CTX), hp, noise)
    critic = init_learner(algo, params)._replace(
        params={"critic": params["critic"]}, opt_state=learner.opt_state["critic"]
    )
    parts = [slice(time, time + 1) for time in (2, 1, 0)] if critic_steps is None else [slice(None)] * 2
    qs = np.zeros((4, 2, 2, 3))
    for part in parts:
        now = jax.tree.map(lambda leaf, part=part: leaf[part], examples)
        grads, qs[part] = jax.grad(algo.critic_loss, has_aux=True)(critic.params["critic"], now)
        critic, _ = apply_gradients(algo, critic, {"critic": grads}, hp._replace(lr=2 * hp.lr))
    same_to_rounding(found.params["critic"], critic.params["critic"])
    same_to_rounding(found.opt_state["critic"], critic.opt_state)
    np.testing.assert_allclose(aux.values["qs"][:, :3], qs.swapaxes(0, 1)[:, :3], rtol=1e-4, atol=1e-5)

    def actor_loss(agent_params: PyTree) -> Any:
        policy = algo.policy(agent_params, batch, CTX)[:, :-1].swapaxes(0, 1)
        log_policy = jnp.log(jnp.where(examples.mask > 0, (policy * examples.actions).sum(-1), 1))
        advantages = counterfactual_advantages(jnp.asarray(qs, jnp.float32), policy, examples.actions)
        return -(log_policy * advantages * examples.mask).sum() / 10

    actors = critic._replace(params={"agent": params["agent"]}, opt_state=learner.opt_state["actors"])
    actors, norm = apply_gradients(algo, actors, {"agent": jax.grad(actor_loss)(params["agent"])}, hp)
    same_to_rounding(found.params["agent"], actors.params["agent"])
    np.testing.assert_allclose(aux.metrics["grad_norm"], norm, rtol=1e-4)


def test_places_after_the_longest_episode_may_be_left_out() -> None:
    algo = tiny_coma()
    (params, target), batch = params_and_target(algo), batch_of(*BATCH)
    learner = init_learner(algo, params)
    start, rest = Trained(learner.params, learner.opt_state), (target, batch, always(1, batch))
    bounded = target, batch._replace(num_places=jnp.int32(4)), always(1, batch)
    one, two = (updated(algo, start, *each) for each in (rest, bounded))
    same_to_rounding(one[0], two[0])
    same_to_rounding(one[1].metrics, two[1].metrics)


def test_actors_draw_from_the_floored_policy_and_play_the_likeliest_action_in_evaluation() -> None:
    algo = tiny_coma()
    params, _ = params_and_target(algo)
    shape = 4000, 2
    inputs = AgentInputs(
        jnp.ones((*shape, 2)), jnp.full(shape, -1), jnp.broadcast_to(jnp.array([True, False, True]), (*shape, 3))
    )
    carry = algo.initial_carry(shape)
    _, logits = algo.step(params["agent"], carry, inputs)
    noise = algo.sample_act_noise(jax.random.key(0), (*shape, 3))
    for epsilon, floor in ((1.0, 1 / 3), (0.5, 0.5 / 3), (0.0, None)):
        ctx = CTX._replace(epsilon=jnp.float32(epsilon))
        played, _ = algo.act_with_noise(params, carry, inputs, hyperparams(algo), ctx, noise)
        shares = (np.array(played)[..., None] == np.arange(3)).mean(0)
        if floor is None:
            known = np.eye(3)[np.where(logits[0, :, 0] >= logits[0, :, 2], 0, 2)]
        else:
            known = ((1 - epsilon) * np.array(jax.nn.softmax(logits[0])) + floor) * [1, 0, 1]
            known /= known.sum(-1, keepdims=True)
        np.testing.assert_allclose(shares, known, atol=0.03)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("algo.critic_steps=0", "algo.critic_steps=0 is not allowed"),
        ("algo.epsilon_finish=0", "algo.epsilon_finish=0 is not allowed"),
        ("algo.buffer_size=16", "algo.buffer_size=16 is not allowed: COMA learns from the num_envs=8 episodes"),
        ("algo.returns=td_lambda", "algo.returns is unknown"),
        ("algo.prioritised=true", "algo.prioritised is unknown"),
    ],
)
def test_what_is_not_allowed_is_one_line(option: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main("+algo=coma", option) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert message in line


def same_to_rounding(one: PyTree, two: PyTree) -> None:
    for mine, its in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(mine, its, rtol=2e-4, atol=2e-6)
