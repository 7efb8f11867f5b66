"""Counts and ratios of the benchmark, without its times."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from experiments import table2
from experiments.benchmarks import (
    benchmark,
    bridge_benchmark,
    checkpoint_cost,
    device_benchmark,
    precision,
    profile_learner,
    short_episodes,
    smax_benchmark,
)
from experiments.benchmarks.benchmark import endless, matmul_flops, one_batch_config
from experiments.examples import demo
from experiments.tabular import claims, deep, exact
from wqmix_jax import load_config
from wqmix_jax.config import names
from wqmix_jax.networks import linear, recurrent

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

    def repeated(times, a, b):  # a loop of dynamic length is counted once
        used = lambda _, total: total + jax.grad(lambda a: (a @ b).sum())(a).sum()  # noqa: E731
        return jax.lax.fori_loop(0, times, used, 0.0)

    assert matmul_flops(repeated, jnp.int32(3), a, b) == one


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
        (device_benchmark, ["algo=nonsense"], "algo=nonsense is not allowed: choose one of"),
        (device_benchmark, ["num_seeds=2"], "num_seeds=2 is not allowed: --seeds chooses the numbers of seeds"),
        (device_benchmark, ["compute_dtype=bfloat16"], "compute_dtype=bfloat16 is not allowed: each precision is"),
        (device_benchmark, ["--seeds", "8", "0"], "argument --seeds: 0 is not allowed: choose a whole number above 0"),
        (device_benchmark, ["--seeds", "999999999"], "num_seeds=999999999 is not allowed"),
        (device_benchmark, ["--repeats", "few"], "argument --repeats: few is not allowed: choose a whole number"),
        (device_benchmark, ["--budget", "0"], "argument --budget: 0 is not allowed: choose a whole number above 0"),
        (device_benchmark, ["--trace", __file__], f"argument --trace: {__file__} is not allowed: choose a new"),
        (device_benchmark, ["--out", "nowhere/a.json"], "argument --out: nowhere/a.json is not allowed: there is no"),
        (short_episodes, ["algo=nonsense"], "algo=nonsense is not allowed: choose one of"),
        (table2, ["iql", "nonsense"], "algo=nonsense is not allowed: choose one of"),
        (table2, ["--games", "table2", "nowhere"], "env.payoff='nowhere' is not allowed"),
        (table2, ["--seeds", "0"], "argument --seeds: 0 is not allowed: choose a whole number above 0"),
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
    for module in (benchmark, device_benchmark, smax_benchmark):
        monkeypatch.setattr(module, "claim_cores", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_short_episodes_are_timed_with_every_way_with_padding():
    options = (*SMALL, "num_seeds=2")
    rows = short_episodes.measured(load_config("+algo=vdn", *options), "vdn")
    assert len(rows) == 4 * 4  # whole, cut, bounded and packed batches
    assert all(row.value > 0 and row.num_seeds == 2 for row in rows)


def test_a_device_is_measured_from_few_seeds_to_many():
    plan = device_benchmark.measurements("vdn", SMALL, [4, 2, 1, 4], repeats=1)
    kinds = ("training", "learner call", "rollout")
    expected = [f"{kind}, 1 seed, float32" for kind in kinds]
    expected += [f"{kind}, 2 seeds, float32" for kind in kinds]
    expected += [f"{kind}, 2 seeds, {name}" for name in ("tensorfloat32", "bfloat16") for kind in kinds[:2]]
    expected += [f"{kind}, 4 seeds, float32" for kind in kinds]
    assert list(map(str, plan)) == expected


@pytest.mark.slow
def test_a_device_is_measured_and_traced(monkeypatch, tmp_path):
    out, trace = tmp_path / "rows.json", tmp_path / "trace"
    options = [*SMALL, "algo=vdn", "algo.buffer_size=16", "chunk_iterations=4"]
    arguments = ["--seeds", "2", "--repeats", "2", "--budget", "600", "--out", str(out), "--trace", str(trace)]
    monkeypatch.setattr(sys, "argv", ["", *options, *arguments])
    monkeypatch.setattr(device_benchmark, "claim_cores", lambda: None)
    monkeypatch.setattr(device_benchmark, "peak_memory", iter(range(100, 200)).__next__)
    monkeypatch.delitem(device_benchmark.PRECISIONS, "tensorfloat32")

    device_benchmark.main()

    machine, *rows = json.loads(out.read_text())
    assert machine["not_measured"] == ""
    assert machine["options"] == " ".join(options)
    assert all(row["value"] > 0 and row["num_seeds"] == 2 for row in rows)
    names = {row["name"] for row in rows}
    assert names >= {"end_to_end_env_steps_per_second", "learner_call_seconds", "rollout_seconds_per_step"}
    assert names >= {"compile_seconds", "planned_memory_bytes", "peak_memory_bytes", "peak_memory_vs_planned"}
    assert names >= {"bfloat16_learner_call_seconds", "bfloat16_end_to_end_env_steps_per_second"}
    assert list(trace.rglob("*.trace.json.gz"))


def test_what_does_not_fit_into_the_budget_or_the_memory_is_left_out(monkeypatch):
    def fake(seconds, rows=1):
        def measure(config):
            nonlocal now
            now += seconds
            if not rows:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
            return [benchmark.Row("row", 1.0, "s", "vdn", config.num_seeds)]

        return measure

    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    one, two = (load_config("+algo=vdn", *SMALL, f"num_seeds={number}") for number in (1, 2))
    plan = [
        device_benchmark.Measurement("training", "float32", one, fake(10)),
        device_benchmark.Measurement("rollout", "float32", one, fake(1)),
        device_benchmark.Measurement("trace", "float32", one, fake(1, rows=0)),
        device_benchmark.Measurement("training", "float32", two, fake(20)),  # on a CPU, expected to take twice as long
        device_benchmark.Measurement("rollout", "bfloat16", two, fake(1)),
    ]
    taken = list(device_benchmark.measured(plan, end=25.0))
    assert [[row.name for row in rows] for rows, _ in taken] == [["row"], ["row"], [], [], ["bfloat16_row"]]
    assert [reason for _, reason in taken if reason] == [
        "trace, 1 seed, float32: RESOURCE_EXHAUSTED: out of memory",
        "training, 2 seeds, float32: it would end after the budget",
    ]


def test_emulated_products_have_the_errors_of_their_precision_and_round_gradients_too():
    errors = {name: precision.product_error(multiply) for name, multiply in precision.PRECISIONS.items()}
    assert errors["float32"] < 1e-6 < errors["bfloat16_3x"] < 2e-5 < errors["tensorfloat32"] < 1e-3 < errors["bfloat16"]
    third = jnp.full((1, 1), 1 / 3)
    product = precision.rounded_product(precision.PRECISIONS["bfloat16"])
    value, (d_inputs, d_kernel) = jax.value_and_grad(lambda a, b: product(a, b).sum(), argnums=(0, 1))(third, third)
    rounded = float(jnp.bfloat16(1 / 3))
    assert (float(value), float(d_inputs[0, 0]), float(d_kernel[0, 0])) == (rounded**2, rounded, rounded)


def test_products_are_replaced_where_nets_use_them_and_put_back():
    own = linear.product
    with precision.replaced_products(precision.PRECISIONS["bfloat16"]):
        assert linear.product is recurrent.product is not own
    assert linear.product is recurrent.product is own


@pytest.mark.parametrize("algo", names("algo").split(", "))
def test_a_learner_call_of_every_algorithm_can_be_timed(algo):
    config = load_config(f"+algo={algo}")
    one_batch = one_batch_config(config)
    assert (one_batch.algo.batch_size, one_batch.algo.buffer_size) == (config.algo.batch_size,) * 2
    assert one_batch.updates_per_iteration == 1
    assert not config.algo.is_on_policy or one_batch.num_envs == config.algo.batch_size
