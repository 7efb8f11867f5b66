"""Policies alone, for playing: the part of the parameters that acting reads, in one ``.npz`` file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from wqmix_jax.config import ConfigError
from wqmix_jax.members import Member
from wqmix_jax.types import PyTree

POLICY_DIR, BEST, LAST = "policies", "best", "last"


class Policy(NamedTuple):
    """What acts, of every member of a run; numpy leaves ``[S, ..]``.

    Attributes:
        params: what `Algorithm.acting_params` gives.
        env_steps: when each was evaluated, int32 ``[S]``.
        episode_return: how well each did, float32 ``[S]``; -inf where there was no evaluation.
    """

    params: PyTree
    env_steps: np.ndarray
    episode_return: np.ndarray


def no_policy(params: PyTree) -> Policy:
    """Zeros of the shapes of ``params``, worse than any policy."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    num_members = len(jax.tree.leaves(zeros)[0])
    return Policy(zeros, np.zeros(num_members, np.int32), np.full(num_members, -np.inf, np.float32))


def better(one: Policy, other: Policy) -> Policy:
    """Of each member the policy with the higher return; ``one`` where they are equal or ``other`` has none."""
    wins = other.episode_return > one.episode_return

    def choose(old: np.ndarray, new: Any) -> np.ndarray:
        return np.where(wins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, one, other) if wins.any() else one


def save_policy(path: Path, policy: Policy, members: Sequence[Member]) -> None:
    """Writes the file in one piece: leaves by their paths (``params.agent.encoder.kernel``) and the members' labels."""
    path.parent.mkdir(exist_ok=True)
    named = {name: np.array([member.labels[name] for member in members]) for name in members[0].labels}
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **named, **flat(policy))
    temporary.replace(path)


def load_policy(path: Path, params: PyTree) -> Policy:
    """Reads the file.

    Args:
        path: the file.
        params: shapes and dtypes of one member's parameters.

    Raises:
        ConfigError: if it can't be read or has other shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            leaves = dict(file)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    like = Policy(params, np.int32(0), np.float32(0))  # type: ignore[arg-type]
    for name, leaf in flat(like).items():
        if name not in leaves or leaves[name].shape[1:] != leaf.shape:
            found = list(leaves[name].shape[1:]) if name in leaves else "absent"
            raise ConfigError(f"{path} doesn't fit: {name} is {found} there, {list(leaf.shape)} here")
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in flat(like)])


def flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by their paths, with dots between."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
