"""DCG: how it acts, what it refuses, and that payoffs solve a game at which utilities alone fail."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import table2
from tests.algos.test_algorithms import PREDATOR_PREY
from tests.environments import tiny_dcg
from tests.running import main, timeless
from tests.training.test_learner import CTX, batch_of, params_and_target
from wqmix_jax import evaluate, load_config, load_metrics, train_seeds
from wqmix_jax.algos.base import AgentInputs, hyperparams
from wqmix_jax.errors import ConfigError
from wqmix_jax.types import EnvSpec

SPEC = EnvSpec(num_agents=3, num_actions=4, obs_dim=5, state_dim=2, episode_limit=3)

PAIRS = "choose full, line, cycle, star, vdn or pairs of two different agents, from 0, each pair once, such as"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        *((f"graph={value}", PAIRS) for value in ("ring", "[]", "[[0]]", "[[0,1,2]]", "[0,1]", "[[0,-1]]", "[[0,a]]")),
        ("graph=[[0,1],[1,1]]", PAIRS),  # an agent twice on one edge
        ("graph=[[0,1],[1,0]]", PAIRS),  # an edge twice
        ("graph=3", PAIRS),
        ("payoff_rank=0", "input should be greater than 0"),
        ("payoff_rank=-1", "input should be greater than 0"),
        ("payoff_layers=-1", "input should be greater than or equal to 0"),
        ("iterations=-1", "input should be greater than or equal to 0"),
        ("duelling=perhaps", "input should be a valid boolean"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(option: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("+algo=dcg", f"algo.{option}")
    assert str(error.value).startswith(f"algo.{option.partition('=')[0]}")
    assert f" is not allowed: {reason}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_edge_of_an_agent_that_is_not_there_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wqmix_jax.training.compiled_loop.compile_trainer", None)
    options = ("+algo=dcg", *PREDATOR_PREY, "algo.graph=[[0,1],[1,3]]")
    assert main(*options, f"run_dir={tmp_path / 'run'}") == 2
    message = "algo.graph=[[0, 1], [1, 3]] is not allowed: it names agent 3, and the environment has agents 0 to 2"
    [line] = [line for line in capfd.readouterr().err.splitlines() if "not allowed" in line]
    assert line == f"error: {message}"
    assert not (tmp_path / "run").exists()


def test_options_without_effect_are_known() -> None:
    known = {
        (): {"mixer_embed_dim"},
        ("algo.duelling=true",): set(),
        ("algo.iterations=0",): {"mixer_embed_dim", "anytime", "normalised"},
        ("algo.graph=vdn",): {
            "mixer_embed_dim", "payoff_rank", "payoff_layers", "iterations", "anytime", "normalised"
        },
    }  # fmt: skip
    always = load_config("+algo=qtran").algo.without_effect().keys()
    for options, expected in known.items():
        assert load_config("+algo=dcg", *options).algo.without_effect().keys() - always == expected


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"recurrent": False, "share_parameters": "none"},
        {"layer_norm": True, "payoff_rank": 2, "payoff_layers": 1, "graph": [[0, 1]]},
    ],
    ids=["default", "alone", "normalised"],
)
def test_agents_play_what_the_loss_calls_greedy(options: dict[str, Any]) -> None:
    """Step by step along an episode, and so also with the right hidden states."""
    algo = tiny_dcg(**options)
    params, target = jax.tree.map(lambda leaf: 4 * leaf, params_and_target(algo))  # so that what is greedy varies
    batch = batch_of([4] * 8, [False] * 8)
    noise = algo.sample_noise(jax.random.key(0), batch)
    expected = algo.loss(params, target, batch, hyperparams(algo), CTX, noise)[1].values["greedy_actions"]
    act = jax.jit(lambda carry, inputs: algo.act(acting, carry, inputs, hyperparams(algo), still, jax.random.key(1)))
    acting, still = algo.acting_params(params), CTX._replace(epsilon=jnp.float32(0))
    assert set(acting) == {"agent", "payoff"}
    carry, last = algo.initial_carry((8, 2)), jnp.full((8, 2), -1)
    for step in range(5):
        played, carry = act(carry, AgentInputs(batch.obs[:, step], last, batch.avail_actions[:, step]))
        np.testing.assert_array_equal(played, expected[:, step])
        last = batch.joint_action[:, min(step, 3)]
    assert len(np.unique(expected)) > 1


def test_each_agent_explores_on_its_own() -> None:
    algo = tiny_dcg()
    params, _ = params_and_target(algo)
    batch = batch_of([4] * 2000, [False] * 2000)
    inputs = AgentInputs(batch.obs[:, 0] * 0, jnp.full((2000, 2), -1), batch.avail_actions[:, 0])
    played = {}
    for epsilon in (0.0, 0.5):
        ctx = CTX._replace(epsilon=jnp.float32(epsilon))
        carry = algo.initial_carry((2000, 2))
        played[epsilon], _ = algo.act(params, carry, inputs, hyperparams(algo), ctx, jax.random.key(0))
    is_greedy = np.array(played[0.0] == played[0.5])
    expected = 1 / 2 + 1 / 2 / 3  # three actions
    np.testing.assert_allclose(is_greedy.mean(0), expected, atol=0.04)
    np.testing.assert_allclose(is_greedy.all(-1).mean(), expected**2, atol=0.04)


def test_the_state_value_changes_values_and_no_action() -> None:
    algo = tiny_dcg()
    params, _ = params_and_target(algo)
    batch = batch_of([4, 3], [True, True])

    def values(params: Any) -> Any:
        return algo.loss(params, params, batch, hyperparams(algo), CTX, ())[1].values

    other = params | {"state_value": jax.tree.map(lambda leaf: leaf + 1, params["state_value"])}
    plain, raised = values(params), values(other)
    np.testing.assert_array_equal(plain["greedy_actions"], raised["greedy_actions"])
    assert (np.abs(plain["q_tot"] - raised["q_tot"]) > 1e-3).any()
    assert "state_value" not in dataclasses.replace(algo, duelling=False).init(jax.random.key(0), SPEC)


def test_a_graph_without_edges_is_vdn_divided_by_the_agents() -> None:
    algo = tiny_dcg(graph="vdn", duelling=False)
    params, _ = params_and_target(algo)
    assert set(params) == {"agent"}
    batch = batch_of([4, 3], [True, True])
    aux = algo.loss(params, params, batch, hyperparams(algo), CTX, ())[1].values
    taken = np.take_along_axis(np.array(aux["agent_qs"][:, :-1]), np.array(batch.joint_action)[..., None], -1)
    np.testing.assert_allclose(aux["q_tot"], taken.mean((-1, -2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(aux["greedy_actions"], aux["agent_qs"].argmax(-1))


@pytest.mark.parametrize(("graph", "payoff"), [("full", 8), ("vdn", 0)])
def test_payoffs_find_the_optimum_that_utilities_alone_miss(graph: str, payoff: float) -> None:
    config = table2.config_of("table2", "dcg")
    algo = dataclasses.replace(config.algo, graph=graph, lr=0.005, hidden_dim=16)
    config = dataclasses.replace(config, algo=algo, total_env_steps=4000, eval_interval=4000)
    _, records = train_seeds(config, range(3))
    last = {record["seed"]: record["episode_return"] for record in records if record["kind"] == "eval"}
    assert last == dict.fromkeys(range(3), payoff)


@pytest.mark.slow
def test_a_run_is_swept_resumed_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The resumed run has the records of the uninterrupted one, and a swept value acts on its own member."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own = ("algo.duelling=true", "algo.payoff_rank=1", "algo.prioritised=true", "algo.standardise_returns=true")
    options = ("+algo=dcg", *PREDATOR_PREY, *own, "sweep.lr=[0.001,0.01]", "checkpoint.every=15")
    assert main(*options, "total_env_steps=60", f"run_dir={whole}") == 0
    assert main(*options, f"run_dir={parts}") == 0
    assert main(f"resume={parts}", "total_env_steps=60") == 0
    records, resumed = timeless(load_metrics(whole)), timeless(load_metrics(parts))
    assert [line for line in records if line in resumed] == records
    assert len({line["loss"] for line in records if line["kind"] == "train" and line["env_steps"] >= 60}) == 4
    capsys.readouterr()
    evaluate.main([f"run_dir={whole}", "policy=last", "episodes=2"])
    assert capsys.readouterr().out.count("seed 1-lr0.01: ") >= 2
