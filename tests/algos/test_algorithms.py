"""Every algorithm of ``configs/algo``, whichever there are: it runs from the command line, and learns what is known."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.table2 import exploration
from tests.environments import Clock, Leaver, Recall, at_places, drawn_latent, hp_of_loss
from tests.running import main
from wqmix_jax import load_config, load_metrics, train_seeds
from wqmix_jax.algos.base import AgentInputs, Algorithm, Context, hyperparams, latent_template, skips_padding
from wqmix_jax.algos.iql import IQL
from wqmix_jax.config import RunConfig, names
from wqmix_jax.envs.matrix_game import MatrixGame
from wqmix_jax.training.learner import init_learner
from wqmix_jax.training.replay import make_replay
from wqmix_jax.types import EnvSpec, Episode, PyTree, StoredEpisode

ALGORITHMS = names("algo").split(", ")
RUN_FAST = ("iql", "qplex", "qtran")
LEARN_FAST = ("iql", "ow_qmix")
SHARE_FAST = ("cw_qmix",)
IDLE_FAST = ("qplex",)
"""Returns the algorithms of the fast tests: nearly all the time goes into compiling each of them."""

PREDATOR_PREY = (
    "env=predator_prey",
    "env.world_shape=[3,3]",
    "env.num_agents=3",
    "env.num_stags=1",
    "env.num_hares=1",
    "env.obs_radius=1",
    "env.episode_limit=5",
    "algo.batch_size=3",
    "algo.buffer_size=6",
    "algo.hidden_dim=4",
    "num_seeds=2",
    "total_env_steps=30",
    "eval_interval=15",
    "eval_episodes=2",
    "logger.progress=false",
)


def small_hunt(algo: str) -> tuple[str, ...]:
    """`PREDATOR_PREY`, of whose episodes an on-policy algorithm learns from those just played: 3, twice."""
    if not load_config(f"+algo={algo}").algo.is_on_policy:
        return PREDATOR_PREY
    kept = (option for option in PREDATOR_PREY if not option.startswith(("algo.batch_size", "algo.buffer_size")))
    return (*kept, "num_envs=3", "algo.batch_size=3", "updates_per_iteration=2")


PAYOFF = ((1.0, 3.0), (2.0, 4.0))
"""A game that is a sum of what each agent does, so that every algorithm can represent it."""


def all_but_slow(fast: tuple[str, ...]) -> list[Any]:
    """Every algorithm, those that aren't among the fast ones marked slow."""
    return [pytest.param(algo, marks=() if algo in fast else pytest.mark.slow) for algo in ALGORITHMS]


@pytest.mark.parametrize("algo", all_but_slow(RUN_FAST))
def test_runs_from_the_command_line_on_predator_prey_with_two_seeds(algo: str, tmp_path: Path) -> None:
    assert main(f"+algo={algo}", *small_hunt(algo), f"run_dir={tmp_path}") == 0
    for seed in (0, 1):
        last = load_metrics(tmp_path, kind="train", seed=seed)[-1]
        assert last["env_steps"] >= 30
        assert last["learner_steps"] >= 4
        assert {"loss", "grad_norm"} <= last.keys()
        assert all(isinstance(value, str) or math.isfinite(value) for value in last.values())
    losses = [load_metrics(tmp_path, kind="train", seed=seed)[-1]["loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("algo", all_but_slow(LEARN_FAST))
def test_learns_the_values_of_a_one_step_game(algo: str) -> None:
    config = small_run(algo, MatrixGame(payoff=PAYOFF, steps=1), total_env_steps=8000)
    state, records = train_seeds(config, [0])
    assert last_return(records) == 4.0
    got, known = known_values(config, jax.tree.map(lambda leaf: leaf[0], state.learner.params))
    np.testing.assert_allclose(got, known, atol=0.4)  # less than half of the difference of two payoffs


@pytest.mark.parametrize("algo", all_but_slow(LEARN_FAST))
def test_learns_to_act_on_what_was_seen_one_step_ago(algo: str) -> None:
    _, records = train_seeds(small_run(algo, Recall(), total_env_steps=16000), [0])
    assert last_return(records) == 1.0


@pytest.mark.parametrize("algo", all_but_slow(SHARE_FAST))
def test_a_batchs_gradient_is_the_mean_of_its_parts_by_their_steps(algo: str) -> None:
    """So that devices may share a batch; the parts differ in how many steps are real."""
    config = small_run(algo, Clock(episode_limit=3, ends_from=1), total_env_steps=1)
    assert skips_padding(config.algo)
    spec, keys = config.env.spec, jax.random.split(jax.random.key(0), 6)
    lengths = jnp.array([3, 3, 1, 2])
    mask = (jnp.arange(3)[None, :] < lengths[:, None]).astype(jnp.float32)
    batch = Episode(
        obs=jax.random.normal(keys[0], (4, 4, 2, spec.obs_dim)),
        state=jax.random.normal(keys[1], (4, 4, spec.state_dim)),
        avail_actions=jnp.ones((4, 4, 2, 3), bool),
        joint_action=jax.random.randint(keys[2], (4, 3, 2), 0, 3),
        reward=jax.random.normal(keys[3], (4, 3)) * mask,
        discount=jnp.ones((4, 3)),
        mask=mask,
        latent=at_places(drawn_latent(config.algo, spec, (4,)), 4),
    )
    learner = init_learner(config.algo, config.algo.init(keys[4], spec))
    ctx = Context(jnp.float32(0.5), jnp.int32(0), jnp.int32(0))
    noise = config.algo.sample_noise(keys[5], batch)
    gradient, hp = jax.grad(config.algo.loss, has_aux=True), hp_of_loss(config.algo, learner.target, batch)

    @jax.jit
    def call(batch: Episode, noise: Any) -> Any:
        grads, aux = gradient(learner.params, learner.target, batch, hp, ctx, noise)
        return grads, aux.metrics

    first, second = (
        call(*jax.tree.map(lambda x: x[:2], (batch, noise))),
        call(*jax.tree.map(lambda x: x[2:], (batch, noise))),
    )
    mean = jax.tree.map(lambda one, other: (6 * one + 3 * other) / 9, first, second)
    for got, known in zip(jax.tree.leaves(mean), jax.tree.leaves(call(batch, noise)), strict=True):
        np.testing.assert_allclose(got, known, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+algo=vdn"], {"mixer_embed_dim", "hypernet_dim", "num_heads"}),
        (["+algo=qmix"], {"num_heads"}),
        (["+algo=qatten"], set()),
        (["+algo=ow_qmix"], {"num_heads"}),
        (["+algo=qmix_ow"], {"num_heads", "q_star_dim"}),
        (["+algo=qmix_qstar"], {"num_heads", "alpha"}),
        (["+algo=ow_qmix", "algo.mixer=vdn"], {"mixer_embed_dim", "hypernet_dim", "num_heads"}),
        (["+algo=ow_qmix", "algo.mixer=vdn", "algo.q_star=attention"], {"mixer_embed_dim", "num_heads"}),
    ],
)
def test_options_that_change_no_parameter_and_no_loss_are_known(overrides: list[str], expected: set[str]) -> None:
    """Sizes are compared by the parameters that they change; `alpha` and `td_lambda` change the loss."""
    algo = load_config(*overrides).algo
    unused = algo.without_effect()
    always = {"adam_b1", "adam_b2", "adam_eps", "importance_exponent", "n_steps", "priority_exponent", "td_lambda"}
    assert unused.keys() == expected | always
    spec = EnvSpec(num_agents=2, num_actions=3, obs_dim=3, state_dim=2, episode_limit=1)

    def shapes(algo: Algorithm) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(lambda: algo.init(jax.random.key(0), spec)))

    for name in ("mixer_embed_dim", "hypernet_dim", "num_heads", "q_star_dim"):
        if hasattr(algo, name):
            larger = dataclasses.replace(algo, **{name: getattr(algo, name) + 1})
            assert (shapes(larger) == shapes(algo)) == (name in unused), name


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (math.inf, -math.inf))]
)
def test_no_parameters_make_an_agent_play_what_is_unavailable(algo: str, value: float) -> None:
    """A seed that has failed continues to play with the others, and some simulators end at an unavailable action."""
    made = build_small(algo)
    obs = jnp.linspace(-1, 1, 5 * 2 * 3).reshape(5, 2, 3)
    avail = jnp.arange(4)[None, None, :] == jnp.array([[3, 1], [2, 2], [1, 3], [3, 3], [0, 1]])[..., None]
    avail |= jnp.arange(4)[None, None, :] == 3
    spec = EnvSpec(num_agents=2, num_actions=4, obs_dim=3, state_dim=1, episode_limit=1)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), made.init(jax.random.key(0), spec))
    inputs = AgentInputs(obs, jnp.full((5, 2), -1), avail, drawn_latent(made, spec, (5,)))
    inputs = inputs._replace(state=jnp.ones((5, 1))) if made.acts_on_state else inputs
    for epsilon in (0.0, 0.5):
        ctx = Context(jnp.float32(epsilon), jnp.int32(0), jnp.int32(0))
        carry = made.initial_carry((5, 2))
        chosen, _ = made.act(params, carry, inputs, hyperparams(made), ctx, jax.random.key(1))
        assert np.take_along_axis(np.array(avail), np.array(chosen)[..., None], axis=-1).all()


@pytest.mark.parametrize("algo", all_but_slow(IDLE_FAST))
def test_an_agent_without_an_available_action_is_harmless(algo: str) -> None:
    """Its loss and gradients stay as large as where no agent leaves; the largest reward is 5."""
    made, sizes = build_small(algo), []
    ctx = Context(jnp.float32(0.5), jnp.int32(0), jnp.int32(0))
    learner = init_learner(made, made.init(jax.random.key(1), Clock(episode_limit=5, ends_from=9).spec))
    gradient = jax.jit(jax.grad(made.loss, has_aux=True))
    for env in (Leaver(episode_limit=5, ends_from=9), Clock(episode_limit=5, ends_from=9)):
        batch = replayed(env, made)
        noise = made.sample_noise(jax.random.key(2), batch)
        hp = hp_of_loss(made, learner.target, batch)
        grads, aux = gradient(learner.params, learner.target, batch, hp, ctx, noise)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        sizes.append((abs(float(aux.metrics["loss"])), float(optax.tree.norm(grads))))
    np.testing.assert_array_less(sizes[0], 3 * np.array(sizes[1]) + 1)


def replayed(env: Clock, algo: Algorithm) -> Episode:
    """An episode of five steps, as the learner sees it after the replay."""
    steps = [env.compress(env.reset(None)._replace(steps=jnp.int32(time))) for time in range(6)]
    stored = StoredEpisode(
        steps=jax.tree.map(lambda *leaves: jnp.stack(leaves)[None], *steps),
        joint_action=jnp.array([[[1, 2], [2, 0], [0, 0], [1, 0], [0, 0]]], jnp.uint8),
        reward=jnp.arange(1.0, 6.0)[None],
        length=jnp.full(1, 5, jnp.int32),
        terminated=jnp.ones(1, bool),
        latent=drawn_latent(algo, env.spec, (1,)),
    )
    replay = make_replay(env, buffer_size=2, batch_size=1, latent=latent_template(algo, env.spec))
    return replay.decode(replay.add(replay.init(), stored, jnp.bool_(True)).experience[0, :1], 5)


def build_small(algo: str) -> Algorithm:
    """An algorithm with its own options and narrow nets."""
    made = load_config(f"+algo={algo}").algo
    widths = {field.name: 8 for field in dataclasses.fields(made) if field.name.endswith("_dim")}
    return dataclasses.replace(made, **widths)


def small_run(algo: str, env: Any, total_env_steps: int) -> RunConfig:
    """The algorithm's own options with narrow nets and fast learning, on what is played at random.

    On-policy algorithms play by their own policies, and learn from 16 episodes at a time.
    """
    options = ("algo.lr=0.005", "algo.batch_size=64", "algo.buffer_size=512", *exploration(algo))
    if load_config(f"+algo={algo}").algo.is_on_policy:
        options = ("algo.lr=0.001", "num_envs=16", "algo.batch_size=16", "updates_per_iteration=10")
    config = load_config(f"+algo={algo}", *options)
    widths = {field.name: 16 for field in dataclasses.fields(config.algo) if field.name.endswith("_dim")}
    return dataclasses.replace(
        config,
        algo=dataclasses.replace(config.algo, **widths),
        env=env,
        num_envs=16,
        total_env_steps=total_env_steps,
        eval_interval=total_env_steps,
        eval_episodes=32,
        chunk_iterations=100,
    )


def last_return(records: list[dict[str, Any]]) -> float:
    return [record["episode_return"] for record in records if record["kind"] == "eval"][-1]


def known_values(config: RunConfig, params: PyTree) -> tuple[Any, Any]:
    """Returns the algorithm's best estimate of every joint action of the one-step game, and the true values."""
    env, algo = config.env, config.algo
    seen = env.observe(env.reset(jax.random.key(0)))
    both = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (4, 2, *leaf.shape)), seen)
    joint_actions = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    reward, ones = jnp.array(PAYOFF).reshape(4, 1), jnp.ones((4, 1))
    latent = at_places(drawn_latent(algo, env.spec, (4,)), 2)
    batch = Episode(*both, joint_actions[:, None], reward, discount=0 * ones, mask=ones, latent=latent)
    zero = jnp.int32(0)
    ctx, noise = Context(jnp.float32(1), zero, zero), algo.sample_noise(jax.random.key(0), batch)
    hp = hp_of_loss(algo, params, batch)
    values = jax.jit(lambda p: algo.loss(p, p, batch, hp, ctx, noise)[1].values)(params)
    for name in ("q_star", "q_tot"):
        if name in values:
            return values[name][:, 0], reward[:, 0]
    if isinstance(algo, IQL):
        return values["chosen_qs"][:, 0], independent_values(algo, joint_actions)
    return (), ()


def independent_values(algo: IQL, joint_actions: Any) -> Any:
    """The mean payoff of an agent's action while the other one plays at random, weighed as the algorithm does.

    With weight alpha on payoffs below it, q is where (high - q) = alpha (q - low).
    """
    alpha = algo.alpha if algo.weighting == "optimistic" else 1.0
    payoff = np.array(PAYOFF)
    first, second = (np.sort(table, axis=-1) @ [alpha, 1.0] / (1 + alpha) for table in (payoff, payoff.T))
    return np.stack([first[joint_actions[:, 0]], second[joint_actions[:, 1]]], axis=-1)
