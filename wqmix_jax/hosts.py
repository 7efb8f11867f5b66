"""Runs over several hosts: each trains its own slice of the seeds, and they never talk.

`python -m wqmix_jax.merge` joins what they leave behind. Where the platform wants it, `jax.distributed` connects and
numbers them.
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

from wqmix_jax.config import ConfigError
from wqmix_jax.exits import REFUSED

ADDRESS = "JAX_COORDINATOR_ADDRESS"
"""The environment's variable that says where host 0 listens: ``HOST:PORT``, the same on all hosts."""

CONNECT_SECONDS = 300
"""How long a host looks for host 0, as long as JAX does."""

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


def connected(values: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A run's options, with `jax.distributed` started where they are ``distributed``, and hosts numbered by it.

    It must come before anything that starts JAX's backend, the import of some environments included. JAX itself ends
    the process, with a stack trace, where the others don't come within five minutes.

    Raises:
        ConfigError: if hosts are numbered impossibly, host 0 can't be found, or JAX connects others than ``hosts``.
    """
    if values["distributed"] is not True:  # or not allowed, which is told when the run's options are checked
        return dict(values)
    import jax  # here, because the command line must answer at once where it has nothing to train

    if not jax.distributed.is_initialized():
        _connect(values["hosts"], values["host"], environ)
    hosts = jax.process_count()
    if values["hosts"] not in (None, hosts):
        raise ConfigError(f"hosts={values['hosts']} is not allowed with distributed: JAX connects {hosts} process(es)")
    host = jax.process_index() if values["host"] is None else values["host"]
    return {**values, "hosts": hosts, "host": host}


def abandon_others() -> None:
    """Ends the process with the exit code of a refusal where JAX connects it with others, which it would wait for."""
    jax = sys.modules.get("jax")  # not imported for this: a refusal comes at once
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(REFUSED)


def _connect(hosts: Any, host: Any, environ: Mapping[str, str]) -> None:
    """Starts `jax.distributed`; what isn't given, JAX finds itself on a TPU pod, under SLURM and under MPI."""
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
        told = f"where JAX doesn't find the others itself, set {ADDRESS}=HOST:PORT and write hosts=N host=i"
        raise ConfigError(f"distributed=true is not possible: {error}; {told}") from error

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
    """Returns when somebody listens at ``address``: JAX would end the process where nobody does."""
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
    """Refuses to run where JAX connects this process with others unasked; looking for them starts the backend.

    Raises:
        ConfigError: if so.
    """
    import jax

    if not values["distributed"] and jax.process_count() > 1:  # all of them would train the same seeds
        raise ConfigError(f"distributed=false is not allowed: JAX connects {jax.process_count()} processes")


def _from_slurm(environ: Mapping[str, str]) -> tuple[int, int]:
    """How many tasks SLURM runs, those of a job array counted together with those of a step, and which this is."""

    def number(name: str, default: int) -> int:
        text = environ.get(name) or str(default)
        if not text.isdecimal():
            raise ConfigError(f"{name}={text} is not a number, so hosts=N host=i must be written")
        return int(text)

    tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
    task = number("SLURM_PROCID", 0) if tasks > 1 else 0
    elements = number("SLURM_ARRAY_TASK_COUNT", 1)
    if elements == 1:
        return tasks, task
    first, last, step = (number(f"SLURM_ARRAY_TASK_{name}", 0) for name in ("MIN", "MAX", "STEP"))
    if step == 0:  # SLURM says more than this; a scheduler that imitates it may not
        first, last, step = 0, elements - 1, 1
    if (last - first) // step + 1 != elements:
        raise ConfigError("host is missing: SLURM's job array has gaps, so hosts=N host=i must be written")
    return elements * tasks, (number("SLURM_ARRAY_TASK_ID", first) - first) // step * tasks + task
