"""The optimiser step and the target update of any algorithm, given the gradients that `batch_gradients` computes."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wqmix_jax.algos.base import Algorithm, Hyperparams, OptimizerStep, Trained, hyperparams
from wqmix_jax.ops.moments import Moments, add_moments, no_moments
from wqmix_jax.training.priorities import is_prioritised
from wqmix_jax.types import Array, PyTree


class LearnerState(NamedTuple):
    """The part of a train state that a learner step changes.

    Attributes:
        params: the online parameters.
        target: the target copy of all of them.
        opt_state: see `Trained`; RMSProp's mean squares for example.
        target_episodes: scalar int32, the episode count at the last hard copy of the targets.
        moments: `Moments` by name: ``rewards`` and ``returns``, of those that are standardised.
    """

    params: PyTree
    target: PyTree
    opt_state: PyTree
    target_episodes: Array
    moments: dict[str, Moments]


def init_learner(algo: Algorithm, params: PyTree) -> LearnerState:
    """Starts the targets as copies and the optimiser's means at zero."""
    return LearnerState(
        params=params,
        target=jax.tree.map(jnp.copy, params),
        opt_state=_init_optimizers(algo, params),
        target_episodes=jnp.int32(0),
        moments={name: no_moments() for name in standardised(algo)},
    )


def _init_optimizers(algo: Algorithm, params: PyTree) -> PyTree:
    init, several = optimizer(algo, hyperparams(algo)).init, algo.optimizers()
    if not several:
        return init(params)
    return {name: init({net: params[net] for net in nets}) for name, nets in several.items()}


def standardised(algo: Algorithm) -> tuple[str, ...]:
    """Returns the names of the quantities that the algorithm standardises, see `LearnerState.moments`."""
    chosen = {"rewards": algo.standardise_rewards, "returns": getattr(algo, "standardise_returns", False)}
    return tuple(name for name, is_chosen in chosen.items() if is_chosen)


def add_returns(learner: LearnerState, metrics: Mapping[str, Array], num_steps: Array) -> LearnerState:
    """Adds the targets of a batch to the moments of a learner that standardises them.

    Args:
        learner: leaves ``[S, ..]``.
        metrics: those of `batch_gradients`, ``[S]``.
        num_steps: ``[S]``, the steps of the batch.
    """
    if "returns" not in learner.moments:
        return learner
    old, mean, square = learner.moments["returns"], metrics["td_target_mean"], metrics["td_target_square_mean"]
    # Standardised targets are about 0, except in the first batches, where float32 may cancel the difference out.
    variance = jnp.maximum(square - jnp.square(mean), 1e-6 * square) * jnp.square(old.deviation)
    batch = Moments(num_steps.astype(jnp.float32), mean * old.deviation + old.mean, variance)
    return learner._replace(moments=learner.moments | {"returns": add_moments(old, batch)})


def optimizer(algo: Algorithm, hp: Hyperparams) -> optax.GradientTransformation:
    """Returns the optimiser of ``algo`` without the clip before it and the learning rate after it.

    Args:
        algo: says which.
        hp: the traced options. Not ``optax.rmsprop(lr)``: they are traced scalars, one value per seed in a sweep.
    """
    if algo.optimizer == "rmsprop":
        # PyTorch's RMSProp: epsilon is added outside of the root.
        scale = optax.scale_by_rms(decay=hp.rms_decay, eps=hp.rms_eps, initial_scale=0.0, eps_in_sqrt=False)
    else:
        make = optax.scale_by_radam if algo.optimizer == "radam" else optax.scale_by_adam
        scale = make(b1=algo.adam_b1, b2=algo.adam_b2, eps=algo.adam_eps)
    if algo.weight_decay == 0:
        return scale
    decay = optax.add_decayed_weights(algo.weight_decay)
    return optax.chain(scale, decay) if algo.optimizer == "adamw" else optax.chain(decay, scale)


def has_schedule(algo: Algorithm) -> bool:
    """Returns True if a value that the learner uses depends on the run's ``total_env_steps``."""
    return algo.lr_schedule != "constant" or is_prioritised(algo)


def with_scheduled_lr(algo: Algorithm, hp: Hyperparams, env_steps: Array, total_env_steps: Array) -> Hyperparams:
    """Returns the traced options with the learning rate after ``env_steps``; all of the same shape."""
    if algo.lr_schedule == "constant":
        return hp
    progress = jnp.minimum(env_steps / total_env_steps, 1)
    left = 1 - progress if algo.lr_schedule == "linear" else (1 + jnp.cos(jnp.pi * progress)) / 2
    return hp._replace(lr=hp.lr * left)


def apply_gradients(
    algo: Algorithm, learner: LearnerState, grads: PyTree, hp: Hyperparams
) -> tuple[LearnerState, Array]:
    """Clips by the joint norm, or each net by its own, and takes the optimiser's step; the targets stay.

    Args:
        algo: the algorithm, for its optimiser.
        learner: one seed's learner.
        grads: the gradients of the loss with respect to its parameters.
        hp: the traced options.

    Returns:
        The learner after it, and the joint norm before clipping.
    """
    trained, grad_norm = optimizer_step(algo, hp)(Trained(learner.params, learner.opt_state), grads)
    return learner._replace(**trained._asdict()), grad_norm


def optimizer_step(algo: Algorithm, hp: Hyperparams) -> OptimizerStep:
    """Returns the optimiser's step that `Algorithm.update` takes."""

    def step(
        trained: Trained, grads: PyTree, name: str | None = None, *, lr: Array | None = None, clips: bool = True
    ) -> tuple[Trained, Array]:
        params, opt_state = trained
        if name is not None:
            nets, opt_state = algo.optimizers()[name], opt_state[name]
            params, grads = ({net: tree[net] for net in nets} for tree in (params, grads))
        max_norm, rate = hp.max_grad_norm if clips else jnp.asarray(jnp.inf), hp.lr if lr is None else lr
        clipped, grad_norm = clip_by_joint_norm(grads, max_norm)
        if algo.clips_nets_apart:
            clipped = {net: clip_by_joint_norm(grads[net], max_norm)[0] for net in grads}
        updates, opt_state = optimizer(algo, hp).update(clipped, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda update: -rate * update, updates))
        if name is not None:
            params, opt_state = trained.params | params, trained.opt_state | {name: opt_state}
        return Trained(params, opt_state), grad_norm

    return step


def update_targets(
    algo: Algorithm, learner: LearnerState, hp: Hyperparams, episodes: Array, ready: Array
) -> LearnerState:
    """Updates the targets of the seeds that took an optimiser step, softly or by `copy_targets`.

    Args:
        algo: says how.
        learner: leaves ``[S, ..]``.
        hp: leaves ``[S]``.
        episodes: see `copy_targets`.
        ready: ``[S]`` bool, the seeds that took the step; the targets of the others stay.
    """
    if algo.target_update_tau is None:
        return copy_targets(learner, hp, episodes, ready)
    target = jax.vmap(optax.incremental_update)(learner.params, learner.target, hp.target_update_tau)
    select = functools.partial(jax.vmap(jnp.where), ready)
    return learner._replace(target=jax.tree.map(select, target, learner.target))


def copy_targets(learner: LearnerState, hp: Hyperparams, episodes: Array, ready: Array) -> LearnerState:
    """Copies all online parameters to the targets of the seeds whose interval has passed, after an optimiser step.

    It costs nothing when no copy is due, and the copies equal the parameters to the bit.

    Args:
        learner: leaves ``[S, ..]``.
        hp: leaves ``[S]``.
        episodes: ``[S]`` int32, the episodes before this iteration, as PyMARL counts them.
        ready: ``[S]`` bool, the seeds that took the step; the targets of the others stay.
    """
    due = ready & (episodes - learner.target_episodes >= hp.target_update_interval)
    select = functools.partial(jax.vmap(jnp.where), due)

    def copy(_: Array, learner: LearnerState) -> LearnerState:
        return learner._replace(
            target=jax.tree.map(select, learner.params, learner.target),
            target_episodes=select(episodes, learner.target_episodes),
        )

    # A loop of one turn or none over all seeds. A branch would copy its whole result even if it changes nothing. A
    # select alone would be compiled into the optimiser step, which then might round differently for the target.
    with jax.named_scope("copies_at_most_1"):
        return jax.lax.fori_loop(0, due.any().astype(jnp.int32), copy, learner)


def clip_by_joint_norm(grads: PyTree, max_norm: Array) -> tuple[PyTree, Array]:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), torch's rule; optax's leaves out the 1e-6.

    Returns:
        The clipped gradients and the norm before clipping.
    """
    norm = jnp.sqrt(joint_sum(jax.tree.map(jnp.square, grads)))
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads), norm


def joint_sum(tree: PyTree) -> Array:
    """Returns the sum of all numbers of all leaves, a scalar."""

    def by_leaf(leaves: list[Array]) -> Array:
        return functools.reduce(jnp.add, [leaf.sum() for leaf in leaves])

    def joined(leaves: list[Array]) -> Array:
        return jnp.concatenate([leaf.reshape(-1) for leaf in leaves]).sum()

    # A GPU takes a kernel or two for each sum, and as many for the sum of all leaves joined. A TPU would have to change
    # the layout of each leaf to join them.
    return jax.lax.platform_dependent(jax.tree.leaves(tree), cuda=joined, rocm=joined, default=by_leaf)
