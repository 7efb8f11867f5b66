"""Weighted QMIX and its baselines in JAX, as one compiled training loop over many seeds."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wqmix_jax.api import load_policies, load_policy, train_seeds, trained_policy
    from wqmix_jax.cli.overrides import load_config
    from wqmix_jax.records.metrics import load_metrics
    from wqmix_jax.runs.saved_policies import play_episode
    from wqmix_jax.training.compiled_loop import make_trainer

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "load_config",
    "load_metrics",
    "load_policies",
    "load_policy",
    "make_trainer",
    "play_episode",
    "train_seeds",
    "trained_policy",
]

_HOMES = {
    "load_config": "cli.overrides",
    "load_metrics": "records.metrics",
    "load_policies": "api",
    "load_policy": "api",
    "make_trainer": "training.compiled_loop",
    "play_episode": "runs.saved_policies",
    "train_seeds": "api",
    "trained_policy": "api",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: ``import wqmix_jax`` alone loads neither jax nor hydra."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
