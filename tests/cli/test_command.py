"""Ends of command lines: closed pipes, missing platforms, an unsupported Python, copies of a checkout."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.running import ROOT
from wqmix_jax.cli import command
from wqmix_jax.cli.command import copied_checkout
from wqmix_jax.errors import CLOSED_PIPE, ConfigError, RunError
from wqmix_jax.runs.output import lasting_output
from wqmix_jax.training import devices
from wqmix_jax.training.devices import refuse_missing_backend


class Closed(io.StringIO):
    """A pipe whose reader is gone after some writes."""

    def __init__(self, writes: int = 0) -> None:
        super().__init__()
        self.writes, self.number = writes, os.open(os.devnull, os.O_WRONLY)

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise BrokenPipeError
        return super().write(text)

    def flush(self) -> None:
        if self.writes < 0:
            raise BrokenPipeError

    def fileno(self) -> int:
        return self.number


@command.command
def talk(lines: int = 3) -> None:
    """Prints a few lines."""
    for line in range(lines):
        print(line)


def test_a_reader_that_is_gone_ends_a_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Closed(writes=3))
    with pytest.raises(SystemExit) as ended:
        talk()
    assert ended.value.code == CLOSED_PIPE == 141
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_of_something_else_is_no_reader_that_is_gone() -> None:
    @command.command
    def fails() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fails()


COMMANDS = {
    "train": ["-m", "wqmix_jax.train", "--help"],
    "evaluate": ["-m", "wqmix_jax.evaluate", "--help"],
    "all": ["-m", "wqmix_jax"],
    "tabular": ["-m", "wqmix_jax.tabular", "table1"],
    "table": ["-m", "wqmix_jax.table", "experiments/results/predator_prey/epsilon_1M/vdn"],
}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=list(COMMANDS))
def test_a_closed_pipe_leaves_no_traceback(arguments: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *arguments]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with os.fdopen(write, "w") as closed:
        ended = subprocess.run(command, cwd=ROOT, env=env, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == ""
    # argparse ignores that its help can't be written
    assert ended.returncode in ((0, CLOSED_PIPE) if "wqmix_jax.evaluate" in arguments else (CLOSED_PIPE,))


def test_training_goes_on_without_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Closed(writes=2)
    monkeypatch.setattr(sys, "stdout", closed)
    with lasting_output():
        for line in range(4):
            print(line, flush=True)
    assert closed.getvalue() == "0\n"
    assert sys.stdout is closed


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(ConfigError("no\nsuch option"), 2), (RunError("no such option"), 1), (RunError("no such option", 3), 3)],
)
def test_an_error_is_one_line(error: Exception, exit_code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @command.command
    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        fails()
    assert (ended.value.code, capsys.readouterr().err) == (exit_code, "error: no such option\n")


def test_ctrl_c_ends_with_130() -> None:
    @command.command
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        interrupted()
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AssertionError(), "JAX_PLATFORMS=cuda can't be used here: no such device is found"),
        (
            RuntimeError("Unable to initialize backend 'tpu': gone (set JAX_PLATFORMS='' to automatically choose ..)"),
            "JAX_PLATFORMS=cuda can't be used here: Unable to initialize backend 'tpu': gone; JAX_PLATFORMS=cpu uses",
        ),
    ],
)
def test_a_platform_that_is_not_there_is_refused(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    refuse_missing_backend()
    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setattr(devices, "asked_platforms", lambda: "cuda")
    with pytest.raises(ConfigError, match=message):
        refuse_missing_backend()
    with pytest.raises(SystemExit) as ended:
        command.command(fail)()
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_fault_that_is_not_of_the_devices_stays_one() -> None:
    @command.command
    def fails() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fails()


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "wqmix_jax.train", "+algo=vdn"],
        ["-m", "wqmix_jax.train", "+algo=vdn", "env=jumanji"],
        ["-m", "wqmix_jax.evaluate", "run_dir=experiments/results/predator_prey/epsilon_1M/vdn/seeds_0-1"],
    ],
    ids=["train", "jumanji", "evaluate"],
)
def test_a_platform_that_is_not_there_as_a_process(arguments: list[str]) -> None:
    env = os.environ | {"JAX_PLATFORMS": "nonsense"}
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("error: JAX_PLATFORMS=nonsense can't be used here: Unable to initialize backend")


def test_an_unsupported_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(SystemExit) as ended:
        talk()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: Python 3.14 is not supported, because hydra 1.3 can't be used there: choose 3.11, 3.12 or 3.13\n"
    )


@pytest.mark.parametrize(
    ("installed", "is_copy"),
    [
        ({"url": "file://{folder}", "dir_info": {}}, True),
        ({"url": "file://{folder}", "dir_info": {"editable": True}}, False),
        ({"url": "file:///elsewhere", "dir_info": {}}, False),
        ({"url": "https://host/wqmix_jax.whl", "archive_info": {}}, False),
        ({}, False),
    ],
)
def test_a_copy_of_the_checkout_in_its_own_environment_is_found(
    installed: dict[str, Any], is_copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return json.dumps(installed).replace("{folder}", f"{tmp_path}/check%20out") if installed else None

    checkout = tmp_path / "check out"
    monkeypatch.setattr(command.importlib.metadata, "distribution", lambda _: Distribution())
    monkeypatch.setattr(sys, "prefix", str(checkout / ".venv"))
    assert copied_checkout() is None  # this package is the checkout's
    monkeypatch.setattr(command, "__file__", str(checkout / ".venv" / "lib" / "wqmix_jax" / "command.py"))
    assert copied_checkout() == (checkout if is_copy else None)


def test_every_command_of_the_project_ends_as_a_command() -> None:
    """Also those in ``experiments``."""
    sources = [path for folder in ("wqmix_jax", "experiments") for path in (ROOT / folder).rglob("*.py")]
    mains = [path for path in sources if '\nif __name__ == "__main__":\n    main()' in path.read_text()]
    assert len(mains) > 15
    assert [path for path in mains if "\n@command\ndef main(" not in path.read_text()] == []
