"""The time of a learner call by operation: ``python -m experiments.profile_learner [ALGO] [KEY=VALUE ..] [--top N]``.

Traces learner calls on 32 full episodes, on one device, with jax's profiler. Prints the operations of the compiled
program by their time per call, and sums: matrix products and reductions separate from the rest, and operations within
the recurrent unrolls (once per step) separate from those that run once. On a CPU, times of operations are comparable
only if the program uses one core (``taskset -c 0 python -m ..``).
"""

import collections
import functools
import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.benchmark import CALLS, next_step, one_after_another, one_batch_config, with_episodes
from wqmix_jax import load_config, make_trainer
from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, count
from wqmix_jax.config import RunConfig


class Operation(NamedTuple):
    """One operation of the compiled program, with its milliseconds and executions per call."""

    milliseconds: float
    times: int
    name: str
    result: str
    traced_as: str


@command
def main() -> None:
    """Profiles the chosen algorithm and prints the tables."""
    parser = OneLineParser(description=str(__doc__))
    parser.add_argument("algo", nargs="?", default="ow_qmix")
    parser.add_argument("overrides", nargs="*", help="options of a run, as for wqmix_jax.train")
    parser.add_argument("--top", type=count, default=40, help="the number of operations to list")
    args = parser.parse_args()
    show(profiled(load_config(f"+algo={args.algo}", *args.overrides)), args.top)


def profiled(config: RunConfig) -> list[Operation]:
    """Returns the operations of a learner call, the longest first."""
    trainer = make_trainer(one_batch_config(config), batches="whole")
    lengths = jnp.full(config.algo.batch_size, config.env.spec.episode_limit)
    state = with_episodes(trainer, config, lengths)
    call = jax.jit(lambda state: one_after_another(functools.partial(next_step, trainer), state)).lower(state).compile()
    jax.block_until_ready(call(state))
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call(state))
        [trace] = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return _by_operation(events, call.as_text() or "")


def _by_operation(events: list[dict[str, Any]], program: str) -> list[Operation]:
    described = {name: (result, line) for name, result, line in re.findall(r"%(\S+) = (\S+) (.*)", program)}
    spent: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        # The event of a loop contains those of its body.
        if event.get("ph") == "X" and event["name"] in described and not event["name"].startswith("while"):
            spent[event["name"]] += event["dur"]
            times[event["name"]] += 1
    operations = []
    for name, microseconds in spent.most_common():
        result, line = described[name]
        traced_as = re.search(r'op_name="([^"]*)"', line)
        operations.append(
            Operation(microseconds / 1e3 / CALLS, times[name] // CALLS, name, result, traced_as[1] if traced_as else "")
        )
    return operations


def show(operations: list[Operation], top: int) -> None:
    """Prints the sums and the longest operations."""
    sums: dict[tuple[str, str], float] = collections.defaultdict(float)
    for operation in operations:
        where = "at every step" if operation.times > 1 else "once"
        kind = "products and reductions" if re.match("ynn|dot|custom-call", operation.name) else "all else"
        sums[where, kind] += operation.milliseconds
    table = Table("", "operations", "ms per call", title="Sums")
    for (where, kind), milliseconds in sorted(sums.items()):
        table.add_row(where, kind, f"{milliseconds:.1f}")
    longest = Table("ms per call", "times", "operation", "result", "of", title=f"The longest {top}")
    for operation in operations[:top]:
        longest.add_row(
            f"{operation.milliseconds:.2f}",
            str(operation.times),
            operation.name,
            operation.result,
            operation.traced_as[-60:],
        )
    Console().print(table, longest)


if __name__ == "__main__":
    main()
