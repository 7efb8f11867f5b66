"""Learner recordings: our loss and learner step on the recorded batch, against everything that was recorded."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from comparison import EXACT, FLOAT32_STEP, Report, Tolerance

from wqmix_jax.algos.base import Algorithm, Context, hyperparams
from wqmix_jax.interop import pymarl
from wqmix_jax.learner import LearnerState, init_learner, learner_step
from wqmix_jax.train import algorithms, load_config
from wqmix_jax.types import EnvSpec, Episode, PyTree

Arrays = Mapping[str, np.ndarray]

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
}
"""The recordings' options with a counterpart of ours."""

LOSSES = {"loss": "loss", "qmix_loss": "qmix_loss", "central_loss": "q_star_loss", "grad_norm": "grad_norm"}
"""The recordings' scalars by our names."""

AGENTS = ("agent", "central_agent")
"""PyMARL's nets that are recurrent agents."""

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Each case is run a handful of times: a fifth of the time to compile, and no other result than rounding."""

FLOAT64 = Tolerance(absolute=1e-11, relative=1e-9)
STORED_FLOAT32 = Tolerance(absolute=1e-11, relative=FLOAT32_STEP)
FLOAT32_VALUE = Tolerance(of_largest=1e-5)
FLOAT32_PARAMETER = Tolerance(absolute=1e-5)
FLOAT32_SCALAR = Tolerance(relative=1e-5)


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
    if case.algo not in algorithms():
        raise NotYetCovered(f"{name} is not yet covered: there is no configs/algo/{case.algo}.yaml")
    hints = typing.get_type_hints(type(_base(case.algo)))
    for option, value in case.options.items():
        if value not in typing.get_args(hints[option]):
            raise NotYetCovered(f"{name} is not yet covered: {case.algo} has no {option}={value}")


def compare(case: str, arrays: Arrays, config: Mapping[str, Any], precision: str) -> Report:
    """Runs ``case`` in ``float64`` or ``float32`` and compares everything."""
    return compare_run(run(case, arrays, config, precision), arrays, config, precision)


def run(case: str, arrays: Arrays, config: Mapping[str, Any], precision: str) -> Run:
    """Five learner steps from the recorded parameters on the recorded batch, as the trainer takes them.

    Raises:
        NotYetCovered: if the project lacks the algorithm.
        CannotRun: if the recorded nets are not those of the project's algorithm.
    """
    check_covered(case)
    algo = build_algorithm(case, config)
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("float32"):
        batch = _batch(arrays, precision)
        params, target = (_params(group, algo, arrays, config, precision) for group in ("params", "target"))
        step = _compiled_step(algo, batch)
        learner = init_learner(params)._replace(target=target)
        taken, metrics = [], []
        for _ in range(NUM_STEPS):
            learner, metric, *seen = step(learner)
            taken.append(jax.device_get(learner.params))
            metrics.append(metric)
            first = seen if len(taken) == 1 else first
        grads, values, utilities, target_utilities = jax.device_get(first)
        losses = {name: np.array([metric[name] for metric in metrics]) for name in metrics[0]}
        return Run(batch, values, utilities, target_utilities, grads, taken, jax.device_get(learner.target), losses)


def build_algorithm(case: str, config: Mapping[str, Any]) -> Algorithm:
    """The project's algorithm with its yaml's options, except those that the recording names."""
    base = _base(CASES[case].algo)
    own = {field.name for field in dataclasses.fields(base)}
    recorded = {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config and ours in own}
    sizes = {option: type(getattr(base, option))(value) for option, value in recorded.items()}
    return dataclasses.replace(base, **CASES[case].options, **sizes)


def compare_run(ran: Run, arrays: Arrays, config: Mapping[str, Any], precision: str) -> Report:
    """Compares what came of a case with what was recorded."""
    report = Report()
    exactly = precision == "float64"

    def tolerance(recorded: np.ndarray, loose: Tolerance) -> Tolerance:
        return (STORED_FLOAT32 if recorded.dtype == np.float32 else FLOAT64) if exactly else loose

    expected = _group(arrays, "expected")
    if not expected:
        raise CannotRun("there are no expected/ values in it")
    for name, (got, where) in _values(ran, expected).items():
        kind = EXACT if name in ("mask", "ws") else tolerance(expected[name], FLOAT32_VALUE)
        recorded = expected[name].astype(got.dtype) if name == "ws" else expected[name]
        report.compare(f"expected/{name}", got, recorded, kind, where)
    for name, ours in LOSSES.items():
        for full, index in ((f"expected/{name}", 0), (f"trace/{name}", slice(None))):
            if full in arrays:
                got = ran.metrics.get(ours, np.array(np.nan))
                report.compare(full, got[index], arrays[full], tolerance(arrays[full], FLOAT32_SCALAR))
    steps = {"grads": (ran.grads, FLOAT32_VALUE)}
    steps |= {f"after{count}": (ran.params[count - 1], FLOAT32_PARAMETER) for count in (1, NUM_STEPS)}
    for group, (tree, loose) in steps.items():
        recorded = _group(arrays, group)
        if not recorded:
            report.absent.append(group)
            continue
        ours = _by_recorded_name(tree)
        unreached = set(config["params_without_grad"]) if group == "grads" else set()
        for name in sorted(recorded.keys() | ours.keys()):
            there = recorded.get(name, np.zeros_like(ours[name]) if name in unreached else np.empty(0))
            report.compare(f"{group}/{name}", ours.get(name, np.empty(0)), there, tolerance(there, loose))
    for name, tensor in _by_recorded_name(ran.target).items():
        report.compare(f"target/{name}", tensor, arrays[f"target/{name}"])
    held = [name for name in arrays if name.startswith(("expected/", "trace/"))]
    report.other = [name for name in held if name not in report.compared]
    return report


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
        obs=jnp.asarray(batch["obs"], dtype),
        state=jnp.asarray(batch["state"], dtype),
        avail_actions=jnp.asarray(batch["avail_actions"] > 0),
        joint_action=jnp.asarray(batch["actions"][:, :-1, :, 0], jnp.int32),
        reward=jnp.asarray(batch["reward"][:, :-1, 0], dtype),
        discount=jnp.asarray(1 - terminated),
        mask=jnp.asarray(mask),
    )


def _params(group: str, algo: Algorithm, arrays: Arrays, config: Mapping[str, Any], dtype: str) -> PyTree:
    """The recorded parameters in our tree, which they must fill."""
    sizes = EnvSpec(*(config[key] for key in ("n_agents", "n_actions", "obs_shape", "state_shape", "T")))
    like = jax.eval_shape(lambda: algo.init(jax.random.key(0), sizes))
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
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), trees)


def _by_recorded_name(tree: PyTree) -> dict[str, np.ndarray]:
    return {
        f"{name}/{tensor}": array
        for name, net in pymarl.NETS.items()
        if net.ours in tree
        for tensor, array in pymarl.to_pymarl(name, tree[net.ours]).items()
    }


def _compiled_step(algo: Algorithm, batch: Episode) -> Callable[[LearnerState], tuple[Any, ...]]:
    """The learner's step, and what it went through: gradients, intermediate values, utilities."""
    hp = jax.tree.map(jnp.asarray, hyperparams(algo))
    ctx = Context(epsilon=jnp.float32(0), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))
    key = jax.random.key(0)
    traced_once = SimpleNamespace(loss=jax.jit(algo.loss), sample_noise=algo.sample_noise)

    def step(learner: LearnerState, batch: Episode, hp: Any) -> tuple[Any, ...]:
        stepped, metrics = learner_step(traced_once, learner, batch, hp, ctx, jnp.int32(0), key)
        noise = algo.sample_noise(key, batch)
        grads, aux = jax.grad(traced_once.loss, has_aux=True)(learner.params, learner.target, batch, hp, ctx, noise)
        utilities = [
            {name: algo.unroll(tree[pymarl.NETS[name].ours], batch) for name in AGENTS if pymarl.NETS[name].ours in tree}
            for tree in (learner.params, learner.target)
        ]
        return stepped, metrics, grads, aux.values, *utilities

    jitted = jax.jit(step, compiler_options=QUICK_TO_COMPILE if jax.default_backend() == "cpu" else None)
    return lambda learner: jitted(learner, batch, hp)


def _values(ran: Run, expected: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ours of the recorded intermediate values, and which of their entries count.

    What goes beyond the loss's own values follows from them by a look-up, a mask or a comparison.
    """
    values = ran.values
    mask, actions, avail = (np.asarray(leaf) for leaf in (ran.batch.mask, ran.batch.joint_action, ran.batch.avail_actions))
    real = mask > 0
    seen = np.pad(real, ((0, 0), (0, 1))) | np.pad(real, ((0, 0), (1, 0)))  # the states before and after a real step
    decided = seen[..., None] & avail.any(-1)
    allowed = seen[..., None, None] & avail
    greedy = np.where(avail, values["agent_qs"], -np.inf).argmax(-1)
    greedy = values.get("greedy_actions", greedy)

    def taken(utilities: np.ndarray, joint_action: np.ndarray) -> np.ndarray:
        return np.take_along_axis(utilities, joint_action[..., None], axis=-1)[..., 0]

    def per_step(value: np.ndarray) -> np.ndarray:
        return value if value.ndim == 3 else value[..., None]

    chosen, y = (per_step(values[name]) for name in (("chosen_qs" if "chosen_qs" in values else "q_tot"), "td_target"))
    steps = {
        "mask": np.broadcast_to(mask[..., None], y.shape),
        "chosen_action_qvals": chosen,
        "chosen_action_qvals_agents": taken(values["agent_qs"][:, :-1], actions),
        "targets": y,
        "td_error": per_step(values["td_error"]),
        "masked_td_error": per_step(values["td_error"]) * mask[..., None],
        "is_max_action": (actions == greedy[:, :-1]).all(-1, keepdims=True),
    }
    states = {
        "mac_out": (values["agent_qs"], np.broadcast_to(seen[..., None, None], avail.shape)),
        "cur_max_actions": (greedy[..., None], decided[..., None]),
        "target_mac_out": (ran.target_utilities["agent"], allowed),
        "target_max_agent_qvals": (taken(ran.target_utilities["agent"], greedy), decided),
    }
    if "weights" in values:
        steps |= {
            "ws": values["weights"][..., None],
            "max_action_qtot": values["bootstrap_now"][..., None],
            "qtot_larger": y > values["bootstrap_now"][..., None],
        }
    if "q_star" in values:
        q_star = values["q_star"][..., None]
        central, central_target = (each["central_agent"] for each in (ran.utilities, ran.target_utilities))
        steps |= {
            "central_chosen_action_qvals": q_star,
            "central_chosen_action_qvals_agents": taken(central[:, :-1], actions)[..., None],
            "central_td_error": q_star - y,
            "central_masked_td_error": (q_star - y) * mask[..., None],
        }
        states |= {
            "central_mac_out": (central[..., None], np.broadcast_to(seen[..., None, None], avail.shape)),
            "central_target_mac_out": (central_target[..., None], allowed),
            "central_target_max_agent_qvals": (taken(central_target, greedy)[..., None], decided),
        }
    everywhere = {"mask", "masked_td_error", "central_masked_td_error"}  # zero in the padding, in the recordings too
    found = {name: (value, np.ones_like(real) if name in everywhere else real) for name, value in steps.items()}
    found |= {name: _cut(name, *pair, expected[name]) for name, pair in states.items() if name in expected}
    return {name: pair for name, pair in found.items() if name in expected}


def _cut(name: str, value: np.ndarray, where: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A value at all states cut to those that were recorded: all, those after a step, or those before one."""
    if recorded.shape[1] == value.shape[1]:
        return value, where
    kept = slice(None, -1) if name == "target_max_agent_qvals" else slice(1, None)
    return value[:, kept], where[:, kept]
