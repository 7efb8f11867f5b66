"""MAVEN's loss in hand-computed numbers, its latent in act and loss, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

from tests.environments import Clock, by_seed, tiny_run
from wqmix_jax import load_config
from wqmix_jax.algos.base import Context, hyperparams, is_mean_over_steps, latent_template
from wqmix_jax.algos.maven import MAVEN
from wqmix_jax.errors import ConfigError
from wqmix_jax.training.compiled_loop import make_trainer
from wqmix_jax.training.learner import init_learner
from wqmix_jax.training.replay import make_replay
from wqmix_jax.training.rollout import rollout
from wqmix_jax.training.row_packing import first_fit_rows
from wqmix_jax.types import Array, EnvSpec, Episode

CLOCK = Clock(episode_limit=5, ends_from=1)
CTX = Context(jnp.float32(0), jnp.int32(0), jnp.int32(0))
SMALL = ("algo.latent_dim=3", "algo.hidden_dim=6", "algo.discriminator_dim=4", "algo.discriminator_layers=1")
SMALL = (*SMALL, "algo.memory_dim=2", "algo.mixer_embed_dim=3")


def maven(*options: str) -> MAVEN:
    return load_config("+algo=maven", *SMALL, *options).algo  # type: ignore[return-value]


def played(algo: MAVEN, params: Any, epsilon: float, num_envs: int = 12) -> tuple[Any, Array]:
    """A replay, and the rows of episodes in it."""
    one_seed = by_seed((params, hyperparams(algo), CTX._replace(epsilon=jnp.float32(epsilon))))
    keys = jax.random.split(jax.random.key(7), 1)
    episodes = jax.jit(lambda: rollout(CLOCK, algo, *one_seed, keys, num_envs=num_envs).episodes)()
    latent = latent_template(algo, CLOCK.spec)
    replay = make_replay(CLOCK, buffer_size=num_envs, batch_size=num_envs, latent=latent)
    episodes = jax.tree.map(lambda leaf: leaf[0], episodes)
    return replay, replay.add(replay.init(), episodes, jnp.bool_(True)).experience[0]


def test_agents_act_on_the_latent_that_the_loss_sees() -> None:
    """The greedy actions recomputed from stored episodes are those that were played; with other latents they differ."""
    algo = maven()
    params = algo.init(jax.random.key(0), CLOCK.spec)
    replay, rows = played(algo, params, epsilon=0.0)
    batch = replay.decode(rows, 5)
    assert len(set(np.array(batch.latent[:, 0]).tolist())) == 3

    @jax.jit
    def greedy(batch: Episode) -> Array:
        return jnp.where(batch.avail_actions, algo.unroll(params["agent"], batch), -jnp.inf).argmax(-1)[:, :-1]

    real = np.array(batch.mask) > 0
    np.testing.assert_array_equal(np.array(greedy(batch))[real], np.array(batch.joint_action)[real])
    others = batch._replace(latent=(batch.latent + 1) % 3)
    assert (np.array(greedy(others))[real] != np.array(batch.joint_action)[real]).any()


OPTIONS = [
    ("algo.latent_policy=learned",),
    ("algo.discriminator=step", "algo.intrinsic_reward=mutual_information"),
    ("algo.share_parameters=none", "algo.layer_norm=true", "algo.returns=td_lambda"),
]


@pytest.mark.parametrize(
    "options", [OPTIONS[1], *(pytest.param(options, marks=pytest.mark.slow) for options in OPTIONS[::2])]
)
def test_packed_rows_have_the_loss_and_gradients_of_whole_ones(options: tuple[str, ...]) -> None:
    algo = maven("algo.mi_loss=1", *options)
    assert is_mean_over_steps(algo)
    learner = init_learner(algo, algo.init(jax.random.key(1), CLOCK.spec))
    replay, rows = played(algo, learner.params, epsilon=1.0)
    layout, num_rows = first_fit_rows(replay.lengths(rows), 5)
    assert 2 * int(num_rows) < 2 * 12
    gradient = jax.jit(jax.grad(algo.loss, has_aux=True))
    results = []
    for batch in (replay.decode(rows, 5), replay.decode_packed(rows, layout)):
        grads, aux = gradient(learner.params, learner.target, batch._replace(compact=None), hyperparams(algo), CTX, ())
        results.append((grads, aux.metrics))
    assert {"discriminator_loss", "td_loss"} <= results[0][1].keys()
    for whole, packed in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(packed, whole, rtol=2e-4, atol=2e-6)


@pytest.mark.slow
def test_the_learner_steps_alike_however_batches_are_laid_out() -> None:
    """Whole, in packed rows, and bounded in the form for accelerators, where loops end with the longest episode."""
    options = ("algo.mi_loss=1", "algo.latent_policy=learned", "algo.batch_size=4", "algo.buffer_size=8")
    config = tiny_run(maven(*options), Clock(episode_limit=32, ends_from=1), num_envs=4)
    trainers = [
        make_trainer(config, batches=batches, platform=platform)
        for batches, platform in (("whole", "cpu"), ("packed", "cpu"), ("bounded", "tpu"))
    ]
    state, _ = trainers[0].train_chunk(trainers[0].init([0, 1]))
    whole, *others = [trainer.learn(state) for trainer in trainers]
    for other in others:
        for one, another in zip(*map(jax.tree.leaves, (whole, other)), strict=True):
            if jnp.issubdtype(one.dtype, jnp.floating):
                np.testing.assert_allclose(another, one, rtol=1e-3, atol=2e-5)


def test_the_released_trajectory_is_no_mean_over_steps() -> None:
    assert not is_mean_over_steps(maven("algo.discriminator=released_trajectory"))


SPEC = EnvSpec(num_agents=1, num_actions=2, obs_dim=1, state_dim=1, episode_limit=2)


def two_episodes() -> Episode:
    """One of two steps with z = 2, and one of a single step with z = 0."""
    mask = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    return Episode(
        obs=jnp.array([0.5, -1.0, 2.0, 1.0, 0.3, 0.0]).reshape(2, 3, 1, 1),
        state=jnp.array([1.0, 2.0, 3.0, -1.0, 0.5, 0.0]).reshape(2, 3, 1),
        avail_actions=jnp.ones((2, 3, 1, 2), bool).at[0, 1, 0, 1].set(False),
        joint_action=jnp.array([[[1], [0]], [[1], [0]]]),
        reward=jnp.array([[3.0, -1.0], [4.0, 0.0]]),
        discount=jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        mask=mask,
        latent=jnp.array([[2, 2, 2], [0, 0, 0]], jnp.uint8),
    )


def loss_of(algo: MAVEN, params: Any, batch: Episode) -> Any:
    return jax.jit(lambda: algo.loss(params, params, batch, hyperparams(algo), CTX, ())[1])()


def features(aux: Any, batch: Episode) -> np.ndarray:
    """The policies of the one agent, by hand, and the state."""
    utilities = np.where(batch.avail_actions, aux.values["agent_qs"], -np.inf)
    utilities[~np.isfinite(utilities).any(-1)] = 0
    return np.concatenate([softmax(utilities, -1)[..., 0, :], batch.state], -1)


def dense(net: Any, inputs: np.ndarray) -> np.ndarray:
    return inputs @ np.array(net["kernel"]) + np.array(net["bias"])


def classify(net: Any, inputs: np.ndarray) -> np.ndarray:
    return log_softmax(dense(net["layer_1"], np.maximum(dense(net["layer_0"], inputs), 0)), -1)


def test_the_cross_entropy_of_steps_by_hand() -> None:
    algo, batch = maven("algo.discriminator=step", "algo.mi_loss=0.5"), two_episodes()
    params = algo.init(jax.random.key(2), SPEC)
    aux = loss_of(algo, params, batch)
    log_q = classify(params["discriminator"]["mlp"], features(aux, batch))
    surprise = -np.array([log_q[0, 0, 2], log_q[0, 1, 2], log_q[1, 0, 0]])
    np.testing.assert_allclose(np.array(aux.values["cross_entropy"])[[0, 0, 1], [0, 1, 0]], surprise, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["discriminator_loss"], surprise.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["loss"], aux.metrics["td_loss"] + 0.5 * surprise.mean(), rtol=1e-5)


def gru(net: Any, hidden: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    from_inputs = inputs @ np.array(net["input_kernel"]) + np.array(net["input_bias"])
    from_hidden = hidden @ np.array(net["hidden_kernel"]) + np.array(net["hidden_bias"])
    (reset, update, new), (h_reset, h_update, h_new) = np.split(from_inputs, 3), np.split(from_hidden, 3)
    reset, update = expit(reset + h_reset), expit(update + h_update)
    return (1 - update) * np.tanh(new + reset * h_new) + update * hidden


def test_the_cross_entropy_of_trajectories_by_hand() -> None:
    """It is that of the state after an episode's last step, and counts for each of its steps."""
    algo, batch = maven(), two_episodes()
    params = algo.init(jax.random.key(2), SPEC)
    aux = loss_of(algo, params, batch)
    net, seen = params["discriminator"], features(aux, batch)
    after_two = gru(net["gru"], gru(net["gru"], np.ones(2), seen[0, 0]), seen[0, 1])
    after_one = gru(net["gru"], np.ones(2), seen[1, 0])
    long, short = -classify(net["mlp"], after_two)[2], -classify(net["mlp"], after_one)[0]
    np.testing.assert_allclose(
        np.array(aux.values["cross_entropy"])[[0, 0, 1], [0, 1, 0]], [long, long, short], rtol=1e-5
    )
    np.testing.assert_allclose(aux.metrics["discriminator_loss"], (2 * long + short) / 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sign", "shift"),
    [("mutual_information", -1, np.log(3)), pytest.param("released", 1, 0.0, marks=pytest.mark.slow)],
)
def test_an_intrinsic_reward_moves_the_targets_and_spares_the_agents(kind: str, sign: float, shift: float) -> None:
    batch = two_episodes()
    with_it = maven("algo.discriminator=step", f"algo.intrinsic_reward={kind}", "algo.mi_loss=1")
    without = dataclasses.replace(with_it, intrinsic_reward="none")
    params = with_it.init(jax.random.key(2), SPEC)
    moved, plain = loss_of(with_it, params, batch), loss_of(without, params, batch)
    bonus = 0.1 * (shift + sign * np.array(plain.values["cross_entropy"])) * np.array(batch.mask)
    np.testing.assert_allclose(moved.values["td_target"], plain.values["td_target"] + bonus, rtol=1e-5)

    def agents_gradient(algo: MAVEN, mi_loss: float) -> Any:
        hp = hyperparams(dataclasses.replace(algo, mi_loss=mi_loss))
        return jax.grad(lambda agent: algo.loss(params | {"agent": agent}, params, batch, hp, CTX, ())[0])(
            params["agent"]
        )

    def differ(algo: MAVEN) -> bool:
        pair = zip(*map(jax.tree.leaves, (agents_gradient(algo, 0.0), agents_gradient(algo, 1.0))), strict=True)
        return any(not np.array_equal(one, other) for one, other in pair)

    assert differ(without)
    assert not differ(with_it)


def test_predicted_returns_learn_those_of_episodes_and_choose_latents() -> None:
    """The returns are 2 and 4, in units of 20; the longer episode counts twice."""
    algo, batch = maven("algo.latent_policy=learned"), two_episodes()
    params = algo.init(jax.random.key(2), SPEC)
    net = params["latent_policy"]
    predicted = [dense(net["out"], np.maximum(dense(net["hidden"], np.array([s])), 0)) for s in (1.0, -1.0)]
    errors = np.square([predicted[0][2] - 2 / 20, predicted[1][0] - 4 / 20])
    aux = loss_of(algo, params, batch)
    np.testing.assert_allclose(aux.metrics["latent_policy_loss"], (2 * errors[0] + errors[1]) / 3, rtol=1e-5)
    # Predictions of 0, 0 and 20 log 2 / 20: a softmax of 1/4, 1/4 and 1/2, with a tenth uniform.
    net = jax.tree.map(jnp.zeros_like, net)
    net["out"]["bias"] = jnp.array([0.0, 0.0, np.log(2) / 20])
    acting = algo.acting_params(params | {"latent_policy": net})
    assert acting.keys() == {"agent", "latent_policy"}
    drawn = algo.draw_latent(acting, jnp.ones((20000, 1)), hyperparams(algo), CTX, jax.random.key(0))
    assert drawn.dtype == np.uint8
    np.testing.assert_allclose(
        np.bincount(drawn) / 20000, [0.9 / 4 + 1 / 30, 0.9 / 4 + 1 / 30, 0.45 + 1 / 30], atol=0.02
    )


def test_an_intrinsic_reward_needs_a_discriminator_of_steps() -> None:
    with pytest.raises(ConfigError, match=r"intrinsic_reward=released is not allowed: .*discriminator=trajectory"):
        maven("algo.intrinsic_reward=released")


def test_options_without_effect_are_known() -> None:
    unused = maven().without_effect()
    assert unused["intrinsic_scale"] == "algo.intrinsic_reward=none"
    assert unused["return_scale"] == unused["uniform_part"] == "algo.latent_policy=uniform"
    assert "memory_dim" not in unused
    assert maven("algo.discriminator=step").without_effect()["memory_dim"] == "algo.discriminator=step"
