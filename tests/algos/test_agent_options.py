"""The options of the agents' networks, in every algorithm and through a whole run."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algos.test_algorithms import ALGORITHMS, PREDATOR_PREY, small_hunt
from tests.environments import Clock
from tests.running import main, timeless
from wqmix_jax import evaluate, load_config, load_metrics, load_policy, train_seeds
from wqmix_jax.algos.base import AgentInputs, Context, hyperparams
from wqmix_jax.config import with_newer_options
from wqmix_jax.errors import ConfigError
from wqmix_jax.types import EnvSpec

SPEC = EnvSpec(num_agents=3, num_actions=4, obs_dim=5, state_dim=2, episode_limit=3)

EVERY_OPTION = ("algo.share_parameters=[[0,2],[1]]", "algo.agent_id=false", "algo.layer_norm=true")


def agents_of(*options: str) -> Any:
    return load_config("+algo=ow_qmix", "algo.hidden_dim=8", *options).algo


ALONE = ("algo.share_parameters=none", "algo.recurrent=false", "algo.weight_init=orthogonal")
GROUPS = (*EVERY_OPTION, "algo.last_action=false")


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        pytest.param(algo, options, marks=() if (algo, options) == ("vdn", ALONE) else pytest.mark.slow)
        for algo in ALGORITHMS
        for options in (ALONE, GROUPS)
    ],
)
def test_every_algorithm_trains_with_them(algo: str, options: tuple[str, ...], tmp_path: Path) -> None:
    assert main(f"+algo={algo}", *small_hunt(algo), *options, f"run_dir={tmp_path}") == 0
    for seed in (0, 1):
        last = load_metrics(tmp_path, kind="train", seed=seed)[-1]
        assert last["learner_steps"] >= 4
        assert all(isinstance(value, str) or math.isfinite(value) for value in last.values())
    assert (load_policy(tmp_path, member=1, which="last").env_steps or 0) >= 30


@pytest.mark.slow
def test_a_run_with_them_is_swept_resumed_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The resumed run has the records of the uninterrupted one, and a swept value acts on its own member."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("+algo=iql", *PREDATOR_PREY, *EVERY_OPTION, "sweep.lr=[0.001,0.01]", "checkpoint.every=15")
    assert main(*options, "total_env_steps=60", f"run_dir={whole}") == 0
    assert main(*options, f"run_dir={parts}") == 0
    assert main(f"resume={parts}", "total_env_steps=60") == 0
    records, resumed = timeless(load_metrics(whole)), timeless(load_metrics(parts))
    assert [line for line in records if line in resumed] == records
    assert len({line["loss"] for line in records if line["kind"] == "train" and line["env_steps"] >= 60}) == 4
    capsys.readouterr()
    evaluate.main([f"run_dir={whole}", "policy=last", "episodes=2"])
    assert capsys.readouterr().out.count("seed 1-lr0.01: ") >= 2


def test_q_stars_and_critics_agents_have_the_same_form() -> None:
    for name in ("ow_qmix", "maddpg", "masac"):
        algo = load_config(f"+algo={name}", *EVERY_OPTION, "algo.last_action=false").algo
        params = jax.eval_shape(lambda algo=algo: algo.init(jax.random.key(0), SPEC))
        shapes = [jax.tree.map(lambda leaf: leaf.shape, params[net]) for net in ("agent", "q_star_agent")]
        assert shapes[0] == shapes[1]
        assert shapes[0]["groups"]["encoder"]["kernel"] == (2, SPEC.obs_dim, algo.hidden_dim)


@pytest.mark.parametrize(("name", "gain"), [("ow_qmix", 1.0), ("masac", 0.01)])
def test_actors_start_nearly_uniform_with_orthogonal_kernels(name: str, gain: float) -> None:
    algo = load_config(f"+algo={name}", "algo.weight_init=orthogonal", "algo.hidden_dim=8").algo
    params = jax.jit(lambda key: algo.init(key, SPEC))(jax.random.key(0))
    for net, expected in (("agent", gain), ("q_star_agent", 1.0)):
        kernel = params[net]["head"]["kernel"]
        np.testing.assert_allclose(kernel.T @ kernel, expected**2 * np.eye(SPEC.num_actions), atol=1e-6)


def test_agents_without_ids_act_alike_on_equal_observations() -> None:
    """With parameters that are shared, and differently without."""
    obs = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (50, 1, SPEC.obs_dim)), (50, 3, SPEC.obs_dim))
    inputs = AgentInputs(obs, jnp.full((50, 3), -1), jnp.ones((50, 3, 4), bool))
    ctx = Context(jnp.float32(0), jnp.int32(0), jnp.int32(0))

    def played(algo: Any, key: Any) -> Any:
        params, carry = algo.init(key, SPEC), algo.initial_carry((50, 3))
        _, utilities = algo.step(params["agent"], carry, inputs)
        return utilities, algo.act(params, carry, inputs, hyperparams(algo), ctx, key)[0]

    for options, is_alike in ((), False), (("algo.agent_id=false",), True):
        for sharing in ("all", "none"):
            algo = agents_of(*options, f"algo.share_parameters={sharing}")
            utilities, chosen = jax.jit(lambda key, algo=algo: played(algo, key))(jax.random.key(1))
            is_equal = bool(jnp.allclose(utilities, utilities[:, :1]))
            assert is_equal == (is_alike and sharing == "all")
            assert (chosen == chosen[:, :1]).all() or not is_equal


@pytest.mark.parametrize(
    "value", ["some", "[]", "[[]]", "[[0],[]]", "[0,1]", "[[0,0],[1]]", "[[0],[2]]", "[[1],[2]]", "[[0.5]]", "[[a]]"]
)
def test_groups_that_are_no_partition_are_refused(value: str) -> None:
    needed = "choose all, none or groups that name each agent, from 0, once, such as"
    with pytest.raises(ConfigError, match=rf"^algo\.share_parameters=.* is not allowed: {needed}"):
        agents_of(f"algo.share_parameters={value}")


@pytest.mark.parametrize("groups", ["[[0,1]]", "[[0,1],[2,3]]"])
def test_groups_that_do_not_name_the_environments_agents_are_refused(
    groups: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before anything is compiled or written, from the command line and from Python."""
    monkeypatch.setattr("wqmix_jax.training.compiled_loop.compile_trainer", None)
    named = 2 if groups == "[[0,1]]" else 4
    message = f"is not allowed: it names {named} agents, and the environment has 3"
    run_dir = tmp_path / "run"
    options = ("+algo=iql", *PREDATOR_PREY, f"algo.share_parameters={groups}")
    assert main(*options, f"run_dir={run_dir}") == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if "not allowed" in line]
    assert line == f"error: algo.share_parameters={json.loads(groups)} {message}"
    assert not run_dir.exists()
    with pytest.raises(ConfigError, match=message):
        train_seeds(load_config(*options), [0])


def test_groups_are_kept_when_an_option_is_changed() -> None:
    """Options are checked again with the values that they have: tuples."""
    algo = agents_of("algo.share_parameters=[[0,2],[1]]")
    assert algo.share_parameters == ((0, 2), (1,))
    assert type(algo)(**vars(algo)).share_parameters == algo.share_parameters
    assert hash(algo) == hash(type(algo)(**vars(algo)))


@pytest.mark.parametrize("target", ["wqmix_jax.algos.iql.IQL", "huber_iql.HuberIQL"])
def test_an_older_run_has_the_default_agents(target: str) -> None:
    """Classes of this package have them, and custom ones with an option of a `TDLearner`."""
    config = load_config("+algo=iql")
    recorded = {"_target_": target, "returns": "one_step", "td_lambda": 0.5, "hidden_dim": 3}
    filled = with_newer_options({"algo": recorded, "env": {"_target_": "coin.Coin"}})["algo"]
    assert (filled["hidden_dim"], filled["td_lambda"]) == (3, 0.5)
    for name in ("agent_id", "last_action", "recurrent", "share_parameters", "layer_norm", "weight_init"):
        assert filled[name] == getattr(config.algo, name)


def test_one_group_of_all_agents_has_shared_parameters() -> None:
    """Its stack has one set of them."""
    env = Clock(episode_limit=3, ends_from=1)
    shared, grouped = (agents_of(f"algo.share_parameters={sharing}") for sharing in ("all", "[[0,1]]"))
    params = jax.jit(lambda key: shared.init(key, env.spec)["agent"])(jax.random.key(0))
    stacked = {"groups": jax.tree.map(lambda leaf: leaf[None], params)}
    inputs = AgentInputs(jnp.ones((5, 2, 2)), jnp.zeros((5, 2), jnp.int32), jnp.ones((5, 2, 3), bool))
    carry = shared.initial_carry((5, 2))
    for one, other in zip(shared.step(params, carry, inputs), grouped.step(stacked, carry, inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
