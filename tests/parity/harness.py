"""Finds the case files of a folder, reads what they are, and runs them.

A folder holds ``env_[<variant>_]<tag>.npz`` and ``learner_<case>_<tag>_<k>.npz``, whatever the tag; sizes and options
stand in each file's ``config_json``. Every ``.npz`` in it must be one of the two; nothing else is looked at.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tests.parity import environment_cases, learner_cases, messages_cases
from tests.parity.comparison import Report
from tests.parity.learner_cases import CannotRun
from wqmix_jax.networks.functional import BlockForm, unroll_in_blocks

GOLDEN = Path(__file__).parent.parent / "golden"
"""The project's own copy of the recordings."""

FOLDER = Path(os.environ.get("WQMIX_PARITY_DIR", GOLDEN))
"""The folder whose files are run."""

BLOCKS = "-blocks"

PRECISIONS = ("float64", f"float64{BLOCKS}", "float32")
"""A learner is run in all of them, in the second with its nets unrolled in blocks as on an accelerator; an environment
once."""

BLOCK_FORM = BlockForm(max_steps=4, steps_inline=1, recomputes=True)
"""With several blocks in the recordings' short episodes, the last of which is padded."""


class CaseFile(NamedTuple):
    """A recording.

    Attributes:
        path: the file.
        arrays: everything in it.
        config: its ``config_json``.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    config: Mapping[str, Any]


def set_up_worker() -> None:
    """Makes a separate process as strict as the tests are."""
    jax.config.update("jax_numpy_rank_promotion", "raise")


def case_files(folder: Path) -> list[Path]:
    """All recordings of ``folder``, sorted; empty if there are none or no such folder."""
    return sorted(folder.glob("*.npz"))


def load(path: Path) -> CaseFile:
    """Reads a recording."""
    with np.load(path) as stored:
        arrays = dict(stored)
    if "config_json" not in arrays:
        raise CannotRun("there is no config_json in it")
    # MAVEN's recurrent discriminator is two nets there and one here, and has no target net there.
    arrays = {name.replace("/rnn_agg/", "/discrim/rnn_agg."): array for name, array in arrays.items()}
    discriminator = {name: array for name, array in arrays.items() if name.startswith("params/discrim/")}
    arrays |= {name.replace("params/", "target/"): array for name, array in discriminator.items()}
    return CaseFile(path, arrays, json.loads(str(arrays.pop("config_json"))))


def is_environment(path: Path) -> bool:
    """Returns True for an environment's file; one that is neither that nor a learner's can't be run."""
    return path.name.startswith("env_")


def holds_messages(path: Path) -> bool:
    """Returns True for a recording of joint actions that DCG's messages find, which has no learner."""
    return path.name.startswith("learner_dcg_greedy_")


def precisions(path: Path) -> tuple[str, ...]:
    """In what a file is run."""
    if holds_messages(path):
        return messages_cases.PRECISIONS
    return ("exact",) if is_environment(path) else PRECISIONS


def learner_case(path: Path, config: Mapping[str, Any]) -> str:
    """Returns the case in a file's name; if a tag looks like a case's end (``qmix_w_0``), ``config_json`` decides."""
    kind, _, rest = path.stem.partition("_")
    if kind != "learner":
        raise CannotRun("its name starts with neither env_ nor learner_")
    named = [case for case in learner_cases.CASES if rest.startswith(f"{case}_")]
    if config.get("case") in named:
        return config["case"]
    if not named:
        raise CannotRun(f"its case is unknown (known are {', '.join(learner_cases.CASES)})")
    return max(named, key=len)


def run(path: Path, precision: str) -> Report:
    """Runs one file.

    Raises:
        NotYetCovered: if the project lacks the algorithm.
        CannotRun: if it is no case file, or lacks what is needed to run it.
    """
    file = load(path)
    if is_environment(path):
        return environment_cases.compare(file.arrays, file.config)
    if holds_messages(path):
        return messages_cases.compare(file.arrays, file.config, precision)
    case = learner_case(path, file.config)
    with unroll_in_blocks(BLOCK_FORM if precision.endswith(BLOCKS) else None):
        return learner_cases.compare(case, file.arrays, file.config, precision.removesuffix(BLOCKS))
