"""Recordings of COMA and LIIR: a learner call with the gradients of its steps, and its values by their names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.comparison import Arrays
from wqmix_jax.algos.base import Aux, Context, Hyperparams, Trained
from wqmix_jax.algos.coma import ACTORS, COMA
from wqmix_jax.algos.liir import LIIR
from wqmix_jax.networks.coma_critic import critic_inputs
from wqmix_jax.training.learner import LearnerState, optimizer_step
from wqmix_jax.types import Episode, PyTree


def noise(arrays: Arrays, dtype: str) -> np.ndarray:
    """Gumbel noise with which the recorded actions are drawn, those in the episodes' last states too."""
    actions = arrays["batch/actions"][..., 0]
    return 1e6 * np.eye(arrays["batch/avail_actions"].shape[-1], dtype=dtype)[actions]


def call(
    algo: COMA, learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: jax.Array
) -> tuple[LearnerState, PyTree, Aux]:
    """A learner call of COMA or LIIR.

    Returns:
        The learner after it; the actors' gradient, and the critic's in its first step; and what was recorded, among it
        ``critic_grads``, the gradient of each time's loss under the critic before its steps.
    """
    plain, taken = optimizer_step(algo, hp), {}

    def step(trained: Trained, grads: PyTree, name: str | None = None, **options: Any) -> tuple[Trained, jax.Array]:
        taken[name] = grads
        return plain(trained, grads, name, **options)

    rest = learner.target, batch, hp, ctx, noise
    trained, aux = algo.update(Trained(learner.params, learner.opt_state), *rest, step)
    policy = algo.policy(learner.params["agent"], batch, ctx)
    examples = algo.examples(learner.params, learner.target, batch, policy, hp, noise)
    gradient = jax.grad(algo.critic_loss, has_aux=True)
    by_time = jax.vmap(lambda now: gradient(learner.params["critic"], now)[0])
    critic_grads = by_time(jax.tree.map(lambda leaf: leaf[:, None], examples))
    actions = jax.nn.one_hot(noise.argmax(-1), noise.shape[-1], dtype=noise.dtype)
    logits = algo.unroll(learner.params["agent"], batch)
    values = {"actions": actions, "critic_grads": critic_grads}
    values["floored"] = (1 - ctx.epsilon) * jax.nn.softmax(logits) + ctx.epsilon / logits.shape[-1]
    grads = taken[ACTORS] | {"critic": jax.tree.map(lambda leaf: leaf[-1], critic_grads)}
    if isinstance(algo, LIIR):
        values |= _intrinsic_values(algo, learner, trained, batch, aux, actions)
        grads |= {"proxy": aux.values["proxy_grads"]}
        errors = aux.values["qs"][..., 0] - aux.values["td_target"]
    else:
        inputs = critic_inputs(batch.obs, batch.state, actions)
        values["init_qs"] = algo.critic_qs(learner.params["critic"], inputs, actions.shape[-1])
        values["target_qs"] = algo.critic_qs(learner.target["critic"], inputs, actions.shape[-1])
        errors = (aux.values["qs"] * actions[:, :-1]).sum(-1) - aux.values["td_target"]
    mask = jnp.broadcast_to(batch.mask[..., None], errors.shape)
    losses = (jnp.square(errors) * mask).sum((0, 2)) / mask.sum((0, 2))
    metrics = {"critic_losses": losses, "critic_grad_norms": aux.values["critic_grad_norms"][::-1]}
    metrics |= {name: values[name] for name in ("pg_loss1", "pg_loss2", "intrinsic_loss") if name in values}
    learner = learner._replace(params=trained.params, opt_state=trained.opt_state)
    return learner, grads, Aux(aux.metrics | metrics, aux.values | values)


def _intrinsic_values(
    algo: LIIR, learner: LearnerState, trained: Trained, batch: Episode, aux: Aux, all_actions: jax.Array
) -> dict[str, Any]:
    """Returns what LIIR's recordings have in addition."""
    actions = all_actions[:, :-1]
    alive, mask = algo.alive_agents(batch), batch.mask[..., None]

    def log_taken(params: PyTree) -> jax.Array:
        logits = algo.unroll(params["agent"], batch)[:, :-1]
        return (jax.nn.log_softmax(logits) * actions).sum(-1) * alive * mask

    old, new = log_taken(learner.params), log_taken(trained.params)
    ratio = jnp.exp((new - aux.values["log_policy"]).sum(-1))
    return {
        "alive": alive,
        "log_old": old,
        "log_new": new,
        "ratio": ratio,
        "pg_loss1": old.sum() / mask.sum() / old.shape[-1],
        "pg_loss2": (ratio * aux.values["ex_advantages"] * batch.mask).sum() / batch.mask.sum(),
        "intrinsic_loss": aux.metrics["meta_loss"] + aux.metrics["v_ex_loss"],
        "init": algo.evaluate(learner.params, batch, all_actions),
        "init_target": algo.evaluate(learner.target, batch, all_actions),
    }


def _all_actions(batch: Episode, aux: Aux) -> jax.Array:
    """Actions at all states, as the critics' inputs have them."""
    return aux.values["actions"]


def step_values(values: Arrays, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Values of steps, ``[B, T, N, ..]``, by their recorded names."""
    if "y_ex" in values:
        return {
            "mask": mask,
            "policy": values["floored"][:, :-1],
            "v_mix": values["qs"][..., 0],
            "target_mix": values["td_target"],
            "advantages": values["advantages"],
            "log_pi_taken": values["log_policy"],
            "log_pi_taken_old": values["log_old"],
            "log_pi_taken_new": values["log_new"],
            "mask_alive": values["alive"],
            "ratio_new": values["ratio"],
            "v_ex": values["v_ex"][:, :-1, None],
            "target_ex": values["y_ex"][..., None],
            "adv_ex": values["ex_advantages"],
        }
    qs, policy, actions = values["qs"], values["policy"], values["actions"][:, :-1]
    return {
        "mask": mask,
        "q_vals": qs,
        "q_taken": (qs * actions).sum(-1),
        "targets": values["td_target"],
        "policy": values["floored"][:, :-1],
        "mac_out": policy,
        "baseline": (policy * qs).sum(-1),
        "pi_taken": (policy * actions).sum(-1),
        "log_pi_taken": values["log_policy"],
        "advantages": values["advantages"],
    }


def state_values(values: Arrays) -> dict[str, np.ndarray]:
    """Values at all states, ``[B, T+1, N, ..]``, by their recorded names."""
    if "y_ex" in values:
        found = {"r_in": values["intrinsic"]}
        for name in ("init", "init_target"):
            r_in, v_mix, v_ex = values[name]
            found |= {f"{name}_r_in": r_in, f"{name}_v_mix": v_mix[..., None], f"{name}_v_ex": v_ex[..., None]}
        return found
    target_qs = values["target_qs"]
    taken = (target_qs * values["actions"]).sum(-1)
    return {"init_q_vals": values["init_qs"], "target_q_vals": target_qs, "targets_taken": taken}
