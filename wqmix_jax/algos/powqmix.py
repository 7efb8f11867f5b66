"""POWQMIX (arXiv 2405.08036; ``pow_qmix_learner`` and its recogniser of tiev-tongji's released code, 10a56e9).

A Weighted QMIX whose weights are 1 for potentially optimal joint actions and 0 for all others. A recogniser Q_r, which
learns the same targets, says which they are.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from wqmix_jax.algos.base import (
    TRACED,
    Aux,
    Context,
    Fraction,
    Hyperparams,
    OptimizerStep,
    PositiveFloat,
    Trained,
    mean_over_steps,
)
from wqmix_jax.algos.q_learning import gather_actions, seen_before
from wqmix_jax.algos.wqmix import WQMIX, Bootstrap
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.recognizer import Recognized, Recognizer
from wqmix_jax.ops import weighting
from wqmix_jax.ops.action_selection import greedy_actions, greedy_values
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree


class Estimates(NamedTuple):
    """The values of a batch's joint actions, ``[B, T]`` but where another shape is given.

    Attributes:
        agent_qs: ``[B, T+1, N, A]``, the utilities.
        greedy_actions: ``[B, T+1, N]``.
        advantages: ``[B, T, N]``, Q_i(u_i) - max_a Q_i(a), constants to the gradient.
        q_tot: Q_tot.
        q_star: Q*.
        bootstrap: y, and the target nets' Q*.
    """

    agent_qs: Array
    greedy_actions: Array
    advantages: Array
    q_tot: Array
    q_star: Array
    bootstrap: Bootstrap


@options
class POWQMIX(WQMIX):
    """POWQMIX: Q_tot learns from potentially optimal joint actions alone.

    Parameters: those of WQMIX with a ``Q*`` plus ``{"recognizer"}``, which has an optimiser to itself. A learner call
    takes ``recognizer_steps`` steps of it, then one step of all other nets.

    Attributes:
        weighting: ``potentially_optimal``, the only one.
        alpha: the weight of joint actions that aren't potentially optimal.
        q_star: the central estimate that targets read: ``feedforward`` or ``attention``.
        threshold: C: a joint action is potentially optimal if its Q_r is less than this below the greedy one's.
        no_weighted_steps: environment steps at the start in which all joint actions have weight 1.
        recognizer_steps: optimiser steps of Q_r per learner call; twice as many in the first one.
        recognizer_v_dim: width of the hidden layers of Q_r's V(s).
        recognizer_hypernet_dim: width of the hidden layers of the hypernetworks that make its weights lambda.
        recognizer_embed_dim: inner width of the product that is lambda.
    """

    weighting: Literal["potentially_optimal"]  # type: ignore[assignment] (none of WQMIX's applies)
    alpha: Fraction
    q_star: Literal["feedforward", "attention"]
    threshold: PositiveFloat
    no_weighted_steps: Annotated[int, Field(ge=0, lt=2**31), TRACED]
    recognizer_steps: PositiveInt
    recognizer_v_dim: PositiveInt
    recognizer_hypernet_dim: PositiveInt
    recognizer_embed_dim: PositiveInt

    @property
    def recognizer_net(self) -> Recognizer:
        """Q_r as a flax module."""
        return Recognizer(self.recognizer_v_dim, self.recognizer_hypernet_dim, self.recognizer_embed_dim)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of WQMIX's nets and of Q_r."""
        wqmix_key, recognizer_key = jax.random.split(key)
        agents, actions = (env_spec.num_agents,), (env_spec.num_agents, env_spec.num_actions)
        inputs = jnp.zeros((1, *agents)), jnp.zeros((1, *actions)), jnp.zeros((1, env_spec.state_dim))
        recognizer = init_net(self.recognizer_net, recognizer_key, *inputs)
        return super().init(wqmix_key, env_spec) | {"recognizer": recognizer}

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """Returns one optimiser for Q_r, one for all other nets; see `Algorithm.optimizers`."""
        return {"recognizer": ("recognizer",), "factored": ("agent", "mixer", "q_star_agent", "q_star_mixer")}

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the losses of Q_tot, Q* and Q_r, summed, with the weights of Q_r as it is; see `update`."""
        del noise
        estimates = self._estimates(params, target, batch, hp)
        loss, aux = self._factored_loss(params["recognizer"], estimates, batch, hp, ctx)
        recognizer_loss = self._recognizer_loss(params["recognizer"], estimates, batch)
        loss += recognizer_loss
        return loss, aux._replace(metrics=aux.metrics | {"loss": loss, "recognizer_loss": recognizer_loss})

    @mean_over_steps
    def update(
        self,
        trained: Trained,
        target: PyTree,
        batch: Episode,
        hp: Hyperparams,
        ctx: Context,
        noise: PyTree,
        step: OptimizerStep,
    ) -> tuple[Trained, Aux]:
        """Trains Q_r on the batch, then Q_tot and Q* with the weights of the new Q_r; see `Algorithm.update`."""
        del noise

        def factored_loss(params: PyTree) -> tuple[Array, tuple[Trained, Aux]]:
            # Q_r's steps read values only, so that the agents are unrolled once for all of them.
            estimates = self._estimates(params, target, batch, hp)
            recognized, metrics = self._train_recognizer(trained, jax.lax.stop_gradient(estimates), batch, ctx, step)
            loss, aux = self._factored_loss(recognized.params["recognizer"], estimates, batch, hp, ctx)
            return loss, (recognized, aux._replace(metrics=aux.metrics | metrics))

        grads, (trained, aux) = jax.grad(factored_loss, has_aux=True)(trained.params)
        trained, grad_norm = step(trained, grads, "factored")
        return trained, aux._replace(metrics=aux.metrics | {"grad_norm": grad_norm})

    def recognize(self, recognizer_params: PyTree, advantages: Array, batch: Episode) -> Recognized:
        """Returns the parts of Q_r of the joint actions taken, ``[B, T]``; see `Recognizer`."""
        actions = jax.nn.one_hot(batch.joint_action, batch.avail_actions.shape[-1], dtype=advantages.dtype)
        return apply_net(self.recognizer_net, recognizer_params, advantages, actions, batch.state[:, :-1])

    def _estimates(self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams) -> Estimates:
        agent_qs, central_qs, target_qs, choosing_qs = self._utilities(params, target, batch)
        greedy, before = greedy_actions(agent_qs, batch.avail_actions), seen_before(batch)
        to_bootstrap = self.greedy_to_bootstrap(agent_qs, choosing_qs, batch)
        advantages = gather_actions(agent_qs[:, :-1], batch.joint_action)
        advantages -= greedy_values(agent_qs[:, :-1], before.avail_actions)
        return Estimates(
            agent_qs,
            greedy,
            jax.lax.stop_gradient(advantages),
            self.mix(params["mixer"], agent_qs[:, :-1], batch.joint_action, before)[0],
            self.central_estimate(params, central_qs[:, :-1], batch.joint_action, before),
            self._bootstrap(target, target_qs, batch, greedy, to_bootstrap, hp),
        )

    def _train_recognizer(
        self, trained: Trained, estimates: Estimates, batch: Episode, ctx: Context, step: OptimizerStep
    ) -> tuple[Trained, dict[str, Array]]:
        """Takes the steps of Q_r; ``recognizer_loss`` is its loss before the last one."""
        gradient = jax.value_and_grad(self._recognizer_loss)

        def one_step(_: Array, carry: tuple[Trained, Array]) -> tuple[Trained, Array]:
            trained, _ = carry
            loss, grads = gradient(trained.params["recognizer"], estimates, batch)
            return step(trained, {"recognizer": grads}, "recognizer")[0], loss

        num_steps = jnp.where(ctx.learner_steps == 0, 2 * self.recognizer_steps, self.recognizer_steps)
        start = trained, jnp.zeros((), batch.reward.dtype)
        trained, loss = jax.lax.fori_loop(0, num_steps, one_step, start)
        return trained, {"recognizer_loss": loss}

    def _recognizer_loss(self, recognizer_params: PyTree, estimates: Estimates, batch: Episode) -> Array:
        """Returns half the mean square error of Q_r."""
        v, advantage = self.recognize(recognizer_params, estimates.advantages, batch)
        return masked_mean_square(v + advantage - estimates.bootstrap.td_target, batch.mask, batch.importance) / 2

    def _factored_loss(
        self, recognizer_params: PyTree, estimates: Estimates, batch: Episode, hp: Hyperparams, ctx: Context
    ) -> tuple[Array, Aux]:
        """Returns half the weighted loss of Q_tot plus half the loss of Q*."""
        v, advantage = jax.lax.stop_gradient(self.recognize(recognizer_params, estimates.advantages, batch))
        is_weighted = ctx.env_steps >= hp.no_weighted_steps
        weights = weighting.potentially_optimal(advantage, hp.threshold, jnp.where(is_weighted, hp.alpha, 1.0))
        y, importance = estimates.bootstrap.td_target, batch.importance
        td_error = estimates.q_tot - y
        both = weights if importance is None else weights * importance
        qmix_loss = masked_mean_square(td_error, batch.mask, both) / 2
        q_star_loss = masked_mean_square(estimates.q_star - y, batch.mask, importance) / 2
        loss = qmix_loss + q_star_loss
        logged = {"q_tot_mean": estimates.q_tot, "td_target_mean": y, "weight_mean": weights}
        metrics = {"loss": loss, "qmix_loss": qmix_loss, "q_star_loss": q_star_loss}
        metrics |= {name: masked_mean(value, batch.mask) for name, value in logged.items()}
        values = {"td_error": td_error, "weights": weights, "q_r": v + advantage, "q_r_advantage": advantage}
        values |= {"q_tot": estimates.q_tot, "q_star": estimates.q_star, "agent_qs": estimates.agent_qs}
        values |= {"greedy_actions": estimates.greedy_actions} | estimates.bootstrap._asdict()
        return loss, Aux(metrics, values)
