"""Imports point strictly downwards through the layers, and each heavy dependency has one home."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wqmix_jax"

# From the bottom to the top. A module or subpackage imports itself and the layers below, never others of its own layer.
LAYERS = (
    ("foreign_names",),
    ("types", "config", "devices", "exits", "pieces", "compile_cache", "randomness"),
    ("hosts", "option_help", "command", "overrides"),
    ("td", "weighting", "exploration", "policies", "networks", "packing", "envs"),
    ("replay",),
    ("algos",),
    ("rollout", "learner", "members"),
    ("evaluator", "policy", "batching"),
    ("trainer",),
    ("loop",),
    ("logger", "checkpoint", "memory", "tabular", "interop", "statistics"),
    ("progress", "runs"),
    ("plotting", "trust"),
    ("api", "runner", "merge", "table"),
    ("compare",),
    ("train",),
    ("evaluate",),
    ("__main__",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

HOMES = {
    "hydra": {"train", "evaluate", "overrides"},
    "wandb": {"logger"},
    "orbax": {"checkpoint"},
    "tensorstore": {"checkpoint"},
}

# Know the contract `algos.base`, never a concrete algorithm.
ALGORITHM_BLIND = {"rollout", "learner", "batching", "evaluator", "trainer"}


def test_imports_point_strictly_downwards() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert sources
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("td.py", "from wqmix_jax.algos.base import Aux", "td imports algos, which is not below it"),
        ("td.py", "import wqmix_jax.weighting", "td imports weighting, which is not below it"),
        ("td.py", "from wqmix_jax import weighting as w", "td imports weighting, which is not below it"),
        ("td.py", "def f():\n    from wqmix_jax import trainer", "td imports trainer, which is not below it"),
        ("td.py", "import wqmix_jax\nf = wqmix_jax.trainer", "td imports trainer, which is not below it"),
        ("td.py", "from wqmix_jax import train_seeds", "td imports the package's root"),
        ("td.py", "from .types import Array", "td imports relatively"),
        ("learner.py", "from wqmix_jax.algos.qmix import QMIX", "learner imports the concrete"),
        ("rollout.py", "from wqmix_jax.algos import iql", "rollout imports the concrete"),
        ("trainer.py", "from wqmix_jax import algos", "trainer imports the concrete"),
        ("api.py", "import hydra", "api imports hydra, whose home is evaluate, overrides, train"),
        ("trainer.py", "from orbax import checkpoint", "trainer imports orbax, whose home is checkpoint"),
        ("train.py", "import wandb.sdk", "train imports wandb, whose home is logger"),
        ("trainer.py", "importlib.import_module('wandb')", "trainer imports wandb, whose home is logger"),
        ("novelty.py", "", "novelty has no layer"),
    ],
)
def test_a_violation_is_seen(path: str, source: str, complaint: str) -> None:
    [seen] = violations({path: source})
    assert complaint in seen


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("envs/predator_prey.py", "from wqmix_jax.envs.base import Environment\nfrom wqmix_jax.types import Array"),
        ("rollout.py", "from wqmix_jax.algos.base import Algorithm\nfrom wqmix_jax.algos import base"),
        ("runner.py", "import wqmix_jax\nprint(wqmix_jax.__version__)"),
        ("logger.py", "importlib.import_module('wandb')\nfrom wqmix_jax import __version__"),
        ("train.py", "import hydra\nimport hydrated_elsewhere\nfrom wqmix_jax.trainer import make_trainer"),
        ("__init__.py", "from wqmix_jax.api import train_seeds"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []


def violations(sources: Mapping[str, str]) -> list[str]:
    """One line per broken rule in sources by their path inside the package."""
    found = []
    for path, source in sorted(sources.items()):
        unit = path.removesuffix(".py").split("/")[0]
        if unit not in LEVEL and unit != "__init__":
            found.append(f"{path}: {unit} has no layer; give it one in LAYERS")
            continue
        for line, name in imports(ast.parse(source)):
            found += [f"{path}:{line}: {complaint}" for complaint in complaints(unit, name)]
    return found


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, inside functions and type-checking blocks too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names if alias.name != "wqmix_jax")
            case ast.Attribute(value=ast.Name(id="wqmix_jax")):  # what `import wqmix_jax` is used for
                yield node.lineno, f"wqmix_jax.{node.attr}"
            case ast.ImportFrom():
                prefix = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def complaints(unit: str, name: str) -> Iterator[str]:
    """What is wrong with module or subpackage ``unit`` importing the dotted ``name``."""
    root, _, inside = name.partition(".")
    if not root:
        yield f"{unit} imports relatively: {name}"
    elif root in HOMES and unit not in HOMES[root]:
        yield f"{unit} imports {root}, whose home is {', '.join(sorted(HOMES[root]))}"
    elif root == "wqmix_jax" and inside != "__version__" and unit != "__init__":
        yield from _complaints_inside(unit, name, imported=inside.split(".")[0])


def _complaints_inside(unit: str, name: str, imported: str) -> Iterator[str]:
    if imported not in LEVEL:
        yield f"{unit} imports the package's root: {name}"
    elif imported != unit and LEVEL[imported] >= LEVEL[unit]:
        yield f"{unit} imports {imported}, which is not below it"
    elif imported == "algos" and unit in ALGORITHM_BLIND and name.split(".")[:3] != ["wqmix_jax", "algos", "base"]:
        yield f"{unit} imports the concrete {name}"
