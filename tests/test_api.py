"""Training without a command line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import wqmix_jax
from tests.running import TINY, USER_FOLDER, timeless
from wqmix_jax import api, load_config, train_seeds
from wqmix_jax.config import RunConfig
from wqmix_jax.errors import ConfigError


def config(*changes: str) -> RunConfig:
    """The tests' small run."""
    return load_config(*TINY, *changes, config_dir=USER_FOLDER / "configs")


@pytest.fixture(scope="module")
def trained() -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """The state, the records, and the records as the callback saw them."""
    heard: list[dict[str, Any]] = []
    state, records = train_seeds(config(), [4, 3], callback=heard.append, progress=True)
    return state, records, heard


def test_progress_is_shown_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Compiled(Exception):
        pass

    def compile_it(*_: Any) -> Any:
        raise Compiled

    monkeypatch.setattr(api, "compile_within_memory", compile_it)
    for progress, message in ((True, "compiling\n"), (False, ""), (None, "")):
        with pytest.raises(Compiled):
            train_seeds(config(), [0], progress=progress)
        assert capfd.readouterr() == ("", message)


def test_the_state_is_that_of_the_seeds_in_their_order(trained: Any) -> None:
    state, records, _ = trained
    ends = {record["seed"]: record["env_steps"] for record in records}
    assert state.counters.env_steps.tolist() == [ends[4], ends[3]]
    assert all(37 <= steps <= 38 for steps in ends.values())
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state))


def test_records_are_the_lines_of_metrics(trained: Any) -> None:
    _, records, heard = trained
    assert heard == records
    assert [(record["kind"], record["seed"], record["env_steps"]) for record in records[:2]] == [
        ("eval", 4, 0),
        ("eval", 3, 0),
    ]
    for seed in (4, 3):
        kinds = [record["kind"] for record in records if record["seed"] == seed]
        assert kinds.count("eval") == kinds.count("train") + 1
        assert kinds[-1] == "eval"


def test_chunk_sizes_never_change_the_numbers(trained: Any) -> None:
    state, records, _ = trained
    again, others = train_seeds(config("chunk_iterations=6"), [4, 3])
    for record, other in zip(timeless(records), timeless(others), strict=True):
        assert {key: record[key] for key in ("kind", "seed")} == {key: other[key] for key in ("kind", "seed")}
        numbers = {key: value for key, value in record.items() if key != "kind"}
        assert numbers == pytest.approx({key: other[key] for key in numbers}, rel=1e-5, abs=1e-6)
    for leaf, other in zip(jax.tree.leaves(state.learner), jax.tree.leaves(again.learner), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1], [2**31], [0.5], ["a"], 5])
def test_seeds_that_are_not_allowed(seeds: Any) -> None:
    with pytest.raises(ConfigError, match=r"^seeds=.* is not allowed: different integers from 0 to 2147483647"):
        train_seeds(config(), seeds)


def test_options_that_are_not_allowed() -> None:
    with pytest.raises(ConfigError, match=r"^algo=None is not allowed"):
        train_seeds({"num_seeds": 1}, [0])


def test_the_package_offers_what_it_lists() -> None:
    for name in wqmix_jax.__all__:
        assert getattr(wqmix_jax, name)
        assert name in dir(wqmix_jax)
    with pytest.raises(AttributeError, match="nonsense"):
        wqmix_jax.nonsense  # noqa: B018 (the look-up is the test)


def test_importing_the_package_alone_is_light_and_train_is_a_module() -> None:
    code = """
import sys, wqmix_jax
heavy = {"jax", "hydra", "orbax", "wandb", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
import wqmix_jax.train
assert not {"jax", "orbax", "wandb", "matplotlib"} & set(sys.modules)
assert wqmix_jax.train.load_config is wqmix_jax.load_config
assert type(wqmix_jax.train).__name__ == "module"
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)
