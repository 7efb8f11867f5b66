"""Deep coordination graphs (Boehmer et al., arXiv 1910.00091; ``src/controllers/dcg_controller.py`` of their code).

Their code is https://github.com/wendelinboehmer/dcg at commit 4de100c.
"""

from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
import pydantic
from pydantic import Field

from wqmix_jax.algos.base import AgentInputs, Aux, Context, Hyperparams, mean_over_steps
from wqmix_jax.algos.q_learning import TDLearner
from wqmix_jax.errors import ConfigError
from wqmix_jax.networks.agent import SeenByAgents, Unrolled, unroll_agents
from wqmix_jax.networks.coordination import PairPayoffs
from wqmix_jax.networks.functional import apply_net, init_net
from wqmix_jax.networks.linear import TwoLayer
from wqmix_jax.ops.action_selection import explore
from wqmix_jax.ops.coordination import Edges, GraphValues, Topology, greedy_joint_actions, joint_value, named_edges
from wqmix_jax.ops.td import masked_mean, masked_mean_square
from wqmix_jax.options import PositiveInt, options
from wqmix_jax.types import Array, EnvSpec, Episode, PRNGKey, PyTree

NAMES = get_args(Topology)


def _graph(value: Any) -> Any:
    if value in NAMES:
        return value
    pairs = value if isinstance(value, list | tuple) else ()
    pairs = tuple(tuple(pair) if isinstance(pair, list | tuple) else () for pair in pairs)
    are_pairs = all(len(pair) == 2 and all(type(agent) is int and agent >= 0 for agent in pair) for pair in pairs)
    different = {frozenset(pair) for pair in pairs if len(set(pair)) == 2}
    if not pairs or not are_pairs or len(different) < len(pairs):
        example = "pairs of two different agents, from 0, each pair once, such as [[0,1],[1,2]]"
        raise ValueError(f"choose {', '.join(NAMES)} or {example}")
    return pairs


Graph = Annotated[Any, pydantic.AfterValidator(_graph)]
"""A name in `NAMES`, or a tuple of pairs of agents."""

Count = Annotated[int, Field(ge=0)]


@options
class DCG(TDLearner):
    """Q is the mean utility of the agents plus the mean payoff of the pairs of agents on the edges of a graph.

    Execution is centralised: to act, all agents' hidden states are needed in one place, where messages between agents
    maximise Q. Parameters ``{"agent", "payoff"}``, without ``payoff`` where the graph has no edge, and
    ``state_value`` with ``duelling``. An agent's utilities are the outputs of its network.

    Attributes:
        graph: the edges: ``full``, all pairs of agents; ``line``; ``cycle``; ``star``, agent 0 with all others;
            ``vdn``, none; or a list of pairs such as ``[[0,1],[1,2]]``.
        payoff_rank: a payoff is a sum of so many outer products of vectors; ``null``: any matrix.
        payoff_layers: hidden layers of the payoff network, as wide as the agents.
        duelling: whether Q has a V(s) in addition (DCG-S), which never changes what the agents do.
        mixer_embed_dim: hidden width of V(s).
        iterations: how often agents send messages before they act; 0: each agent maximises its utility.
        anytime: whether the best joint action of all iterations is played, and not that of the last one.
        normalised: whether the mean over actions is subtracted from each message.
    """

    graph: Graph
    payoff_rank: PositiveInt | None
    payoff_layers: Count
    duelling: bool
    mixer_embed_dim: PositiveInt
    iterations: Count
    anytime: bool
    normalised: bool

    def without_effect(self) -> dict[str, str]:
        """See `Algorithm.without_effect`."""
        without = {} if self.duelling else {"mixer_embed_dim": "algo.duelling=false"}
        if self.graph == "vdn":
            edges_alone = ["payoff_rank", "payoff_layers", "iterations", "anytime", "normalised"]
            without |= dict.fromkeys(edges_alone, "algo.graph=vdn")
        elif self.iterations == 0:
            without |= dict.fromkeys(["anytime", "normalised"], "algo.iterations=0")
        return super().without_effect() | without

    def edges(self, num_agents: int) -> Edges:
        """Returns the pairs of agents on edges.

        Raises:
            ConfigError: if a listed edge names an agent that the environment doesn't have.
        """
        if isinstance(self.graph, str):
            return named_edges(self.graph, num_agents)  # type: ignore[arg-type]
        largest = max(max(edge) for edge in self.graph)
        if largest >= num_agents:
            listed = [list(edge) for edge in self.graph]
            has = f"the environment has agents 0 to {num_agents - 1}"
            raise ConfigError(f"algo.graph={listed} is not allowed: it names agent {largest}, and {has}")
        return self.graph

    def payoff_net(self, num_agents: int, num_actions: int) -> PairPayoffs:
        """Returns the payoff network as a flax module."""
        hidden_dims = (self.hidden_dim,) * self.payoff_layers
        return PairPayoffs(self.edges(num_agents), num_actions, self.payoff_rank, hidden_dims)

    @property
    def state_value_net(self) -> TwoLayer:
        """V(s) as a flax module."""
        return TwoLayer(self.mixer_embed_dim, 1)

    def init(self, key: PRNGKey, env_spec: EnvSpec) -> PyTree:
        """Draws the parameters of agent, payoffs and V(s)."""
        agent_key, payoff_key, value_key = jax.random.split(key, 3)
        params = super().init(agent_key, env_spec)
        if self.edges(env_spec.num_agents):
            net = self.payoff_net(env_spec.num_agents, env_spec.num_actions)
            params["payoff"] = init_net(net, payoff_key, jnp.zeros((env_spec.num_agents, self.hidden_dim)))
        if self.duelling:
            params["state_value"] = init_net(self.state_value_net, value_key, jnp.zeros(env_spec.state_dim))
        return params

    def acting_params(self, params: PyTree) -> PyTree:
        """Returns agent and payoffs: V(s) is the same for all joint actions."""
        return {name: params[name] for name in ("agent", "payoff") if name in params}

    def act_with_noise(
        self, params: PyTree, carry: Array, inputs: AgentInputs, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Array]:
        """Finds the joint action by messages; then each agent explores. See `Algorithm.act_with_noise`."""
        del hp
        agents = self.agents(*inputs.avail_actions.shape[-2:])
        seen = SeenByAgents(inputs.obs[None], inputs.last_action[None])
        unrolled = unroll_agents(agents, [params["agent"]], [], carry, seen, keeps_hiddens=True)
        [step] = jax.tree.map(lambda leaf: leaf[0], unrolled)
        greedy = self.greedy(self.graph_values(params, step), inputs.avail_actions)
        policy = jax.nn.one_hot(greedy, inputs.avail_actions.shape[-1])
        return explore(noise, policy, inputs.avail_actions, ctx.epsilon), step.hiddens

    @mean_over_steps
    def loss(
        self, params: PyTree, target: PyTree, batch: Episode, hp: Hyperparams, ctx: Context, noise: PyTree
    ) -> tuple[Array, Aux]:
        """Returns the mean square TD error of Q."""
        del ctx, noise
        nets = self.unroll_nets(batch, [params["agent"]], [target["agent"]], keeps_hiddens=True)
        values, target_values = (self.graph_values(*each) for each in zip((params, target), nets, strict=True))
        greedy = self.greedy(values, batch.avail_actions)
        q_tot = self.q_value(params, _before(values), batch.joint_action, batch.state[:, :-1])
        # Double Q-learning: the online nets choose the next joint action, the target nets say its value.
        to_bootstrap = greedy if self.double_q else self.greedy(target_values, batch.avail_actions)
        following = jax.tree.map(lambda leaf: leaf[:, 1:], target_values)
        next_value = self.q_value(target, following, self.next_actions(to_bootstrap, batch), batch.state[:, 1:])

        def value(joint_action: Array) -> Array:
            return self.q_value(target, _before(target_values), joint_action, batch.state[:, :-1])

        y = self.td_targets(batch, hp, next_value, self.correction(batch, to_bootstrap, value))
        loss = masked_mean_square(q_tot - y, batch.mask, batch.importance)
        means = {"q_tot": q_tot, "td_target": y}
        metrics = {"loss": loss} | {f"{name}_mean": masked_mean(each, batch.mask) for name, each in means.items()}
        aux: dict[str, Any] = {
            "agent_qs": values.utilities,
            "payoffs": values.payoffs,
            "target_payoffs": target_values.payoffs,
        }
        aux |= {"hidden": nets[0].hiddens, "target_hidden": nets[1].hiddens, "greedy_actions": greedy}
        aux |= {"q_tot": q_tot, "td_target": y, "next_value": next_value, "td_error": q_tot - y}
        return loss, Aux(metrics, aux)

    def graph_values(self, params: PyTree, unrolled: Unrolled) -> GraphValues:
        """Returns utilities and payoffs of agents with hidden states ``[.., N, H]``."""
        *leading, num_agents, num_actions = unrolled.utilities.shape
        if not self.edges(num_agents):
            nothing = jnp.zeros((*leading, 0, num_actions, num_actions), unrolled.utilities.dtype)
            return GraphValues(unrolled.utilities, nothing)
        net = self.payoff_net(num_agents, num_actions)
        return GraphValues(unrolled.utilities, apply_net(net, params["payoff"], unrolled.hiddens))

    def greedy(self, values: GraphValues, avail_actions: Array) -> Array:
        """Returns the joint action that messages find, ``[.., N]``; see `greedy_joint_actions`."""
        edges = self.edges(avail_actions.shape[-2])
        how = {"iterations": self.iterations, "anytime": self.anytime, "normalised": self.normalised}
        return greedy_joint_actions(values, avail_actions, edges, **how)

    def q_value(self, params: PyTree, values: GraphValues, joint_action: Array, state: Array) -> Array:
        """Returns Q of joint actions ``[.., N]`` in states ``[.., D]``, V(s) included: ``[..]``."""
        q = joint_value(values, joint_action, self.edges(joint_action.shape[-1]))
        return q + apply_net(self.state_value_net, params["state_value"], state)[..., 0] if self.duelling else q


def _before(values: GraphValues) -> GraphValues:
    """Returns the values before each step."""
    return jax.tree.map(lambda leaf: leaf[:, :-1], values)
