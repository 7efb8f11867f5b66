"""Runs over several hosts: each trains its own slice of the seeds, and they never talk.

`python -m wqmix_jax.merge` joins what they leave behind. Where the platform wants it, `jax.distributed` connects and
numbers them.
"""

from collections.abc import Mapping
from typing import Any

from wqmix_jax.config import ConfigError

MAX_APART_SECONDS = 7 * 24 * 3600
"""How long a connected host that is done waits for the others before it ends: their seeds may take longer."""


def with_host(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A run's options with ``hosts`` and ``host`` filled in: as they were given, from SLURM, or one host alone.

    Where the run is ``distributed``, `connected` fills in what wasn't given.

    Raises:
        ConfigError: if it can't be known which of several hosts this is.
    """
    hosts, host = values["hosts"], values["host"]
    if values["distributed"] is True:
        return dict(values)
    if hosts is None and host is not None:
        raise ConfigError(f"hosts is missing: host={host} is one of how many?")
    if hosts == 1 or host is not None:
        return {**values, "host": host or 0}
    count, index = _from_slurm(environ)
    if hosts is not None and hosts != count:
        if not isinstance(hosts, int) or hosts < 1:
            raise ConfigError(f"hosts={hosts} is not allowed: a positive integer is needed")
        told = f"write host=0 .. host={hosts - 1}"
        raise ConfigError(f"host is missing: SLURM runs {count} task(s) here and not hosts={hosts}; {told}")
    return {**values, "hosts": count, "host": index}


def connected(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's options, with `jax.distributed` started where they are ``distributed``, and hosts numbered by it.

    It must come before anything that starts JAX's backend, the import of some environments included.

    Raises:
        ConfigError: if the processes can't be connected, or are not as many as ``hosts`` says.
    """
    if values["distributed"] is not True:  # or not allowed, which is told when the run's options are checked
        return dict(values)
    import jax  # here, because the command line must answer at once where it has nothing to train

    if not jax.distributed.is_initialized():
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the run
        try:
            jax.distributed.initialize(
                num_processes=values["hosts"],
                process_id=values["host"],
                shutdown_timeout_seconds=MAX_APART_SECONDS,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            told = "where JAX doesn't find the others itself, set JAX_COORDINATOR_ADDRESS and write hosts=N host=i"
            raise ConfigError(f"distributed=true is not possible: {error}; {told}") from error
    hosts = jax.process_count()
    if values["hosts"] not in (None, hosts):
        raise ConfigError(f"hosts={values['hosts']} is not allowed with distributed: JAX connects {hosts} process(es)")
    host = jax.process_index() if values["host"] is None else values["host"]
    return {**values, "hosts": hosts, "host": host}


def refuse_unexpected_processes(values: Mapping[str, Any]) -> None:
    """Refuses to run where JAX connects this process with others unasked; looking for them starts the backend.

    Raises:
        ConfigError: if so.
    """
    import jax

    if not values["distributed"] and jax.process_count() > 1:  # all of them would train the same seeds
        raise ConfigError(f"distributed=false is not allowed: JAX connects {jax.process_count()} processes")


def _from_slurm(environ: Mapping[str, str]) -> tuple[int, int]:
    """How many tasks SLURM runs, those of a job array counted together with those of a step, and which this is."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    task = int(environ.get("SLURM_PROCID") or 0) if tasks > 1 else 0
    elements = int(environ.get("SLURM_ARRAY_TASK_COUNT") or 1)
    if elements == 1:
        return tasks, task
    first, last, step = (int(environ.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in ("MIN", "MAX", "STEP"))
    if step == 0:  # SLURM says more than this; a scheduler that imitates it may not
        first, last, step = 0, elements - 1, 1
    if (last - first) // step + 1 != elements:
        raise ConfigError("host is missing: SLURM's job array has gaps, so hosts=N host=i must be written")
    return elements * tasks, (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step * tasks + task
