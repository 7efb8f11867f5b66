"""The notebooks run from the first cell to the last, with small numbers in their cell of parameters."""

import ast
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jax
import nbclient
import nbformat
import pytest

from tests.running import ROOT
from tests.test_language import words

FOLDER = ROOT / "experiments" / "examples"

NAMES = ("demo", "tabular")


def read(name: str) -> Any:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(name: str, folder: Path, **parameters: Any) -> str:
    """Runs a notebook with other parameters, and returns everything that it prints."""
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.keys() <= {target.id for line in ast.parse(cell.source).body for target in targets(line)}
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    here = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder)}
    here |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    here |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(jax.config.read("jax_disable_most_optimizations"))}
    kept = {**os.environ}
    os.environ |= here  # the kernel inherits them
    try:
        nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        os.environ.clear()
        os.environ |= kept
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def targets(line: ast.stmt) -> list[ast.Name]:
    return [each for each in line.targets if isinstance(each, ast.Name)] if isinstance(line, ast.Assign) else []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_as_run_from_top_to_bottom_and_says_nothing_of_this_machine(name: str) -> None:
    cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        compile(cell.source, name, "exec")
        assert not [output for output in cell.outputs if output.output_type == "error"]
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]
        run = [ast.unparse(line) for line in ast.parse(cell.source).body if not isinstance(line, ast.FunctionDef)]
        assert bool(cell.outputs) == any(call in line for line in run for call in ("print(", "show(")), cell.source
    assert [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert not [place for place in ("/root", "/home", "/work", str(Path.home())) if place in text]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_in_plain_english(name: str) -> None:
    assert [word for cell in read(name).cells for word in words(cell.source)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_installs_the_package_from_its_repository(name: str) -> None:
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    cells = [cell.source for cell in read(name).cells]
    place = f"{repository.removeprefix('https://github.com')}/blob/main/experiments/examples/{name}.ipynb"
    assert f"(https://colab.research.google.com/github{place})" in cells[0]
    assert f'REPOSITORY = "{repository}"' in cells[1] + cells[2]
    [install] = [source for source in cells if "pip" in source and "subprocess" in source]
    assert install == next(cell.source for cell in read(NAMES[0]).cells if "subprocess" in cell.source)


def install_cell() -> str:
    [cell] = [cell.source for cell in read("demo").cells if "subprocess" in cell.source]
    return cell


@pytest.mark.parametrize("present", [True, False])
def test_a_notebook_installs_only_where_the_package_is_missing(
    present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.util if present else None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    no_accelerator(monkeypatch)
    exec(install_cell(), {"REPOSITORY": "https://example.org/wqmix"})
    assert [command[-1] for command in commands] == ([] if present else ["wqmix_jax @ git+https://example.org/wqmix"])
    if not present:
        held = Path("held.txt").read_text().splitlines()
        assert f"jax=={jax.__version__}" in held
        assert not [line for line in held if line.startswith("jaxmarl")]


def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(glob, "glob", lambda _: [])
    monkeypatch.setattr(shutil, "which", lambda _: None)


@pytest.mark.parametrize(
    ("variables", "shown", "kind"),
    [
        ({"COLAB_TPU_1VM": ""}, None, ""),
        ({"COLAB_TPU_1VM": "1", "TPU_ACCELERATOR_TYPE": "v5e-1"}, None, "tpu"),
        ({}, "| Driver Version: 580.65  CUDA Version: 13.0 |", "cuda13"),
        ({}, "| Driver Version: 550.54  CUDA Version: 12.4 |", "cuda12"),
        ({}, "No devices were found", ""),
    ],
)
def test_a_notebook_finds_the_accelerator(
    variables: dict[str, str], shown: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_accelerator(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    exec(install_cell(), names)
    monkeypatch.setattr(shutil, "which", lambda _: shown and "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, shown))
    assert names["accelerator"]() == kind


@pytest.mark.parametrize(
    ("kind", "present", "needed"),
    [
        ("", ["jax"], ["wqmix_jax @ git+there"]),
        ("tpu", ["jax"], ["wqmix_jax[tpu] @ git+there"]),
        ("tpu", ["jax", "libtpu"], ["wqmix_jax @ git+there"]),  # as in Colab
        ("cuda13", ["jax"], ["wqmix_jax[cuda] @ git+there"]),
        ("cuda12", ["jax"], ["wqmix_jax @ git+there", "jax[cuda12]"]),
        ("cuda12", ["jax", "jax-cuda12-plugin"], ["wqmix_jax @ git+there"]),  # as in Colab
        ("cuda13", ["jax", "jax_cuda12_plugin"], ["wqmix_jax @ git+there"]),  # a second plugin would disturb the first
    ],
)
def test_a_notebook_adds_the_plugin_that_is_missing(kind: str, present: list[str], needed: list[str]) -> None:
    names: dict[str, Any] = {"REPOSITORY": "there"}
    exec(install_cell(), names)
    assert names["requirements"](kind, present) == needed


def test_the_tour_of_the_tabular_laboratory(tmp_path: Path) -> None:
    printed = run("tabular", tmp_path, NUM_GAMES=12, ALPHAS=(0.5, 0.0001))
    assert "4 minimisers, each of loss 0.6667" in printed
    assert "T*_Qmix: [0.6, 0.9]" in printed


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    small = {"NUM_SEEDS": 2, "TOTAL_ENV_STEPS": 1500, "SEEDS_TO_TIME": (1, 2), "TIMED_ITERATIONS": 10}
    printed = run("demo", tmp_path, **small)
    for algo in ("ow_qmix", "qmix"):
        assert re.search(rf"{algo}, 2 seeds: compiled in .*\nmemory: .* per seed", printed)
        assert f"{algo}: 2 seeds of 1,500 steps in " in printed
    table = printed[printed.index("seeds   env steps/s") :].splitlines()
    assert [row.split()[0] for row in table[1:3]] == ["1", "2"]
