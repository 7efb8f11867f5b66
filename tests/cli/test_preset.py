"""Presets set options of a run together; those on the command line override them."""

from pathlib import Path

import pytest
import yaml

from tests.running import ROOT
from wqmix_jax import load_config, load_metrics
from wqmix_jax.cli.checks import check_overrides
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.run_dir import read_config

PRESETS = sorted((ROOT / "configs" / "preset").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("algo_first", [True, False])
def test_every_option_of_a_preset_replaces_the_default(path: Path, algo_first: bool) -> None:
    given = yaml.safe_load(path.read_text())
    env = [f"env={chosen['override /env']}" for chosen in given.pop("defaults", [])]
    overrides = ["+algo=ow_qmix", f"+preset={path.stem}"]
    values = load_values(*(overrides if algo_first else reversed(overrides)))
    assert values["env"]["_target_"] == load_values("+algo=ow_qmix", *env)["env"]["_target_"]
    for key, value in given.items():
        assert (values[key] | value if isinstance(value, dict) else value) == values[key]
    assert "preset" not in values


def test_options_of_the_command_line_go_before_a_preset() -> None:
    config = load_config("algo.td_lambda=0.9", "+preset=smax", "+algo=qmix", "env.map=8m", "num_envs=4")
    assert (config.algo.td_lambda, config.env.map, config.num_envs) == (0.9, "8m", 4)
    assert config.env.max_return == 20


def test_a_preset_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "mine.yaml").write_text("# @package _global_\nnum_envs: 7\nalgo: {lr: 0.25}\n")
    values = load_values("+algo=qmix", "+preset=mine", config_dir=tmp_path)
    assert (values["num_envs"], values["algo"]["lr"]) == (7, 0.25)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+algo=qmix", "+preset=smak"],
            "preset=smak is not allowed: choose one of epymarl, jaxmarl_smax, pymarl2, smax",
        ),
        (
            ["+algo=qmix", "preset=smax"],
            r"preset=smax is not allowed: write \+preset=NAME, NAME one of epymarl, jaxmarl_smax, pymarl2, smax",
        ),
        (["+algo=qmix", "+preset=null"], r"\+preset=null is not allowed: write \+preset=NAME"),
        (["+algo=masac", "+preset=smax"], "algo.returns is unknown"),
        (["+algo=qmix", "+preset=smax", "env=predator_prey"], "env.map is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(*overrides)


def test_a_run_that_is_resumed_takes_no_preset() -> None:
    run_dir = ROOT / "experiments" / "results" / "smax_3m" / "ow_qmix_preset" / "seed_0"
    with pytest.raises(
        ConfigError, match=rf"\+preset=smax is not allowed with resume={run_dir}: a run keeps its options"
    ):
        check_overrides([f"resume={run_dir}", "+preset=smax"], None)


def test_the_recorded_battles_are_those_of_the_preset() -> None:
    """As the README says: the win rate rises, and most battles are won in the end."""
    folder = ROOT / "experiments" / "results" / "smax_3m" / "ow_qmix_preset" / "seed_0"
    composed = load_values("+algo=ow_qmix", "algo.alpha=0.75", "+preset=smax")
    recorded = read_config(folder)
    for key in (
        "algo",
        "env",
        "num_envs",
        "updates_per_iteration",
        "total_env_steps",
        "eval_interval",
        "eval_episodes",
    ):
        assert composed[key] == recorded[key]
    won = [line["win_rate"] for line in load_metrics(folder, kind="eval")]
    assert max(won[:3]) < 0.3
    assert min(won[-3:]) > 0.8
