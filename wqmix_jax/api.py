"""Training from a notebook or a script: no command line, no files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wqmix_jax.config import MAX_SEED, ConfigError, RunConfig, run_config
from wqmix_jax.loop import advance, begin, is_finished
from wqmix_jax.members import make_members
from wqmix_jax.memory import compile_within_memory
from wqmix_jax.trainer import Trainer, TrainState, make_trainer, train_sharding


def train_seeds(
    config: RunConfig | Mapping[str, Any],
    seeds: Sequence[int],
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains all ``seeds`` in one compiled call until each has seen ``config.total_env_steps`` environment steps.

    Args:
        config: what `wqmix_jax.load_config` returns, or nested mappings as in a run folder's ``config.yaml``. Its
            ``seed``, ``num_seeds`` and ``host`` are not used, nor is anything that concerns files.
        seeds: different integers from 0 to 2**31 - 1; a seed trains the same in any company.
        callback: called with each record as it comes.

    Returns:
        The final train state, leaves ``[S, ..]`` in the order of ``seeds`` (with ``config.sweep`` all of them for its
        first values, and so on), and all records: the same dicts as the lines of ``metrics.jsonl``, see
        `wqmix_jax.logger`.

    Raises:
        ConfigError: if an option or a seed is not allowed.
        RunError: if an environment outside of JAX fails too often, or the memory is too small.
    """
    config = config if isinstance(config, RunConfig) else run_config(config)
    members = make_members(config.algo, _checked(seeds), config.sweep)
    sharding = train_sharding(config, len(members))

    def grouped(learner_groups: int) -> Trainer:
        return make_trainer(config, sharding=sharding, learner_groups=learner_groups)

    trainer, _, _ = compile_within_memory(grouped(1), members, grouped)
    records: list[dict[str, Any]] = []

    def take(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            records.append(line)
            if callback is not None:
                callback(line)

    with config.env.host.running([member.seed for member in members]):
        loop, lines = begin(trainer, members)
        while True:
            if (failure := trainer.failure()) is not None:
                raise failure
            take(lines)
            if is_finished(loop):
                return loop.state, records
            loop, lines = advance(trainer, loop)


def _checked(seeds: Sequence[int]) -> list[int]:
    listed = [int(seed) for seed in seeds]
    if not listed or len(set(listed)) < len(listed) or min(listed) < 0 or max(listed) > MAX_SEED:
        raise ConfigError(f"seeds={listed} is not allowed: different integers from 0 to {MAX_SEED} are needed")
    return listed
