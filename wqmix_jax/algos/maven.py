"""MAVEN: QMIX whose agents share a latent, drawn once per episode, so that exploration is committed (arXiv 1910.07483).

``src/learners/noise_q_learner.py`` of the authors' code, AnujMahajanOxf/MAVEN at commit be975c5.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
from pydantic import Field

from wqmix_jax.algos import base
from wqmix_jax.algos.base import AgentInputs, Aux, Context, Hyperparams, PositiveFloat, PositiveFraction
from wqmix_jax.algos.factored import FactoredQLearner
from wqmix_jax.algos.q_learning import gather_actions, is_followed
from wqmix_jax.networks.agent import AgentForm, SeenByAgents, Unrolled, unroll_agents
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.latent import Discriminator, latent_utilities, with_latent_heads
from wqmix_jax.networks.linear import TwoLayer
from wqmix_jax.networks.mixers import QMIXMixer
from wqmix_jax.ops.action_selection import UNAVAILABLE
from wqmix_jax.ops.td import masked_mean, sum_to_the_end
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, Observation, PRNGKey, PyTree

Coefficient = Annotated[float, Field(ge=0), base.TRACED]


@options
class MAVEN(FactoredQLearner):
    """QMIX given a latent z, plus the cross-entropy of a discriminator that recognises z from what the agents do.

    Parameters: ``{"agent", "mixer", "discriminator"}`` and, if the policy over z learns, ``"latent_policy"``. The
    agents have a ``latent_head``; their ``head`` is idle.

    Attributes:
        latent_dim: ``Z``, the number of values of z, a category.
        latent_policy: how z is drawn: ``uniform``, or ``learned``: a softmax of the returns that a net predicts from
            the first state, mixed with a uniform part (``bandit_policy: False`` of the authors' code).
        uniform_part: that part.
        return_scale: a predicted return is the net's output times this.
        mi_loss: weight of the cross-entropy, which bounds the mutual information of z and the agents' behaviour.
        discriminator: ``step`` recognises z at each step alone; ``trajectory`` has a GRU over the episode and
            recognises z at its end; ``released_trajectory`` reads it after the batch's last step, padding included, as
            the authors' code does. Then batches are cut, not packed.
        discriminator_dim: width of its hidden layers.
        discriminator_layers: their number.
        memory_dim: width of the GRU.
        intrinsic_reward: ``none``; ``mutual_information``: log q(z) + log Z at each step; or ``released``: -log q(z),
            as ``mi_intrinsic`` in the authors' code. Then the cross-entropy has no gradient in the agents.
        intrinsic_scale: factor of the intrinsic reward.
        mixer_embed_dim: width of the mixing network, whose hypernetworks are linear.
    """

    latent_dim: PositiveInt
    latent_policy: Literal["uniform", "learned"]
    uniform_part: PositiveFraction
    return_scale: PositiveFloat
    mi_loss: Coefficient
    discriminator: Literal["step", "trajectory", "released_trajectory"]
    discriminator_dim: PositiveInt
    discriminator_layers: PositiveInt
    memory_dim: PositiveInt
    intrinsic_reward: Literal["none", "mutual_information", "released"]
    intrinsic_scale: Coefficient
    mixer_embed_dim: PositiveInt

    @pydantic.model_validator(mode="after")
    def _rewards_steps(self) -> Self:
        if self.intrinsic_reward != "none" and self.discriminator != "step":
            needed = f"algo.discriminator={self.discriminator} sees no single step; choose step"
            raise ValueError(f"algo.intrinsic_reward={self.intrinsic_reward} is not allowed: {needed}")
        return self

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        needed = (("memory_dim", "discriminator", "step"), ("intrinsic_scale", "intrinsic_reward", "none"))
        needed += (("uniform_part", "latent_policy", "uniform"), ("return_scale", "latent_policy", "uniform"))
        unused = {name: f"algo.{option}={value}" for name, option, value in needed if getattr(self, option) == value}
        return super().without_effect() | unused

    @property
    def mixer_net(self) -> nn.Module:
        """See `FactoredQLearner.mixer_net`."""
        return QMIXMixer(self.mixer_embed_dim, hypernet_dim=None)

    @property
    def discriminator_net(self) -> Discriminator:
        """The discriminator as a flax module."""
        memory = 0 if self.discriminator == "step" else self.memory_dim
        return Discriminator(self.latent_dim, self.discriminator_dim, self.discriminator_layers, memory)

    def mixer_inputs(self, agent_qs: Array, joint_action: Array, seen: Observation) -> tuple[Array, ...]:
        """Returns the chosen utilities and the state, which holds z; see `FactoredQLearner.mixer_inputs`."""
        return gather_actions(agent_qs, joint_action), seen.state

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws all parameters."""
        keys = jax.random.split(key, 4)
        num_agents, num_actions, _, state_dim, _ = env_spec
        params = super().init(keys[0], env_spec._replace(state_dim=state_dim + self.latent_dim))
        agents = self.agents(num_agents, num_actions, self.head_gain)
        params["agent"] = with_latent_heads(agents, params["agent"], keys[1], num_agents, self.latent_dim)
        features = jnp.zeros((1, 1, num_agents * num_actions + state_dim))
        params["discriminator"] = init_net(self.discriminator_net, keys[2], features)
        if self.latent_policy == "learned":
            params["latent_policy"] = init_net(TwoLayer(256, self.latent_dim), keys[3], jnp.zeros((1, state_dim)))
        return params

    def acting_params(self, params: PyTree) -> PyTree:
        """Returns the agent, and the policy over z if it learns."""
        return {name: params[name] for name in ("agent", "latent_policy") if name in params}

    def draw_latent(self, params: PyTree, state: Array, hp: Hyperparams, ctx: Context, key: PRNGKey) -> Array:
        """Draws z of each episode, an integer ``[..]``; see `Algorithm.draw_latent`."""
        del ctx
        logits = jnp.zeros((*state.shape[:-1], self.latent_dim))
        if self.latent_policy == "learned":
            returns = hp.return_scale * apply_net(TwoLayer(256, self.latent_dim), params["latent_policy"], state)
            logits = jnp.log((1 - hp.uniform_part) * jax.nn.softmax(returns) + hp.uniform_part / self.latent_dim)
        return jax.random.categorical(key, logits).astype(np.min_scalar_type(self.latent_dim - 1))

    def step(self, agent_params: PyTree, carry: Array, inputs: AgentInputs) -> tuple[Array, Array]:
        """See `QLearner.step`."""
        agents = self.agents(*inputs.avail_actions.shape[-2:])
        seen = SeenByAgents(inputs.obs[None], inputs.last_action[None])
        hiddens: Any = unroll_agents(agents, [agent_params], [], carry, seen, keeps_hiddens=True)[0].hiddens
        return hiddens[0], latent_utilities(agents, agent_params, hiddens[0], self._one_hot(inputs.latent, carry))

    def unroll_nets(
        self,
        batch: Episode,
        trained: Sequence[PyTree],
        frozen: Sequence[PyTree] = (),
        *,
        keeps_hiddens: bool = True,
        agents: AgentForm | None = None,
    ) -> list[Unrolled]:
        """See `QLearner.unroll_nets`; hidden states are kept in any case."""
        del keeps_hiddens
        agents = self.agents(*batch.avail_actions.shape[-2:]) if agents is None else agents
        unrolled = super().unroll_nets(batch, trained, frozen, keeps_hiddens=True, agents=agents)
        z = self._one_hot(batch.latent, batch.state)

        nets: Any = zip((*trained, *frozen), [net.hiddens for net in unrolled], strict=True)
        return [Unrolled(hiddens, latent_utilities(agents, params, hiddens, z)) for params, hiddens in nets]

    @base.mean_over_steps_where(lambda algo: algo.discriminator != "released_trajectory")
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the mean square TD error of Q_tot plus the cross-entropy, and the error of the predicted returns."""
        del ctx, noise
        online, delayed = self.unroll_nets(batch, [params["agent"]], [target["agent"]])
        surprise, parts = self._cross_entropy(params["discriminator"], online.utilities, batch)
        given_z = batch._replace(state=jnp.concatenate([batch.state, self._one_hot(batch.latent, batch.state)], -1))
        if self.intrinsic_reward != "none":
            bonus = surprise if self.intrinsic_reward == "released" else math.log(self.latent_dim) - surprise
            bonus = hp.intrinsic_scale * jax.lax.stop_gradient(bonus) * batch.mask
            given_z = given_z._replace(reward=batch.reward + bonus)
        td_loss, aux = self.td_loss(params, target, given_z, hp, online.utilities, delayed.utilities)
        weighted = surprise if batch.importance is None else surprise * batch.importance
        each_episode = self.discriminator == "released_trajectory"  # a mean over episodes, whatever their lengths
        discriminator_loss = weighted[:, 0].mean() if each_episode else masked_mean(weighted, batch.mask)
        loss = td_loss + hp.mi_loss * discriminator_loss
        metrics = {"td_loss": td_loss, "discriminator_loss": discriminator_loss}
        if self.latent_policy == "learned":
            metrics["latent_policy_loss"] = self._return_error(params["latent_policy"], batch, hp)
            loss += metrics["latent_policy_loss"]
        return loss, Aux(aux.metrics | metrics | {"loss": loss}, aux.values | parts)

    def _one_hot(self, latent: Array, like: Array) -> Array:
        """Returns z one-hot in a dtype, ``[..]`` -> ``[.., Z]``."""
        return jax.nn.one_hot(latent, self.latent_dim, dtype=like.dtype)

    def _cross_entropy(self, net: PyTree, agent_qs: Array, batch: Episode) -> tuple[Array, dict[str, Array]]:
        """Returns -log q(z) at each step, ``[B, T]``, that of its episode with a trajectory; and what it is made of."""
        policies = jax.nn.softmax(jnp.where(batch.avail_actions, agent_qs, UNAVAILABLE))
        features = jnp.concatenate([policies.reshape(*policies.shape[:2], -1), batch.state], -1)
        if self.intrinsic_reward != "none":
            features = jax.lax.stop_gradient(features)
        logits = apply_net(self.discriminator_net, net, features, batch.starts, batch.num_places)[:, :-1]
        if self.discriminator == "released_trajectory":
            logits = jnp.broadcast_to(logits[:, -1:], logits.shape)
        surprise = optax.softmax_cross_entropy(logits, self._one_hot(batch.latent, logits)[:, :-1])
        if self.discriminator == "trajectory":
            followed = is_followed(batch)
            surprise = sum_to_the_end(surprise * batch.mask * (1 - followed), followed)
        return surprise, {"cross_entropy": surprise, "latent_logits": logits, "policies": policies}

    def _return_error(self, net: PyTree, batch: Episode, hp: Hyperparams) -> Array:
        """Returns the mean square error of the predicted returns, in units of the scale; episodes count by steps."""
        predicted = apply_net(TwoLayer(256, self.latent_dim), net, batch.state[:, :-1])
        predicted = (predicted * self._one_hot(batch.latent, batch.state)[:, :-1]).sum(-1)
        error = predicted - sum_to_the_end(batch.reward * batch.mask, is_followed(batch)) / hp.return_scale
        first = jnp.zeros_like(batch.mask, bool).at[:, 0].set(True) if batch.starts is None else batch.starts[:, :-1]
        return masked_mean(
            jnp.where(first, jnp.square(error) * sum_to_the_end(batch.mask, is_followed(batch)), 0), batch.mask
        )
