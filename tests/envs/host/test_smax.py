"""A real battle through the bridge: SMAX in a worker, behind the interface of SMAC's client."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.envs.host.running import HERE, WORKERS
from tests.envs.host.smax_client import WIDTH, look, make
from wqmix_jax import load_config, train_seeds
from wqmix_jax.options import build

pytestmark = pytest.mark.slow  # each worker imports JAX and compiles the game

LIMIT, MAP = 25, "3m"


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes workers import this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[2]))


def bridged(**changes: Any) -> Any:
    simulator = {"simulator": f"{HERE / 'smax_client.py'}:Smax", "options": {"map_name": MAP, "episode_limit": LIMIT}}
    target = "wqmix_jax.envs.host.bridge.HostEnvironment"
    return build("env", {"_target_": target, **WORKERS, "launch_timeout": 600, "eval_envs": 1, **simulator, **changes})


def test_a_battle_is_the_native_one() -> None:
    """To the bit, at the width at which the worker computes it, until both battles have ended."""
    ours, native = bridged(), make(MAP, LIMIT)
    assert ours.spec == native.spec
    keys = jax.random.split(jax.random.key(3), 2)
    seeds = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32) >> 1)(keys)
    wide = jnp.concatenate([seeds, jnp.repeat(seeds[:1], WIDTH - 2)])
    reset, step = jax.jit(jax.vmap(native.reset)), jax.jit(jax.vmap(native.step))
    native_look, keys_at = (
        jax.jit(jax.vmap(lambda state: look(native, state))),
        jax.jit(lambda number: jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), number))(wide)),
    )
    theirs, rng = reset(keys_at(0)), np.random.default_rng(0)
    step_batch, ended = jax.jit(ours.step_batch), np.zeros(2, bool)
    with ours.external.running([0]):
        state = jax.jit(ours.reset_batch)(keys)
        for number in range(1, LIMIT + 1):
            obs, world, avail, _ = jax.tree.map(np.asarray, native_look(theirs))
            for one, other in zip(state.seen, (obs, world, avail), strict=True):
                np.testing.assert_array_equal(np.asarray(one)[~ended], other[:2][~ended])
            # All units shoot when they can, so that one side wins.
            wanted = np.where(avail[..., 5:].any(-1), 5 + avail[..., 5:].argmax(-1), 1)
            chosen = np.where(np.take_along_axis(avail, wanted[..., None], -1)[..., 0], wanted, avail.argmax(-1))
            chosen = np.where(rng.random(chosen.shape) < 0.1, avail.argmax(-1), chosen)
            theirs, outcome = step(theirs, jnp.asarray(chosen, jnp.int32), keys_at(number))
            state, found = step_batch(state, jnp.asarray(chosen[:2], jnp.int32), keys)
            for one, other in zip(found, outcome, strict=True):
                np.testing.assert_array_equal(np.asarray(one)[~ended], np.asarray(other)[:2][~ended])
            ended |= np.asarray(found.terminated | found.truncated)
            if ended.all():
                break
        assert ended.all()
        metrics = jax.vmap(ours.metrics)(state)
        assert (np.asarray(metrics["dead_allies"] + metrics["dead_enemies"]) > 0).all()


def test_ow_qmix_trains_on_it() -> None:
    small = {"num_seeds": 2, "total_env_steps": 60, "eval_interval": 50, "eval_episodes": 2}
    narrow = ["algo.batch_size=2", "algo.buffer_size=4", "algo.hidden_dim=8", "algo.q_star_dim=8"]
    config = load_config(
        "+algo=ow_qmix", "env=matrix_game", *(f"{key}={value}" for key, value in small.items()), *narrow
    )
    env = bridged()
    _, records = train_seeds(dataclasses.replace(config, env=env), [0, 1])
    evals = [record for record in records if record["kind"] == "eval"]
    assert {record["seed"] for record in evals} == {0, 1}
    assert all(0 <= record["win_rate"] <= 1 for record in evals)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses
    assert np.isfinite(losses).all()
    assert env.external.facts() == {"worker_restarts": 0}
