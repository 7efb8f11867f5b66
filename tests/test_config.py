"""Refusals of the schema: one line that names the key, the value and what is allowed."""

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from tests.envs.host.games import faked
from wqmix_jax import load_config
from wqmix_jax.algos.qmix import QMIX
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.config import RunConfig, names, run_config
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR, MOVED, build, options, target_class


def plain(**changes: Any) -> dict[str, Any]:
    """The default run of OW-QMIX as nested mappings, some values changed (``{"algo.lr": 1}``)."""
    env = yaml.safe_load((CONFIG_DIR / "env" / "predator_prey.yaml").read_text())
    values = yaml.safe_load((CONFIG_DIR / "train.yaml").read_text())
    del values["hydra"], values["defaults"]
    algo: dict[str, Any] = {}
    for name in ("_base", "_agent", "_td", "_q_star", "qmix", "ow_qmix"):
        algo |= yaml.safe_load((CONFIG_DIR / "algo" / f"{name}.yaml").read_text())
    del algo["defaults"]
    values |= {"algo": algo, "env": env}
    for key, value in changes.items():
        *groups, name = key.split(".")
        group = values
        for part in groups:
            group = group[part]
        group[name] = value
    return values


def test_plain_mappings_give_what_the_command_line_gives() -> None:
    assert run_config(plain()) == load_config("+algo=ow_qmix")


@pytest.mark.parametrize("algo", names("algo").split(", "))
@pytest.mark.parametrize("env", names("env").split(", "))
def test_every_yaml_is_a_run(algo: str, env: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with faked(tmp_path_factory.getbasetemp() / "sc2"):  # StarCraft's packages are not installed
        config = load_config(f"+algo={algo}", f"env={env}")
    assert isinstance(config, RunConfig)
    assert config.env.spec.num_agents > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("algo.lr", "abc", "algo.lr='abc' is not allowed: input should be a valid number"),
        ("algo.lr", -1, "algo.lr=-1 is not allowed: input should be greater than 0"),
        ("algo.lr", float("nan"), "algo.lr=nan is not allowed: input should be a finite number"),
        ("algo.alpha", 0, "algo.alpha=0 is not allowed: input should be greater than 0"),
        ("algo.alpha", 2, "algo.alpha=2 is not allowed: input should be less than or equal to 1"),
        ("algo.batch_size", True, "algo.batch_size=True is not allowed: input should be a valid integer"),
        ("algo.batch_size", 5001, "algo.buffer_size=5000 is not allowed: at least algo.batch_size=5001 is needed"),
        ("algo.lrr", 1, "algo.lrr is unknown: did you mean algo.lr? known keys are gamma, "),
        ("algo._target_", None, "algo._target_ is missing: it names the class of these options"),
        ("algo._target_", "no_such_module.X", "algo._target_='no_such_module.X' can't be imported: No module named"),
        ("algo._target_", "wqmix_jax.algos.iql.IQLL", "algo._target_='wqmix_jax.algos.iql.IQLL' can't be imported: "),
        (
            "algo._target_",
            "wqmix_jax.algos.no_such.X",
            "algo._target_='wqmix_jax.algos.no_such.X' can't be imported: module 'wqmix_jax.algos' has no attribute",
        ),
        ("algo._target_", "math.pi", "algo._target_='math.pi' is not allowed: it is no class"),
        ("algo._target_", "numpy", "algo._target_='numpy' is not allowed: it is no class"),
        ("algo.target_update_interval", 10**10, "algo.target_update_interval=10000000000 is not allowed: input should"),
        ("algo.epsilon_anneal_steps", 2**31, f"algo.epsilon_anneal_steps={2**31} is not allowed: input should be less"),
        ("env.stag_catchers", 9, "env.stag_catchers=9 is not allowed: at most num_agents=8 can catch a stag"),
        ("env.world_shape", [3, 3], "env.world_shape=(3, 3) is not allowed: its 9 cells must hold"),
        ("env", 3, "env=3 is not allowed: a group of options is needed"),
        ("algo.returns", "retrace", "algo.returns='retrace' is not allowed: input should be 'one_step', 'n_step', "),
        ("algo.td_lambda", 1.1, "algo.td_lambda=1.1 is not allowed: input should be less than or equal to 1"),
        ("algo.q_star", "ff", "algo.q_star='ff' is not allowed: input should be 'feedforward', 'attention' or 'none'"),
        ("algo.mixer", "dmaq", "algo.mixer='dmaq' is not allowed: input should be 'qmix', 'vdn' or 'qatten'"),
        ("num_seeds", 0, "num_seeds=0 is not allowed: input should be greater than 0"),
        ("num_envs", 5001, "num_envs=5001 is not allowed: at most algo.buffer_size=5000 episodes fit"),
        ("seed", 2**31, f"seed={2**31} is not allowed: input should be less than or equal to {2**31 - 1}"),
        ("checkpoint.every", 0, "checkpoint.every=0 is not allowed: input should be greater than 0"),
        ("checkpoint", None, "checkpoint=None is not allowed: a group of options is needed"),
        ("logger.wandb", "on", "logger.wandb='on' is not allowed: input should be 'disabled', 'offline' or 'online'"),
        ("matmul_precision", "float16", "matmul_precision='float16' is not allowed: input should be 'float32', "),
        ("unheard_of", 1, "unheard_of is unknown: known keys are algo, env, num_seeds, "),
    ],
)
def test_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run_config(plain(**{key: value}))
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("group", "contract"), [("algo", "algos.base.Algorithm"), ("env", "envs.base.Environment")])
def test_a_class_that_is_not_of_its_group_is_refused(group: str, contract: str) -> None:
    message = rf"^{group}\._target_='decimal.Decimal' is not allowed: it is not a subclass of wqmix_jax\.{contract}$"
    with pytest.raises(ConfigError, match=message):
        run_config(plain(**{group: {"_target_": "decimal.Decimal"}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef f(:\n", "invalid syntax (spoilt.py, line 2)"),
        ("x = 1\ny = undefined\n", "name 'undefined' is not defined (NameError in "),
        ("raise ValueError('x')\n", "x (ValueError in "),
        ("import no_such_package\n", "No module named 'no_such_package' (ModuleNotFoundError in "),
    ],
)
@pytest.mark.parametrize("target", ["spoilt.Spoilt", "{folder}.spoilt.Spoilt", "{folder}.spoilt:Spoilt"])
def test_a_module_that_can_not_be_imported_tells_where(
    target: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spoilt.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path.parent)
    target = target.format(folder=tmp_path.name)
    with pytest.raises(ConfigError) as refused:
        run_config(plain(**{"algo._target_": target}))
    assert str(refused.value).startswith(f"algo._target_={target!r} can't be imported: {message}")
    last_line = len(text.splitlines())
    assert re.search(rf"spoilt\.py, line {last_line}\)$", str(refused.value))


class WithoutOptions(QMIX):
    """Forgets ``@options``."""

    temperature: float


def test_a_class_that_forgets_to_declare_its_options_is_told() -> None:
    values = load_values("+algo=vdn")["algo"]
    message = r"^algo\.temperature is unknown: WithoutOptions names it, but isn't declared with @options$"
    with pytest.raises(ConfigError, match=message):
        build("algo", {**values, "_target_": f"{__name__}.WithoutOptions", "temperature": 1.0})


def test_a_range_of_seeds_must_end_in_time() -> None:
    with pytest.raises(ConfigError, match=r"^seed=2147483647 is not allowed: 2 seeds from there pass 2147483647$"):
        run_config(plain(seed=2**31 - 1, num_seeds=2))


def test_a_misspelt_key_is_named_before_the_one_that_it_leaves_missing() -> None:
    values = plain()
    values["num_seed"] = values.pop("num_seeds")
    with pytest.raises(ConfigError, match=r"^num_seed is unknown: did you mean num_seeds\?"):
        run_config(values)


def test_a_missing_key_is_named() -> None:
    values = plain()["env"]
    del values["punishment"]
    with pytest.raises(ConfigError, match=r"^env\.punishment is missing$"):
        build("env", values)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_is_reported_with_its_new_place(
    old: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's algorithm from before the modules moved names them by their old places."""
    assert importlib.util.find_spec(MOVED[old])
    name = f"from_{old.replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(f"import {old}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"; import {MOVED[old]} instead$"):
        target_class("algo", f"{name}.Algorithm")


def test_a_subclass_of_qmix_may_have_another_mixer() -> None:
    @options
    class Summed(QMIX):
        mixer: Literal["qmix", "sum"]  # type: ignore[assignment]

    values = load_values("+algo=qmix", "algo.mixer=qmix")["algo"]
    del values["_target_"]
    assert "mixer_embed_dim" not in Summed(**{**values, "mixer": "sum"}).without_effect()
