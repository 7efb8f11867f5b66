"""The README's example of a custom algorithm and environment, from a folder outside this repository."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import ROOT, main
from wqmix_jax import load_config, load_metrics
from wqmix_jax.config import RunConfig
from wqmix_jax.types import Episode

PROJECT = ROOT / "experiments" / "examples" / "my_project"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("outside") / "my_project"
    return Path(shutil.copytree(PROJECT, copied, ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    sizes = ["algo.hidden_dim=4", "algo.mixer_embed_dim=4", "algo.hypernet_dim=4"]
    return load_config("+algo=smooth_ow", "env=meet", *sizes, config_dir=folder / "configs")


def test_the_files_are_short_and_the_readme_counts_them_right() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, pattern in (("smooth_ow", r"an algorithm in (\d+)\s"), ("meet", r"an environment in (\d+)")):
        lines = len((PROJECT / f"{name}.py").read_text().splitlines())
        assert lines < 80
        [counted] = re.findall(pattern, readme)
        assert int(counted) == lines


def test_agents_meet(config: RunConfig) -> None:
    env = config.env
    state = env.reset(jax.random.key(0))._replace(cells=jnp.array([6, 0, 1]))
    seen = env.observe(state)
    np.testing.assert_array_equal(seen.obs[0], [1, 1, 1, 0, 0, 0, 0])  # its own cell first, around the ring
    np.testing.assert_array_equal(seen.obs[2], [1, 0, 0, 0, 0, 1, 1])
    apart, outcome = env.step(state, jnp.array([1, 1, 1]), jax.random.key(0))
    assert (float(outcome.reward), bool(outcome.terminated), float(env.metrics(apart)["win_rate"])) == (0, False, 0)
    together, outcome = env.step(state, jnp.array([2, 1, 0]), jax.random.key(0))
    np.testing.assert_array_equal(together.cells, [0, 0, 0])
    assert (float(outcome.reward), bool(outcome.terminated), float(env.metrics(together)["win_rate"])) == (1, True, 1)


def test_the_weights_fall_smoothly(config: RunConfig) -> None:
    """By hand: alpha 0.1 and temperature 1 give 0.1 + 0.9 sigmoid(-delta), 0.55 at 0."""
    algo, spec = config.algo, config.env.spec
    params = algo.init(jax.random.key(0), spec)
    batch = Episode(
        obs=jnp.zeros((1, 3, 3, spec.obs_dim)), state=jnp.zeros((1, 3, spec.state_dim)),
        avail_actions=jnp.ones((1, 3, 3, 3), bool), joint_action=jnp.zeros((1, 2, 3), jnp.int32),
        reward=jnp.array([[5.0, -5.0]]), discount=jnp.zeros((1, 2)), mask=jnp.ones((1, 2)),
    )  # fmt: skip
    from wqmix_jax.algos.base import hyperparams

    loss, aux = algo.loss(params, params, batch, hyperparams(algo), None, ())
    td_error = aux.values["td_error"]
    assert td_error[0, 0] < 0 < td_error[0, 1]
    expected = 0.1 + 0.9 / (1 + np.exp(np.asarray(td_error)))
    np.testing.assert_allclose(aux.values["weights"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, (expected * np.square(td_error)).mean(), rtol=1e-5)


@pytest.mark.slow
def test_it_trains_and_learns_to_meet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    small = ["total_env_steps=8000", "eval_interval=2000", "eval_episodes=64", "num_envs=8", "algo.batch_size=32"]
    small += [
        "algo.buffer_size=500",
        "algo.epsilon_anneal_steps=3000",
        "algo.lr=0.002",
        "algo.target_update_interval=50",
    ]
    assert main("+algo=smooth_ow", "env=meet", *small, "run_dir=run", config_dir=folder / "configs") == 0
    wins = [line["win_rate"] for line in load_metrics("run", kind="eval")]
    assert wins[0] < 0.5 < 0.8 < wins[-1]
