"""Learner recordings: our loss and learner step on the recorded batch, against everything that was recorded."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import coma_cases
from tests.parity.comparison import EXACT, Arrays, Report, Tolerance
from tests.parity.learner_values import Run, recorded_values
from tests.parity.recorded_names import DCG_NAMES, LOSSES, SIZES, UNUSUAL_NAMES, WORDS, by_recorded_name, renamed
from wqmix_jax import load_config
from wqmix_jax.algos import masac
from wqmix_jax.algos.base import Algorithm, Aux, Context, Hyperparams, Trained, hyperparams
from wqmix_jax.algos.coma import COMA
from wqmix_jax.algos.powqmix import POWQMIX
from wqmix_jax.interop import pymarl
from wqmix_jax.ops import coordination
from wqmix_jax.options import CONFIG_DIR
from wqmix_jax.training.learner import (
    LearnerState,
    apply_gradients,
    clip_by_joint_norm,
    init_learner,
    optimizer_step,
)
from wqmix_jax.types import EnvSpec, Episode, PyTree

Step = Callable[[LearnerState, Episode, Context, PyTree], tuple[Any, ...]]

NUM_STEPS = 5
"""Optimiser steps of a recording, all on the same batch."""


class Case(NamedTuple):
    """The names here of a case of the recordings.

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
    "resq": Case("resq", {"residual_sign": "none"}),
    "resq_mse": Case("resq"),
    "powqmix": Case("powqmix"),
    "dcg": Case("dcg"),
    "dcg_v": Case("dcg"),
    "dcg_rank": Case("dcg"),
    "dcg_v_rank": Case("dcg"),
    "maven": Case("maven", {"discriminator": "step"}),
    "maven_intrinsic": Case("maven", {"discriminator": "step", "intrinsic_reward": "released"}),
    "maven_rnn": Case("maven", {"discriminator": "released_trajectory"}),
    "coma": Case("coma"),
    "coma_frozen": Case("coma"),
    "liir": Case("liir", {"alive": "action_0", "standardise_padding": True}),
}
"""By the names in the recordings."""

AGENTS = {name: pymarl.NETS[name].ours for name in ("agent", "central_agent", "rest_agent")}
"""PyMARL's recurrent agents and their names here."""

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Each case is run a handful of times: a fifth of the time to compile, and no other result than rounding."""

FLOAT64 = Tolerance(absolute=1e-11, relative=1e-9)
STORED_FLOAT32 = Tolerance(absolute=1e-11, relative=float(np.finfo(np.float32).eps))
FLOAT32_VALUE = Tolerance(relative_to_largest=1e-5)
FLOAT32_PARAMETER = Tolerance(absolute=1e-5)
FLOAT32_OF_LARGEST_STEP = 1e-5


NUM_TRIES = 64
"""The most repetitions of a step whose ties rounding decides."""


class NotYetCovered(Exception):
    """A case whose algorithm the project doesn't have."""


class CannotRun(Exception):
    """A file that isn't what a case file must be."""


def check_covered(name: str) -> None:
    """Raises `NotYetCovered` as long as the project lacks the algorithm of case ``name``."""
    case = CASES[name]
    if not (CONFIG_DIR / "algo" / f"{case.algo}.yaml").is_file():
        raise NotYetCovered(f"{name} is not yet covered: there is no configs/algo/{case.algo}.yaml")
    for option, value in case.options.items():
        kinds = typing.get_type_hints(type(_base(case.algo)))
        if kinds[option] is not bool and value not in typing.get_args(kinds[option]):
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
    arrays = _by_usual_names(arrays)
    tensors = _without_nets(arrays, _idle_nets(arrays, config, like))
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("float32"):
        batch = _batch(arrays, precision)
        params, target = (_params(group, like, tensors, precision) for group in ("params", "target"))
        step = step or compile_step(algo)
        learner = jax.jit(functools.partial(init_learner, algo))(params)._replace(target=target)
        epsilon = jnp.asarray(config.get("epsilon_online", config.get("epsilon", 0.0)))
        ctx = Context(epsilon, env_steps=jnp.int32(config.get("t_env", 0)), learner_steps=jnp.int32(0))
        taken, metrics, first = [], [], None
        for count in range(1, NUM_STEPS + 1):
            noise = _noise(_group(arrays, f"noise/step{count}"), batch, precision)
            if isinstance(algo, COMA):
                noise = coma_cases.noise(arrays, precision)
            elif isinstance(algo, POWQMIX):
                noise = metrics[-1]["clipped_norm"] if metrics else jnp.zeros((), precision)
            ctx = ctx._replace(learner_steps=jnp.int32(count - 1))
            take = functools.partial(step, batch=batch, ctx=ctx, noise=noise)
            if case.startswith("dcg"):
                learner, metric, *seen = _with_recorded_ties(take, learner, arrays["trace/loss"][count - 1], precision)
            else:
                learner, metric, *seen = take(learner)
            taken.append(jax.device_get(learner.params))
            metrics.append(metric)
            first = first or jax.device_get(seen)
        grads, values, utilities, target_utilities = first
        losses = {name: np.array([metric[name] for metric in metrics]) for name in metrics[0]}
        return Run(batch, values, utilities, target_utilities, grads, taken, jax.device_get(learner.target), losses)


def _with_recorded_ties(
    take: Callable[[LearnerState], tuple[Any, ...]], learner: LearnerState, recorded: float, precision: str
) -> tuple[Any, ...]:
    """Takes DCG's step of which the loss was recorded.

    Around cycles, messages make actions exactly equally good in a few states, in which rounding decides in the authors'
    code. Here it decides too, without our rule for ties, and where it decides otherwise, the step is repeated from
    parameters that differ by roundings.
    """
    with mock.patch.object(coordination, "TIE", 0):
        first = take(learner)
        for seed in range(1, NUM_TRIES):
            tried = first if seed == 1 else take(learner._replace(params=_nudged(learner.params, seed)))
            if np.isclose(tried[1]["loss"], recorded, rtol=1e-9 if precision == "float64" else 1e-5, atol=0):
                return tried
    return first


def _nudged(params: PyTree, seed: int) -> PyTree:
    """Changes each parameter by about a rounding of itself."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf * (1 + jnp.finfo(leaf.dtype).eps * random.normal(size=leaf.shape)).astype(leaf.dtype), params
    )


def compile_step(algo: Algorithm) -> Step:
    """The learner's step, and what it went through: gradients, intermediate values, utilities."""
    loss = jax.jit(algo.loss)

    def step(learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree) -> tuple[Any, ...]:
        if isinstance(algo, POWQMIX):
            stepped, grads, aux = _powqmix_call(algo, learner, batch, hp, ctx, noise)
        elif isinstance(algo, COMA):
            stepped, grads, aux = coma_cases.call(algo, learner, batch, hp, ctx, noise)
        else:
            grads, aux = jax.grad(loss, has_aux=True)(learner.params, learner.target, batch, hp, ctx, noise)
            stepped, grad_norm = apply_gradients(algo, learner, grads, hp)
            aux = aux._replace(metrics=aux.metrics | {"grad_norm": grad_norm})
        metrics = aux.metrics
        if "objectives" in aux.values:
            metrics |= {"last_objective": aux.values["objectives"][-1]}
        utilities = [
            {name: algo.unroll(tree[ours], batch) for name, ours in AGENTS.items() if ours in tree}
            for tree in (learner.params, learner.target)
        ]
        return stepped, metrics, grads, aux.values, *utilities

    jitted = jax.jit(step, compiler_options=QUICK_TO_COMPILE if jax.default_backend() == "cpu" else None)

    def call(learner: LearnerState, batch: Episode, ctx: Context, noise: PyTree) -> tuple[Any, ...]:
        return jitted(learner, batch, jax.tree.map(jnp.asarray, hyperparams(algo)), ctx, noise)

    return call


def _powqmix_call(
    algo: POWQMIX, learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, left_over: jax.Array
) -> tuple[LearnerState, PyTree, Aux]:
    """A learner call of POWQMIX, with the clip of the released code.

    There the clip of Q_r's steps counts the gradients of the other nets, too, which the last call left behind, and
    scales them as well. ``left_over`` is their norm after that call's clip; `Trained.opt_state` carries it from step to
    step. Q_r's gradient is that of its first step, those of the other nets are with the weights after its last step.
    """
    plain = optimizer_step(algo, hp)

    def step(trained: Trained, grads: PyTree, name: str | None = None) -> tuple[Trained, jax.Array]:
        if name != "recognizer":
            return plain(trained, grads, name)
        both = {"recognizer": grads["recognizer"], "left over": trained.opt_state["left over"]}
        clipped, norm = clip_by_joint_norm(both, hp.max_grad_norm)
        trained, _ = plain(trained, clipped, name, clips=False)
        return trained._replace(opt_state=trained.opt_state | {"left over": clipped["left over"]}), norm

    rest = learner.target, batch, hp, ctx
    opt_state = learner.opt_state | {"left over": left_over}
    trained, aux = algo.update(Trained(learner.params, opt_state), *rest, (), step)
    gradient = jax.grad(algo.loss, has_aux=True)
    first, first_aux = gradient(learner.params, *rest, ())
    last, _ = gradient(learner.params | {"recognizer": trained.params["recognizer"]}, *rest, ())
    norm = aux.metrics["grad_norm"]
    metrics = {"first_recognizer_loss": first_aux.metrics["recognizer_loss"]}
    metrics |= {"clipped_norm": norm * jnp.minimum(1, hp.max_grad_norm / (norm + 1e-6))}
    values = {f"first_{name}": first_aux.values[name] for name in ("q_r", "q_r_advantage")}
    aux = Aux(aux.metrics | metrics, aux.values | values)
    opt_state = {name: trained.opt_state[name] for name in learner.opt_state}
    return learner._replace(params=trained.params, opt_state=opt_state), last | {"recognizer": first["recognizer"]}, aux


def build_algorithm(case: str, config: Mapping[str, Any]) -> Algorithm:
    """The project's algorithm with its yaml's options, except those that the recording names."""
    base = _base(CASES[case].algo)
    own = {field.name for field in dataclasses.fields(base)}
    recorded = {ours: config[theirs] for theirs, ours in SIZES.items() if theirs in config and ours in own}
    if "critic_lr_factor" in own and "critic_lr" in config:
        recorded["critic_lr_factor"] = config["critic_lr"] / config["lr"]
    like = {option: getattr(base, option) for option, value in recorded.items() if value is not None}
    sizes = {
        option: WORDS.get(value, value) if like.get(option) is None else type(like[option])(WORDS.get(value, value))
        for option, value in recorded.items()
    }
    return dataclasses.replace(base, **CASES[case].options, **sizes)


def compare_run(ran: Run, arrays: Arrays, config: Mapping[str, Any], precision: str) -> Report:
    """Compares the results of a case with the recording."""
    if not _group(arrays, "expected"):
        raise CannotRun("there are no expected/ values in it")
    arrays = _by_usual_names(arrays)
    report, idle = Report(), _idle_nets(arrays, config, ran.target)
    arrays = _without_nets(arrays, idle)
    _compare_values(report, ran, arrays, precision)
    _compare_losses(report, ran, arrays, precision)
    _compare_by_time(report, ran, arrays, precision)
    _compare_tensors(report, "grads", ran.grads, arrays, precision, unreached=config.get("params_without_grad", ()))
    for count in (1, NUM_STEPS):
        _compare_tensors(report, f"after{count}", ran.params[count - 1], arrays, precision)
    _compare_tensors(report, "target", ran.target, arrays, precision)
    recorded = [name for name in arrays if name.startswith(("expected/", "trace/"))]
    report.other = [name for name in recorded if name not in report.compared]
    report.other += [name if "/" in name else f"the net {name}" for name in sorted(idle)]
    return report


def _compare_values(report: Report, ran: Run, arrays: Arrays, precision: str) -> None:
    expected = _group(arrays, "expected")
    for name, (got, where) in recorded_values(ran, expected).items():
        recorded = expected[name]
        tolerance = _tolerance(recorded, precision, FLOAT32_VALUE)
        if name in ("mask", "ws"):
            recorded, tolerance = recorded.astype(got.dtype), EXACT
        report.compare(f"expected/{name}", got, recorded, tolerance, where)


def _compare_losses(report: Report, ran: Run, arrays: Arrays, precision: str) -> None:
    """Compares the scalars; an actor's loss may pass zero, so all five steps decide how far rounding may go."""
    for theirs, ours in LOSSES.items():
        for name, steps in ((f"expected/{theirs}", 0), (f"trace/{theirs}", slice(None))):
            if name in arrays and arrays[name].size == (NUM_STEPS if name.startswith("trace/") else 1):
                got = ran.metrics.get(ours.removeprefix("-"), np.full(NUM_STEPS, np.nan))[steps]
                got = -got if ours.startswith("-") else got
                steps_of_it = arrays.get(f"trace/{theirs}", arrays[name])
                in_float32 = Tolerance(absolute=FLOAT32_OF_LARGEST_STEP * float(np.abs(steps_of_it).max()))
                report.compare(name, got, arrays[name], _tolerance(arrays[name], precision, in_float32))


def _compare_tensors(
    report: Report, group: str, tree: PyTree, arrays: Arrays, precision: str, unreached: Sequence[str] = ()
) -> None:
    """Compares one tensor for each of the parameters; what the loss doesn't reach has no recorded gradient."""
    recorded, ours = _group(arrays, group), by_recorded_name(tree)
    if group == "target":  # of some cases only the target nets that enter the loss were recorded
        nets = {name.partition("/")[0] for name in recorded}
        ours = {name: tensor for name, tensor in ours.items() if name.partition("/")[0] in nets}
    if not recorded:
        report.absent.append(group)
        return
    recorded |= {name: np.zeros_like(ours[name]) for name in unreached if name in ours}
    loose = FLOAT32_VALUE if group == "grads" else FLOAT32_PARAMETER
    for name in sorted(recorded.keys() | ours.keys()):
        there, here = recorded.get(name, np.empty(0)), ours.get(name, np.empty(0))
        report.compare(f"{group}/{name}", here, there, _tolerance(there, precision, loose))


def _compare_by_time(report: Report, ran: Run, arrays: Arrays, precision: str) -> None:
    """Compares the gradient of the critic's loss at each time, where it was recorded."""
    for name, recorded in _group(arrays, "critic_grads").items():
        times = range(len(recorded))
        by_time = [jax.tree.map(lambda leaf, time=time: leaf[time], ran.values["critic_grads"]) for time in times]
        ours = np.stack([by_recorded_name({"critic": grads})[name] for grads in by_time])
        report.compare(f"critic_grads/{name}", ours, recorded, _tolerance(recorded, precision, FLOAT32_VALUE))


def _tolerance(recorded: np.ndarray, precision: str, in_float32: Tolerance) -> Tolerance:
    if precision == "float32":
        return in_float32
    return STORED_FLOAT32 if recorded.dtype == np.float32 else FLOAT64


@functools.cache
def _base(algo: str) -> Algorithm:
    return load_config(f"+algo={algo}").algo


def _by_usual_names(arrays: Arrays) -> dict[str, np.ndarray]:
    """The recording with PyMARL's names of QMIX's tensors, and with all gradients in one group.

    Of gradients that were recorded for each time, that is the last time's.
    """
    found = {}
    for name, array in arrays.items():
        for theirs, usual in UNUSUAL_NAMES.items():
            name = name.replace(theirs, usual)
        found[name] = array
        if name.startswith("critic_grads/"):
            found[name.replace("critic_grads/", "grads/")] = array[-1]
    return found


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
        latent=_latent(batch),
    )


def _latent(batch: Arrays) -> PyTree:
    """The latents of MAVEN's episodes at each place, which are recorded one-hot at the first."""
    if "noise" not in batch:
        return ()
    return np.broadcast_to(batch["noise"][:, :1].argmax(-1), batch["noise"].shape[:2])


def _noise(recorded: Arrays, batch: Episode, dtype: str) -> PyTree:
    """Returns the random numbers of a step's loss, as the algorithm's `sample_noise` would."""
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
    """Returns recorded nets and tensors without a counterpart that the loss there doesn't reach: a critic's mixer."""
    unreached = set(config.get("params_without_grad", ()))
    nets: dict[str, set[str]] = {}
    for name in _group(arrays, "params"):
        nets.setdefault(name.partition("/")[0], set()).add(name)
    known = {name for name, net in pymarl.NETS.items() if net.ours in ours}
    idle = {net for net, names in nets.items() if net not in known and names <= unreached}
    for net in nets.keys() & known:  # MAVEN's agents have layers that are never used
        named = {f"{net}/{tensor}" for layout in pymarl.NETS[net].layouts for tensor in layout}
        idle |= (nets[net] & unreached) - named
    return idle


def _without_nets(arrays: Arrays, nets: Set[str]) -> dict[str, np.ndarray]:
    """The recording without these tensors, and without those of these nets."""
    groups = ("params", "target", "grads", "after1", f"after{NUM_STEPS}")
    left_out = {f"{group}/{net}" for group in groups for net in nets}
    return {name: array for name, array in arrays.items() if not left_out & {name, name.rpartition("/")[0]}}


def _params(group: str, like: PyTree, arrays: Arrays, dtype: str) -> PyTree:
    """The recorded parameters in our tree, which they must fill; a target net that isn't recorded is a copy."""
    names = DCG_NAMES if "payoff" in like else {}
    tensors = _by_net(_group(arrays, group), names)
    if group == "target":
        tensors = _by_net(_group(arrays, "params"), names) | tensors
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


def _by_net(recorded: Arrays, names: Mapping[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Maps each net's name to its tensors, after the beginnings of names are changed to ``names``."""
    tensors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in recorded.items():
        net, _, rest = renamed(name, names).partition("/")
        tensors.setdefault(net, {})[rest] = tensor
    return tensors
