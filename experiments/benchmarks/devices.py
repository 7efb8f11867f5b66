"""Eight seeds over 1, 2, 4 and 8 virtual CPU devices: ``python -m experiments.devices``.

Prints one JSON line per number of devices: the largest difference of the parameters from those on one device, whether
each seed is bit-equal to the one trained in a group of the same size on one device, and how many programs were compiled
during training.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from wqmix_jax import load_config
from wqmix_jax.cli.command import command
from wqmix_jax.training.compiled_loop import compile_trainer, make_trainer
from wqmix_jax.training.devices import BATCH_AXIS, SEED_AXIS
from wqmix_jax.training.host_loop import advance, begin, is_finished
from wqmix_jax.training.members import make_members

NUM_SEEDS = 8

OPTIONS = (
    "+algo=ow_qmix", "env.world_shape=[4,4]", "env.episode_limit=10", "algo.batch_size=4", "algo.buffer_size=16",
    "algo.hidden_dim=8", "algo.mixer_embed_dim=4", "algo.hypernet_dim=4", "algo.q_star_dim=8", "total_env_steps=400",
    "eval_interval=200", "eval_episodes=2",
)  # fmt: skip


@command
def main() -> None:
    """Trains with each number of devices, and prints the comparison."""
    jax.config.update("jax_num_cpu_devices", NUM_SEEDS)
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    one = SingleDeviceSharding(jax.devices()[0])
    alone, _ = train(range(NUM_SEEDS), one, compilations)
    for count in (1, 2, 4, 8):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(count, 1), (SEED_AXIS, BATCH_AXIS))
        spread, compiled = train(range(NUM_SEEDS), NamedSharding(mesh, PartitionSpec(SEED_AXIS)), compilations)
        group, _ = train(range(NUM_SEEDS // count), one, compilations)
        size = NUM_SEEDS // count
        result = {
            "devices": count,
            "largest_difference": float(max(np.abs(a - b).max() for a, b in zip(spread, alone, strict=True))),
            "bit_equal_at_equal_shapes": all((a[:size] == b).all() for a, b in zip(spread, group, strict=True)),
            "programs_compiled_while_training": compiled,
        }
        print(json.dumps(result), flush=True)


def train(seeds: Sequence[int], sharding: Sharding, compilations: list[str]) -> tuple[list[Any], int]:
    """Returns the leaves of the final parameters, and the number of programs compiled after `compile_trainer`."""
    config = load_config(*OPTIONS)
    members = make_members(config.algo, seeds, {})
    trainer, _ = compile_trainer(make_trainer(config, sharding=sharding), members)
    loop, _ = begin(trainer, members)
    before = len(compilations)
    while not is_finished(loop):
        loop, _ = advance(trainer, loop)
    return jax.device_get(jax.tree.leaves(loop.state.learner.params)), len(compilations) - before


if __name__ == "__main__":
    main()
