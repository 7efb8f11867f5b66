"""Learner recordings: our loss and learner step on the recorded batch, against everything that was recorded."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from tests.parity.comparison import EXACT, Report, Tolerance
from wqmix_jax import load_config
from wqmix_jax.algos import masac
from wqmix_jax.algos.base import Algorithm, Context, Hyperparams, hyperparams
from wqmix_jax.algos.q_learning import UNAVAILABLE
from wqmix_jax.config import CONFIG_DIR
from wqmix_jax.interop import pymarl
from wqmix_jax.learner import LearnerState, init_learner, learner_step
from wqmix_jax.types import EnvSpec, Episode, PyTree

Arrays = Mapping[str, np.ndarray]

Step = Callable[[LearnerState, Episode, Context, PyTree], tuple[Any, ...]]

NUM_STEPS = 5
"""Optimiser steps of a recording, all on the same batch."""


class Case(NamedTuple):
    """How a case of the recordings is called here.

    Attributes:
        algo: the yaml in ``configs/algo``.
        options: options of it that make the case.
    """

    algo: str
    options: Mapping[str, Any] = {}


CASES: Mapping[str, Case] = {
    "iql": Case("iql"),
    "vdn": Case("vdn"),
    "qmix": Case("qmix"),
    "qmix_w_ow": Case("qmix_ow"),
    "qmix_w_cw": Case("qmix_cw"),
    "ow_qmix": Case("ow_qmix"),
    "cw_qmix": Case("cw_qmix"),
    "cw_qmix_w1": Case("qmix_qstar"),
    "ow_qmix_atten": Case("ow_qmix", {"q_star": "attention"}),
    "cw_qmix_atten": Case("cw_qmix", {"q_star": "attention"}),
    "qtran": Case("qtran"),
    "qplex": Case("qplex"),
    "ddpg": Case("maddpg"),
    "sac": Case("masac"),
}
"""By the names in the recordings."""

SIZES = {
    "gamma": "gamma",
    "lr": "lr",
    "optim_alpha": "rms_decay",
    "optim_eps": "rms_eps",
    "grad_norm_clip": "max_grad_norm",
    "rnn_hidden_dim": "hidden_dim",
    "mixing_embed_dim": "mixer_embed_dim",
    "hypernet_embed": "hypernet_dim",
    "central_mixing_embed_dim": "q_star_dim",
    "w": "alpha",
    "policy_temp": "gumbel_temperature",
    "entropy_temp": "alpha_ent",
    "epsilon_target": "epsilon_start",
}
"""The recordings' options with a counterpart of ours."""

LOSSES = {
    "loss": "loss",
    "qmix_loss": "qmix_loss",
    "central_loss": "q_star_loss",
    "grad_norm": "grad_norm",
    "actor_loss": "actor_loss",
    "qmix_actor_loss": "-actor_loss",
    "agent_policy_loss": "last_objective",
    "logit_entropy": "logit_entropy",
}
"""The recordings' scalars by our names; a minus says that theirs is maximised."""

AGENTS = {name: pymarl.NETS[name].ours for name in ("agent", "central_agent")}
"""PyMARL's recurrent agents and their names here."""

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Each case is run a handful of times: a fifth of the time to compile, and no other result than rounding."""

FLOAT64 = Tolerance(absolute=1e-11, relative=1e-9)
STORED_FLOAT32 = Tolerance(absolute=1e-11, relative=float(np.finfo(np.float32).eps))
FLOAT32_VALUE = Tolerance(of_largest=1e-5)
FLOAT32_PARAMETER = Tolerance(absolute=1e-5)
FLOAT32_OF_LARGEST_STEP = 1e-5


class NotYetCovered(Exception):
    """A case whose algorithm the project doesn't have."""


class CannotRun(Exception):
    """A file that isn't what a case file must be."""


class Run(NamedTuple):
    """What came of a case.

    Attributes:
        batch: the recorded episodes.
        values: the loss's intermediate values before the first step.
        utilities: of each net of agents, online and target: ``[B, T+1, N, A]``, by PyMARL's name of the net.
        target_utilities: likewise.
        grads: before clipping, at the first step.
        params: after each step.
        target: after all steps.
        metrics: at each step, leaves ``[5]``.
    """

    batch: Episode
    values: dict[str, np.ndarray]
    utilities: dict[str, np.ndarray]
    target_utilities: dict[str, np.ndarray]
    grads: PyTree
    params: list[PyTree]
    target: PyTree
    metrics: dict[str, np.ndarray]


def check_covered(name: str) -> None:
    """Raises `NotYetCovered` as long as the project lacks the algorithm of case ``name``."""
    case = CASES[name]
    if not (CONFIG_DIR / "algo" / f"{case.algo}.yaml").is_file():
        raise NotYetCovered(f"{name} is not yet covered: there is no configs/algo/{case.algo}.yaml")
    for option, value in case.options.items():
        kinds = typing.get_type_hints(type(_base(case.algo)))
        if value not in typing.get_args(kinds[option]):
            raise NotYetCovered(f"{name} is not yet covered: {case.algo} has no {option}={value}")


def compare(case: str, arrays: Arrays, config: Mapping[str, Any], precision: str) -> Report:
    """Runs ``case`` in ``float64`` or ``float32`` and compares everything."""
    return compare_run(run(case, arrays, config, precision), arrays, config, precision)


def run(case: str, arrays: Arrays, config: Mapping[str, Any], precision: str, step: Step | None = None) -> Run:
    """Five learner steps from the recorded parameters on the recorded batch, as the trainer takes them.

    Args:
        case: a key of `CASES`.
        arrays: the recording.
        config: its options.
        precision: ``float64`` or ``float32``.
        step: what `compile_step` returned for another recording of the same options and sizes.

    Raises:
        NotYetCovered: if the project lacks the algorithm.
        CannotRun: if the recorded nets are not those of the project's algorithm.
    """
    check_covered(case)
    algo = build_algorithm(case, config)
    like = _shapes(algo, config)
    tensors = _without_nets(arrays, _idle_nets(arrays, config, like))
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("float32"):
        batch = _batch(arrays, precision)
        params, target = (_params(group, like, tensors, precision) for group in ("params", "target"))
        step = step or compile_step(algo)
        learner = jax.jit(init_learner)(params)._replace(target=target)
        epsilon = jnp.asarray(config.get("epsilon_online", 0.0))
        ctx = Context(epsilon, env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
        taken, metrics, first = [], [], None
        for count in range(1, NUM_STEPS + 1):
            noise = _noise(_group(arrays, f"noise/step{count}"), batch, precision)
            learner, metric, *seen = step(learner, batch, ctx, noise)
            taken.append(jax.device_get(learner.params))
            metrics.append(metric)
            first = first or jax.device_get(seen)
        grads, values, utilities, target_utilities = first
        losses = {name: np.array([metric[name] for metric in metrics]) for name in metrics[0]}
        return Run(batch, values, utilities, target_utilities, grads, taken, jax.device_get(learner.target), losses)


def compile_step(algo: Algorithm) -> Step:
    """The learner's step, and what it went through: gradients, intermediate values, utilities."""
    loss, key = jax.jit(algo.loss), jax.random.key(0)

    def step(learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree) -> tuple[Any, ...]:
        recorded = SimpleNamespace(loss=loss, sample_noise=lambda key, batch: noise)
        stepped, metrics = learner_step(recorded, learner, batch, hp, ctx, key)
        grads, aux = jax.grad(loss, has_aux=True)(learner.params, learner.target, batch, hp, ctx, noise)
        if "objectives" in aux.values:
            metrics |= {"last_objective": aux.values["objectives"][-1]}
        utilities = [
            {name: algo.unroll(tree[ours], batch) for name, ours in AGENTS.items() if ours in tree}
            for tree in (learner.params, learner.target)
        ]
        return stepped, metrics, grads, aux.values, *utilities

    jitted = jax.jit(step, compiler_options=QUICK_TO_COMPILE if jax.default_backend() == "cpu" else None)
    return lambda learner, batch, ctx, noise: jitted(
        learner, batch, jax.tree.map(jnp.asarray, hyperparams(algo)), ctx, noise
    )


def build_algorithm(case: str, config: Mapping[str, Any]) -> Algorithm:
    """The project's algorithm with its yaml's options, except those that the recording names."""
    base = _base(CASES[case].algo)
    own = {field.name for field in dataclasses.fields(base)}
    recorded = {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config and ours in own}
    sizes = {option: type(getattr(base, option))(value) for option, value in recorded.items()}
    return dataclasses.replace(base, **CASES[case].options, **sizes)


def compare_run(ran: Run, arrays: Arrays, config: Mapping[str, Any], precision: str) -> Report:
    """Compares what came of a case with what was recorded."""
    if not _group(arrays, "expected"):
        raise CannotRun("there are no expected/ values in it")
    report, idle = Report(), _idle_nets(arrays, config, ran.target)
    arrays = _without_nets(arrays, idle)
    _compare_values(report, ran, arrays, precision)
    _compare_losses(report, ran, arrays, precision)
    _compare_tensors(report, "grads", ran.grads, arrays, precision, unreached=config.get("params_without_grad", ()))
    for count in (1, NUM_STEPS):
        _compare_tensors(report, f"after{count}", ran.params[count - 1], arrays, precision)
    _compare_tensors(report, "target", ran.target, arrays, precision)
    recorded = [name for name in arrays if name.startswith(("expected/", "trace/"))]
    report.other = [name for name in recorded if name not in report.compared]
    report.other += [f"the net {net}" for net in idle]
    return report


def _compare_values(report: Report, ran: Run, arrays: Arrays, precision: str) -> None:
    expected = _group(arrays, "expected")
    for name, (got, where) in _values(ran, expected).items():
        recorded = expected[name]
        tolerance = _tolerance(recorded, precision, FLOAT32_VALUE)
        if name in ("mask", "ws"):
            recorded, tolerance = recorded.astype(got.dtype), EXACT
        report.compare(f"expected/{name}", got, recorded, tolerance, where)


def _compare_losses(report: Report, ran: Run, arrays: Arrays, precision: str) -> None:
    """Compares the scalars; an actor's loss may pass zero, so what rounding may do is told by all five steps."""
    for theirs, ours in LOSSES.items():
        for name, steps in ((f"expected/{theirs}", 0), (f"trace/{theirs}", slice(None))):
            if name in arrays:
                got = ran.metrics.get(ours.removeprefix("-"), np.full(NUM_STEPS, np.nan))[steps]
                got = -got if ours.startswith("-") else got
                steps_of_it = arrays.get(f"trace/{theirs}", arrays[name])
                in_float32 = Tolerance(absolute=FLOAT32_OF_LARGEST_STEP * float(np.abs(steps_of_it).max()))
                report.compare(name, got, arrays[name], _tolerance(arrays[name], precision, in_float32))


def _compare_tensors(
    report: Report, group: str, tree: PyTree, arrays: Arrays, precision: str, unreached: Sequence[str] = ()
) -> None:
    """Compares one tensor for each of the parameters; what the loss doesn't reach has no recorded gradient."""
    recorded, ours = _group(arrays, group), _by_recorded_name(tree)
    if not recorded:
        report.absent.append(group)
        return
    recorded |= {name: np.zeros_like(ours[name]) for name in unreached if name in ours}
    loose = FLOAT32_VALUE if group == "grads" else FLOAT32_PARAMETER
    for name in sorted(recorded.keys() | ours.keys()):
        there, here = recorded.get(name, np.empty(0)), ours.get(name, np.empty(0))
        report.compare(f"{group}/{name}", here, there, _tolerance(there, precision, loose))


def _tolerance(recorded: np.ndarray, precision: str, in_float32: Tolerance) -> Tolerance:
    if precision == "float32":
        return in_float32
    return STORED_FLOAT32 if recorded.dtype == np.float32 else FLOAT64


@functools.cache
def _base(algo: str) -> Algorithm:
    return load_config(f"+algo={algo}").algo


def _group(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}


def _batch(arrays: Arrays, dtype: str) -> Episode:
    """The recorded episodes; a step is real if it was filled and the one before it did not terminate."""
    batch = _group(arrays, "batch")
    terminated = batch["terminated"][:, :-1, 0].astype(dtype)
    mask = batch["filled"][:, :-1, 0].astype(dtype)
    mask[:, 1:] *= 1 - terminated[:, :-1]
    return Episode(
        obs=batch["obs"].astype(dtype),
        state=batch["state"].astype(dtype),
        avail_actions=batch["avail_actions"] > 0,
        joint_action=batch["actions"][:, :-1, :, 0].astype(np.int32),
        reward=batch["reward"][:, :-1, 0].astype(dtype),
        discount=1 - terminated,
        mask=mask,
    )


def _noise(recorded: Arrays, batch: Episode, dtype: str) -> PyTree:
    """What a step's loss drew, as the algorithm's `sample_noise` would give it."""
    if "gumbel" in recorded:
        return recorded["gumbel"].astype(dtype)
    if "sampled_actions" in recorded:
        num_actions = batch.avail_actions.shape[-1]
        draws = (recorded["sampled_actions"], recorded["sampled_target_actions"])
        return masac.Noise(*(1e6 * np.eye(num_actions, dtype=dtype)[actions] for actions in draws))
    return ()


def _shapes(algo: Algorithm, config: Mapping[str, Any]) -> PyTree:
    """The algorithm's parameters as they would be drawn for the recording's task."""
    sizes = EnvSpec(*(config[key] for key in ("n_agents", "n_actions", "obs_shape", "state_shape", "T")))
    return jax.eval_shape(lambda: algo.init(jax.random.key(0), sizes))


def _idle_nets(arrays: Arrays, config: Mapping[str, Any], ours: PyTree) -> set[str]:
    """The recorded nets without a counterpart that the authors' loss reaches in no tensor: a mixer beside a critic."""
    unreached = set(config.get("params_without_grad", ()))
    nets: dict[str, set[str]] = {}
    for name in _group(arrays, "params"):
        nets.setdefault(name.partition("/")[0], set()).add(name)
    known = {name for name, net in pymarl.NETS.items() if net.ours in ours}
    return {net for net, names in nets.items() if net not in known and names <= unreached}


def _without_nets(arrays: Arrays, nets: Set[str]) -> dict[str, np.ndarray]:
    """The recording without these nets' tensors."""
    groups = ("params", "target", "grads", "after1", f"after{NUM_STEPS}")
    left_out = tuple(f"{group}/{net}/" for group in groups for net in nets)
    return {name: array for name, array in arrays.items() if not name.startswith(left_out)}


def _params(group: str, like: PyTree, arrays: Arrays, dtype: str) -> PyTree:
    """The recorded parameters in our tree, which they must fill."""
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _group(arrays, group).items():
        net, _, rest = name.partition("/")
        tensors.setdefault(net, {})[rest] = tensor
    nets = {net: pymarl.NETS[net].ours if net in pymarl.NETS else None for net in tensors}
    for net, ours in nets.items():
        if ours not in like:
            raise CannotRun(f"the recorded net {net} has no counterpart among {', '.join(like)}")
    unknown = like.keys() - {net.ours for net in pymarl.NETS.values()}
    if unknown:
        raise CannotRun(f"our nets {', '.join(sorted(unknown))} have no counterpart in the recording")
    trees = {
        net.ours: pymarl.from_pymarl(name, tensors.get(name, {}), like[net.ours], source=f"{group}/{name}")
        for name, net in pymarl.NETS.items()
        if net.ours in like
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), trees)


def _by_recorded_name(tree: PyTree) -> dict[str, np.ndarray]:
    return {
        f"{name}/{tensor}": array
        for name, net in pymarl.NETS.items()
        if net.ours in tree
        for tensor, array in pymarl.to_pymarl(name, tree[net.ours]).items()
    }


def _values(ran: Run, expected: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ours of the recorded intermediate values, and which of their entries count.

    What goes beyond the loss's own values follows from them by a look-up, a mask or a comparison.
    """
    values = ran.values
    mask, actions, avail = (ran.batch.mask, ran.batch.joint_action, ran.batch.avail_actions)
    real = mask > 0
    seen = np.pad(real, ((0, 0), (0, 1))) | np.pad(real, ((0, 0), (1, 0)))  # the states before and after a real step
    decided = seen[..., None] & avail.any(-1)
    whole = np.broadcast_to(seen[..., None, None], avail.shape)
    agent_qs, target_qs = (each["agent"] for each in (ran.utilities, ran.target_utilities))
    greedy, target_greedy = (np.where(avail, each, -np.inf).argmax(-1) for each in (agent_qs, target_qs))
    greedy = values.get("greedy_actions", greedy)
    chosen = values.get("chosen_qs", values.get("q_tot", _taken(agent_qs[:, :-1], actions)))
    y = _per_step(values["td_target"])
    steps = {
        "mask": np.broadcast_to(mask[..., None], y.shape),
        "chosen_action_qvals": _per_step(chosen),
        "chosen_action_qvals_agents": _taken(agent_qs[:, :-1], actions),
        "targets": y,
        "target_max_qvals": _per_step(values["next_value"]),
        "is_max_action": (actions == greedy[:, :-1]).all(-1, keepdims=True),
    }
    states = {
        "mac_out": (agent_qs, whole),
        "cur_max_actions": (greedy[..., None], decided[..., None]),
        "tar_max_actions": (target_greedy[..., None], decided[..., None]),
        "target_mac_out": (target_qs, whole),
        "target_max_agent_qvals": (_taken(target_qs, greedy), decided),
    }
    if "td_error" in values:
        td_error = _per_step(values["td_error"])
        steps |= {"td_error": td_error, "masked_td_error": td_error * mask[..., None]}
    if "weights" in values:
        steps |= {
            "ws": values["weights"][..., None],
            "max_action_qtot": values["greedy_value"][..., None],
            "qtot_larger": y > values["greedy_value"][..., None],
        }
    if "q_star" in values:
        q_star = values["q_star"][..., None]
        central, central_target = (each["central_agent"] for each in (ran.utilities, ran.target_utilities))
        steps |= {
            "central_chosen_action_qvals": q_star,
            "central_chosen_action_qvals_agents": _taken(central[:, :-1], actions)[..., None],
            "central_td_error": q_star - y,
            "central_masked_td_error": (q_star - y) * mask[..., None],
            "target_chosen_qvals": _taken(central_target, greedy)[:, :-1, :, None],
        }
        states |= {
            "central_mac_out": (central[..., None], whole),
            "central_target_mac_out": (central_target[..., None], whole),
            "central_target_max_agent_qvals": (_taken(central_target, greedy)[..., None], decided),
        }
    if "objectives" in values:
        steps |= _logit_values(agent_qs[:, :-1], avail[:, :-1])
    if "policy" in values:
        more_steps, more_states = _policy_values(ran, whole)
        steps, states = steps | more_steps, states | more_states
    everywhere = {"mask", "masked_td_error", "central_masked_td_error"}  # zero in the padding, in the recordings too
    found = {name: (value, np.ones_like(real) if name in everywhere else real) for name, value in steps.items()}
    found |= {name: _cut(name, *pair, expected[name]) for name, pair in states.items() if name in expected}
    return {name: pair for name, pair in found.items() if name in expected}


def _logit_values(logits: np.ndarray, avail: np.ndarray) -> dict[str, np.ndarray]:
    """MADDPG's policy as it is only logged: the softmax over all actions, zero where unavailable."""
    log_probs = scipy.special.log_softmax(logits, axis=-1)
    return {"ps": np.exp(log_probs) * avail, "log_ps": log_probs * avail}


def _policy_values(ran: Run, whole: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, ...]]]:
    """MASAC's policies and what was drawn from them: per step, and per state with the entries that count."""
    values, drawn, target_drawn = (ran.values, ran.values["drawn"], ran.values["target_drawn"])
    central, central_target = (each["central_agent"] for each in (ran.utilities, ran.target_utilities))
    num_agents, seen = drawn.shape[-1], whole[..., 0]
    steps = {
        "central_sampled_action_qvals_agents": _taken(central, drawn)[:, :-1, :, None],
        "central_sampled_action_qvals": np.repeat(values["drawn_q_star"][..., None], num_agents, axis=-1),
        "critic_bootstrap_qvals": values["next_value"][..., None],
        "policy_logs": values["log_probs"],
    }
    states = {
        "mac_out": (values["policy"], whole),
        "target_mac_out": (values["target_policy"], whole),
        "sampled_actions": (drawn, seen),
        "sampled_target_actions": (target_drawn, seen),
        "sampled_action_probs": (_taken(values["policy"], drawn), seen),
        "target_chosen_action_probs": (_taken(values["target_policy"], target_drawn), seen),
        "target_policy_logs": (values["target_log_probs"][..., None], seen[..., :1]),
        "central_target_action_qvals_agents": (_taken(central_target, target_drawn)[..., None], seen),
    }
    return steps, states


def _taken(utilities: np.ndarray, joint_action: np.ndarray) -> np.ndarray:
    return np.take_along_axis(utilities, joint_action[..., None], axis=-1)[..., 0]


def _per_step(value: np.ndarray) -> np.ndarray:
    return value if value.ndim == 3 else value[..., None]


def _cut(name: str, value: np.ndarray, where: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A value at all states cut to those that were recorded: all, those after a step, or those before one.

    Where the recording has put a number in the place of an unavailable action, there is nothing to compare.
    """
    kept = slice(None)
    if recorded.shape[1] < value.shape[1]:
        kept = slice(None, -1) if name == "target_max_agent_qvals" else slice(1, None)
    value, where = value[:, kept], where[:, kept]
    return value, where & (recorded != UNAVAILABLE).reshape(*where.shape, -1).all(-1)
