"""Runs over several hosts: each trains its own slice of the seeds, and they never talk.

`python -m wqmix_jax.merge` joins what they leave behind.
"""

from collections.abc import Mapping
from typing import Any

from wqmix_jax.config import ConfigError


def with_host(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A run's options with ``hosts`` and ``host`` filled in: as they were given, from SLURM, or one host alone.

    Raises:
        ConfigError: if it can't be known which of several hosts this is.
    """
    hosts, host = values["hosts"], values["host"]
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


def refuse_connected_processes() -> None:
    """Refuses to run where JAX connects this process with others; asking it starts the backend.

    Raises:
        ConfigError: if so.
    """
    import jax  # here, because the command line must answer at once where it has nothing to train

    if jax.process_count() > 1:  # orbax would write the first one's checkpoints alone
        alone = "hosts=N host=i train without that, on a TPU pod with TPU_PROCESS_BOUNDS=1,1,1 on every host"
        raise ConfigError(f"a run of {jax.process_count()} processes that JAX connects is not allowed: {alone}")


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
