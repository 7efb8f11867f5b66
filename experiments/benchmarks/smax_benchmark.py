"""Speed on SMAX, compared with JaxMARL: ``python -m experiments.smax_benchmark [--map NAME] [--out FILE]``.

Two comparisons in one process on one machine. First the environment alone: random available actions, observations
included. Then training QMIX with as much work per environment step as JaxMARL's script: the script plays 16
environments for 128 steps and then calls the learner 8 times on 32 such sequences; ours plays 16 battles and calls the
learner 8 times on 32 battles, so both replay every environment step 16 times on average. A battle is shorter than a
sequence, so 4 calls, which are measured as well, are still at least as many per environment step as in the script.
JaxMARL's script is not in its package; a plain loop of the same structure replaces it, see
`experiments.benchmarks.plain_qmix`.

Times are medians after a call that is not counted; compile time is left out. No other program should run at the same
time.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import plain_qmix
from experiments.benchmarks.benchmark import REPETITIONS, Row, loop_rows, show, timed, write
from experiments.benchmarks.plain_qmix import make_plain_qmix
from wqmix_jax import load_config
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.envs.base import without_weak_types
from wqmix_jax.envs.smax.task import SMAX
from wqmix_jax.errors import ConfigError, refuse
from wqmix_jax.training.devices import claim_cores
from wqmix_jax.types import Array, PRNGKey

NUM_ENVS, NUM_STEPS = 32, 128
"""Environments and steps of the comparison of the environment alone."""


@command
def main() -> None:
    """Measures both comparisons, prints the table and writes it."""
    parser = OneLineParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--map", default="3s5z")
    parser.add_argument("--out", type=out_file, help="a JSON file for the rows, the machine and the versions")
    args = parser.parse_args()
    claim_cores()
    try:
        config = load_config(*training_options(args.map))
    except ConfigError as error:
        refuse(str(error))
    fewer = dataclasses.replace(config, updates_per_iteration=config.updates_per_iteration // 2)
    rows = [
        *environment_rows(config.env),
        *plain_rows(config.env),
        *loop_rows(config, "qmix, ours"),
        *loop_rows(fewer, "qmix, ours, as many calls")[:1],
    ]
    show(rows)
    if args.out is not None:
        write(args.out, rows, map=args.map)


def training_options(name: str) -> list[str]:
    """Returns options of QMIX with the sizes that JaxMARL uses on SMAX, with 64 hidden units."""
    sizes = ["algo.hidden_dim=64", "algo.mixer_embed_dim=64", "algo.hypernet_dim=256"]
    work = ["num_envs=16", "updates_per_iteration=8", "algo.batch_size=32", "chunk_iterations=5"]
    return ["+algo=qmix", "env=smax", f"env.map={name}", *sizes, *work]


def environment_rows(env: SMAX) -> list[Row]:
    """Times `NUM_ENVS` environments for `NUM_STEPS` steps, ours and JaxMARL's."""
    plays = {
        "random, ours": our_play(env),
        "random, JaxMARL": native_play(env, resets=True),
        "random, JaxMARL without its resets": native_play(env, resets=False),
    }
    steps = NUM_ENVS * NUM_STEPS
    return [
        Row("env_steps_per_second", steps / timed(jax.jit(play), jax.random.key(0))[0], "1/s", name)
        for name, play in plays.items()
    ]


def our_play(env: SMAX) -> Callable[[PRNGKey], Array]:
    """Returns a function that plays with our protocol, in which finished battles stay finished."""

    def play(key: PRNGKey) -> Array:
        def advance(carry: tuple[Any, Array], key: PRNGKey) -> tuple[tuple[Any, Array], None]:
            env_state, total = carry
            seen = jax.vmap(env.observe)(env_state)
            joint_action = at_random(key, seen.avail_actions)
            env_state, outcome = env.step_batch(env_state, joint_action, jax.random.split(key, NUM_ENVS))
            return (env_state, total + seen.obs.sum() + seen.state.sum() + outcome.reward.sum()), None

        start = env.reset_batch(jax.random.split(key, NUM_ENVS))
        return jax.lax.scan(advance, (start, jnp.float32(0)), jax.random.split(key, NUM_STEPS))[0][1]

    return play


def native_play(env: SMAX, *, resets: bool) -> Callable[[PRNGKey], Array]:
    """Returns a function that plays with JaxMARL's ``step``, which resets after every step, or with ``step_env``."""
    game = env.game
    step = game.step if resets else game.step_env

    def play(key: PRNGKey) -> Array:
        def advance(carry: tuple[Any, Any, Array], key: PRNGKey) -> tuple[tuple[Any, Any, Array], None]:
            obs, env_state, total = carry
            avail = jax.vmap(game.get_avail_actions)(env_state)
            joint_action = at_random(key, jnp.stack([avail[name] for name in game.agents], axis=1) > 0)
            actions = {name: joint_action[:, index] for index, name in enumerate(game.agents)}
            obs, env_state, rewards, _, _ = jax.vmap(step)(jax.random.split(key, NUM_ENVS), env_state, actions)
            total += sum(seen.sum() for seen in obs.values()) + rewards[game.agents[0]].sum()
            return (obs, without_weak_types(env_state), total), None

        obs, env_state = jax.vmap(game.reset)(jax.random.split(key, NUM_ENVS))
        start = (obs, without_weak_types(env_state), jnp.float32(0))
        return jax.lax.scan(advance, start, jax.random.split(key, NUM_STEPS))[0][2]

    return play


def at_random(key: PRNGKey, avail_actions: Array) -> Array:
    """Returns a random available action of every agent."""
    return jax.random.categorical(key, jnp.where(avail_actions, 0.0, -jnp.inf))


def plain_rows(env: SMAX) -> list[Row]:
    """Times iterations of the plain loop, which play and learn, from the second one."""
    plain = make_plain_qmix(env.game)
    state = jax.jit(plain.init)(jax.random.key(0))
    iterate = jax.jit(plain.iterate, donate_argnums=0)
    times = []
    for _ in range(REPETITIONS + 1):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(iterate(state))
        times.append(time.perf_counter() - started)
    steps = plain_qmix.NUM_ENVS * plain_qmix.NUM_STEPS
    rate = steps / statistics.median(times[1:])
    return [Row("end_to_end_env_steps_per_second", rate, "1/s", "qmix, plain loop")]


if __name__ == "__main__":
    main()
