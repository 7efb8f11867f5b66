"""Paths and names reach an option as they were written, and every printed command can be pasted into a shell."""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from wqmix_jax import load_config
from wqmix_jax.cli.overrides import load_values, prepare
from wqmix_jax.cli.syntax import FOLDERS, NAMES, as_text, parse_overrides, quoted
from wqmix_jax.config import CheckpointOptions, LoggerOptions, RunConfig
from wqmix_jax.errors import ConfigError
from wqmix_jax.evaluate import EvaluateOptions
from wqmix_jax.options import CONFIG_DIR, target_class
from wqmix_jax.runs import startup
from wqmix_jax.runs.startup import command_to_continue

NASTY = [
    "1e3", "2026_11_30", "outputs/c=d", "true", "on", "null", "None", "inf", "0x10", "1.50", "it's", 'say "hi"',
    "'quoted'", '"quoted"', "back\\", "back\\\\", "a\\'b", "a,b", "[x]", "{a}", "{a: b}", "(x)", "choice(a,b)",
    "glob(*)", "my run", " lead", "trail ", "a#b", "a$b", "$HOME", "a;b", "a&b", "a|b", "a>b", "`ls`", "$(ls)", "*",
    "?", "!x", "~x", "~",
    "~/x", "-x", "--help", "@x", "%x", "x:y", "é", "名前", "new\nline", "tab\tbed", "+x", "=x", "x=", "a\\b",
    "..", "${x}", "\\${x}",
]  # fmt: skip


def value(text: str) -> Any:
    """Returns the value that hydra reads after `as_text`."""
    return parse_overrides(as_text([text]))[0].value()


WRITTEN = [name for name in NASTY if name not in ("null", "'quoted'", '"quoted"', "~", "~/x")]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("key", ["run_dir", "resume", "++run_dir", "logger.group", "env.map"])
def test_a_path_or_a_name_is_a_string(key: str, name: str) -> None:
    if key in NAMES and name in ("a,b", "choice(a,b)", "glob(*)"):
        pytest.skip("a sweep")
    assert value(f"{key}={name}") == name


def test_null_is_no_value_and_quotes_are_left_out() -> None:
    assert value("run_dir=null") is None
    assert value("run_dir='null'") == "null"
    assert value("run_dir='it is'") == "it is"


def test_a_home_folder_that_no_shell_replaced_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^run_dir=~/x is not allowed: the shell didn't replace ~"):
        as_text(["run_dir=~/x"])


def test_names_can_be_swept_and_stay_names() -> None:
    [override] = parse_overrides(as_text(["env.map=3s5z,1e3"]))
    assert override.is_sweep_override()
    assert [str(element) for element in override.sweep_string_iterator()] == ["'3s5z'", "'1e3'"]
    assert as_text(["env.map=choice(a,b)", "algo.lr=1e3", "+algo=a,b"]) == [
        "env.map=choice(a,b)",
        "algo.lr=1e3",
        "+algo=a,b",
    ]


def test_options_of_a_name_are_all_known() -> None:
    """Covers the package's classes; an option of a user's class is quoted as hydra has it."""
    found = set()
    groups: dict[str, list[type]] = {"": [RunConfig, EvaluateOptions], "checkpoint": [CheckpointOptions]}
    groups |= {"logger": [LoggerOptions], "env": [], "algo": []}
    for group in ("env", "algo"):
        for path in (CONFIG_DIR / group).glob("[!_]*.yaml"):
            groups[group].append(target_class(group, _target(path)))
    for group, classes in groups.items():
        for cls in classes:
            hints = typing.get_type_hints(cls)
            fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
            texts = (name for name in fields if hints[name] in (str, str | None))
            found |= {f"{group}.{name}".lstrip(".") for name in texts}
    assert found - {"env.payoff"} <= {*FOLDERS, *NAMES}


def _target(path: Path) -> str:
    lines = path.read_text().splitlines()
    own = next((line.partition(": ")[2] for line in lines if line.startswith("_target_: ")), None)
    if own is not None:
        return own
    [parents] = [line for line in lines if line.startswith("defaults: ")]
    return _target(path.with_name(f"{parents.partition('[')[2].split(',')[0].rstrip(']')}.yaml"))


def test_load_config_takes_paths_as_they_are() -> None:
    config = load_config("+algo=vdn", "run_dir=1e3", "logger.group=2026_11_30")
    assert (config.run_dir, config.logger.group) == ("1e3", "2026_11_30")


def test_values_may_refer_to_what_hydra_chose() -> None:
    before = HydraConfig.instance().cfg
    values = load_values("+algo=vdn", "run_dir=runs/${hydra:runtime.choices.algo}_${algo.lr}")
    assert values["run_dir"] == "runs/vdn_0.0005"
    assert load_values("+algo=vdn", "run_dir=${hydra:job.name}")["run_dir"] == "train"
    assert HydraConfig.instance().cfg is before  # of an application that uses hydra itself


def resuming(run_dir: str, config_dir: Path | str | None = None) -> str:
    """Returns the printed command alone."""
    return command_to_continue(Path(run_dir), config_dir).partition(": ")[2]


FOLDER_NAMES = [name for name in NASTY if name not in ("..",)]


def test_the_printed_command_is_the_one_to_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash reads it, then the command line; what it names is the folder that was meant."""
    monkeypatch.chdir(tmp_path)
    folders = [*FOLDER_NAMES, *(str(tmp_path / name) for name in FOLDER_NAMES), "outputs/null", "outputs/'x'"]
    commands = [resuming(folder) for folder in folders]
    script = "\n".join(f"printf '%s\\0' {command}; printf '\\1'" for command in commands)
    read = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    for folder, command, words in zip(folders, commands, read.split("\1")[:-1], strict=True):
        arguments = words.split("\0")[:-1]
        assert arguments == shlex.split(command)
        assert arguments[1:3] == ["-m", "wqmix_jax.train"]
        [text] = prepare(arguments[3:])
        read_back = OmegaConf.create({"resume": parse_overrides([text])[0].value()}).resume
        assert Path(read_back).absolute() == Path(folder).absolute()


def test_the_printed_command_starts_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "python3"):
        (tmp_path / ".venv" / "bin" / name).symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python3"))
    assert resuming("r") == ".venv/bin/python3 -m wqmix_jax.train resume=r"
    monkeypatch.setenv("PATH", f"{tmp_path / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert resuming("r") == "python -m wqmix_jax.train resume=r"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resuming("r") == f"{shlex.quote(sys.executable)} -m wqmix_jax.train resume=r"


def test_the_printed_command_names_own_yamls_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_python", lambda: "python")
    monkeypatch.chdir(tmp_path)
    assert resuming("r", tmp_path / "my configs") == "python -m wqmix_jax.train --config-dir 'my configs' resume=r"
    assert resuming("r", "/else where") == "python -m wqmix_jax.train --config-dir '/else where' resume=r"


def test_quoted_is_read_as_it_was() -> None:
    for name in NASTY:
        assert parse_overrides([f"x={quoted(name)}"])[0].value() == name
