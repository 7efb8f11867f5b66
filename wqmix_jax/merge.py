"""Joins the parts of a run that were trained separately: ``python -m wqmix_jax.merge RUN.. --out FOLDER``.

A RUN is a run's folder, or a folder of them. The parts may only differ in their seeds; any other difference is refused
in one line, with exit code 2. FOLDER then holds the files of a run, except checkpoints and policies.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.metrics import HEADER_FILE, METRICS_FILE, load_header, load_metrics
from wqmix_jax.records.plotting import plot_run
from wqmix_jax.records.run_dir import (
    SUMMARY_FILE,
    differing,
    find_runs,
    library_version,
    make_run_dir,
    new_run_dir,
    read_config,
    read_summary,
    refuse_common_seeds,
    refuse_other_games,
    save_config,
    shared_options,
)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    parser = OneLineParser(
        prog="python -m wqmix_jax.merge",
        description="Joins the parts of a run that were trained separately, for example on several hosts.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of them")
    parser.add_argument("--out", required=True, type=Path, help="a new folder for the joined run")
    args = parser.parse_args(arguments)
    merge(find_runs(args.runs), args.out)
    print(f"merged: {args.out}")


def merge(runs: Sequence[Path], out: Path) -> None:
    """Writes ``out`` from the folders of the parts.

    Raises:
        ConfigError: if a part is damaged, or if the parts have different options or a seed in common; nothing was
            written then.
    """
    headers, configs = [load_header(run) for run in runs], [read_config(run) for run in runs]
    games = {str(run): header.get("simulator", {}) for run, header in zip(runs, headers, strict=True)}
    warnings = refuse_other_games(games)
    for run, header, config in zip(runs, headers, configs, strict=True):
        _refuse_other(run, _identity(header, config), runs[0], _identity(headers[0], configs[0]))
    refuse_common_seeds(runs)
    new_run_dir(str(out), algo=headers[0]["algo"], env=headers[0]["env"], option="--out")  # refuses what isn't empty
    summaries = [_summary(run) for run in runs]
    for run in runs:
        load_metrics(run)  # refuses what is damaged
    _warn_of_missing(configs)
    for line in warnings:
        print(line, file=sys.stderr)
    make_run_dir(out)
    labels = [label for header in headers for label in header["members"]]
    seeds = sorted({label["seed"] for label in labels})
    header = {**headers[0], "seeds": seeds, "members": labels, "merged": [str(run) for run in runs]}
    if not all(games.values()):  # a version that a part doesn't record is unknown
        header.pop("simulator", None)
    (out / HEADER_FILE).write_text(json.dumps(header) + "\n")
    with open(out / METRICS_FILE, "w") as file:
        for run in runs:
            file.writelines(line + "\n" for line in (run / METRICS_FILE).read_text().split("\n")[:-1])
    alone = {"hosts": 1, "host": 0, "distributed": False}
    save_config(out, {**configs[0], **alone, "seed": seeds[0], "num_seeds": len(seeds), "run_dir": str(out)})
    (out / SUMMARY_FILE).write_text(json.dumps(_joined(summaries), indent=2) + "\n")
    if load_metrics(out, kind="eval"):
        plot_run(out)


def _identity(header: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options and versions that all parts of a run share."""
    return {**library_version(header), **shared_options(config)}


def _refuse_other(run: Path, found: dict[str, Any], first: Path, wanted: dict[str, Any]) -> None:
    for name in sorted(differing(found, wanted)):
        values = f"{run} has {name}={found.get(name)!r} and {first} has {wanted.get(name)!r}"
        raise ConfigError(f"{values}; python -m wqmix_jax.table compares different runs")


def _summary(run: Path) -> dict[str, Any]:
    summary = read_summary(run)
    if summary.get("status") != "finished":
        print(f"warning: {run} is not finished ({summary.get('status', 'no summary yet')})", file=sys.stderr)
    return summary


def _warn_of_missing(configs: Sequence[dict[str, Any]]) -> None:
    hosts = configs[0]["hosts"] or 1
    missing = sorted(set(range(hosts)) - {config["host"] or 0 for config in configs})
    if missing and all(config["hosts"] == hosts for config in configs):
        print(f"warning: of {hosts} hosts these are missing: {', '.join(map(str, missing))}", file=sys.stderr)


def _joined(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the summaries: all final figures and failures, and the longest time, because the parts run in parallel."""
    statuses = {summary.get("status", "running") for summary in summaries}
    ended = "stopped" if "stopped" in statuses else "finished"
    return {
        **summaries[0],
        "status": ended if statuses <= {"finished", "stopped"} else "running",
        "failed": [failure for summary in summaries for failure in summary.get("failed", [])],
        "final": {name: line for summary in summaries for name, line in summary.get("final", {}).items()},
        "wall_seconds": max(summary.get("wall_seconds", 0.0) for summary in summaries),
    }


if __name__ == "__main__":
    main()
