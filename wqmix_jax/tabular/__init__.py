"""Sections 3 and 4 of the paper, exactly: projections of payoff tables, and the operators that consist of them.

Everything runs on the host, with numpy and scipy only. ``python -m wqmix_jax.tabular table2`` prints a projection.
"""

from wqmix_jax.tabular.projection import NoProofWarning, Projection, project
from wqmix_jax.tabular.weightings import QTRAN, EpsilonGreedy, GreedyWeighting, PracticalCentral, Weighting, Weights

__all__ = [
    "QTRAN",
    "EpsilonGreedy",
    "GreedyWeighting",
    "NoProofWarning",
    "PracticalCentral",
    "Projection",
    "Weighting",
    "Weights",
    "project",
]
