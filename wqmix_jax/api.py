"""Training from a notebook or a script: no command line, no files."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wqmix_jax.config import MAX_SEED, ConfigError, RunConfig, run_config
from wqmix_jax.loop import advance, begin, compile_trainer, is_finished
from wqmix_jax.trainer import TrainState, make_trainer, train_sharding


def train_seeds(
    config: RunConfig | Mapping[str, Any],
    seeds: Sequence[int],
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Trains all ``seeds`` in one compiled call until each has seen ``config.total_env_steps`` environment steps.

    Args:
        config: what `wqmix_jax.load_config` returns, or nested mappings as in a run folder's ``config.yaml``. Its
            ``seed`` and ``num_seeds`` are not used, nor is anything that concerns files.
        seeds: different integers from 0 to 2**31 - 1; a seed trains the same in any company.
        callback: called with each record as it comes.

    Returns:
        The final train state, leaves ``[S, ..]`` in the order of ``seeds``, and all records: the same dicts as the
        lines of ``metrics.jsonl``, see `wqmix_jax.logger`.

    Raises:
        ConfigError: if an option or a seed is not allowed.
        RunError: if an environment outside of JAX fails too often.
    """
    config = config if isinstance(config, RunConfig) else run_config(config)
    seeds = _checked(seeds)
    host = config.env.host
    trainer, _ = compile_trainer(make_trainer(config, sharding=train_sharding(config, len(seeds))), seeds)
    records: list[dict[str, Any]] = []

    def take(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            records.append(line)
            if callback is not None:
                callback(line)

    with host.running(seeds):
        loop, lines = begin(trainer, seeds)
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
