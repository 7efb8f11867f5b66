"""The first parameters of a run that starts from those of another run (``init_from``).

They are read before anything is compiled and kept in the new run's folder, so that it no longer needs the other one.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.config import RunConfig
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.atomic import atomic
from wqmix_jax.records.metrics import HEADER_FILE, load_header
from wqmix_jax.records.run_dir import CHECKPOINT_DIR, read_config
from wqmix_jax.runs.checkpoints import read_learner
from wqmix_jax.runs.saved_policies import finite_members, flat, policy_file, read_arrays, read_labels
from wqmix_jax.training.compiled_loop import TrainState
from wqmix_jax.training.learner import LearnerState
from wqmix_jax.training.members import Member, member_name
from wqmix_jax.types import PyTree

INITIAL_FILE = "initial.npz"

PARAMS, OPTIMIZER, MOMENTS = "params", "opt_state", "moments"

Arrays = dict[str, np.ndarray]
"""Arrays ``[S, ..]`` by their paths in a `LearnerState`, ``params.agent.encoder.kernel`` for example."""


class Initial(NamedTuple):
    """The first parameters of a run.

    Attributes:
        arrays: see `Arrays`, in the order of the run's members; leaves that are absent are drawn.
        lines: their origin, for the user.
    """

    arrays: Arrays
    lines: list[str]


class _Part(NamedTuple):
    """The learner of a run, or of the seeds that one of its hosts has trained.

    Attributes:
        path: where it is read from.
        labels: the labels of its members.
        arrays: see `Arrays`.
    """

    path: Path
    labels: list[dict[str, Any]]
    arrays: Arrays


def read_initial(config: RunConfig, members: Sequence[Member], learner: LearnerState) -> Initial:
    """Reads the parameters of the run that ``config.init_from`` names.

    Args:
        config: the options of the new run.
        members: its members.
        learner: shapes and dtypes of its learner, leaves ``[S, ..]``.

    Raises:
        ConfigError: if there are none, or they don't fit: nets, shapes, seeds or numbers that are not finite.
    """
    folder = Path(str(config.init_from))
    parts = [_read(run, config.init_from_policy) for run in _runs(folder)]
    here, there = _flat(learner, (PARAMS, OPTIMIZER, MOMENTS)), parts[0].arrays
    nets = _chosen_nets(config, _names_of_nets(here), _names_of_nets(there))
    names = [name for name in here if name.startswith(PARAMS) and _net(name) in nets]
    for run in _runs(folder):
        _refuse_other_agents(config, run, nets)
    if config.init_from_optimizer:
        if config.algo.optimizer != "rmsprop" and (drawn := [net for net in _names_of_nets(here) if net not in nets]):
            reason = f"{config.algo.optimizer} counts the steps of all nets together, and {', '.join(drawn)} is drawn"
            raise ConfigError(f"init_from_optimizer=true is not allowed: {reason}")
        names += _names_in_optimizer(here, nets)
    # Networks that have learned standardised returns mean nothing without their moments.
    names += [name for name in here if name.startswith(MOMENTS) and name in there]
    for part in parts:
        _refuse_other_shapes(f"init_from={folder} is not allowed", part.arrays, here, names, nets)
    found = [_origin(config, member, parts) for member in members]
    arrays = {name: np.stack([part.arrays[name][place] for part, place in found]) for name in names}
    for place in np.flatnonzero(~finite_members(arrays)).tolist():
        part, there_place = found[place]
        name = member_name(part.labels[there_place])
        raise ConfigError(f"init_from={folder} is not allowed: parameters of its seed {name} are not finite")
    return Initial(arrays, _lines(members, found, nets))


def save_initial(run_dir: Path, initial: Initial) -> None:
    """Writes the parameters to the new run's folder."""
    with atomic(run_dir / INITIAL_FILE) as temporary:
        np.savez(temporary, **initial.arrays)  # type: ignore[arg-type]


def load_initial(run_dir: Path, learner: LearnerState) -> Arrays:
    """Reads the parameters that `save_initial` has written.

    Args:
        run_dir: the run's folder.
        learner: shapes and dtypes of the run's learner, leaves ``[S, ..]``.

    Raises:
        ConfigError: if they can't be read, or don't fit.
    """
    path, here = run_dir / INITIAL_FILE, _flat(learner, (PARAMS, OPTIMIZER, MOMENTS))
    arrays = read_arrays(path)
    _refuse_other_shapes(f"{path} doesn't fit", arrays, here, list(arrays), [])
    return arrays


def with_arrays(state: TrainState, arrays: Arrays) -> TrainState:
    """Replaces parameters of a first train state, the target's, and the optimiser's and moments, by ``arrays``."""
    learner = state.learner
    params = _replaced(learner.params, PARAMS, arrays)
    opt_state = _replaced(learner.opt_state, OPTIMIZER, arrays)
    moments = _replaced(learner.moments, MOMENTS, arrays)
    target = jax.tree.map(jnp.copy, params)  # as `init_learner`
    learner = learner._replace(params=params, target=target, opt_state=opt_state, moments=moments)
    return state._replace(learner=learner)


def _replaced(tree: PyTree, prefix: str, arrays: Arrays) -> PyTree:
    leaves = [
        jnp.copy(jax.device_put(arrays[f"{prefix}.{name}"], leaf.sharding)) if f"{prefix}.{name}" in arrays else leaf
        for name, leaf in flat(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _runs(folder: Path) -> list[Path]:
    """Returns the folder, or the parts of a run in it that several hosts have trained."""
    if (folder / HEADER_FILE).is_file():
        return [folder]
    parts = sorted(path.parent for path in folder.glob(f"host_*/{HEADER_FILE}"))
    if not parts:
        reason = f"there is no run in it ({HEADER_FILE})" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"init_from={folder} is not allowed: {reason}")
    return parts


def _read(run_dir: Path, policy: str | None) -> _Part:
    if policy is None:
        try:
            path, arrays = read_learner(run_dir / CHECKPOINT_DIR)
        except ConfigError as error:
            ways = "init_from_policy=best takes the nets that act from its policies"
            raise ConfigError(f"init_from={run_dir} is not allowed: {error}; {ways}") from error
        return _Part(path, load_header(run_dir)["members"], arrays)
    path = policy_file(run_dir, policy)
    arrays = {name: leaf for name, leaf in read_arrays(path).items() if name.startswith(f"{PARAMS}.")}
    return _Part(path, read_labels(path), arrays)


def _chosen_nets(config: RunConfig, here: list[str], there: list[str]) -> list[str]:
    """Returns the names of the nets that are taken.

    Raises:
        ConfigError: if there are none, or one that was asked for is missing.
    """
    lists = f"that run has {', '.join(there)}, and this one {', '.join(here)}"
    if config.init_from_nets is None:
        if both := [net for net in here if net in there]:
            return both
        raise ConfigError(f"init_from={config.init_from} is not allowed: no net is in both runs: {lists}")
    for net in config.init_from_nets:
        if net not in here or net not in there:
            raise ConfigError(f"init_from_nets={config.init_from_nets} is not allowed: {lists}")
    return config.init_from_nets


def _refuse_other_agents(config: RunConfig, run: Path, nets: Sequence[str]) -> None:
    """Refuses nets of agents that mean something else there, although they may have the same shapes.

    Raises:
        ConfigError: if an option differs.
    """
    if not any(net.endswith("agent") for net in nets):
        return
    there = read_config(run, option="init_from")["algo"]
    for name in ("agent_id", "last_action", "share_parameters"):
        if name in there and hasattr(config.algo, name):
            here = getattr(config.algo, name)
            if json.dumps(here) != json.dumps(there[name]):
                difference = f"it has algo.{name}={there[name]}, and this run {here}"
                raise ConfigError(f"init_from={run} is not allowed: {difference}")


def _names_in_optimizer(here: Mapping[str, Any], nets: Sequence[str]) -> list[str]:
    """Returns the leaves of the optimiser that are of ``nets``, or of no net, as a counter is."""
    params = sorted((name.removeprefix(f"{PARAMS}.") for name in here if name.startswith(f"{PARAMS}.")), key=len)
    found = []
    for name in here:
        if name.startswith(f"{OPTIMIZER}."):
            [*_, owner] = ["", *(param for param in params if name.endswith(f".{param}"))]
            if not owner or owner.partition(".")[0] in nets:
                found.append(name)
    return found


def _refuse_other_shapes(
    start: str, there: Mapping[str, Any], here: Mapping[str, Any], names: Sequence[str], nets: Sequence[str]
) -> None:
    """Refuses arrays whose shape (without the axis of members) or dtype is not that of the run.

    Args:
        start: the start of the message.
        there: the arrays that are read.
        here: those of the run.
        names: the arrays that must fit.
        nets: the nets of which ``there`` may have no others.

    Raises:
        ConfigError: at the first that doesn't fit.
    """
    extra = [name for name in there if name.startswith(PARAMS) and _net(name) in nets and name not in here]
    for name in (*names, *extra):
        found, needed = _shape(there.get(name)), _shape(here.get(name))
        if found != needed:
            hint = "; init_from_nets=[NET,..] chooses the nets" if nets else ""
            raise ConfigError(f"{start}: {name} is {found} there and {needed} here{hint}")


def _origin(config: RunConfig, member: Member, parts: Sequence[_Part]) -> tuple[_Part, int]:
    """Returns the part of the other run, and the place in it, whose parameters a member takes.

    Raises:
        ConfigError: if there is none, or several.
    """
    every = [(part, place) for part in parts for place in range(len(part.labels))]
    seed = member.seed if config.init_from_seed is None else config.init_from_seed
    found = [(part, place) for part, place in every if part.labels[place]["seed"] == seed]
    equal = [(part, place) for part, place in found if part.labels[place] == {**member.labels, "seed": seed}]
    if not found and config.init_from_seed is None and len(every) == 1:
        return every[0]
    if not found:
        seeds = ", ".join(str(part.labels[place]["seed"]) for part, place in every)
        option = f"init_from={config.init_from}" if config.init_from_seed is None else f"init_from_seed={seed}"
        hint = "" if config.init_from_seed is not None else "; init_from_seed=SEED takes one for all"
        raise ConfigError(f"{option} is not allowed: seed {seed} is not among its seeds {seeds}{hint}")
    if len(found) > 1 and len(equal) != 1:
        names = ", ".join(member_name(part.labels[place]) for part, place in found)
        raise ConfigError(f"init_from={config.init_from} is not allowed: it has seed {seed} several times: {names}")
    return equal[0] if len(equal) == 1 else found[0]


def _lines(members: Sequence[Member], found: Sequence[tuple[_Part, int]], nets: Sequence[str]) -> list[str]:
    """Returns a line per file that parameters come from."""
    lines = []
    for path in dict.fromkeys(part.path for part, _ in found):
        pairs = [
            (member_name(member.labels), member_name(part.labels[place]))
            for member, (part, place) in zip(members, found, strict=True)
            if part.path == path
        ]
        same = all(new == old for new, old in pairs)
        seeds = "each of its seeds" if same else ", ".join(f"seed {old} for {new}" for new, old in pairs)
        lines.append(f"first parameters: {', '.join(nets)} of {path} ({seeds})")
    return lines


def _flat(learner: LearnerState, parts: Iterable[str]) -> dict[str, Any]:
    return {f"{part}.{name}": leaf for part in parts for name, leaf in flat(getattr(learner, part)).items()}


def _net(name: str) -> str:
    """Returns the net of an array of ``params``."""
    return name.split(".")[1]


def _names_of_nets(arrays: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_net(name) for name in arrays if name.startswith(f"{PARAMS}.")))


def _shape(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype}{list(leaf.shape[1:])}"
