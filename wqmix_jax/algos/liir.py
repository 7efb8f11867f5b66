"""LIIR (Du et al., NeurIPS 2019; ``liir_learner`` of github.com/yalidu/liir, a5edb47).

Each actor follows a proxy reward, the team's plus a small intrinsic one that is learned, so that the actors' next step
raises the team's return.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

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
from wqmix_jax.networks.agent import AgentForm
from wqmix_jax.networks.coma_critic import apply_critic, critic_inputs
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.linear import Linear
from wqmix_jax.ops.policy_gradient import has_choice
from wqmix_jax.ops.td import masked_mean, masked_mean_square
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

    def critic_form(self, num_agents: int, num_actions: int) -> AgentForm:
        """See `COMA.critic_form`; the only output is the value of the proxy rewards."""
        return super().critic_form(num_agents, 1)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of actors, critic and heads."""
        key, *keys = jax.random.split(key, 3)
        inputs = jnp.zeros((1, self.critic_dim)), jnp.zeros((1, env_spec.num_agents * self.critic_dim))
        heads = self.heads(env_spec.num_actions).items()
        proxy = {name: init_net(head, *drawn) for (name, head), *drawn in zip(heads, keys, inputs, strict=True)}
        return super().init(key, env_spec) | {"proxy": proxy}

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
        advantages = self.standardised(y_ex[..., 0] - outputs.v_ex[:, :-1], batch.mask, axes=(0,))
        found = self.policy_gradients(old, trained.params, batch, actions, aux.values["log_policy"], advantages)
        product = sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, found), strict=True))

        def loss(proxy: PyTree) -> tuple[Array, dict[str, Array]]:
            outputs = self.evaluate(old | {"proxy": proxy}, batch, actions)
            y_mix = self.td_targets(old | {"proxy": proxy}, target, batch, actions, hp)
            mask = jnp.broadcast_to(batch.mask[..., None], y_mix.shape)
            meta_loss = product * masked_mean(y_mix, mask)
            v_ex_loss = masked_mean_square(outputs.v_ex[:, :-1] - y_ex[..., 0], batch.mask)
            return meta_loss + v_ex_loss, {"meta_loss": meta_loss, "v_ex_loss": v_ex_loss}

        grads, metrics = jax.grad(loss, has_aux=True)(old["proxy"])
        lr = hp.lr * hp.critic_lr_factor
        trained, _ = step(trained, {"proxy": grads}, PROXY, lr=lr, clips=False)
        metrics = aux.metrics | metrics | {"gradient_product": product}
        values: dict[str, Any] = {"v_ex": outputs.v_ex, "y_ex": y_ex[..., 0], "ex_advantages": advantages}
        values |= {"intrinsic": (outputs.r_in * actions).sum(-1), "policy_gradients": found, "proxy_grads": grads}
        return trained, Aux(metrics, aux.values | values)

    def evaluate(self, params: PyTree, batch: Episode, actions: Array) -> Outputs:
        """Returns the outputs at all states, ``[B, T+1, ..]``, with a gradient of the heads alone."""
        num_agents, num_actions = actions.shape[-2:]
        inputs = critic_inputs(batch.obs, batch.state, actions)
        critic = apply_critic(self.critic_form(num_agents, num_actions), params["critic"], inputs)
        assert critic.hiddens is not None
        hiddens, heads = jax.lax.stop_gradient(critic.hiddens), self.heads(num_actions)
        r_in = apply_net(heads["r_in"], params["proxy"]["r_in"], hiddens)
        v_ex = apply_net(heads["v_ex"], params["proxy"]["v_ex"], hiddens.reshape(*hiddens.shape[:2], -1))
        return Outputs(10 * jnp.tanh(r_in / 10), jax.lax.stop_gradient(critic.utilities[..., 0]), v_ex[..., 0])

    def td_targets(self, params: PyTree, target: PyTree, batch: Episode, actions: Array, hp: Hyperparams) -> Array:
        """Returns the lambda-returns of the proxy rewards, ``[B, T, N]``, with a gradient of the heads."""
        intrinsic = (self.evaluate(params, batch, actions).r_in * actions).sum(-1)[:, :-1]
        reward = batch.reward[..., None] + hp.intrinsic_weight * intrinsic
        return self.returns(batch, hp, reward, self.evaluate(target, batch, actions).v_mix)

    def chosen(self, qs: Array, actions: Array) -> Array:
        """Returns the value of the proxy rewards: ``[.., 1]`` -> ``[..]``."""
        del actions
        return qs[..., 0]

    def advantages(self, qs: Array, policy: Array, examples: Examples, *, is_part: bool) -> Array:
        """Returns the returns of the proxy rewards minus their value; a part of a batch isn't standardised."""
        del policy
        advantages = jax.lax.stop_gradient(examples.td_target - qs[..., 0])
        return advantages if is_part else self.standardised(advantages, examples.mask, axes=(1, 2))

    def standardised(self, advantages: Array, mask: Array, axes: Sequence[int]) -> Array:
        """Returns advantages with mean 0 and deviation 1; ``axes`` are those but time, see ``standardise_padding``."""
        if self.standardise_padding:
            mask = jnp.broadcast_to(mask.max(axes, keepdims=True), mask.shape)
        centred = advantages - masked_mean(advantages, mask)
        variance = (jnp.square(centred) * mask).sum() / jnp.maximum(mask.sum() - 1, 1)
        return centred / (jnp.sqrt(variance) + 1e-8)

    def alive_agents(self, batch: Episode) -> Array:
        """See `FlooredActors.alive_agents`, and ``alive``."""
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
            return (
                (jax.nn.log_softmax(logits) * actions[:, :-1]).sum(-1)
                * self.alive_agents(batch)
                * batch.mask[..., None]
            )

        def old_objective(agent_params: PyTree) -> Array:
            return masked_mean(log_taken(agent_params), jnp.broadcast_to(batch.mask[..., None], log_policy.shape))

        def new_objective(agent_params: PyTree) -> Array:
            ratio = jnp.exp((log_taken(agent_params) - jax.lax.stop_gradient(log_policy)).sum(-1))
            return masked_mean(ratio * advantages, batch.mask)

        return jax.grad(old_objective)(old["agent"]), jax.grad(new_objective)(new["agent"])
