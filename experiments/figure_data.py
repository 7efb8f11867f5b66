"""Curves and tables over the seeds of a figure's runs, and the data files of the figure.

``evaluations.jsonl`` has every evaluation of every seed, ``seeds.csv`` the results of each seed, ``curves.csv`` the
drawn statistics, ``table.csv`` their last point and the absolute metric, ``marl_eval.json`` all seeds in the format of
marl-eval, ``made.json`` the commands, versions and machines that made the runs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.figures import Run
from wqmix_jax.api import load_policies
from wqmix_jax.records.atomic import write_whole
from wqmix_jax.records.metrics import load_header, load_metrics, read_mapping
from wqmix_jax.records.run_dir import failed_members, read_config, read_summary, refuse_common_seeds
from wqmix_jax.records.statistics import Estimate, SeedCurves, horizon, iqm_estimate, quartiles, seed_curves
from wqmix_jax.records.text_table import Row, write_csv
from wqmix_jax.runs.playing import play_policies
from wqmix_jax.runs.saved_policies import BEST, POLICY_DIR

NUM_POINTS = 101
ABSOLUTE_FILE = "absolute.json"
METRICS = ("episode_return", "win_rate")


class Line(NamedTuple):
    """One line of one panel.

    Attributes:
        run: the line's place in the figure, and its overrides.
        folders: the folders of its runs.
        records: eval records of the seeds that didn't fail.
        absolute: metrics of each such seed's best policy, by the seed's name; empty if no policy was kept.
        failed: names of the seeds that failed.
    """

    run: Run
    folders: list[Path]
    records: list[Row]
    absolute: dict[str, Row]
    failed: list[str]

    @property
    def num_seeds(self) -> int:
        """The number of seeds with records."""
        return len({record["seed"] for record in self.records})


def gather(run: Run, folders: Sequence[Path], absolute_factor: int) -> Line:
    """Reads the records that the runs of a line have so far, and evaluates their best policies.

    Raises:
        ConfigError: if a seed is in two of them.
    """
    refuse_common_seeds(folders)
    line = Line(run, list(folders), [], {}, [])
    for folder in folders:
        failed = list(failed_members(folder))
        line.failed.extend(failed)
        records = load_metrics(folder, kind="eval")
        line.records.extend(record for record in records if str(record["seed"]) not in failed)
        played = absolute_metric(folder, absolute_factor)
        line.absolute.update({seed: metrics for seed, metrics in played.items() if seed not in failed})
    return line


def absolute_metric(folder: Path, factor: int) -> dict[str, Row]:
    """Returns metrics of each seed's best policy over ``factor`` times as many episodes as an evaluation has.

    A finished run keeps them in its folder; they are computed again if the run is made longer.
    """
    config, kept = read_config(folder), folder / ABSOLUTE_FILE
    episodes = factor * config["eval_episodes"]
    last = max((line["env_steps"] for line in load_metrics(folder, kind="eval")), default=0)
    wanted = {"episodes": episodes, "env_steps": last}
    known = read_mapping(kept) if kept.is_file() else {}
    if wanted.items() <= known.items():
        return known["seeds"]
    if not (folder / POLICY_DIR / f"{BEST}.npz").is_file():
        return {}
    print(f"the best policies of {folder} play {episodes} episodes", flush=True)
    played = wanted | {"seeds": _best_policies(folder, episodes)}
    if read_summary(folder).get("status") == "finished":
        write_whole(kept, json.dumps(played) + "\n")
    return played["seeds"]


def _best_policies(folder: Path, episodes: int) -> dict[str, Row]:
    """Means over the episodes that each seed's best policy plays."""
    env, policies = load_policies(folder, which=BEST)
    played = play_policies(env, policies, episodes=episodes, seed=0)
    return {name: {what: float(values.mean()) for what, values in figures.items()} for name, figures in played}


def curves(line: Line, metric: str) -> SeedCurves:
    """Returns `NUM_POINTS` points, up to the last step that every seed has reached."""
    first = max(records[0]["env_steps"] for records in _by_seed(line).values())
    return seed_curves(line.records, metric, np.linspace(first, horizon(line.records), NUM_POINTS))


def curve_rows(line: Line, metric: str) -> Iterator[Row]:
    """Yields median and quartiles, IQM and its interval, at each point."""
    drawn = curves(line, metric)
    columns = _columns(quartiles(drawn.values), iqm_estimate(drawn.values))
    for index, steps in enumerate(drawn.env_steps):
        values = {name: _text(column[index], 5) for name, column in columns.items()}
        yield {"panel": line.run.panel, "line": line.run.line, "env_steps": round(steps), **values}


def table_row(line: Line, metric: str) -> Row:
    """Returns the last point of a line's curve and the absolute metric; no numbers if all seeds failed."""
    row = {"panel": line.run.panel, "line": line.run.line, "seeds": line.num_seeds, "failed": len(line.failed)}
    if not line.records:
        return row
    last = curves(line, metric)
    final = _columns(*(estimate(last.values[-1]) for estimate in (quartiles, iqm_estimate)))
    absolute = np.array([metrics[metric] for metrics in line.absolute.values()])
    row |= {"env_steps": round(last.env_steps[-1]), **{name: _text(value) for name, value in final.items()}}
    if absolute.size:
        best = iqm_estimate(absolute)
        row |= {"absolute_seeds": absolute.size, "absolute": _text(best.value)}
        row |= {"absolute_low": _text(best.low), "absolute_high": _text(best.high)}
    return row


def seed_rows(line: Line, metric: str, passes: Sequence[float]) -> Iterator[Row]:
    """Yields each seed's first evaluation of at least each of ``passes``, its last one, and its absolute metric."""
    for seed, records in _by_seed(line).items():
        row = {"panel": line.run.panel, "line": line.run.line, "seed": int(seed)}
        for least in passes:
            reached = (record["env_steps"] for record in records if record[metric] >= least)
            row[f"passes_{least:g}"] = next(reached, "")
        row |= {"env_steps": records[-1]["env_steps"], "last": _text(records[-1][metric])}
        if seed in line.absolute:
            row["absolute"] = _text(line.absolute[seed][metric])
        yield row


def marl_eval(lines: Sequence[Line], env: str) -> dict[str, Any]:
    """Returns all seeds in the format that marl-eval documents: environment, task, algorithm, seed, step.

    Each metric is a list of one number, the mean over an evaluation's episodes. The tool needs the same number of steps
    for all runs, so the evaluations are interpolated on common steps, up to the last one that every seed of a task has
    reached; ``absolute_metrics`` is the best policy's evaluation.
    """
    exported: dict[str, Any] = {}
    for task in dict.fromkeys(line.run.task for line in lines):
        task_lines = [line for line in lines if line.run.task == task]
        interval = read_config(task_lines[0].folders[0])["eval_interval"]
        first = max(records[0]["env_steps"] for line in task_lines for records in _by_seed(line).values())
        last = min(horizon(line.records) for line in task_lines)
        every = interval * -(-(last - first) // (interval * NUM_POINTS))  # about NUM_POINTS steps keep the file small
        steps = np.arange(first, last + 1, max(every, interval))
        exported[task] = {line.run.label: _exported_seeds(line, steps) for line in task_lines}
    return {env.lower(): exported}


def _exported_seeds(line: Line, steps: np.ndarray) -> dict[str, Any]:
    metrics = [name for name in METRICS if name in line.records[0]]
    values = {name: seed_curves(line.records, name, steps).values for name in metrics}
    exported = {}
    for index, seed in enumerate(_by_seed(line)):
        exported[seed] = {
            f"step_{at}": {"step_count": int(step)}
            | {name: [round(float(values[name][at, index]), 4)] for name in metrics}
            for at, step in enumerate(steps)
        }
        if seed in line.absolute:
            exported[seed]["absolute_metrics"] = {name: [round(line.absolute[seed][name], 4)] for name in metrics}
    return exported


def write(
    folder: Path,
    lines: Sequence[Line],
    metric: str,
    env: str,
    made: Mapping[str, Any],
    passes: Sequence[float] = (),
) -> list[Row]:
    """Writes all files except the picture, and returns the table's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, shown = [table_row(line, metric) for line in lines], [line for line in lines if line.records]
    write_csv(rows, folder / "table.csv")
    write_csv([row for line in shown for row in seed_rows(line, metric, passes)], folder / "seeds.csv")
    write_csv([row for line in shown for row in curve_rows(line, metric)], folder / "curves.csv")
    _write_lines(folder / "evaluations.jsonl", (row for line in shown for row in _evaluations(line)))
    (folder / "marl_eval.json").write_text(json.dumps(marl_eval(shown, env)) + "\n")
    runs = [_run_record(line, path) for line in lines for path in line.folders]
    (folder / "made.json").write_text(json.dumps({**made, "runs": runs}, indent=2) + "\n")
    return rows


def _evaluations(line: Line) -> Iterator[Row]:
    """Yields the evaluations of each seed as columns."""
    for seed, records in _by_seed(line).items():
        names = ["env_steps", *(name for name in METRICS if name in records[0])]
        columns = {name: [round(record[name], 4) for record in records] for name in names}
        yield {"panel": line.run.panel, "line": line.run.line, "seed": int(seed), **columns}


def _run_record(line: Line, folder: Path) -> Row:
    """Returns the command, versions and state of one run, for ``made.json``."""
    summary, header = read_summary(folder), load_header(folder)
    facts = {name: summary[name] for name in ("status", "wall_seconds", "device", "versions") if name in summary}
    command = ["python -m wqmix_jax.train", *map(_quoted, line.run.overrides), f"run_dir={folder}"]
    seeds = f"seed={header['seeds'][0]} num_seeds={len(header['seeds'])}"
    game = {"game": header["simulator"]} if "simulator" in header else {}
    named = {"panel": line.run.panel, "line": line.run.line, "seeds": header["seeds"]}
    return {**named, "failed": list(failed_members(folder)), "command": f"{' '.join(command)} {seeds}", **game, **facts}


def _quoted(override: str) -> str:
    return f"'{override}'" if set(override) & set("[]{} ") else override


def _by_seed(line: Line) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for record in line.records:
        found.setdefault(str(record["seed"]), []).append(record)
    return found


def _text(value: Any, digits: int = 4) -> str:
    """Formats a number; empty for nan, such as the interval of a single seed."""
    return "" if np.isnan(value) else f"{value:.{digits}g}"


def _columns(paper: Estimate, iqm: Estimate) -> dict[str, np.ndarray]:
    quantiles = {"median": paper.value, "q25": paper.low, "q75": paper.high}
    return quantiles | {"iqm": iqm.value, "iqm_low": iqm.low, "iqm_high": iqm.high}


def _write_lines(path: Path, rows: Iterator[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
