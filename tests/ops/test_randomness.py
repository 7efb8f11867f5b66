"""Draws don't depend on the user's settings of JAX, and a resumed run names the settings that aren't pinned."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.environments import Recall, tiny_run, tiny_wqmix
from tests.running import TINY, main
from wqmix_jax import play_episode
from wqmix_jax.config import load_group
from wqmix_jax.envs.checks import check_environment
from wqmix_jax.ops.randomness import numeric_settings
from wqmix_jax.options import build
from wqmix_jax.runs.saved_policies import GreedyPolicy
from wqmix_jax.training.compiled_loop import make_trainer

SETTINGS = {"jax_threefry_partitionable": False, "jax_default_prng_impl": "rbg"}


@pytest.fixture(params=SETTINGS)
def other_setting(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.param
    before = getattr(jax.config, name)
    jax.config.update(name, SETTINGS[name])
    yield
    jax.config.update(name, before)


def numbers() -> list[np.ndarray]:
    """Everything that a trainer computes in a few iterations, and an episode that is played afterwards."""
    env = Recall()
    algo = tiny_wqmix()
    trainer = make_trainer(tiny_run(algo, env, eval_interval=8, chunk_iterations=4))
    state, record = trainer.train_chunk(trainer.init([3]))
    evaluated = trainer.evaluate(state)
    params = jax.tree.map(lambda leaf: leaf[0], algo.acting_params(state.learner.params))
    key = jax.random.key(1, impl="threefry2x32")
    moments = play_episode(env, GreedyPolicy(algo, params, env.spec, "float32"), key)
    tree = (state._replace(keys=jax.tree.map(jax.random.key_data, state.keys)), record, evaluated)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((tree, [moment.env_state for moment in moments]))]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    return numbers()


def test_draws_do_not_depend_on_the_users_settings(expected: list[np.ndarray], other_setting: None) -> None:
    for found, wanted in zip(numbers(), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_raw_keys_of_a_library_are_read_as_they_were_made(other_setting: None) -> None:
    """jumanji hands raw key data to `jax.random`."""
    check_environment(build("env", load_group("env", "jumanji")))


def test_settings_that_change_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=x --xla_cpu_max_isa=AVX2")
    before = numeric_settings()
    assert before.endswith("--xla_cpu_max_isa=AVX2")
    assert "device_count" not in before
    assert "dump" not in before
    with jax.enable_x64(True):
        assert numeric_settings() == f"jax_enable_x64=True, {before}"


def test_a_resume_under_other_settings_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The finished run isn't compiled again."""
    assert main(*TINY, "total_env_steps=1", f"run_dir={tmp_path / 'run'}") == 0
    assert main(f"resume={tmp_path / 'run'}") == 0
    assert "configuration of jax" not in capfd.readouterr().err
    was = numeric_settings()
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_max_isa=AVX2")
    assert main(f"resume={tmp_path / 'run'}") == 0
    now = numeric_settings()
    assert ("AVX2" in was, "AVX2" in now) == (False, True)
    message = f"warning: configuration of jax is {now}, and was {was} when the checkpoint was made"
    assert f"{message}; the numbers will not be equal to the last bit\n" in capfd.readouterr().err
