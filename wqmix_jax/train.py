"""Trains: ``python -m wqmix_jax.train +algo=ow_qmix [key=value ..]``.

Options are composed from yamls, see `wqmix_jax.cli.overrides`; whatever is wrong with them is printed as one line on
stderr, with exit code 2, before anything is compiled or written.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wqmix_jax.cli.arguments import read_arguments, show
from wqmix_jax.cli.checks import refuse_settings_of_hydra
from wqmix_jax.cli.command import command, warn_of_copied_checkout
from wqmix_jax.cli.overrides import Composed, compose_run, given_values, load_config
from wqmix_jax.cli.sweeps import composed_by_hydra, run_sweep
from wqmix_jax.config import RunConfig, run_config
from wqmix_jax.options import whole
from wqmix_jax.runs.hosts import connected, refuse_unexpected_processes, unused_tasks, with_host

__all__ = ["load_config", "main"]


@command
def main() -> None:
    """Starts a run, continues one (``resume=RUN_DIR``) or starts several (``-m``)."""
    arguments = read_arguments(sys.argv[1:])
    if arguments.shows_only:
        show(arguments)
        return
    warn_of_copied_checkout()
    if arguments.multirun:
        run_sweep(arguments, _train_one_of_several)
        return
    refuse_settings_of_hydra(arguments.overrides)
    run = compose_run(arguments.overrides, arguments.config_dir)
    if run.values["resume"] is None:
        config, values = _built(run, os.environ)
        from wqmix_jax.runs import session  # slow

        session.start(config, values, algo=run.choices["algo"], env=run.choices["env"], config_dir=arguments.config_dir)
    else:
        from wqmix_jax.runs import session

        session.resume(Path(str(run.values["resume"])), given_values(run), config_dir=arguments.config_dir)


def _train_one_of_several(composed: DictConfig) -> None:
    """Trains one run of a sweep, maybe in another process, where hydra calls this function."""
    run, config_dir = composed_by_hydra(composed)
    config, values = _built(run, {})  # each run trains all its seeds: SLURM's tasks don't split them
    from wqmix_jax.runs import session

    session.start(config, values, algo=run.choices["algo"], env=run.choices["env"], config_dir=config_dir)


def _built(run: Composed, environ: Mapping[str, str]) -> tuple[RunConfig, dict[str, Any]]:
    """Builds the options of a new run, this host's number filled in, and refuses what can't be trained here.

    Args:
        run: the composed options.
        environ: environment variables that may say how many hosts share the run.
    """
    from wqmix_jax.training.devices import claim_cores, refuse_missing_backend

    given = {name: whole(run.values[name]) for name in ("hosts", "host", "num_seeds")}  # compared before their check
    values = with_host({**run.values, **given}, environ)
    note = unused_tasks({**run.values, **given}, environ)
    claim_cores()  # before an environment's library starts the backend
    values = connected(values, os.environ)
    refuse_missing_backend()
    config = run_config(values)
    refuse_unexpected_processes(values)
    for name, reason in config.algo.without_effect().items():
        if f"algo.{name}" in run.given:
            print(f"warning: algo.{name} has no effect with {reason}", file=sys.stderr, flush=True)
    if note is not None:
        print(note, file=sys.stderr, flush=True)
    return config, values


if __name__ == "__main__":
    main()
