"""Recordings of the joint actions that DCG's message passing finds: our search on the same utilities and payoffs."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.comparison import EXACT, Report, Tolerance
from wqmix_jax.ops.coordination import GraphValues, greedy_joint_actions, joint_value, named_edges

PRECISIONS = ("float64", "float32")

TOLERANCES = {"float64": Tolerance(absolute=1e-11, relative=1e-9), "float32": Tolerance(relative_to_largest=1e-5)}

SETTING = re.compile(r"iterations(\d+)_anytime([01])_normalized([01])")


def compare(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], precision: str) -> Report:
    """Compares edges, the values of all joint actions, and what is found with every recorded setting."""
    report = Report()
    avail = arrays["avail_actions"] > 0
    with jax.enable_x64(precision == "float64"):
        for graph in sorted({name.partition("/")[0] for name in arrays if "/" in name}):
            edges = named_edges(graph, config["n_agents"])  # type: ignore[arg-type]
            recorded = [arrays[f"{graph}/edges_{end}"].tolist() for end in ("from", "to")]
            report.compare(f"{graph}/edges", np.array(edges).reshape(-1, 2).T, np.array(recorded, int), EXACT)
            values = GraphValues(*(jnp.asarray(leaf, precision) for leaf in (arrays["f_i"], arrays[f"{graph}/f_ij"])))
            _compare_values(report, graph, values, arrays, TOLERANCES[precision])
            for name in sorted(name for name in arrays if name.startswith(f"{graph}/iterations")):
                setting, _, kind = name.removeprefix(f"{graph}/").partition("/")
                found = SETTING.fullmatch(setting)
                assert found is not None
                iterations, anytime, normalised = map(int, found.groups())
                how = {"iterations": iterations, "anytime": bool(anytime), "normalised": bool(normalised)}
                greedy = greedy_joint_actions(values, jnp.asarray(avail), edges, **how)
                got = greedy if kind == "actions" else joint_value(values, greedy, edges)
                report.compare(name, got, arrays[name], TOLERANCES[precision])
    return report


def _compare_values(
    report: Report, graph: str, values: GraphValues, arrays: Mapping[str, np.ndarray], tolerance: Tolerance
) -> None:
    """Compares the values of all joint actions, and those of the best available ones."""
    edges = tuple(zip(*(arrays[f"{graph}/edges_{end}"].tolist() for end in ("from", "to")), strict=True))
    actions = jnp.asarray(arrays["joint_actions"])
    every = np.stack([joint_value(values, jnp.broadcast_to(one, values[0].shape[:-1]), edges) for one in actions], 1)
    report.compare(f"{graph}/joint_values", every, arrays[f"{graph}/joint_values"], tolerance)
    avail, agents = arrays["avail_actions"] > 0, np.arange(actions.shape[-1])
    is_possible = avail[:, agents, arrays["joint_actions"]].all(-1)
    best = np.where(is_possible, every, -np.inf).max(-1)
    report.compare(f"{graph}/best_value", best, arrays[f"{graph}/best_value"], tolerance)
