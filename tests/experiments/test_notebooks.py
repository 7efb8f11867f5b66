"""The notebooks run from the first cell to the last, with small numbers in their cell of parameters."""

import ast
import os
from pathlib import Path
from typing import Any

import jax
import nbclient
import nbformat
import pytest

from tests.running import ROOT

FOLDER = ROOT / "experiments"

NAMES = ("demo", "tabular")


def read(name: str) -> Any:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(name: str, folder: Path, **parameters: Any) -> str:
    """All that a notebook prints, its parameters replaced by others."""
    notebook = read(name)
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
def test_a_notebook_is_committed_without_outputs_and_says_nothing_of_this_machine(name: str) -> None:
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, name, "exec")
            assert (cell.outputs, cell.execution_count) == ([], None)
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert not [place for place in ("/root", "/home", "/work", str(Path.home())) if place in text]


def test_the_tour_of_the_tabular_laboratory(tmp_path: Path) -> None:
    printed = run("tabular", tmp_path, NUM_GAMES=12, ALPHAS=(0.5, 0.0001))
    assert "4 minimisers, each of loss 0.6667" in printed
    assert "T*_Qmix: [0.6, 0.9]" in printed


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    small = {"NUM_SEEDS": 2, "TOTAL_ENV_STEPS": 1500, "SEEDS_TO_TIME": (1, 2), "TIMED_ITERATIONS": 5}
    printed = run("demo", tmp_path, INSTALL=False, **small)
    assert "ow_qmix: 2 seeds in " in printed
    table = printed[printed.index("seeds   env steps/s") :].splitlines()
    assert [row.split()[0] for row in table[1:3]] == ["1", "2"]
