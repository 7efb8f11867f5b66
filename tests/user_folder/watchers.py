"""A user's own callbacks."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wqmix_jax.callbacks import Callback, Evaluation, Outcome
from wqmix_jax.options import PositiveInt, options


@options
class ParamNorm(Callback):
    """Adds the norm of each seed's parameters."""

    def on_evaluation(self, evaluation: Evaluation, state: Any) -> None:
        """Adds a number per eval record."""
        leaves = jax.tree.leaves(evaluation.state.learner.params)
        norms = jnp.sqrt(sum(jnp.square(leaf).reshape(len(leaf), -1).sum(-1) for leaf in leaves))
        for place, record in evaluation.eval_records():
            record["param_norm"] = norms[place]


@options
class Counts(Callback):
    """Counts evaluations, in its state and in the records.

    Attributes:
        stops_after: the number at which it ends the run.
        fails_at: the number at which it fails while the file ``broken`` is there.
        broken: a file.
    """

    stops_after: PositiveInt | None = None
    fails_at: PositiveInt | None = None
    broken: str = ""

    def initial_state(self) -> Any:
        """Nothing was seen."""
        return {"seen": 0}

    def on_evaluation(self, evaluation: Evaluation, state: Any) -> Outcome:
        """Counts."""
        seen = state["seen"] + 1
        if seen == self.fails_at and Path(self.broken).exists():
            raise ValueError("no\nluck")
        for record in evaluation.records:
            record["seen"] = seen
        ends = self.stops_after is not None and seen >= self.stops_after
        return Outcome({"seen": seen}, stop=f"{seen} were enough" if ends else None)
