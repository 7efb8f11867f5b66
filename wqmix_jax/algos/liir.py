"""LIIR (Du et al., NeurIPS 2019; ``liir_learner`` of github.com/yalidu/liir, a5edb47).

Each actor follows a proxy reward, the team's plus a small intrinsic one that is learned, so that the actors' next step
raises the team's return.
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
    Hyperparams,
    OptimizerStep,
    Trained,
    mean_over_steps,
)
from wqmix_jax.algos.coma import COMA, Examples
from wqmix_jax.algos.q_learning import is_followed
from wqmix_jax.networks.coma_critic import apply_critic, critic_inputs
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.linear import Linear
from wqmix_jax.ops.policy_gradient import has_choice
from wqmix_jax.ops.td import lambda_return, masked_mean, masked_mean_square
from wqmix_jax.options import options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree

PROXY = "proxy"
"""The third optimiser, see `Algorithm.optimizers`."""


class Outputs(NamedTuple):
    """The outputs of a critic and its heads.

    Attributes:
        r_in: ``[.., N, A]``, the intrinsic reward of each action.
        v_mix: ``[.., N]``, the value of the proxy rewards.
        v_ex: ``[..]``, the value of the team's rewards.
    """

    r_in: Array
    v_mix: Array
    v_ex: Array


@options
class LIIR(COMA):
    """Actors on individual proxy rewards; parameters ``{"agent", "critic", "proxy"}``.

    A learner call takes all steps of the critic, whose output is the value of the proxy rewards, then one of the
    actors, then one of ``proxy``, the heads for intrinsic rewards and the team's value on the critic's hidden layer.
    The gradient of the intrinsic rewards is the released code's, which isn't that of the paper: the product of the mean
    return of the proxy rewards and the inner product of two gradients of means, and it is minimised.

    Attributes:
        intrinsic_weight: weight of the intrinsic reward in the proxy reward.
        alive: the agents that have a part in the losses of the policy: those with a ``choice`` of actions, or, as in
            the released code, those for whom ``action_0`` is not available, which is what living units are in SMAC.
        standardise_padding: whether mean and deviation of advantages include the padding up to the longest episode, as
            in the released code; otherwise real steps alone.
    """

    intrinsic_weight: Annotated[float, Field(ge=0), TRACED]
    alive: Literal["choice", "action_0"]
    standardise_padding: bool

    def heads(self, num_actions: int) -> dict[str, Linear]:
        """Returns the heads by name: intrinsic rewards on an agent's hidden layer, the team's value on all of them."""
        gain = None if self.weight_init == "torch" else 1.0
        return {"r_in": Linear(num_actions, gain), "v_ex": Linear(1, gain)}

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of actors, critic and heads."""
        coma_key, critic_key, *keys = jax.random.split(key, 4)
        num_agents, num_actions = env_spec.num_agents, env_spec.num_actions
        width = env_spec.state_dim + env_spec.obs_dim + 2 * num_agents * num_actions
        critic = self.critic_form(num_agents, 1).init(critic_key, num_agents, width)
        inputs = jnp.zeros((1, self.critic_dim)), jnp.zeros((1, num_agents * self.critic_dim))
        heads = self.heads(num_actions).items()
        proxy = {name: init_net(head, *drawn) for (name, head), *drawn in zip(heads, keys, inputs, strict=True)}
        agent = super().init(coma_key, env_spec)["agent"]
        return {"agent": agent, "critic": critic, "proxy": proxy}

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """Returns one optimiser each for actors, critic and heads; see `Algorithm.optimizers`."""
        return {**super().optimizers(), PROXY: ("proxy",)}

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
        """Takes the steps of COMA, then one of the heads; see `Algorithm.update`."""
        old = trained.params
        trained, aux = super().update(trained, target, batch, hp, ctx, noise, step)
        actions = self.actions(batch, self.policy(old["agent"], batch, ctx), noise)
        outputs = self.evaluate(old, batch, actions)
        y_ex = self.returns(batch, hp, batch.reward[..., None], self.evaluate(target, batch, actions).v_ex[..., None])
        advantages = self.standardised(y_ex[..., 0] - outputs.v_ex[:, :-1], batch.mask, batch.mask)
        found = self.policy_gradients(old, trained.params, batch, actions, aux.values["log_policy"], advantages)
        product = sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, found), strict=True))

        def loss(proxy: PyTree) -> tuple[Array, dict[str, Array]]:
            outputs = self.evaluate(old | {"proxy": proxy}, batch, actions)
            y_mix = self.proxy_returns(outputs, target, batch, actions, hp)
            mask = jnp.broadcast_to(batch.mask[..., None], y_mix.shape)
            meta_loss = product * masked_mean(y_mix, mask)
            v_ex_loss = masked_mean_square(outputs.v_ex[:, :-1] - y_ex[..., 0], batch.mask)
            return meta_loss + v_ex_loss, {"meta_loss": meta_loss, "v_ex_loss": v_ex_loss}

        grads, metrics = jax.grad(loss, has_aux=True)(old["proxy"])
        lr = hp.lr * hp.critic_lr_factor
        trained, _ = step(trained, {"proxy": grads}, PROXY, lr=lr, clips=False)
        metrics = aux.metrics | metrics | {"gradient_product": product}
        values = {"v_ex": outputs.v_ex, "y_ex": y_ex[..., 0], "ex_advantages": advantages}
        values |= {"intrinsic": (outputs.r_in * actions).sum(-1), "policy_gradients": found, "proxy_grads": grads}
        return trained, Aux(metrics, aux.values | values)

    def evaluate(self, params: PyTree, batch: Episode, actions: Array) -> Outputs:
        """Returns the outputs at all states, ``[B, T+1, ..]``, with a gradient of the heads alone."""
        num_agents, num_actions = actions.shape[-2:]
        inputs = critic_inputs(batch.obs, batch.state, actions)
        critic = apply_critic(self.critic_form(num_agents, 1), params["critic"], inputs)
        hiddens, heads = jax.lax.stop_gradient(critic.hiddens), self.heads(num_actions)
        r_in = apply_net(heads["r_in"], params["proxy"]["r_in"], hiddens)
        v_ex = apply_net(heads["v_ex"], params["proxy"]["v_ex"], hiddens.reshape(*hiddens.shape[:2], -1))
        return Outputs(10 * jnp.tanh(r_in / 10), jax.lax.stop_gradient(critic.utilities[..., 0]), v_ex[..., 0])

    def returns(self, batch: Episode, hp: Hyperparams, reward: Array, value: Array) -> Array:
        """Returns lambda-returns of each agent: ``[B, T, N]``, values ``[B, T+1, N]`` -> ``[B, T, N]``."""
        each_agent = jax.vmap(lambda_return, in_axes=(1, None, None, 1, None), out_axes=1)
        each_row = jax.vmap(each_agent, in_axes=(0, 0, None, 0, 0))
        y = each_row(reward, batch.discount, hp.gamma, value[:, 1:], hp.td_lambda * is_followed(batch))
        return y * batch.mask[..., None]

    def proxy_returns(self, outputs: Outputs, target: PyTree, batch: Episode, actions: Array, hp: Hyperparams) -> Array:
        """Returns the lambda-returns of the proxy rewards of actions ``[B, T+1, N, A]``, ``[B, T, N]``."""
        intrinsic = (outputs.r_in * actions).sum(-1)[:, :-1]
        reward = batch.reward[..., None] + hp.intrinsic_weight * intrinsic
        return self.returns(batch, hp, reward, self.evaluate(target, batch, actions).v_mix)

    def examples(
        self, params: PyTree, target: PyTree, batch: Episode, policy: Array, hp: Hyperparams, noise: Array
    ) -> Examples:
        """Returns what the critic learns: the returns of the proxy rewards."""
        actions = self.actions(batch, policy, noise)
        y = self.proxy_returns(self.evaluate(params, batch, actions), target, batch, actions, hp)
        inputs = critic_inputs(batch.obs, batch.state, actions)
        mask = jnp.broadcast_to(batch.mask[..., None], y.shape)
        examples = Examples(inputs[:, :-1], actions[:, :-1], y, mask)
        return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf.swapaxes(0, 1)), examples)

    def critic_loss(self, critic_params: PyTree, examples: Examples) -> tuple[Array, Array]:
        """Returns the critic's mean square error, and its values, ``[T, B, N]``."""
        v_mix = self.critic_qs(critic_params, examples.inputs, 1)[..., 0]
        return masked_mean_square(v_mix - examples.td_target, examples.mask), v_mix

    def actor_critic_loss(
        self, policy: Array, qs: Array, examples: Examples, batch: Episode, *, is_part: bool = False
    ) -> tuple[Array, Aux]:
        """Returns the actors' loss plus the critic's, with advantages as they are for a part of a batch."""
        policy, v_mix, y, mask = (
            policy[:, :-1],
            *(leaf.swapaxes(0, 1) for leaf in (qs, examples.td_target, examples.mask)),
        )
        advantages = jax.lax.stop_gradient(y - v_mix)
        advantages = advantages if is_part else self.standardised(advantages, mask, batch.mask)
        taken = (policy * examples.actions.swapaxes(0, 1)).sum(-1)
        log_policy = jnp.log(jnp.where(mask > 0, taken, 1)) * self.is_alive(batch)
        actor_loss, critic_loss = -masked_mean(advantages * log_policy, mask), masked_mean_square(v_mix - y, mask)
        metrics = {"loss": actor_loss + critic_loss, "actor_loss": actor_loss, "critic_loss": critic_loss}
        metrics |= {"td_target_mean": masked_mean(y, mask)}
        values = {"v_mix": v_mix, "policy": policy, "advantages": advantages, "log_policy": log_policy, "td_target": y}
        return metrics["loss"], Aux(metrics, values)

    def standardised(self, advantages: Array, mask: Array, episode_mask: Array) -> Array:
        """Returns advantages ``[B, T, ..]`` with mean 0 and deviation 1, see ``standardise_padding``."""
        if self.standardise_padding:
            in_batch = episode_mask.max(0).reshape(1, -1, *(1,) * (advantages.ndim - 2))
            mask = jnp.broadcast_to(in_batch, advantages.shape)
        centred = advantages - masked_mean(advantages, mask)
        variance = (jnp.square(centred) * mask).sum() / jnp.maximum(mask.sum() - 1, 1)
        return centred / (jnp.sqrt(variance) + 1e-8)

    def is_alive(self, batch: Episode) -> Array:
        """Returns 1 for agents with a part in the losses, ``[B, T, N]``; see ``alive``."""
        avail = batch.avail_actions[:, :-1]
        alive = has_choice(avail) if self.alive == "choice" else 1 - avail[..., 0]
        return alive.astype(batch.reward.dtype)

    def policy_gradients(
        self, old: PyTree, new: PyTree, batch: Episode, actions: Array, log_policy: Array, advantages: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns the gradients whose inner product is the released meta-gradient's factor.

        That of the mean log-probability under the old actors, and that of the mean of ratio times advantage under the
        new ones, both without the policy's floor.
        """

        def log_taken(agent_params: PyTree) -> Array:
            logits = self.unroll(agent_params, batch)[:, :-1]
            return (jax.nn.log_softmax(logits) * actions[:, :-1]).sum(-1) * self.is_alive(batch) * batch.mask[..., None]

        def old_objective(agent_params: PyTree) -> Array:
            return masked_mean(log_taken(agent_params), jnp.broadcast_to(batch.mask[..., None], log_policy.shape))

        def new_objective(agent_params: PyTree) -> Array:
            ratio = jnp.exp((log_taken(agent_params) - jax.lax.stop_gradient(log_policy)).sum(-1))
            return masked_mean(ratio * advantages, batch.mask)

        return jax.grad(old_objective)(old["agent"]), jax.grad(new_objective)(new["agent"])
