"""Counts and ratios of the benchmark, without its times."""

import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import table2
from experiments.benchmarks import (
    benchmark,
    bridge_benchmark,
    checkpoint_cost,
    profile_learner,
    short_episodes,
    smax_benchmark,
)
from experiments.benchmarks.benchmark import endless, matmul_flops
from experiments.examples import demo
from experiments.tabular import claims, deep, exact
from wqmix_jax import load_config

SMALL = ("env=matrix_game", "algo.batch_size=4", "algo.hidden_dim=8")


def test_flops_of_loops_branches_and_gradients_are_counted_as_often_as_they_run():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
    one = 2 * 2 * 3 * 5

    assert matmul_flops(jnp.matmul, a, b) == one
    assert matmul_flops(jax.jit(lambda a, b: jax.lax.map(lambda _: a @ b, jnp.arange(7))), a, b) == 7 * one
    assert matmul_flops(lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: jnp.zeros((2, 5))), a, b) == one
    assert matmul_flops(jax.vmap(jnp.matmul, (0, None)), jnp.ones((4, 2, 3)), b) == 4 * one
    assert matmul_flops(jax.value_and_grad(lambda a, b: (a @ b).sum(), argnums=(0, 1)), a, b) == 3 * one


def test_products_that_nothing_depends_on_are_not_counted():
    a, b = jnp.ones((2, 3)), jnp.ones((3, 5))
    one = 2 * 2 * 3 * 5

    def scanned(a, b):
        return jax.lax.scan(lambda total, _: (total + (a @ b).sum(), a.T @ (a @ b)), 0.0, jnp.arange(7))

    assert matmul_flops(scanned, a, b) == 7 * (one + 2 * 3 * 2 * 5 + one)
    assert matmul_flops(lambda a, b: scanned(a, b)[0], a, b) == 7 * one
    assert matmul_flops(jax.grad(lambda a, b: (a @ b).sum()), a, b) == one


def test_an_endless_environment_plays_on_after_its_end():
    options = (
        "env.world_shape=[2,3]",
        "env.num_agents=2",
        "env.num_stags=1",
        "env.num_hares=0",
        "env.episode_limit=30",
    )
    config = endless(load_config("+algo=vdn", *options))
    env, spec = config.env, config.env.spec
    state = env.reset(jax.random.key(0))._replace(prey_alive=jnp.zeros(1, bool))
    _, outcome = env.step(state, jnp.zeros(spec.num_agents, jnp.int32), jax.random.key(1))
    assert not outcome.terminated
    assert load_config("+algo=vdn", *options).env.step(state, jnp.zeros(2, jnp.int32), jax.random.key(1))[1].terminated


@pytest.mark.parametrize("name", ["iql", "hysteretic_iql"])
def test_a_call_is_timed_next_to_the_authors_where_they_have_the_algorithm(name, monkeypatch):
    monkeypatch.setattr(benchmark, "MATMUL_SIZE", 8)
    rows = {row.name: row.value for row in benchmark.learner_rows(load_config(f"+algo={name}", *SMALL), name)}
    assert rows["learner_call_seconds"] > 0
    assert rows.get("learner_call_seconds_authors") == {"iql": 0.31}.get(name)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (benchmark, ["nonsense"], "'nonsense' can't be read"),
        (benchmark, ["algo=nonsense"], "algo=nonsense is not allowed: choose one of"),
        (benchmark, ["num_seed=2"], "num_seed is unknown: did you mean num_seeds?"),
        (benchmark, ["seeds=3"], "seeds=3 is not allowed: seeds=all times 1, 2, 4, .. seeds, num_seeds=N that many"),
        (benchmark, ["algo=all", "seeds=all"], "seeds=all is not allowed with algo=all"),
        (benchmark, ["--out", "nowhere/a.json"], "argument --out: nowhere/a.json is not allowed: there is no folder"),
        (short_episodes, ["algo=nonsense"], "algo=nonsense is not allowed: choose one of"),
        (table2, ["iql", "nonsense"], "algo=nonsense is not allowed: choose one of"),
        (profile_learner, ["nonsense"], "algo=nonsense is not allowed: choose one of"),
        (profile_learner, ["--top", "0"], "argument --top: 0 is not allowed: choose a whole number above 0"),
        (smax_benchmark, ["--map", "nowhere"], "env.map=nowhere is not allowed"),
        (bridge_benchmark, ["--json", "nowhere/a.json"], "argument --json: nowhere/a.json is not allowed"),
        (checkpoint_cost, ["--seeds", "1", "x"], "argument --seeds: x is not allowed"),
        (demo, ["--out", __file__], f"--out {__file__} is not allowed: it is a file"),
        (claims, ["--games", "-1"], "argument --games: -1 is not allowed"),
        (deep, ["--steps", "0"], "argument --steps: 0 is not allowed"),
        (exact, ["--games", "1.5"], "argument --games: 1.5 is not allowed"),
    ],
)
def test_wrong_options_are_refused_in_one_line(command, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
    for module in (benchmark, smax_benchmark):
        monkeypatch.setattr(module, "claim_cores", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_short_episodes_are_timed_with_every_way_with_padding():
    options = (*SMALL, "num_seeds=2")
    rows = short_episodes.measured(load_config("+algo=vdn", *options), "vdn")
    assert len(rows) == 4 * 3
    assert all(row.value > 0 and row.num_seeds == 2 for row in rows)
