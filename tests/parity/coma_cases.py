"""COMA's recordings: a learner call with the gradients of its steps, and its values by their recorded names."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wqmix_jax.algos.base import Aux, Context, Hyperparams, Trained
from wqmix_jax.algos.coma import ACTORS, COMA
from wqmix_jax.networks.coma_critic import critic_inputs
from wqmix_jax.training.learner import LearnerState, optimizer_step
from wqmix_jax.types import Episode, PyTree

Arrays = Mapping[str, np.ndarray]


def noise(arrays: Arrays, dtype: str) -> np.ndarray:
    """Gumbel noise with which the recorded actions are drawn, those in the episodes' last states too."""
    actions = arrays["batch/actions"][..., 0]
    return 1e6 * np.eye(arrays["batch/avail_actions"].shape[-1], dtype=dtype)[actions]


def call(
    algo: COMA, learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: jax.Array
) -> tuple[LearnerState, PyTree, Aux]:
    """A learner call of COMA.

    Returns:
        The learner after it; the actors' gradient, and the critic's in its first step; and what was recorded, among it
        ``critic_grads``, the gradient of each time's loss under the critic before its steps.
    """
    plain, taken = optimizer_step(algo, hp), {}

    def step(trained: Trained, grads: PyTree, name: str, **options: Any) -> tuple[Trained, jax.Array]:
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
    inputs = critic_inputs(batch.obs, batch.state, actions)
    logits = algo.unroll(learner.params["agent"], batch)
    values = aux.values | {
        "actions": actions,
        "critic_grads": critic_grads,
        "init_qs": algo.critic_qs(learner.params["critic"], inputs, actions.shape[-1]),
        "target_qs": algo.critic_qs(learner.target["critic"], inputs, actions.shape[-1]),
        "floored": (1 - ctx.epsilon) * jax.nn.softmax(logits) + ctx.epsilon / logits.shape[-1],
    }
    errors = (values["qs"] * actions[:, :-1]).sum(-1) - values["td_target"]
    mask = jnp.broadcast_to(batch.mask[..., None], errors.shape)
    losses = (jnp.square(errors) * mask).sum((0, 2)) / mask.sum((0, 2))
    metrics = {"critic_losses": losses, "critic_grad_norms": values["critic_grad_norms"][::-1]}
    grads = taken[ACTORS] | {"critic": jax.tree.map(lambda leaf: leaf[-1], critic_grads)}
    learner = learner._replace(params=trained.params, opt_state=trained.opt_state)
    return learner, grads, Aux(aux.metrics | metrics, values)


def step_values(values: Arrays, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Values of steps, ``[B, T, N, ..]``, by their recorded names."""
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
    target_qs = values["target_qs"]
    taken = (target_qs * values["actions"]).sum(-1)
    return {"init_q_vals": values["init_qs"], "target_q_vals": target_qs, "targets_taken": taken}
