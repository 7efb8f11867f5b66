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
import scipy.special

from tests.parity import coma_cases
from tests.parity.comparison import EXACT, Report, Tolerance
from wqmix_jax import load_config
from wqmix_jax.algos import masac
from wqmix_jax.algos.base import Algorithm, Aux, Context, Hyperparams, Trained, hyperparams
from wqmix_jax.algos.coma import COMA
from wqmix_jax.algos.powqmix import POWQMIX
from wqmix_jax.interop import pymarl
from wqmix_jax.ops import coordination
from wqmix_jax.ops.action_selection import UNAVAILABLE
from wqmix_jax.options import CONFIG_DIR
from wqmix_jax.training.learner import (
    LearnerState,
    apply_gradients,
    clip_by_joint_norm,
    init_learner,
    optimizer_step,
)
from wqmix_jax.types import EnvSpec, Episode, PyTree

Arrays = Mapping[str, np.ndarray]

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
    "adv_hypernet_embed": "attention_dim",
    "num_kernel": "num_heads",
    "network_size": "mixer_layers",
    "opt_loss": "lambda_opt",
    "nopt_min_loss": "lambda_nopt",
    "w": "alpha",
    "policy_temp": "gumbel_temperature",
    "entropy_temp": "alpha_ent",
    "epsilon_target": "epsilon_start",
    "td_lambda": "td_lambda",
    "weighted_qmix_threshold": "threshold",
    "other_actions_weight": "alpha",
    "no_weighted_steps": "no_weighted_steps",
    "v_embed_dim": "recognizer_v_dim",
    "lambda_hypernet_embed_dim": "recognizer_hypernet_dim",
    "lambda_mixing_embed_dim": "recognizer_embed_dim",
    "cg_edges": "graph",
    "cg_payoff_rank": "payoff_rank",
    "duelling": "duelling",
    "msg_iterations": "iterations",
    "msg_anytime": "anytime",
    "msg_normalized": "normalised",
    "noise_dim": "latent_dim",
    "mi_loss": "mi_loss",
    "mi_scaler": "intrinsic_scale",
    "discrim_size": "discriminator_dim",
    "discrim_layers": "discriminator_layers",
    "rnn_agg_size": "memory_dim",
    "critic_width": "critic_dim",
}
"""The recordings' options with a counterpart of ours."""

WORDS = {"small": 2, "big": 3}
"""Options with other names in the recordings: hidden layers of QTRAN's networks."""

LOSSES = {
    "loss": "loss",
    "qmix_loss": "qmix_loss",
    "central_loss": "q_star_loss",
    "td_loss": "td_loss",
    "opt_loss": "opt_loss",
    "nopt_loss": "nopt_loss",
    "noopt_loss": "sign_loss",
    "qr_first_loss": "first_recognizer_loss",
    "qr_last_loss": "recognizer_loss",
    "hit_prob": "greedy_mean",
    "grad_norm": "grad_norm",
    "actor_loss": "actor_loss",
    "qmix_actor_loss": "-actor_loss",
    "agent_policy_loss": "last_objective",
    "logit_entropy": "logit_entropy",
    "discrim_loss": "discriminator_loss",
    "averaged_discrim_loss": "discriminator_loss",
    "coma_loss": "actor_loss",
    "agent_grad_norm": "grad_norm",
    "critic_loss": "critic_losses",
    "critic_grad_norm": "critic_grad_norms",
    "liir_loss": "actor_loss",
    "v_ex_loss": "v_ex_loss",
    "pg_ex_loss": "meta_loss",
    "intrinsic_loss": "intrinsic_loss",
    "grad_total": "gradient_product",
    "pg_loss1": "pg_loss1",
    "pg_loss2": "pg_loss2",
}
"""The recordings' scalars by our names; a minus says that theirs is maximised."""

STEP_VALUES = {
    "ws": "weights",
    "max_action_qtot": "greedy_value",
    "central_chosen_action_qvals": "q_star",
    "joint_qs": "q_star",
    "max_joint_qs": "greedy_q_star",
    "vs": "v",
    "target_vs": "next_v",
    "opt_error": "opt_error",
    "nopt_values": "nopt_error",
    "ans_chosen": "q_value",
    "ans_adv": "q_advantage",
    "target_chosen": "next_q_value",
    "target_adv": "next_q_advantage",
    "q_tot": "q_tot",
    "rest_q": "residual",
    "w_r": "residual_weights",
    "central_q_tot": "q_star",
    "q_tot_qmix": "q_tot",
    "lambda_mut_deltaq": "q_r_advantage",
    "training_weight": "weights",
    "first_q_r": "first_q_r",
    "first_lambda_mut_deltaq": "first_q_r_advantage",
    "discrim_loss": "cross_entropy",
    "discrim_prediction": "latent_logits",
}
"""The recordings' values of single steps that not every algorithm has, by our names."""

UNUSUAL_NAMES = {
    "grads_qr/": "grads/",
    "critic_grads_last_t/": "grads/",
    "grads_intrinsic/": "grads/",
    "/critic/fc3_v_mix.": "/critic/fc3.",
    "/critic/fc3_r_in.": "/proxy/fc3_r_in.",
    "/critic/fc4.": "/proxy/fc4.",
    "/mixer/hyper_w1.": "/mixer/hyper_w_1.",
    "/mixer/hyper_b1.0.": "/mixer/hyper_b_1.",
    "/mixer/hyper_w2.": "/mixer/hyper_w_final.",
    "/mixer/hyper_b2.": "/mixer/V.",
}
"""Parts of names in the recordings of POWQMIX, whose code comes from PyMARL2, and of COMA, and the usual ones."""

DCG_NAMES = {"utility/0.": "agent/fc2.", "payoff/": "payoffs/"}
"""The beginnings of names in DCG's recordings, and in `pymarl.NETS`: its agents have their last layer outside."""

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


class Run(NamedTuple):
    """The results of a case.

    Attributes:
        batch: the recorded episodes.
        values: the loss's intermediate values before the first step.
        utilities: of each net of agents, online and target: ``[B, T+1, N, A]``, by PyMARL's name of the net.
        target_utilities: the same of the target nets.
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
    for name, (got, where) in _values(ran, expected).items():
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
    recorded, ours = _group(arrays, group), _by_recorded_name(tree)
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
        ours = np.stack([_by_recorded_name({"critic": grads})[name] for grads in by_time])
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
        net, _, rest = _renamed(name, names).partition("/")
        tensors.setdefault(net, {})[rest] = tensor
    return tensors


def _by_recorded_name(tree: PyTree) -> dict[str, np.ndarray]:
    arrays = {
        f"{name}/{tensor}": array
        for name, net in pymarl.NETS.items()
        if net.ours in tree
        for tensor, array in pymarl.to_pymarl(name, tree[net.ours]).items()
    }
    if "payoff" not in tree:
        return arrays
    theirs = {ours: theirs for theirs, ours in DCG_NAMES.items()}
    return {_renamed(name, theirs): array for name, array in arrays.items()}


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    """Returns a name with another beginning, if it has one of these."""
    found = [old for old in beginnings if name.startswith(old)]
    return beginnings[found[0]] + name.removeprefix(found[0]) if found else name


def _values(ran: Run, expected: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ours of the recorded intermediate values, and which of their entries count.

    What goes beyond the loss's own values follows from them by a look-up, a mask or a comparison.
    """
    real = ran.batch.mask > 0
    seen = np.pad(real, ((0, 0), (0, 1))) | np.pad(real, ((0, 0), (1, 0)))  # the states before and after a real step
    where = {"seen": seen, "decided": seen[..., None] & ran.batch.avail_actions.any(-1)}
    where["valued"] = where["decided"].all(-1)
    if "critic_grads" in ran.values:
        steps = coma_cases.step_values(ran.values, ran.batch.mask[..., None])
        found = {name: (value, real) for name, value in steps.items()}
        found |= {name: (value, seen) for name, value in coma_cases.state_values(ran.values).items()}
        for number, grads in enumerate(ran.values.get("policy_gradients", ()), start=1):
            tensors = _by_recorded_name({"agent": grads}).items()
            found |= {f"pg_loss{number}_grad/{name}": (tensor, np.ones(tensor.shape, bool)) for name, tensor in tensors}
        return {name: pair for name, pair in found.items() if name in expected}
    found = {}
    for name, value in _step_values(ran, expected).items():
        everywhere = name.startswith(("mask", "central_masked"))  # zero in the padding, in the recordings too
        found[name] = value, np.ones_like(real) if everywhere else real
    for name, (value, kind) in _state_values(ran).items():
        if name in expected:
            found[name] = _cut(name, value, where[kind], expected[name])
    return {name: _flat(*pair, expected[name]) for name, pair in found.items() if name in expected}


def _step_values(ran: Run, expected: Arrays) -> dict[str, np.ndarray]:
    """Values of steps, ``[B, T, 1]`` or more, by their recorded names."""
    values, mask, actions = ran.values, ran.batch.mask[..., None], ran.batch.joint_action
    is_greedy = actions == _greedy(ran)[:, :-1]

    def per_step(name: str) -> np.ndarray:
        return values[name] if values[name].ndim == 3 else values[name][..., None]

    y, chosen = per_step("td_target"), _taken(ran.utilities["agent"][:, :-1], actions)
    steps = {
        "mask": np.broadcast_to(mask, y.shape),
        "chosen_action_qvals": next((per_step(name) for name in ("chosen_qs", "q_tot") if name in values), chosen),
        "chosen_action_qvals_agents": chosen,
        "targets": y,
        "td_targets": y,
        "target_max_qvals": per_step("next_value"),
        "target_joint_qs": per_step("next_value"),
        "critic_bootstrap_qvals": per_step("next_value"),
        "is_max_action": is_greedy.all(-1, keepdims=True),
        "masked_hit_prob": is_greedy.mean(-1, keepdims=True) * mask,
    }
    if "is_max_action" in expected and expected["is_max_action"].ndim == 4:  # QPLEX's is each agent's
        steps["is_max_action"] = is_greedy[..., None]
    steps |= {theirs: per_step(ours) for theirs, ours in STEP_VALUES.items() if ours in values}
    if "td_error" in values:
        steps |= {"td_error": per_step("td_error"), "masked_td_error": per_step("td_error") * mask}
    if "greedy_value" in values:
        steps["qtot_larger"] = y > per_step("greedy_value")
    if "q_star" in values:
        error = per_step("q_star") - y
        steps |= {"central_td_error": error, "central_masked_td_error": error * mask}
    if "nopt_error" in values:
        negative = np.minimum(per_step("nopt_error"), 0)
        steps |= {"masked_opt_error": per_step("opt_error") * mask}
        steps |= {"nopt_error": negative, "masked_nopt_error": negative * mask}
    if "central_agent" in ran.utilities:
        central = ran.utilities["central_agent"][:, :-1]
        steps["central_chosen_action_qvals_agents"] = _taken(central, actions)[..., None]
    return steps | _own_step_values(ran, expected)


def _own_step_values(ran: Run, expected: Arrays) -> dict[str, np.ndarray]:
    """Returns the values of steps that single algorithms alone have."""
    values, steps = ran.values, {}
    if "objectives" in values:
        steps |= _logit_values(ran.utilities["agent"][:, :-1], ran.batch.avail_actions[:, :-1])
        steps["target_chosen_qvals"] = _taken(ran.target_utilities["central_agent"], _greedy(ran))[:, :-1, :, None]
    if "payoffs" in values:
        steps |= {"mac_out": values["q_tot"][..., None], "target_out": values["next_value"][..., None]}
    if "cross_entropy" in values:
        steps |= {"q_softmax_actions": values["policies"][:, :-1], "discrim_target": ran.batch.latent[:, :-1, None]}
    steps |= _resq_step_values(ran, expected) if "residual" in values else {}
    steps |= _powqmix_step_values(ran) if "q_r" in values else {}
    return steps | (_policy_step_values(ran) if "policy" in values else {})


def _resq_step_values(ran: Run, expected: Arrays) -> dict[str, np.ndarray]:
    """Returns the residual at each step."""
    values, residual = ran.values, ran.values["residual"][..., None]
    # The released default takes minus the absolute value here, and here alone: its loss is always 0.
    is_free = (expected["Q_r"] <= 0).all()
    return {
        "rest_chosen_qvals_agents": _taken(ran.utilities["rest_agent"][:, :-1], ran.batch.joint_action),
        "td_error_without_residual": (values["q_tot"] - values["td_target"])[..., None],
        "Q_r": -np.abs(residual) if is_free else residual,
    }


def _powqmix_step_values(ran: Run) -> dict[str, np.ndarray]:
    """Returns the set of potentially optimal joint actions, and the utilities of those taken."""
    actions = ran.batch.joint_action
    return {
        "chosen_action_qvals": _taken(ran.utilities["agent"][:, :-1], actions),
        "is_max_joint_action": (actions == _greedy(ran)[:, :-1]).all(-1, keepdims=True),
        "condition": ran.values["weights"][..., None] == 1,
    }


def _state_values(ran: Run) -> dict[str, tuple[np.ndarray, str]]:
    """Values at all states, ``[B, T+1, N, ..]``, by their recorded names, and where they count: see `_values`."""
    values, greedy, avail = ran.values, _greedy(ran), ran.batch.avail_actions
    agent_qs, target_qs = ran.utilities["agent"], ran.target_utilities["agent"]
    one_hot = np.eye(avail.shape[-1])[greedy]
    best, target_best = (np.where(avail, qs, -np.inf) for qs in (agent_qs, target_qs))
    states = {
        "mac_out": (agent_qs, "seen"),
        "cur_max_actions": (greedy[..., None], "decided"),
        "cur_max_actions_onehot": (one_hot, "decided"),
        "target_next_actions": (greedy[..., None], "decided"),
        "target_mac_out": (target_qs, "seen"),
        "target_max_agent_qvals": (_taken(target_qs, greedy), "decided"),
        "target_chosen_qvals": (_taken(target_qs, greedy), "decided"),
        "tar_max_actions": (target_best.argmax(-1)[..., None], "decided"),
        "target_max_actions": (target_best.argmax(-1)[..., None], "decided"),
        "max_action_qvals": (best.max(-1), "decided"),
        "max_action_index": (greedy[..., None], "decided"),
        "max_actions_qvals": (best.max(-1)[..., None], "decided"),
        "max_actions_current": (greedy[..., None], "decided"),
        "max_actions_current_onehot": (one_hot, "decided"),
        "max_actions_onehot": (one_hot, "decided"),
    }
    if "hidden" in values:
        states |= {"mac_hidden_states": (values["hidden"], "seen")}
        states |= {"target_mac_hidden_states": (values["target_hidden"], "seen")}
    if "central_agent" in ran.utilities:
        central, central_target = (each["central_agent"] for each in (ran.utilities, ran.target_utilities))
        states |= {
            "central_mac_out": (central[..., None], "seen"),
            "central_target_mac_out": (central_target[..., None], "seen"),
            "central_target_max_agent_qvals": (_taken(central_target, greedy)[..., None], "decided"),
        }
    if "rest_agent" in ran.utilities:
        states["rest_mac_out"] = ran.utilities["rest_agent"], "seen"
    if "rest_agent" in ran.utilities or "q_r" in values:
        at_all_states = np.concatenate([values["greedy_value"], values["next_value"][:, -1:]], axis=1)
        name = "target_max_qvals" if "rest_agent" in ran.utilities else "target_central_q_tot"
        states[name] = at_all_states[..., None], "valued"
    if "payoffs" in values:  # DCG's `mac_out` is its value, of steps
        del states["mac_out"]
        states |= {"f_i": (agent_qs, "seen"), "f_ij": (values["payoffs"], "seen"), "hidden": (values["hidden"], "seen")}
        states |= {"target_f_i": (target_qs, "seen"), "target_f_ij": (values["target_payoffs"], "seen")}
        states |= {"target_hidden": (values["target_hidden"], "seen"), "greedy": (greedy, "decided")}
    if "objectives" in values:  # MADDPG's are the critic's, of steps
        del states["target_chosen_qvals"]
    return states | (_policy_state_values(ran) if "policy" in values else {})


def _greedy(ran: Run) -> np.ndarray:
    """The online agents' greedy actions at all states, ``[B, T+1, N]``."""
    best = np.where(ran.batch.avail_actions, ran.utilities["agent"], -np.inf).argmax(-1)
    return ran.values.get("greedy_actions", best)


def _taken(utilities: np.ndarray, joint_action: np.ndarray) -> np.ndarray:
    return np.take_along_axis(utilities, joint_action[..., None], axis=-1)[..., 0]


def _logit_values(logits: np.ndarray, avail: np.ndarray) -> dict[str, np.ndarray]:
    """MADDPG's policy as it is only logged: the softmax over all actions, zero where unavailable."""
    log_probs = scipy.special.log_softmax(logits, axis=-1)
    return {"ps": np.exp(log_probs) * avail, "log_ps": log_probs * avail}


def _policy_step_values(ran: Run) -> dict[str, np.ndarray]:
    """Returns the draws of MASAC at each step."""
    values, drawn = ran.values, ran.values["drawn"]
    return {
        "central_sampled_action_qvals_agents": _taken(ran.utilities["central_agent"], drawn)[:, :-1, :, None],
        "central_sampled_action_qvals": np.repeat(values["drawn_q_star"][..., None], drawn.shape[-1], axis=-1),
        "policy_logs": values["log_probs"],
    }


def _policy_state_values(ran: Run) -> dict[str, tuple[np.ndarray, str]]:
    """MASAC's policies, where others have utilities, and what was drawn from them."""
    values, drawn, target_drawn = (ran.values, ran.values["drawn"], ran.values["target_drawn"])
    central_target = ran.target_utilities["central_agent"]
    states = {
        "mac_out": values["policy"],
        "target_mac_out": values["target_policy"],
        "sampled_actions": drawn,
        "sampled_target_actions": target_drawn,
        "sampled_action_probs": _taken(values["policy"], drawn),
        "target_chosen_action_probs": _taken(values["target_policy"], target_drawn),
        "target_policy_logs": values["target_log_probs"][..., None],
        "central_target_action_qvals_agents": _taken(central_target, target_drawn)[..., None],
    }
    return {name: (value, "seen") for name, value in states.items()}


def _cut(name: str, value: np.ndarray, where: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A value at all states cut to those that were recorded: all, those after a step, or those before one.

    Where the recording has put a number in the place of an unavailable action, there is nothing to compare.
    """
    if recorded.shape[1] < value.shape[1]:
        before = ("target_max_agent_qvals", "max_action_qvals", "max_action_index")
        kept = slice(None, -1) if name in before else slice(1, None)
        value, where = value[:, kept], where[:, kept]
    if recorded.shape == value.shape:
        where = where.reshape(where.shape + (1,) * (value.ndim - where.ndim)) & (recorded != UNAVAILABLE)
    return value, where


def _flat(value: np.ndarray, where: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some values of steps are recorded one after the other, ``[B * T, 1]`` or ``[B * T]``, some once per episode."""
    if recorded.ndim < value.ndim and len(recorded) == len(value):
        return value[:, 0].reshape(recorded.shape), where[:, 0]
    if recorded.ndim == 1 and value.ndim == 3:
        return value.reshape(-1), where.reshape(-1)
    if recorded.ndim != 2 or value.ndim != 3:
        return value, where
    return value.reshape(-1, value.shape[-1]), where.reshape(-1)
