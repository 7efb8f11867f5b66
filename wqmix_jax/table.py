"""Prints one table of many runs: ``python -m wqmix_jax.table RUN.. [--csv FILE]``.

A RUN is a run's folder, or a folder of them. The table has a row for every combination of options that differ between
the runs or are swept inside one, with median and quartiles over the seeds of their last evaluation. Runs that have a
seed in common (because one was started again, or merged from the others) have a row each.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.errors import refuse
from wqmix_jax.records.metrics import load_header, load_metrics
from wqmix_jax.records.run_dir import (
    differing,
    failed_members,
    find_runs,
    library_version,
    read_config,
    shared_options,
    simulator_versions,
)
from wqmix_jax.records.statistics import quartiles
from wqmix_jax.records.text_table import Row, show, write_csv
from wqmix_jax.training.members import labels_of, member_name


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    parser = OneLineParser(
        prog="python -m wqmix_jax.table",
        description="One table of many runs: median and quartiles over seeds of the last evaluations.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of them")
    parser.add_argument("--csv", type=out_file, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(arguments)
    try:
        rows = table(find_runs(args.runs))
        show(rows)
        if args.csv is not None:
            write_csv(rows, args.csv)
    except BrokenPipeError:  # of the reader of what is printed: see `command`
        raise
    except (ValueError, OSError) as error:
        refuse(str(error))


def table(runs: Sequence[Path]) -> list[Row]:
    """Returns the rows of the table, in the order of the runs.

    Raises:
        ConfigError: if a folder holds no run.
    """
    settings = [_settings(run) for run in runs]
    members = [load_header(run)["members"] for run in runs]
    columns = _columns(settings)
    swept = dict.fromkeys(key for each in members for labels in each for key in labels)
    columns += [key for key in swept if key != "seed"]
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for run, setting, each in zip(runs, settings, members, strict=True):
        last = {member_name(labels_of(line)): line for line in load_metrics(run, kind="eval")}
        failed = failed_members(run)
        for labels in each:
            key = tuple(str((setting | labels).get(column, "")) for column in columns)
            name = member_name(labels)
            member = {"run": run, "name": name, "line": last.get(name, {}), "failed": name in failed}
            grouped.setdefault(key, []).append(member)
    return [
        dict(zip(columns, key, strict=True)) | run | _figures(part)
        for key, group in grouped.items()
        for run, part in _separated(group)
    ]


def _separated(members: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Yields the members of one setting: all together, or by their runs if these have a seed in common."""
    if len({member["name"] for member in members}) == len(members):
        yield {}, list(members)
        return
    for run in dict.fromkeys(member["run"] for member in members):
        yield {"run": str(run)}, [member for member in members if member["run"] == run]


def _settings(run: Path) -> Row:
    config, header = read_config(run), load_header(run)
    options = shared_options({name: value for name, value in config.items() if name != "sweep"})
    return {
        "algo": header["algo"],
        "env": header["env"],
        **library_version(header),
        **simulator_versions(header),
        **options,
    }


def _columns(settings: Sequence[Row]) -> list[str]:
    """Returns the names and options in which the runs differ.

    Runs of different algorithms are not compared by the options of their algorithms; the same holds for environments.
    """
    names = [name for name in ("algo", "env") if len({setting[name] for setting in settings}) > 1]
    found = dict.fromkeys(names)
    for one in settings:
        for other in settings:
            others_own = tuple(f"{name}." for name in names if one[name] != other[name])
            found |= dict.fromkeys(name for name in differing(one, other) if not name.startswith(others_own))
    return list(found)


def _figures(members: Sequence[Row]) -> Row:
    running = [member["line"] for member in members if not member["failed"]]
    sound = [line for line in running if line]
    waiting = len(running) - len(sound)
    figures: Row = {
        "seeds": len(members),
        "failed": sum(member["failed"] for member in members),
        **({"not evaluated yet": waiting} if waiting else {}),
        "env_steps": min((line["env_steps"] for line in sound), default=0),
    }
    for name in ("episode_return", "win_rate"):
        values = [line[name] for line in sound if name in line]
        if values:
            median, low, high = quartiles(np.array(values))
            figures |= {name: f"{median:.4g}", f"{name}_q25": f"{low:.4g}", f"{name}_q75": f"{high:.4g}"}
    return figures


if __name__ == "__main__":
    main()
