"""Imports point strictly downwards through the layers, and each heavy dependency has one home."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wqmix_jax"

# From the bottom to the top. A module or package imports those below it, never others of the same entry.
LAYERS = (
    (("foreign_names", "types", "errors"), ("options",), ("config",)),
    (("ops", "networks", "interop"),),
    (("envs", "algos"),),
    (("training",),),
    (("callbacks", "records"),),
    (("runs",),),
    (("api", "cli"),),
    (("tabular", "train", "evaluate", "compare", "table", "merge", "search"), ("__main__",)),
)

# The same for the modules inside each package.
INSIDE = {
    "ops": (
        ("action_selection", "byte_rows", "moments", "randomness", "td", "weighting"),
        ("coordination", "policy_gradient"),
    ),
    "networks": (
        ("functional",),
        ("linear",),
        ("coordination", "mixers", "q_star", "qplex", "qtran", "recognizer", "recurrent"),
        ("blocked_recurrent",),
        ("agent",),
        ("coma_critic", "latent"),
    ),
    "interop": (("pymarl",),),
    "envs": (
        ("payoffs", "quiet_imports", "viewer"),
        ("base",),
        ("checks", "host", "jaxmarl", "jumanji", "matrix_game", "mmdp", "predator_prey", "smax"),
    ),
    "algos": (
        ("base",),
        ("q_learning",),
        ("actor_critic", "dcg", "factored", "floored_actors", "iql", "ppo", "qtran"),
        ("central_iql", "coma", "maddpg", "masac", "maven", "qmix", "qplex"),
        ("liir", "pqn", "wqmix"),
        ("powqmix", "resq"),
    ),
    "training": (
        ("compile_cache", "devices", "members", "priorities", "rollout", "row_packing"),
        ("learner", "replay"),
        ("batch_gradients",),
        ("compiled_loop",),
        ("host_loop",),
    ),
    "records": (("atomic", "metrics", "statistics", "text_table"), ("run_dir",), ("plotting",)),
    "runs": (
        ("checkpoint_pieces", "hosts", "loggers", "output", "progress", "saved_policies", "signals", "startup"),
        ("checkpoints", "memory", "playing", "trust"),
        ("initial",),
        ("session",),
    ),
    "cli": (("command", "help", "parser", "syntax"), ("checks",), ("overrides",), ("arguments",), ("sweeps",)),
    "search": (("settings",), ("space",), ("trials",), ("report",), ("__main__",)),
    "tabular": (
        ("isotonic", "weightings"),
        ("additive", "degeneracy", "search"),
        ("projection",),
        ("claims", "operators"),
        ("__main__",),
    ),
}  # fmt: skip

HOMES = {
    "hydra": {"cli"},
    "tensorboard": {"runs.loggers"},
    "wandb": {"runs.loggers"},
    "optuna": {"search"},
    "orbax": {"runs.checkpoints"},
    "tensorstore": {"runs.checkpoints"},
}

# Know the contract `algos.base`, never a concrete algorithm.
ALGORITHM_BLIND = {"training"}


def test_imports_point_strictly_downwards() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert sources
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("ops/td.py", "from wqmix_jax.algos.base import Aux", "ops.td imports algos.base, which is not below it"),
        ("ops/td.py", "import wqmix_jax.ops.weighting", "imports ops.weighting, which is not below it"),
        (
            "ops/td.py",
            "from wqmix_jax.ops import weighting as w",
            "imports ops.weighting, which is not below it",
        ),
        ("ops/td.py", "def f():\n    from wqmix_jax import training", "ops.td imports training, which is not below it"),
        ("ops/td.py", "import wqmix_jax\nf = wqmix_jax.training", "ops.td imports training, which is not below it"),
        ("ops/td.py", "from wqmix_jax import train_seeds", "ops.td imports the package's root"),
        ("ops/td.py", "from ..types import Array", "ops.td imports relatively"),
        ("config.py", "from wqmix_jax.ops.td import td_target", "config imports ops.td, which is not below it"),
        ("errors.py", "from wqmix_jax.options import build", "errors imports options, which is not below it"),
        ("records/metrics.py", "from wqmix_jax.records.run_dir import held", "records.run_dir, which is not below it"),
        ("training/learner.py", "from wqmix_jax.algos.qmix import QMIX", "training.learner imports the concrete"),
        ("training/rollout.py", "from wqmix_jax.algos import iql", "training.rollout imports the concrete"),
        ("training/rollout.py", "from wqmix_jax import algos", "training.rollout imports the concrete"),
        ("api.py", "import hydra", "api imports hydra, whose home is cli"),
        ("training/rollout.py", "from orbax import checkpoint", "imports orbax, whose home is runs.checkpoints"),
        ("train.py", "import wandb.sdk", "train imports wandb, whose home is runs.loggers"),
        ("runs/memory.py", "importlib.import_module('wandb')", "runs.memory imports wandb, whose home is runs.loggers"),
        ("novelty.py", "", "novelty has no layer"),
        ("ops/novelty.py", "", "ops.novelty has no layer"),
    ],
)
def test_a_violation_is_seen(path: str, source: str, complaint: str) -> None:
    [seen] = violations({path: source})
    assert complaint in seen


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("envs/matrix_game.py", "from wqmix_jax.envs.base import Environment\nfrom wqmix_jax.types import Array"),
        ("training/rollout.py", "from wqmix_jax.algos.base import Algorithm\nfrom wqmix_jax.algos import base"),
        ("runs/session.py", "import wqmix_jax\nprint(wqmix_jax.__version__)"),
        ("runs/loggers.py", "importlib.import_module('wandb')\nfrom wqmix_jax import __version__"),
        ("cli/sweeps.py", "import hydra\nimport hydrated_elsewhere\nfrom wqmix_jax.training.learner import Optimizer"),
        ("envs/host/worker.py", "from wqmix_jax.envs.base import Environment"),
        ("__init__.py", "from wqmix_jax.api import train_seeds"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []


def test_the_layers_name_what_is_there() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    named = {unit for layer in LAYERS for part in layer for unit in part}
    named |= {f"{package}.{unit}" for package, layers in INSIDE.items() for part in layers for unit in part}
    packages = {module.removesuffix(".__init__") for module in modules}
    assert [unit for unit in sorted(named) if unit not in packages] == []


def violations(sources: Mapping[str, str]) -> list[str]:
    """Returns one line per broken rule in sources by their path inside the package."""
    found = []
    for path, source in sorted(sources.items()):
        module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if module != "__init__" and level(module) is None:
            found.append(f"{path}: {module} has no layer; give it one in LAYERS or INSIDE")
            continue
        for line, name in imports(ast.parse(source)):
            found += [f"{path}:{line}: {complaint}" for complaint in complaints(module, name)]
    return found


def level(module: str) -> tuple[int, int, int] | None:
    """Returns the layer, the place in it and the place inside the package; None for a module without a layer."""
    package, _, inside = module.partition(".")
    for layer, parts in enumerate(LAYERS):
        for place, units in enumerate(parts):
            if package not in units:
                continue
            if not inside:
                return layer, place, -1
            unit = inside.split(".")[0]
            found = [index for index, part in enumerate(INSIDE.get(package, ())) if unit in part]
            return (layer, place, found[0]) if found else None
    return None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and full dotted name of everything imported, inside functions and type-checking blocks too."""
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


def complaints(module: str, name: str) -> Iterator[str]:
    """Yields the broken rules where ``module`` imports the dotted ``name``."""
    root, _, inside = name.partition(".")
    if not root:
        yield f"{module} imports relatively: {name}"
    elif root in HOMES and not {module, module.split(".")[0]} & HOMES[root]:
        yield f"{module} imports {root}, whose home is {', '.join(sorted(HOMES[root]))}"
    elif root == "wqmix_jax" and inside != "__version__" and module != "__init__":
        yield from _complaints_inside(module, name, inside)


def _complaints_inside(module: str, name: str, inside: str) -> Iterator[str]:
    imported = _module_of(inside)
    if imported is None:
        yield f"{module} imports the package's root: {name}"
    elif "algos" in imported.split(".") and module.split(".")[0] in ALGORITHM_BLIND and imported != "algos.base":
        yield f"{module} imports the concrete {name}"
    elif not _is_below(imported, module):
        yield f"{module} imports {imported}, which is not below it"


def _module_of(inside: str) -> str | None:
    """Returns the module or package that a dotted name inside of the package is, or is a member of."""
    package, *rest = inside.split(".")
    if level(package) is None:
        return None
    return f"{package}.{rest[0]}" if rest and level(f"{package}.{rest[0]}") is not None else package


def _is_below(imported: str, module: str) -> bool:
    here, there = module.split(".")[:2], imported.split(".")
    if here == there or here == there[:1]:  # inside of a package's own package, or its `__init__`
        return True
    if here[0] == there[0]:
        return _place(".".join(there)) < _place(".".join(here))
    return _place(there[0])[:2] < _place(here[0])[:2]


def _place(module: str) -> tuple[int, int, int]:
    found = level(module)
    assert found is not None, module
    return found
