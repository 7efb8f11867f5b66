"""Our values of a learner recording's intermediate ones, by their recorded names."""

from typing import NamedTuple

import numpy as np
import scipy.special

from tests.parity import coma_cases
from tests.parity.comparison import Arrays
from tests.parity.recorded_names import STEP_VALUES, by_recorded_name
from wqmix_jax.ops.action_selection import UNAVAILABLE
from wqmix_jax.types import Episode, PyTree


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


def recorded_values(ran: Run, expected: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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
            tensors = by_recorded_name({"agent": grads}).items()
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
    """Values at all states, ``[B, T+1, N, ..]``, by their recorded names, and where: see `recorded_values`."""
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
