"""COMA (Foerster et al., arXiv 1705.08926; ``coma_learner`` of github.com/oxwhirl/pymarl, c971afd).

An actor's advantage is a central critic's value of its action less a baseline, the policy's mean over all its actions.
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from pydantic import Field

from wqmix_jax.algos.base import (
    TRACED,
    Aux,
    Context,
    Hyperparams,
    OptimizerStep,
    Trained,
    mean_over_steps,
)
from wqmix_jax.algos.floored_actors import FlooredActors
from wqmix_jax.networks.agent import AgentForm
from wqmix_jax.networks.coma_critic import apply_critic, critic_inputs
from wqmix_jax.ops.policy_gradient import counterfactual_advantages
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree

ACTORS, CRITIC = "actors", "critic"  # the optimisers


class Examples(NamedTuple):
    """The episodes as a critic learns from them, constants to the gradient; time is the first axis.

    Attributes:
        inputs: ``[T, B, N, F]``, see `critic_inputs`.
        actions: ``[T, B, N, A]``, the actions taken, one-hot.
        td_target, mask: ``[T, B, N]``, y of each agent, and the mask of its episode.
    """

    inputs: Array
    actions: Array
    td_target: Array
    mask: Array


@options
class COMA(FlooredActors):
    """Actors whose outputs are logits of a policy with a floor, and a critic with counterfactual baselines.

    Parameters: ``{"agent", "critic"}``, each with an optimiser and a clip to itself. A learner call takes all steps of
    the critic, then one of the actors. Epsilon is the policy's floor, not a chance to explore.

    Attributes:
        critic_dim: width of the critic's two hidden layers.
        critic_lr_factor: the critic's learning rate, divided by ``lr``.
        critic_steps: the critic's steps per learner call, each on all times; ``null``: one step per time step, the
            last first, each on that time of all episodes. The actors see the critic at each time as it was before its
            last step there.
    """

    critic_dim: PositiveInt
    critic_lr_factor: Annotated[float, Field(ge=0), TRACED]
    critic_steps: PositiveInt | None

    def critic_form(self, num_agents: int, num_actions: int) -> AgentForm:
        """Returns the form of the critic: agents without memory, which always have the id."""
        form = self.agents(num_agents, num_actions)
        return form._replace(hidden_dim=self.critic_dim, has_id=True, has_last_action=False, recurrent=False)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of actors and critic."""
        agent_key, critic_key = jax.random.split(key)
        num_agents, num_actions, obs_dim, state_dim, _ = env_spec
        width = state_dim + obs_dim + 2 * num_agents * num_actions  # see `critic_inputs`
        critic = self.critic_form(num_agents, num_actions).init(critic_key, num_agents, width)
        return super().init(agent_key, env_spec) | {"critic": critic}

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """Returns one optimiser for the actors, one for the critic; see `Algorithm.optimizers`."""
        return {ACTORS: ("agent",), CRITIC: ("critic",)}

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: Array
    ) -> tuple[Array, Aux]:
        """Returns the actors' loss plus the critic's over all times, both under the critic as it is; see `update`."""
        policy = self.policy(params["agent"], batch, ctx)
        examples = self.examples(params, target, batch, policy, hp, noise)
        _, qs = self.critic_loss(params["critic"], examples)
        return self.losses(policy, qs, examples, batch, is_part=True)

    @mean_over_steps
    def update(
        self,
        trained: Trained,
        target: PyTree,
        batch: Episode,
        hp: Hyperparams,
        ctx: Context,
        noise: Array,
        step: OptimizerStep,
    ) -> tuple[Trained, Aux]:
        """Takes all steps of the critic, then one of the actors; see `Algorithm.update`."""

        def loss(agent_params: PyTree) -> tuple[Array, tuple[Trained, Aux]]:
            policy = self.policy(agent_params, batch, ctx)
            examples = self.examples(trained.params, target, batch, policy, hp, noise)
            taught, qs, norms = self.train_critic(trained, examples, batch.num_places, hp, step)
            total, aux = self.losses(policy, qs, examples, batch)
            metrics = {"critic_grad_norm": norms.sum() / jnp.maximum((norms > 0).sum(), 1)}
            return total, (taught, Aux(aux.metrics | metrics, aux.values | {"critic_grad_norms": norms}))

        grads, (trained, aux) = jax.grad(loss, has_aux=True)(trained.params["agent"])
        trained, grad_norm = step(trained, {"agent": grads}, ACTORS)
        return trained, aux._replace(metrics=aux.metrics | {"grad_norm": grad_norm})

    def examples(
        self, params: PyTree, target: PyTree, batch: Episode, policy: Array, hp: Hyperparams, noise: Array
    ) -> Examples:
        """Returns what the critic learns; ``params`` are the online parameters, ``policy`` is ``[B, T+1, N, A]``."""
        actions = self.actions(batch, policy, noise)
        y = self.td_targets(params, target, batch, actions, hp)
        inputs, mask = critic_inputs(batch.obs, batch.state, actions), jnp.broadcast_to(batch.mask[..., None], y.shape)
        examples = Examples(inputs[:, :-1], actions[:, :-1], y, mask)
        return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf.swapaxes(0, 1)), examples)

    def td_targets(self, params: PyTree, target: PyTree, batch: Episode, actions: Array, hp: Hyperparams) -> Array:
        """Returns lambda-returns over the target critic's values of ``actions`` ``[B, T+1, N, A]``: ``[B, T, N]``."""
        del params
        qs = self.critic_qs(target["critic"], critic_inputs(batch.obs, batch.state, actions), actions.shape[-1])
        reward = jnp.broadcast_to(batch.reward[..., None], batch.joint_action.shape)
        return self.returns(batch, hp, reward, self.chosen(qs, actions))

    def train_critic(
        self, trained: Trained, examples: Examples, num_places: Array | None, hp: Hyperparams, step: OptimizerStep
    ) -> tuple[Trained, Array, Array]:
        """Takes the steps of the critic, see ``critic_steps``; a time without a real step has none.

        Also returns the values ``[T, B, N, A]`` before the last step at each time, and each gradient's norm or 0.
        """
        num_times, is_per_time = len(examples.mask), self.critic_steps is None
        num_steps, length = (num_times, 1) if self.critic_steps is None else (self.critic_steps, num_times)
        turns = num_steps if num_places is None or not is_per_time else jnp.minimum(num_places - 1, num_times)
        gradient = jax.grad(self.critic_loss, has_aux=True)

        def one_step(index: Array, carry: tuple[Trained, Array, Array]) -> tuple[Trained, Array, Array]:
            trained, qs, norms = carry
            time = turns - 1 - index if is_per_time else 0
            now = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, time, length), examples)
            grads, found = gradient(trained.params["critic"], now)
            stepped, norm = step(trained, {"critic": grads}, CRITIC, lr=hp.lr * hp.critic_lr_factor)
            is_real = now.mask.any()
            trained = jax.tree.map(lambda new, old: jnp.where(is_real, new, old), stepped, trained)
            qs = jax.lax.dynamic_update_slice_in_dim(qs, found, time, axis=0)
            return trained, qs, norms.at[index].set(jnp.where(is_real, norm, 0))

        _, qs = jax.eval_shape(self.critic_loss, trained.params["critic"], examples)
        zeros = jnp.zeros(qs.shape, qs.dtype), jnp.zeros(num_steps, qs.dtype)
        return jax.lax.fori_loop(0, turns, one_step, (trained, *zeros))

    def critic_loss(self, critic_params: PyTree, examples: Examples) -> tuple[Array, Array]:
        """Returns the critic's mean square error, and its outputs, ``[T, B, N, A]``."""
        qs = self.critic_qs(critic_params, examples.inputs, examples.actions.shape[-1])
        return masked_mean_square(self.chosen(qs, examples.actions) - examples.td_target, examples.mask), qs

    def critic_qs(self, critic_params: PyTree, inputs: Array, num_actions: int) -> Array:
        """Returns the critic's values of all actions of each agent: ``[.., N, F]`` -> ``[.., N, A]``."""
        return apply_critic(self.critic_form(inputs.shape[-2], num_actions), critic_params, inputs).utilities

    def chosen(self, qs: Array, actions: Array) -> Array:
        """Returns the values of one-hot actions: two ``[.., A]`` -> ``[..]``."""
        return (qs * actions).sum(-1)

    def advantages(self, qs: Array, policy: Array, examples: Examples, *, is_part: bool) -> Array:
        """Returns the actors' advantages, ``[T, B, N]``; for a part of a batch if ``is_part``."""
        del is_part
        return counterfactual_advantages(qs, policy, examples.actions)

    def losses(
        self, policy: Array, qs: Array, examples: Examples, batch: Episode, *, is_part: bool = False
    ) -> tuple[Array, Aux]:
        """Returns the actors' loss plus the critic's, of values ``qs`` ``[T, B, N, A]`` and the policy's gradient."""
        policy, mask, y = policy[:, :-1].swapaxes(0, 1), examples.mask, examples.td_target
        advantages, chosen_qs = (
            self.advantages(qs, policy, examples, is_part=is_part),
            self.chosen(qs, examples.actions),
        )
        taken = (policy * examples.actions).sum(-1)
        log_policy = jnp.log(jnp.where(mask * taken > 0, taken, 1))  # finite in padding, and for unavailable actions
        log_policy *= self.alive_agents(batch).swapaxes(0, 1)
        actor_loss, critic_loss = -masked_mean(advantages * log_policy, mask), masked_mean_square(chosen_qs - y, mask)
        means = {"chosen_q_mean": chosen_qs, "td_target_mean": y, "policy_entropy": entr(policy).sum(-1)}
        metrics = {"loss": actor_loss + critic_loss, "actor_loss": actor_loss, "critic_loss": critic_loss}
        metrics |= {name: masked_mean(value, mask) for name, value in means.items()}
        values = {"qs": qs, "policy": policy, "advantages": advantages, "log_policy": log_policy, "td_target": y}
        return metrics["loss"], Aux(metrics, {name: value.swapaxes(0, 1) for name, value in values.items()})
