"""OW-QMIX's learner call in PyTorch, structured like PyMARL's: one pass of the agents per time step, autograd, RMSProp.

It does the work of ``+algo=ow_qmix`` on a decoded batch, and was written for the benchmark; the authors' code also
unrolls target agents whose values it doesn't use.
"""

from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import nn

from wqmix_jax.algos.wqmix import WQMIX
from wqmix_jax.types import Episode


class Agent(nn.Module):
    """Maps inputs ``[T, R, F]`` to utilities ``[T, R, A]``."""

    def __init__(self, num_inputs: int, hidden_dim: int, num_actions: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_inputs, hidden_dim)
        self.cell = nn.GRUCell(hidden_dim, hidden_dim)
        self.head = nn.Linear(hidden_dim, num_actions)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden, utilities = inputs.new_zeros(inputs.shape[1], self.cell.hidden_size), []
        for step in inputs:
            hidden = self.cell(torch.relu(self.encoder(step)), hidden)
            utilities.append(self.head(hidden))
        return torch.stack(utilities)


class Mixer(nn.Module):
    """QMIX's mixer: maps ``[.., N]`` and ``[.., D]`` to ``[..]``."""

    def __init__(self, num_agents: int, state_dim: int, embed_dim: int, hypernet_dim: int) -> None:
        super().__init__()
        self.w_1 = _two_layer(state_dim, hypernet_dim, num_agents * embed_dim)
        self.b_1 = nn.Linear(state_dim, embed_dim)
        self.w_2 = _two_layer(state_dim, hypernet_dim, embed_dim)
        self.v = _two_layer(state_dim, embed_dim, 1)

    def forward(self, qs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        w_1 = self.w_1(state).abs().unflatten(-1, (qs.shape[-1], -1))
        hidden = nn.functional.elu((qs[..., None] * w_1).sum(-2) + self.b_1(state))
        return (hidden * self.w_2(state).abs()).sum(-1) + self.v(state)[..., 0]


class QStar(nn.Module):
    """The feed-forward Q*: maps ``[.., N]`` and ``[.., D]`` to ``[..]``."""

    def __init__(self, num_agents: int, state_dim: int, hidden_dim: int) -> None:
        super().__init__()
        first, *rest = (nn.Linear(width, hidden_dim) for width in (state_dim + num_agents, hidden_dim, hidden_dim))
        relus = [layer for linear in rest for layer in (linear, nn.ReLU())]
        self.net = nn.Sequential(first, nn.ReLU(), *relus, nn.Linear(hidden_dim, 1))
        self.v = _two_layer(state_dim, hidden_dim, 1)

    def forward(self, qs: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return (self.net(torch.cat([state, qs], dim=-1)) + self.v(state))[..., 0]


def make_torch_learner(algo: WQMIX, batch: Episode) -> Callable[[], float]:
    """Returns a function that makes one optimiser step on ``batch`` and returns the loss."""
    data: Any = jax.tree.map(lambda leaf: torch.tensor(jax.device_get(leaf)), batch)
    inputs, num_agents, state_dim = _inputs(data), data.obs.shape[-2], data.state.shape[-1]

    def nets() -> nn.ModuleDict:
        def agent() -> Agent:
            return Agent(inputs.shape[-1], algo.hidden_dim, data.avail_actions.shape[-1])

        mixer = Mixer(num_agents, state_dim, algo.mixer_embed_dim, algo.hypernet_dim)
        q_star = QStar(num_agents, state_dim, algo.q_star_dim)
        return nn.ModuleDict({"agent": agent(), "q_agent": agent(), "mixer": mixer, "q_star": q_star})

    online, target = nets(), nets()
    optimiser = torch.optim.RMSprop(online.parameters(), algo.lr, alpha=algo.rms_decay, eps=algo.rms_eps)

    def call() -> float:
        loss = _loss(algo, online, target, inputs, data)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(online.parameters(), algo.max_grad_norm)
        optimiser.step()
        return loss.item()

    return call


def _loss(algo: WQMIX, online: nn.ModuleDict, target: nn.ModuleDict, inputs: torch.Tensor, data: Any) -> torch.Tensor:
    def unroll(net: nn.Module) -> torch.Tensor:
        utilities = net(inputs)
        return utilities.unflatten(1, (data.obs.shape[0], data.obs.shape[2])).transpose(0, 1)

    agent_qs, central_qs = unroll(online["agent"]), unroll(online["q_agent"])
    actions, now, after = data.joint_action, data.state[:, :-1], data.state[:, 1:]
    with torch.no_grad():
        best = agent_qs.masked_fill(~data.avail_actions, -torch.inf).argmax(-1)
        next_q = target["q_star"](_pick(unroll(target["q_agent"])[:, 1:], best[:, 1:]), after)
        y = data.reward + algo.gamma * data.discount * next_q
    q_tot = online["mixer"](_pick(agent_qs[:, :-1], actions), now)
    q_star = online["q_star"](_pick(central_qs[:, :-1], actions), now)
    weights = torch.where(q_tot < y, 1.0, algo.alpha)
    squares = weights * (q_tot - y) ** 2 + (q_star - y) ** 2
    return (data.mask * squares).sum() / data.mask.sum()


def _inputs(data: Any) -> torch.Tensor:
    """Returns observation, last action and id of every agent, ``[T+1, B * N, F]``."""
    num_agents, num_actions = data.avail_actions.shape[-2:]
    taken = nn.functional.one_hot(data.joint_action.long(), num_actions).float()
    last = torch.cat([torch.zeros_like(taken[:, :1]), taken], dim=1)
    ids = torch.eye(num_agents).expand(*data.obs.shape[:-1], num_agents)
    return torch.cat([data.obs, last, ids], dim=-1).transpose(0, 1).flatten(1, 2).contiguous()


def _pick(qs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return qs.gather(-1, actions[..., None].long())[..., 0]


def _two_layer(num_inputs: int, hidden_dim: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_outputs))
