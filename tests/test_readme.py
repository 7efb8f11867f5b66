"""The README's commands and programs are what they claim to be: all of them compose, and the slow test runs them."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import wqmix_jax
from tests.running import ROOT, make
from wqmix_jax import evaluate, load_config
from wqmix_jax.cli.checks import check_overrides
from wqmix_jax.cli.overrides import compose_evaluation, prepare

README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)

TRAINED = "experiments/results/predator_prey/epsilon_1M/vdn/seeds_0-1"
"""A run whose policies are in the repository."""

# What makes a run of seconds of any; with `resume` only the first may change.
SHORT = ("total_env_steps=200", "eval_episodes=2", "algo.batch_size=2", "algo.buffer_size=8", "env.episode_limit=20")


def of(module: str) -> list[list[str]]:
    """The arguments of each command ``python -m MODULE``."""
    return [command[command.index(module) + 1 :] for command in COMMANDS if module in command]


def test_every_command_is_of_a_known_kind() -> None:
    assert len(COMMANDS) > 15
    assert len(of("wqmix_jax.train")) > 5
    for command in COMMANDS:
        assert command[0] in ("make", "python", "cd")
        if "-m" in command:
            module = command[command.index("-m") + 1]
            assert find_spec(module) or find_spec(f"{module}.__main__")


def test_every_make_target_is_there() -> None:
    targets = {command[1] for command in COMMANDS if command[0] == "make"}
    assert targets >= {"demo", "train", "setup", "test"}
    for command in COMMANDS:
        if command[0] == "make":
            planned = make("-n", *command[1:])
            assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("arguments", of("wqmix_jax.train"), ids=" ".join)
def test_the_options_of_every_training_compose(arguments: list[str]) -> None:
    multirun = "-m" in arguments
    config_dir = ROOT / "experiments" / "examples" / "my_project" / "configs" if "--config-dir" in arguments else None
    overrides = [text for text in arguments if "=" in text and not text.startswith("hydra/")]
    check_overrides(prepare(overrides), config_dir, multirun=multirun)
    if not any(text.startswith("resume=") for text in overrides):
        for first in (0, -1) if multirun else (0,):
            one = [text.split("=", 1) for text in overrides]
            load_config(
                *[f"{key}={value.split(',')[first] if multirun else value}" for key, value in one],
                config_dir=config_dir,
            )


@pytest.mark.parametrize("arguments", of("wqmix_jax.evaluate"), ids=" ".join)
def test_the_options_of_every_evaluation_compose(arguments: list[str]) -> None:
    values = compose_evaluation(arguments, None).values
    del values["env"], values["algo"]
    chosen = evaluate._options(values)
    played = {
        ("outputs/first", None, None),
        (TRAINED, None, None),
        (None, "outputs/first/policies/best.npz", None),
        (None, None, "FOLDER"),
    }
    assert (chosen.run_dir, chosen.policy_file, chosen.pymarl) in played


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_uses_what_the_package_offers(program: str) -> None:
    compile(program, "README.md", "exec")
    for imported in re.findall(r"from wqmix_jax import (.*)", program):
        assert set(imported.split(", ")) <= set(wqmix_jax.__all__)


def test_every_link_leads_somewhere() -> None:
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_commands_and_programs_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if command[0] == "python" and not any("hydra/launcher" in text or "FOLDER env=" in text for text in command):
            run(command, tmp_path)
            if "host=0" in command:  # `merge` and `compare` come next
                run([text.replace("host=0", "host=1") for text in command], tmp_path)
    short = lambda *overrides: load_config(*overrides[:1], *SHORT)  # noqa: E731
    monkeypatch.setattr(wqmix_jax, "load_config", short, raising=False)
    for program in PROGRAMS:
        paste(program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_runs_as_it_is_pasted(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``outputs/first`` has been trained; a training is a small one."""
    shutil.copytree(ROOT / TRAINED, tmp_path / "outputs" / "first")
    monkeypatch.chdir(tmp_path)
    tiny = load_config("+algo=iql", "env=matrix_game", "total_env_steps=8", "algo.batch_size=2", "algo.buffer_size=4")
    monkeypatch.setattr(wqmix_jax, "load_config", lambda *_: tiny, raising=False)
    names = paste(program)
    if "joint_action" in names:
        assert names["joint_action"].shape == (5, names["env"].spec.num_agents)
        assert names["outcome"].reward.shape == (5,)
        assert len(names["moments"]) > 1
    else:
        assert {record["seed"] for record in names["records"]} == {0, 1}  # of the trained run


def paste(program: str) -> dict[str, Any]:
    """Runs a program where nothing is defined yet, and returns what it defines."""
    names: dict[str, Any] = {}
    exec(program, names)
    return names


def run(command: list[str], folder: Path) -> None:
    """Runs a command in ``folder``, a training shortened and what has placeholders left out."""
    arguments = command[1:]
    if "wqmix_jax.train" in arguments:
        resumes = any(text.startswith("resume=") for text in arguments)
        arguments = [text for text in arguments if not text.startswith("total_env_steps=")]
        arguments += ["total_env_steps=400"] if resumes else SHORT
    if any("outputs/FOLDER" in text or "pymarl=FOLDER" in text for text in arguments):
        return
    arguments = [text.replace(f"run_dir={TRAINED}", f"run_dir={ROOT / TRAINED}") for text in arguments]
    ended = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, (arguments, ended.stderr)
