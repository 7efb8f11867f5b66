"""MADDPG and MASAC: what their losses are made of, which net each part moves, how they act, and that they learn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.environments import AGENT, TINY
from wqmix_jax import load_config, train_seeds
from wqmix_jax.algos import masac
from wqmix_jax.algos.actor_critic import ActorCritic
from wqmix_jax.algos.base import AgentInputs, Context, hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.ops.action_selection import epsilon_floor
from wqmix_jax.options import build
from wqmix_jax.types import EnvSpec, Episode, PyTree

SPEC = EnvSpec(num_agents=2, num_actions=3, obs_dim=4, state_dim=5, episode_limit=3)
CTX = Context(epsilon=jnp.float32(0.25), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
KEY = jax.random.key(0)


def tiny(name: str, **changes: Any) -> ActorCritic:
    """``maddpg`` or ``masac`` with narrow nets."""
    own = {"maddpg": {"gumbel_temperature": 0.5}, "masac": {"alpha_ent": 0.3, "epsilon_start": 0.5}}[name]
    target = {"maddpg": "wqmix_jax.algos.maddpg.MADDPG", "masac": "wqmix_jax.algos.masac.MASAC"}[name]
    return build("algo", {"_target_": target, **AGENT, **TINY, "q_star_dim": 6, **own, **changes})


@functools.cache
def a_batch() -> Episode:
    """Two episodes: three steps that the limit cuts, and two that the task ends; some actions are barred.

    What was taken is available, and nothing is available in the padding.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    mask = jnp.array([[1.0, 1, 1], [1, 1, 0]])
    seen = jnp.array([[True] * 4, [True] * 3 + [False]])[..., None, None]
    joint_action = jax.random.randint(keys[0], (2, 3, 2), 0, 3)
    taken = jnp.pad(jax.nn.one_hot(joint_action, 3, dtype=bool), ((0, 0), (0, 1), (0, 0), (0, 0)))
    avail = jax.random.bernoulli(keys[1], 0.6, (2, 4, 2, 3)) | taken
    return Episode(
        obs=jax.random.normal(keys[2], (2, 4, 2, 4)),
        state=jax.random.normal(keys[3], (2, 4, 5)),
        avail_actions=avail.at[..., 0].set(True) & seen,
        joint_action=joint_action,
        reward=jax.random.normal(keys[4], (2, 3)),
        discount=jnp.array([[1.0, 1, 1], [1, 0, 1]]),
        mask=mask,
    )


@functools.cache
def nets(algo: ActorCritic) -> tuple[PyTree, PyTree]:
    """Online and target parameters that differ."""
    return algo.init(jax.random.key(1), SPEC), algo.init(jax.random.key(2), SPEC)


@functools.partial(jax.jit, static_argnums=0)
def jitted_loss(algo: ActorCritic, params: PyTree, target: PyTree, batch: Episode, noise: Any) -> Any:
    return algo.loss(params, target, batch, hyperparams(algo), CTX, noise)


def loss_of(algo: ActorCritic, params: PyTree, noise: Any) -> Any:
    return jitted_loss(algo, params, nets(algo)[1], a_batch(), noise)


def unrolled(algo: ActorCritic, agent: PyTree) -> jax.Array:
    return jax.jit(algo.unroll)(agent, a_batch())


@functools.cache
def noise_of(algo: ActorCritic) -> Any:
    return algo.sample_noise(KEY, a_batch())


@functools.cache
def gradients(algo: ActorCritic) -> dict[str, PyTree]:
    """Returns the gradients of the loss and of each of its parts, in all parameters."""

    def part(params: PyTree, noise: Any, name: str) -> jax.Array:
        return loss_of(algo, params, noise)[1].metrics[name]

    params, noise = nets(algo)[0], noise_of(algo)
    return {name: jax.grad(part)(params, noise, name) for name in ("loss", "actor_loss", "q_star_loss")}


def size(tree: PyTree) -> float:
    return float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))


def values_of(algo: ActorCritic, net: PyTree, joint_action: Any, state: Any) -> np.ndarray:
    """The critic of ``net`` at recorded observations, for a joint action and a state of each step."""
    agent_qs = unrolled(algo, net["q_star_agent"])[:, : joint_action.shape[1]]
    chosen = np.take_along_axis(np.array(agent_qs), np.array(joint_action)[..., None], -1)[..., 0]
    return np.array(algo.q_star_net.apply({"params": net["q_star_mixer"]}, jnp.array(chosen), state))


@pytest.mark.parametrize("name", ["maddpg", "masac"])
def test_each_part_of_the_loss_moves_its_own_nets(name: str) -> None:
    """So that the sum's gradient is the authors', and a better critic is never sought in the actors or the reverse."""
    grads = gradients(tiny(name))
    for net, own, other in (
        ("agent", "actor_loss", "q_star_loss"),
        ("q_star_agent", "q_star_loss", "actor_loss"),
        ("q_star_mixer", "q_star_loss", "actor_loss"),
    ):
        assert size(grads[own][net]) > 0
        assert size(grads[other][net]) == 0
        jax.tree.map(np.testing.assert_array_equal, grads["loss"][net], grads[own][net])


def test_maddpg_bootstraps_from_the_online_actors_greedy_action_and_the_target_critic() -> None:
    algo, batch = tiny("maddpg"), a_batch()
    params, target = nets(algo)
    _, aux = loss_of(algo, params, noise_of(algo))
    logits = np.array(unrolled(algo, params["agent"]))
    greedy = np.where(batch.avail_actions, logits, -np.inf).argmax(-1)
    following = values_of(algo, target, greedy, batch.state)[:, 1:]
    expected = batch.reward + 0.9 * batch.discount * following
    real = np.array(batch.mask) > 0
    np.testing.assert_allclose(aux.values["td_target"][real], expected[real], rtol=1e-5)
    assert aux.values["td_target"][1, 1] == batch.reward[1, 1]


def test_an_actors_gradient_is_the_targets_value_of_its_own_deviations() -> None:
    """By hand: the mean over steps of d soft / d logit times Q(u_a, the others greedy), 0 where unavailable.

    Read at the last layer's bias, whose gradient is the sum of the logits' gradients.
    """
    algo, batch = tiny("maddpg"), a_batch()
    params, target = nets(algo)
    gumbel = np.array(noise_of(algo), np.float64)
    logits = np.array(unrolled(algo, params["agent"]), np.float64)[:, :-1]
    avail = np.array(batch.avail_actions)[:, :-1]
    greedy = np.where(avail, logits, -np.inf).argmax(-1)
    worth = np.zeros((2, 3, 2, 3))
    for agent in range(2):
        for action in range(3):
            deviating = greedy.copy()
            deviating[..., agent] = action
            worth[..., agent, action] = values_of(algo, target, deviating, batch.state[:, :-1])
    worth *= avail
    soft = np.exp((logits + gumbel) / 0.5)
    soft /= soft.sum(-1, keepdims=True)
    slope = soft / 0.5 * (worth - (soft * worth).sum(-1, keepdims=True))  # d sum(soft worth) / d logits
    expected = -(slope * np.array(batch.mask)[..., None, None]).sum((0, 1, 2)) / 5
    np.testing.assert_allclose(gradients(algo)["loss"]["agent"]["head"]["bias"], expected, rtol=1e-4)
    drawn = np.take_along_axis(worth, (logits + gumbel).argmax(-1)[..., None], -1)[..., 0]
    objective = (drawn * np.array(batch.mask)[..., None]).sum() / 5
    np.testing.assert_allclose(loss_of(algo, params, noise_of(algo))[1].metrics["actor_loss"], -objective, rtol=1e-5)


def test_masacs_target_is_soft_and_its_policy_keeps_the_first_floor() -> None:
    """y = r + gamma (Q_target(s', u') - alpha_ent sum log pi(u')), u' drawn from the target policy at floor 1/2."""
    algo, batch = tiny("masac"), a_batch()
    params, target = nets(algo)
    wanted = jax.random.randint(jax.random.key(3), (2, 4, 2), 0, 3)
    wanted = jnp.where(jnp.take_along_axis(batch.avail_actions, wanted[..., None], -1)[..., 0], wanted, 0)
    noise = masac.Noise(*noise_of(algo)[:1], target=100.0 * jax.nn.one_hot(wanted, 3))
    _, aux = loss_of(algo, params, noise)
    policy = np.array(epsilon_floor(unrolled(algo, target["agent"]), batch.avail_actions, 0.5))
    log_probs = np.log(np.take_along_axis(policy, np.array(wanted)[..., None], -1)[..., 0]).sum(-1)
    soft = values_of(algo, target, wanted, batch.state) - 0.3 * log_probs
    expected = batch.reward + 0.9 * batch.discount * soft[:, 1:]
    real = np.array(batch.mask) > 0
    np.testing.assert_allclose(aux.values["td_target"][real], expected[real], rtol=1e-5)
    assert aux.values["td_target"][1, 1] == batch.reward[1, 1]


def test_masacs_actors_see_the_online_critics_value_of_their_own_draws() -> None:
    """Mean over steps and agents of log pi (alpha_ent (log pi + 1) - Q(s, u)), u all agents' draws at ctx's floor.

    The gradient is that of log pi alone, the bracket being a constant: a factor of each agent's draw.
    """
    algo, batch = tiny("masac"), a_batch()
    params, _ = nets(algo)
    _, aux = loss_of(algo, params, noise_of(algo))
    drawn, mask = np.array(aux.values["drawn"])[:, :-1], np.array(batch.mask)[..., None]

    def log_probs(agent: PyTree) -> jax.Array:
        policy = epsilon_floor(algo.unroll(agent, batch), batch.avail_actions, 0.25)[:, :-1]
        return jnp.log(jnp.take_along_axis(policy, drawn[..., None], -1)[..., 0])

    now = np.array(log_probs(params["agent"]))
    cost = 0.3 * (now + 1) - values_of(algo, params, drawn, batch.state[:, :-1])[..., None]
    np.testing.assert_allclose(aux.metrics["actor_loss"], (now * cost * mask).sum() / 10, rtol=1e-5)
    expected = jax.jit(jax.grad(lambda agent: (log_probs(agent) * cost * mask).sum() / 10))(params["agent"])
    for got, wanted in zip(*map(jax.tree.leaves, (gradients(algo)["loss"]["agent"], expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)


def test_recorded_draws_are_followed_and_fresh_ones_follow_the_key() -> None:
    algo, batch = tiny("masac"), a_batch()
    noise = algo.sample_noise(KEY, batch)
    assert noise.online.shape == noise.target.shape == batch.avail_actions.shape
    assert not np.allclose(noise.online, noise.target)
    again = algo.sample_noise(KEY, batch)
    np.testing.assert_array_equal(noise.online, again.online)
    assert not np.allclose(noise.online, algo.sample_noise(jax.random.key(1), batch).online)
    gumbel = tiny("maddpg").sample_noise(KEY, batch)
    assert gumbel.shape == batch.avail_actions[:, :-1].shape


def played(algo: ActorCritic, epsilon: float, num: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Returns each agent's frequencies of actions in one situation, and its logits there; agent 0 may not play 2."""
    params, _ = nets(algo)
    one = AgentInputs(
        obs=jax.random.normal(KEY, (2, 4)),
        last_action=jnp.array([-1, 1]),
        avail_actions=jnp.array([[True, True, False], [True, True, True]]),
    )
    inputs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), one)
    ctx = CTX._replace(epsilon=jnp.float32(epsilon))
    act = jax.jit(lambda: algo.act(params, algo.initial_carry((num, 2)), inputs, hyperparams(algo), ctx, KEY))
    _, logits = algo.step(params["agent"], algo.initial_carry((2,)), one)
    joint_action = np.array(act()[0])
    shares = [np.bincount(joint_action[:, agent], minlength=3) / num for agent in range(2)]
    return np.stack(shares), np.array(logits)


@pytest.mark.parametrize("name", ["maddpg", "masac"])
def test_evaluation_is_greedy_in_what_is_available(name: str) -> None:
    shares, logits = played(tiny(name), epsilon=0.0, num=10)
    best = np.where([[True, True, False], [True] * 3], logits, -np.inf).argmax(-1)
    np.testing.assert_array_equal(shares, np.eye(3)[best])


def test_masac_plays_its_policy_and_maddpg_explores_around_its_best() -> None:
    epsilon, avail = 0.4, np.array([[True, True, False], [True] * 3])
    shares, logits = played(tiny("masac"), epsilon)
    floored = 0.6 * np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) + 0.4 / 3
    np.testing.assert_allclose(shares, floored * avail / (floored * avail).sum(-1, keepdims=True), atol=0.015)
    shares, logits = played(tiny("maddpg"), epsilon)
    best = np.eye(3)[np.where(avail, logits, -np.inf).argmax(-1)]
    np.testing.assert_allclose(shares, 0.6 * best + 0.4 * avail / avail.sum(-1, keepdims=True), atol=0.015)


@pytest.mark.parametrize(
    ("algo", "option", "least"),
    [
        ("masac", "epsilon_start=0", "greater than 0"),
        ("masac", "epsilon_finish=0", "greater than 0"),
        ("masac", "alpha_ent=-1", "greater than or equal to 0"),
        ("maddpg", "gumbel_temperature=0", "greater than 0"),
    ],
)
def test_refused(algo: str, option: str, least: str) -> None:
    """A floor of 0 too: it would be taken for evaluation."""
    with pytest.raises(ConfigError) as refused:
        load_config(f"+algo={algo}", f"algo.{option}")
    assert str(refused.value) == f"algo.{option} is not allowed: input should be {least}"


def test_the_papers_settings_and_what_a_sweep_does_not_recompile() -> None:
    settings = {
        "maddpg": {"gumbel_temperature": 1.0, "epsilon_start": 1.0, "epsilon_finish": 0.05},
        "masac": {"alpha_ent": 0.001, "epsilon_start": 0.5, "epsilon_finish": 0.01, "epsilon_anneal_steps": 100_000},
    }
    for name, expected in settings.items():
        algo = load_config(f"+algo={name}").algo
        traced = hyperparams(algo)._asdict()
        assert {key: traced[key] for key in expected} == expected
        assert (algo.q_star_dim, algo.hidden_dim) == (256, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maddpg", "masac"])
def test_a_one_step_game_is_learned(name: str) -> None:
    """Two seeds end on the best of four joint actions, worth 3, and the critic knows what each is worth."""
    config = load_config(
        f"+algo={name}",
        "env=matrix_game",
        "env.payoff=[[0,1],[1,3]]",
        "algo.lr=0.003",
        "algo.epsilon_anneal_steps=1000",
        "algo.batch_size=32",
        "algo.buffer_size=500",
        "algo.target_update_interval=50",
        "algo.hidden_dim=16",
        "algo.q_star_dim=32",
        "num_envs=8",
        "total_env_steps=4000",
        "eval_interval=4000",
        "eval_episodes=1",
        "chunk_iterations=250",
    )
    state, records = train_seeds(config, [0, 1])
    assert [record["episode_return"] for record in records if record["kind"] == "eval"][-2:] == [3.0, 3.0]
    algo, env = config.algo, config.env
    seen = env.observe(env.reset(KEY))
    for seed in range(2):
        params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state.learner.params)
        inputs = AgentInputs(seen.obs, jnp.full(2, -1), seen.avail_actions)
        _, critic_qs = algo.step(params["q_star_agent"], algo.initial_carry((2,)), inputs)
        value = algo.critic_values(params["q_star_mixer"], critic_qs, jnp.array([1, 1]), seen.state)
        assert value == pytest.approx(3.0, abs=0.3)
