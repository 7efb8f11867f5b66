"""Runs over several hosts: each trains its own slice of the seeds, without communication.

`python -m wqmix_jax.merge` joins their folders. Where the platform requires it, `jax.distributed` connects and numbers
the hosts.
"""

import atexit
import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from wqmix_jax.errors import REFUSED, ConfigError

ADDRESS = "JAX_COORDINATOR_ADDRESS"
"""The environment variable with the address of host 0: ``HOST:PORT``, the same on all hosts."""

SLURM = "slurm"
"""The value of ``hosts`` that splits seeds over the tasks of an srun step and the elements of a job array."""

_RESERVED_STEPS = 0xFFFFFFF0
"""From here on SLURM's step ids aren't srun's: they name batch scripts and interactive shells."""

CONNECT_SECONDS = 300
"""Seconds for which a host looks for host 0, as long as JAX does."""

MAX_APART_SECONDS = 7 * 24 * 3600
"""Seconds for which a connected host that is done waits for the others, whose seeds may take longer."""


def with_host(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Fills in the options ``hosts`` and ``host``: as given, from SLURM, or for a single host.

    Without ``hosts``, seeds are split only if the process is one of several tasks of an srun step. With
    ``hosts=slurm``, the elements of a job array are hosts, too. If the run is ``distributed``, `connected` fills in the
    missing options.

    Args:
        values: the run's options.
        environ: the process's environment variables.

    Raises:
        ConfigError: if the number of this host can't be determined, or if SLURM runs more tasks than there are seeds.
    """
    hosts, host = values["hosts"], values["host"]
    if hosts == SLURM and (values["distributed"] is True or host is not None):
        other = "distributed=true: JAX" if values["distributed"] is True else f"host={host}: SLURM"
        raise ConfigError(f"hosts={SLURM} is not allowed with {other} numbers the hosts")
    if values["distributed"] is True:
        return dict(values)
    if hosts is None and host is not None:
        raise ConfigError(f"hosts is missing: host={host} is one of how many?")
    if hosts == 1 or host is not None:
        return {**values, "host": host or 0}
    count, index = _slurm_step(environ) or (1, 0)
    if hosts is not None:
        count, index = _in_slurm_array(count, index, environ)
    if hosts == SLURM and count == 1 and not _slurm_step(environ) and "SLURM_ARRAY_TASK_ID" not in environ:
        neither = "this process is neither an srun task nor an element of a job array"
        raise ConfigError(f"hosts={SLURM} is not allowed: {neither}; start it with srun, or write hosts=N host=i")
    if hosts not in (None, SLURM, count):
        if not isinstance(hosts, int) or hosts < 1:
            raise ConfigError(f"hosts={hosts} is not allowed: a positive integer is needed, or {SLURM}")
        choices = f"write host=0 .. host={hosts - 1}"
        raise ConfigError(f"host is missing: SLURM runs {count} task(s) here and not hosts={hosts}; {choices}")
    num_seeds = values["num_seeds"]
    if isinstance(num_seeds, int) and 0 < num_seeds < count:
        raise ConfigError(
            f"num_seeds={num_seeds} is not allowed: SLURM runs {count} tasks here, each of which needs a seed"
        )
    return {**values, "hosts": count, "host": index}


def unused_tasks(values: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    """Returns a line about SLURM's tasks over which this run isn't split, or None.

    Args:
        values: a run's options as given, before `with_host`.
        environ: the process's environment variables.
    """
    if values["hosts"] is not None or values["host"] is not None or values["distributed"] is True:
        return None
    seeds = "its one seed" if values["num_seeds"] == 1 else f"all {values['num_seeds']} seeds"
    tasks, elements = (environ.get(name) or "1" for name in ("SLURM_NTASKS", "SLURM_ARRAY_TASK_COUNT"))
    if tasks != "1" and not _slurm_step(environ):
        split = "start it with srun to split them, or write hosts=N host=i"
        return f"SLURM_NTASKS={tasks}, but this process is not an srun task: it trains {seeds}; {split}"
    if elements != "1" and values["num_seeds"] != 1:
        return f"SLURM_ARRAY_TASK_COUNT={elements}: each element trains {seeds}; hosts={SLURM} splits them"
    return None


def refuse_step_of_tasks(environ: Mapping[str, str]) -> None:
    """Refuses a sweep in each of several tasks of an srun step, because every task would run all of it.

    Raises:
        ConfigError: if this process is one of several such tasks.
    """
    step = _slurm_step(environ)
    if step is not None and step[0] > 1:
        ways = "start it once, or let hydra/launcher=submitit_slurm submit its runs"
        raise ConfigError(
            f"-m is not allowed under srun with {step[0]} tasks, each of which would run the sweep: {ways}"
        )


def connected(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Starts `jax.distributed` if the run is ``distributed``, and numbers the hosts by it.

    Call it before anything that starts JAX's backend, including the import of some environments. JAX itself ends the
    process, with a stack trace, if the other processes don't connect within five minutes.

    Args:
        values: the run's options.
        environ: the process's environment variables.

    Returns:
        The options, with ``hosts`` and ``host``.

    Raises:
        ConfigError: if hosts are numbered impossibly, host 0 can't be found, or JAX connects others than ``hosts``.
    """
    if values["distributed"] is not True:  # or not allowed, which the check of the run's options reports
        return dict(values)
    import jax  # here, because a command line that trains nothing must answer quickly

    if not jax.distributed.is_initialized():
        _connect(values["hosts"], values["host"], environ)
    hosts = jax.process_count()
    if values["hosts"] not in (None, hosts):
        raise ConfigError(f"hosts={values['hosts']} is not allowed with distributed: JAX connects {hosts} process(es)")
    host = jax.process_index() if values["host"] is None else values["host"]
    return {**values, "hosts": hosts, "host": host}


def abandon_others() -> None:
    """Ends the process with the exit code of a refusal if JAX has connected it: it would wait for the others."""
    jax = sys.modules.get("jax")  # not imported for this: a refusal must be quick
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(REFUSED)


def _connect(hosts: Any, host: Any, environ: Mapping[str, str]) -> None:
    """Starts `jax.distributed`; JAX finds missing numbers itself on a TPU pod, under SLURM and under MPI."""
    import jax
    from jax._src import distributed  # its client is nowhere else

    address = environ.get(ADDRESS)
    _refuse_impossible(hosts, host, address, environ)
    who = "the hosts" if host is None else f"host {host} of {hosts}"
    print(f"connecting {who}, within five minutes; distributed=false trains apart from the others", flush=True)
    if address is not None and host not in (None, 0):
        _wait_for(address)
    all_given = None not in (hosts, host, address)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the run
    try:
        jax.distributed.initialize(address, hosts, host, cluster_detection_method="deactivate" if all_given else None)
    except Exception as error:  # of a cluster's metadata, its network, or JAX
        hint = f"where JAX doesn't find the others itself, set {ADDRESS}=HOST:PORT and write hosts=N host=i"
        raise ConfigError(f"distributed=true is not possible: {error}; {hint}") from error

    client: Any = distributed.global_state.client

    def wait_for_the_others() -> None:
        with contextlib.suppress(Exception):  # one of them was killed
            client.wait_at_barrier("wqmix_jax_done", MAX_APART_SECONDS * 1000)

    atexit.register(wait_for_the_others)  # JAX's own wait at exit takes five minutes at most, and ends them all


def _refuse_impossible(hosts: Any, host: Any, address: str | None, environ: Mapping[str, str]) -> None:
    for name, value, least in (("hosts", hosts, 1), ("host", host, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"{name}={value} is not allowed: an integer of at least {least} is needed")
    if hosts is not None and host is not None and host >= hosts:
        raise ConfigError(f"host={host} is not allowed: hosts={hosts} are counted from 0")
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"{ADDRESS}={address} is not allowed: HOST:PORT of host 0 is needed")
    if None in (hosts, host) and int(environ.get("SLURM_ARRAY_TASK_COUNT") or 1) > 1:
        raise ConfigError("hosts is missing: JAX can't number SLURM's job array; write hosts=N host=i")


def _wait_for(address: str) -> None:
    """Waits until host 0 listens at ``address``; JAX would end the process if it doesn't."""
    name, _, port = address.rpartition(":")
    last = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > last:
                raise ConfigError(f"{ADDRESS}={address} is not allowed: host 0 doesn't answer ({error})") from error
            time.sleep(0.5)
        else:
            return


def refuse_unexpected_processes(values: Mapping[str, Any]) -> None:
    """Refuses to run if JAX connects this process with others unasked; looking for them starts the backend.

    Raises:
        ConfigError: if JAX connects processes although ``distributed`` is false.
    """
    import jax

    if not values["distributed"] and jax.process_count() > 1:  # all of them would train the same seeds
        raise ConfigError(f"distributed=false is not allowed: JAX connects {jax.process_count()} processes")


def _slurm_step(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Returns the number of tasks in the srun step of this process, and this task's index; None outside of a step.

    Under sbatch or salloc without srun there is one process, ``SLURM_PROCID=0``, whatever ``SLURM_NTASKS`` is.
    """
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    if not step.isdecimal() or int(step) >= _RESERVED_STEPS or not environ.get("SLURM_STEP_NUM_TASKS"):
        return None
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    task = _number(environ, "SLURM_PROCID") if tasks > 1 else 0
    if task >= tasks:
        range_of_tasks = f"SLURM_STEP_NUM_TASKS={tasks} are counted from 0, so hosts=N host=i must be written"
        raise ConfigError(f"SLURM_PROCID={task} is not allowed: {range_of_tasks}")
    return tasks, task


def _in_slurm_array(tasks: int, task: int, environ: Mapping[str, str]) -> tuple[int, int]:
    """Returns number and index of this task among all elements of SLURM's job array, which run ``tasks`` each."""
    elements = _number(environ, "SLURM_ARRAY_TASK_COUNT", 1)
    if elements == 1:
        return tasks, task
    first, last, step = (_number(environ, f"SLURM_ARRAY_TASK_{name}", 0) for name in ("MIN", "MAX", "STEP"))
    if step == 0:  # SLURM sets these; a scheduler that imitates it may not
        first, last, step = 0, elements - 1, 1
    if (last - first) // step + 1 != elements:
        raise ConfigError("host is missing: SLURM's job array has gaps, so hosts=N host=i must be written")
    return elements * tasks, (_number(environ, "SLURM_ARRAY_TASK_ID", first) - first) // step * tasks + task


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} is not a number, so hosts=N host=i must be written")
    return int(text)
