"""The commands that make would run, by dry runs on copies of the Makefile."""

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.running import ROOT, make


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose ``.venv`` is up to date."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    site = tmp_path / ".venv" / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    (tmp_path / ".venv" / "bin").mkdir()
    for name in ("bin/pip", "bin/python", ".installed", ".installed-dev", ".installed-smax"):
        (tmp_path / ".venv" / name).touch()
    before = time.time() - 60
    for name in ("pyproject.toml", ".venv/bin/pip"):
        os.utime(tmp_path / name, (before, before))
    return tmp_path


def planned(checkout: Path, *arguments: str) -> list[str]:
    """The commands that make would run."""
    ended = make("--dry-run", *arguments, cwd=checkout)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


TRAIN = ".venv/bin/python -m wqmix_jax.train"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], f"{TRAIN} +algo=ow_qmix "),
        (["ALGO=qmix"], f"{TRAIN} +algo=qmix "),
        (["ARGS=num_seeds=4 seed=10"], f"{TRAIN} +algo=ow_qmix num_seeds=4 seed=10"),
        (["ARGS=resume=outputs/first"], f"{TRAIN}  resume=outputs/first"),
        (["ALGO=qmix", "ARGS=resume=outputs/first"], f"{TRAIN} +algo=qmix resume=outputs/first"),
        (["EXTRAS=smax", "PIP_ARGS=--quiet", "PYTHON=python3.12"], f"{TRAIN} +algo=ow_qmix "),
    ],
)
def test_train(checkout: Path, arguments: list[str], command: str) -> None:
    assert planned(checkout, "train", *arguments) == [command]


@pytest.mark.parametrize(("arguments", "command"), [([], "build"), (["ARGS=serve"], "serve")])
def test_docs(checkout: Path, arguments: list[str], command: str) -> None:
    [planned_command] = planned(checkout, "docs", *arguments)
    assert planned_command.endswith(f".venv/bin/python -m mkdocs {command} --strict -f docs/mkdocs.yml")


def test_a_new_extra_is_installed_once(checkout: Path) -> None:
    assert planned(checkout, "train", "EXTRAS=torch")[0] == ".venv/bin/pip install  -e '.[torch]'"
    assert planned(checkout, "setup", "EXTRAS=torch,smax")[0] == ".venv/bin/pip install  -e '.[dev,torch,smax]'"


@pytest.mark.parametrize(("target", "extras"), [("train", ""), ("setup", "[dev]")])
def test_a_copy_in_the_environment_is_replaced(checkout: Path, target: str, extras: str) -> None:
    """As ``pip install .`` makes it; without one nothing is installed."""
    assert not [line for line in planned(checkout, target) if "pip install" in line]
    copy = checkout / ".venv" / "lib" / "python3.12" / "site-packages" / "wqmix_jax"
    copy.mkdir()
    (copy / "__init__.py").touch()
    assert [line for line in planned(checkout, target) if "pip install" in line] == [
        f".venv/bin/pip install  -e '.{extras}'"
    ]


@pytest.mark.parametrize(
    "target", ["help", "setup", "demo", "train", "test", "test-slow", "lint", "format", "docs", "clean"]
)
def test_every_target_refuses_a_variable_that_nothing_reads(checkout: Path, target: str) -> None:
    (checkout / ".venv" / ".installed").unlink()
    ended = make(target, "num_seeds=4", cwd=checkout)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert 'num_seeds=4: make knows no such variable. Write ARGS="num_seeds=4".' in ended.stderr
    assert not (checkout / ".venv" / ".installed").exists()
