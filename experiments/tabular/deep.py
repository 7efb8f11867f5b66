"""Trained networks on the same random games: ``python -m experiments.tabular.deep [--games N]``.

Every game with every alpha is a member of one vmapped call per algorithm. Exploration is exactly uniform: each learner
step's batch holds every joint action of the member's game once, so only the initial weights are random. The networks
are the project's own, with fewer units and a larger learning rate, since a game of one step has a single observation.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tabular.games import FOLDER, NUM_ACTIONS, NUM_AGENTS, Share, random_games, write
from wqmix_jax import load_config
from wqmix_jax.algos.base import Context, hyperparams
from wqmix_jax.algos.q_learning import seen_before
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count, out_file
from wqmix_jax.ops.action_selection import greedy_actions
from wqmix_jax.training.learner import apply_gradients, init_learner
from wqmix_jax.types import Array, EnvSpec, Episode, PyTree

ALPHAS = (0.5, 0.1, 0.01)
ALGOS = ("qmix", "ow_qmix", "cw_qmix")
OVERRIDES = (
    "env=matrix_game",
    "algo.hidden_dim=16",
    "algo.mixer_embed_dim=16",
    "algo.hypernet_dim=16",
    "algo.lr=0.002",
)
Q_STAR = ("algo.q_star_dim=32",)
SPEC = EnvSpec(num_agents=NUM_AGENTS, num_actions=NUM_ACTIONS, obs_dim=1, state_dim=1, episode_limit=1)
NEARLY = 0.02
"""Values of Q_tot that differ by less than this part of its range count as equal: trained nets have no exact ties."""


@command
def main() -> None:
    """Trains each algorithm, prints the shares and writes them."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--games", type=count, default=25)
    parser.add_argument("--steps", type=count, default=1500, help="learner steps")
    parser.add_argument("--out", type=out_file, default=FOLDER / "deep.jsonl")
    args = parser.parse_args()
    games, shares = random_games(args.games), []
    for name in ALGOS:
        started = time.perf_counter()
        found = train(name, games, (1.0,) if name == "qmix" else ALPHAS, args.steps)
        for each in found:
            print(f"{each.name:8} alpha {each.alpha:<5g} argmax {each.argmax:.3f}  greedy {each.greedy:.3f}")
        print(f"{name:8} took {time.perf_counter() - started:.0f} s", flush=True)
        shares += found
        write(args.out, shares)


def train(name: str, games: np.ndarray, alphas: tuple[float, ...], num_steps: int) -> list[Share]:
    """Trains one algorithm on all games with all alphas, ``M = len(alphas) * len(games)`` members in one call."""
    algo = load_config(f"+algo={name}", *OVERRIDES, *(() if name == "qmix" else Q_STAR)).algo
    payoffs = jnp.tile(jnp.asarray(games, jnp.float32), (len(alphas), 1, 1))
    member_alphas = jnp.repeat(jnp.asarray(alphas, jnp.float32), len(games))

    def member(key: Array, payoff: Array, alpha: Array) -> tuple[Array, Array]:
        hp = jax.tree.map(jnp.asarray, hyperparams(algo))
        hp = hp._replace(alpha=alpha) if "alpha" in hp._fields else hp
        learner, batch = init_learner(algo, algo.init(key, SPEC)), every_joint_action(payoff)

        def step(learner: Any, _: None) -> tuple[Any, None]:
            gradient = jax.grad(algo.loss, has_aux=True)
            grads, _ = gradient(learner.params, learner.target, batch, hp, _context(), algo.sample_noise(key, batch))
            return apply_gradients(algo, learner, grads, hp)[0], None

        learner, _ = jax.lax.scan(step, learner, length=num_steps)
        return _learnt(algo, learner.params, batch)

    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), len(payoffs))
    q_tot, greedy = jax.device_get(jax.jit(jax.vmap(member))(keys, payoffs, member_alphas))
    return [
        _share(name, alpha, games, *(leaf.reshape(len(alphas), len(games), -1)[index] for leaf in (q_tot, greedy)))
        for index, alpha in enumerate(alphas)
    ]


def every_joint_action(payoff: Array) -> Episode:
    """Returns a batch of one-step episodes with each joint action once, in C order, ``B = payoff.size``."""
    joint_actions = np.indices(payoff.shape).reshape(payoff.ndim, -1).T[:, None]
    num_episodes = payoff.size
    return Episode(
        obs=jnp.ones((num_episodes, 2, NUM_AGENTS, 1)),
        state=jnp.ones((num_episodes, 2, 1)),
        avail_actions=jnp.ones((num_episodes, 2, NUM_AGENTS, NUM_ACTIONS), bool),
        joint_action=jnp.asarray(joint_actions, jnp.int32),
        reward=payoff.reshape(-1, 1),
        discount=jnp.zeros((num_episodes, 1)),
        mask=jnp.ones((num_episodes, 1)),
    )


def _context() -> Context:
    return Context(epsilon=jnp.float32(1), env_steps=jnp.int32(0), learner_steps=jnp.int32(0))


def _learnt(algo: Any, params: PyTree, batch: Episode) -> tuple[Array, Array]:
    """Returns Q_tot of every joint action ``[C]``, and the greedy joint action ``[N]``."""
    agent_qs = algo.unroll(params["agent"], batch)
    q_tot, _ = algo.mix(params["mixer"], agent_qs[:, :-1], batch.joint_action, seen_before(batch))
    return q_tot[:, 0], greedy_actions(agent_qs, batch.avail_actions)[0, 0]


def _share(name: str, alpha: float, games: np.ndarray, q_tot: np.ndarray, greedy: np.ndarray) -> Share:
    best = games.reshape(len(games), -1).argmax(1)
    highest, at_best = q_tot.max(1), q_tot[np.arange(len(games)), best]
    argmax = at_best >= highest - NEARLY * np.ptp(q_tot, axis=1)
    played = np.ravel_multi_index(tuple(greedy.T), games.shape[1:])
    return Share(name, alpha, round(float(argmax.mean()), 4), round(float((played == best).mean()), 4), len(games))


if __name__ == "__main__":
    main()
