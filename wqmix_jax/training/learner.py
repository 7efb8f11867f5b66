"""One optimiser step, and the target copy, for any algorithm."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wqmix_jax.algos.base import Algorithm, Context, Hyperparams
from wqmix_jax.types import Array, Episode, PRNGKey, PyTree


class LearnerState(NamedTuple):
    """What a learner step changes.

    Attributes:
        params: the online parameters.
        target: the target copy of all of them.
        opt_state: RMSProp's mean squares.
        target_episodes: scalar int32, the episode count at the last target copy.
    """

    params: PyTree
    target: PyTree
    opt_state: PyTree
    target_episodes: Array


def init_learner(params: PyTree) -> LearnerState:
    """Starts the targets as copies and the mean squares at zero."""
    return LearnerState(
        params=params,
        target=jax.tree.map(jnp.copy, params),
        opt_state=optax.scale_by_rms(initial_scale=0.0).init(params),
        target_episodes=jnp.int32(0),
    )


def learner_step(
    algo: Algorithm,
    learner: LearnerState,
    batch: Episode,
    hp: Hyperparams,
    ctx: Context,
    key: PRNGKey,
) -> tuple[LearnerState, dict[str, Array]]:
    """One optimiser step on a batch of episodes; the targets stay.

    Args:
        algo: whose loss is minimised.
        learner: one seed's learner.
        batch: leaves ``[B, T(+1), ..]``.
        hp: the traced options.
        ctx: where training stands.
        key: for what the loss draws.

    Returns:
        The learner after the step, and scalars for the log: the loss's own and ``grad_norm`` before clipping.
    """
    grads, metrics = gradients(algo, learner, batch, hp, ctx, algo.sample_noise(key, batch))
    learner, grad_norm = apply_gradients(learner, grads, hp)
    return learner, metrics | {"grad_norm": grad_norm}


def gradients(
    algo: Algorithm, learner: LearnerState, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
) -> tuple[PyTree, dict[str, Array]]:
    """The loss's gradient by the online parameters, and its scalars for the log; arguments as in `learner_step`."""
    grads, aux = jax.grad(algo.loss, has_aux=True)(learner.params, learner.target, batch, hp, ctx, noise)
    return grads, aux.metrics


def apply_gradients(learner: LearnerState, grads: PyTree, hp: Hyperparams) -> tuple[LearnerState, Array]:
    """Clips by the joint norm and takes RMSProp's step.

    Returns:
        The learner after it, and the norm before clipping.
    """
    grads, grad_norm = clip_by_joint_norm(grads, hp.max_grad_norm)
    rms = optax.scale_by_rms(decay=hp.rms_decay, eps=hp.rms_eps, initial_scale=0.0, eps_in_sqrt=False)
    updates, opt_state = rms.update(grads, learner.opt_state)
    params = optax.apply_updates(learner.params, jax.tree.map(lambda update: -hp.lr * update, updates))
    return learner._replace(params=params, opt_state=opt_state), grad_norm


def copy_targets(learner: LearnerState, hp: Hyperparams, episodes: Array) -> LearnerState:
    """Copies all online parameters to the targets of the seeds whose interval has passed, after an optimiser step.

    A real branch over all seeds, so it costs nothing when it isn't time, and copies to the bit what the step gave.

    Args:
        learner: leaves ``[S, ..]``.
        hp: leaves ``[S]``.
        episodes: ``[S]`` int32, episodes before those of this iteration, as PyMARL counts them.
    """
    due = episodes - learner.target_episodes >= hp.target_update_interval

    def copy(learner: LearnerState) -> LearnerState:
        return learner._replace(
            target=jax.tree.map(functools.partial(jax.vmap(jnp.where), due), learner.params, learner.target),
            target_episodes=jax.vmap(jnp.where)(due, episodes, learner.target_episodes),
        )

    return jax.lax.cond(due.any(), copy, lambda learner: learner, learner)


def clip_by_joint_norm(grads: PyTree, max_norm: Array) -> tuple[PyTree, Array]:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), torch's rule; optax's leaves out the 1e-6.

    Returns:
        The clipped gradients and the norm before clipping.
    """
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads), norm
