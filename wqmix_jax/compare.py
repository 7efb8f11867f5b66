"""Compares runs of one task: ``python -m wqmix_jax.compare RUN_A RUN_B .. [--metric NAME] [--out FILE]``.

A RUN is a run's folder, or a folder of them; seeds with equal options are joined, and each value of a sweep counts as
a run. The first run is the baseline. All are compared up to the environment steps that every seed of every run has
reached: ``final`` is the metric there, ``mean`` its mean over training until there, which is the area under the curve
divided by its length.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase

from wqmix_jax.cli.command import command
from wqmix_jax.cli.parser import OneLineParser, out_file
from wqmix_jax.config import load_group
from wqmix_jax.errors import ConfigError, refuse
from wqmix_jax.records.metrics import load_header, load_metrics
from wqmix_jax.records.plotting import (
    COLOURS,
    Style,
    decorate,
    draw_band,
    metric_label,
    new_figure,
    save_figure,
    seeds_label,
    styles,
)
from wqmix_jax.records.run_dir import (
    UNKNOWN,
    VERSION,
    differing,
    failed_members,
    find_runs,
    library_version,
    read_config,
    refuse_other_games,
    shared_options,
    simulator_versions,
)
from wqmix_jax.records.statistics import (
    CONFIDENCE,
    Estimate,
    horizon,
    iqm_difference,
    iqm_estimate,
    iqm_name,
    mann_whitney_p,
    mean_over_training,
    probability_of_improvement,
    quartiles,
    seed_curves,
)
from wqmix_jax.records.text_table import Row, show
from wqmix_jax.training.members import labels_of, member_name, setting_name

PICTURE = Path("outputs") / "comparison.png"

FEW_SEEDS = 5
"""With fewer seeds, intervals are printed with a warning."""

NEED_TEX = {"pgf"}
"""Formats that matplotlib writes only if TeX is installed."""

MOST_OPTIONS = 2
"""If more options differ between runs of one algorithm, the picture's legend shows none."""


class Group(NamedTuple):
    """Seeds with equal options.

    Attributes:
        folders: the folders of their runs.
        algo: the algorithm's name.
        task: the environment, its options and its versions.
        options: all other options.
        records: eval records of the seeds that didn't fail.
        num_failed: the number of seeds that failed.
    """

    folders: list[Path]
    algo: str
    task: Row
    options: Row
    records: list[Row]
    num_failed: int


class Scores(NamedTuple):
    """One number per seed, ``[S]`` each.

    Attributes:
        final: the metric at the last common step.
        mean: its mean over training until there.
    """

    final: np.ndarray
    mean: np.ndarray


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    parser = OneLineParser(prog="python -m wqmix_jax.compare", description="Compares runs of one task.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of them")
    parser.add_argument("--metric", help="metric of the evaluations (win_rate if there is one, else episode_return)")
    parser.add_argument("--out", type=_picture_file, default=PICTURE, metavar="FILE", help=f"the picture ({PICTURE})")
    args = parser.parse_args(arguments)
    try:
        groups = find_groups(args.runs)
        metric = choose_metric(groups, args.metric)
        last = min(horizon(group.records) for group in groups.values())
        scores = {name: score(group, metric, last) for name, group in groups.items()}
        _print_report(groups, scores, metric, last)
        args.out.parent.mkdir(parents=True, exist_ok=True)  # the default's folder may be missing
        print(f"picture: {draw(groups, scores, metric, last, args.out)}")
    except BrokenPipeError:  # of the reader of what is printed: see `command`
        raise
    except (ValueError, OSError) as error:
        refuse(str(error))


def _picture_file(text: str) -> Path:
    """Converts an argument to a file in a format that matplotlib writes.

    Raises:
        ArgumentTypeError: if the file has another format or can't be written.
    """
    path, known = out_file(text), FigureCanvasBase.get_supported_filetypes().keys() - NEED_TEX
    if path.suffix.removeprefix(".").lower() not in known:
        raise argparse.ArgumentTypeError(f"{path} is not allowed: it must end with .{', .'.join(sorted(known))}")
    return path


def find_groups(folders: Sequence[Path]) -> dict[str, Group]:
    """Returns the groups of all runs by their letters, ``A`` and so on.

    Raises:
        ConfigError: if the tasks differ, if there are fewer than two groups or too many, if one has no evaluations yet,
            or if a seed appears twice.
    """
    found: list[Group] = []
    for folder in folders:
        groups = {run: _groups_of_run(run) for run in find_runs([folder])}
        if not any(groups.values()):
            raise ConfigError(f"{folder} can't be compared: it has no evaluations yet")
        for run in (run for run, found_there in groups.items() if not found_there):
            print(f"warning: {run} has no evaluations yet and is left out", file=sys.stderr)
        found += _joined([group for found_there in groups.values() for group in found_there])
    if len(found) < 2:
        raise ConfigError(f"{', '.join(map(str, folders))} can't be compared: two runs with evaluations are needed")
    if len(found) > len(COLOURS):
        raise ConfigError(f"{len(found)} runs are too many for one picture: python -m wqmix_jax.table lists them")
    _refuse_other_versions(found)
    for group in found:
        _refuse_other_task(group, found[0])
        if not group.records:
            raise ConfigError(f"{group.folders[0]} can't be compared: all of its seeds failed")
    return {chr(ord("A") + index): group for index, group in enumerate(found)}


def choose_metric(groups: Mapping[str, Group], wanted: str | None) -> str:
    """Returns the metric to compare.

    Raises:
        ConfigError: if ``wanted`` is not one that all groups have.
    """
    records = [record for group in groups.values() for record in group.records]
    numbers = {name for name in records[0].keys() - labels_of(records[0]) if isinstance(records[0][name], float)}
    shared = sorted(name for name in numbers if all(name in record for record in records))
    if wanted is None:
        return "win_rate" if "win_rate" in shared else "episode_return"
    if wanted not in shared:
        raise ConfigError(f"metric={wanted} is not allowed: all of these runs have {', '.join(shared)}")
    return wanted


def score(group: Group, metric: str, last: int) -> Scores:
    """Scores each seed of a group, up to ``last`` environment steps."""
    curves = seed_curves(group.records, metric)
    until = np.append(curves.env_steps[curves.env_steps < last], last)
    curves = seed_curves(group.records, metric, until)
    return Scores(curves.values[-1], mean_over_training(curves))


def draw(groups: Mapping[str, Group], scores: Mapping[str, Scores], metric: str, last: int, path: Path) -> Path:
    """Draws curves as in the paper, the final IQM of each run, and how likely each is better than the first."""
    looks, baseline = styles(list(groups)), next(iter(groups))
    figure = new_figure(13, 4.4)
    curves, final, better = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, group in groups.items():
        drawn = seed_curves(group.records, metric)
        label = f"{_title(name, groups)} ({seeds_label(drawn.values.shape[1])})"
        draw_band(curves, drawn.env_steps, quartiles(drawn.values), looks[name], label)
    curves.axvline(last, color="0.5", linewidth=1, linestyle=":", label="compared until here")
    curves.set_title("median, 25-75% quartiles", fontsize=10)
    curves.set_xlabel("environment steps")
    decorate(curves, metric)
    curves.legend(frameon=False, fontsize=9)
    estimates = {name: iqm_estimate(scores[name].final) for name in groups}
    _draw_intervals(final, estimates, looks, f"{metric_label(metric)} at {last:,} steps")
    warning = " (few seeds)" if _fewest(scores) < FEW_SEEDS else ""
    final.set_title(f"{iqm_name(_fewest(scores))},\n{CONFIDENCE:.0%} interval{warning}", fontsize=10)
    others = [name for name in groups if name != baseline]
    wins = {name: probability_of_improvement(scores[name].final, scores[baseline].final) for name in others}
    _draw_intervals(better, wins, looks, f"probability of improvement on {baseline}")
    better.axvline(0.5, color="0.5", linewidth=1, linestyle="--")
    better.set_xlim(-0.03, 1.03)
    better.set_title(f"against {baseline},\n{CONFIDENCE:.0%} interval{warning}", fontsize=10)
    return save_figure(figure, path)


def _draw_intervals(axes: Axes, estimates: Mapping[str, Estimate], looks: Mapping[str, Style], label: str) -> None:
    """Draws each estimate as a point with its interval, one per row."""
    for row, (name, estimate) in enumerate(estimates.items()):
        look = looks[name]
        ends = [estimate.low, estimate.high]
        axes.plot(ends, [row, row], color=look.colour, linewidth=5, alpha=0.4, solid_capstyle="butt")
        axes.plot(estimate.value, row, color=look.colour, marker=look.marker, markersize=8, linestyle="")
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _print_report(groups: Mapping[str, Group], scores: Mapping[str, Scores], metric: str, last: int) -> None:
    baseline = next(iter(groups))
    for name, group in groups.items():
        seeds = seeds_label(len(scores[name].final))
        failed = f", {group.num_failed} failed and left out" if group.num_failed else ""
        print(f"{name} {group.algo}: {', '.join(map(str, group.folders))} ({seeds}{failed})")
    print("\noptions that differ:")
    show(list(_differences(groups)) or [{"option": "none"}])
    statistic = f"{metric_label(metric)}, {iqm_name(_fewest(scores))}"
    print(f"\n{statistic} over seeds [{CONFIDENCE:.0%} interval], until {last:,} environment steps:")
    show([{"run": name, "seeds": len(each.final)} | _row(each) for name, each in scores.items()])
    print(f"\nagainst {baseline}, at the last of these steps:")
    show([{"run": name} | _against(scores[name], scores[baseline]) for name in groups if name != baseline])
    if any(each.final.size > 1 and np.ptp(each.final) == 0 for each in scores.values()):
        print("\nan interval without width means that all seeds ended alike; it says nothing about other seeds")
    if _fewest(scores) < FEW_SEEDS:
        print(f"\nfewer than {FEW_SEEDS} seeds: the confidence intervals are unreliable")


def _fewest(scores: Mapping[str, Scores]) -> int:
    """Returns the number of seeds of the smallest run."""
    return min(len(each.final) for each in scores.values())


def _row(scores: Scores) -> Row:
    return {"final": _text(iqm_estimate(scores.final)), "mean over training": _text(iqm_estimate(scores.mean))}


def _against(scores: Scores, baseline: Scores) -> Row:
    return {
        "difference of final": _text(iqm_difference(scores.final, baseline.final)),
        "of mean over training": _text(iqm_difference(scores.mean, baseline.mean)),
        "probability of improvement": _text(probability_of_improvement(scores.final, baseline.final)),
        "Mann-Whitney p": f"{mann_whitney_p(scores.final, baseline.final):.3g}",
    }


def _text(estimate: Estimate) -> str:
    interval = f"[{estimate.low:.4g}, {estimate.high:.4g}]" if np.isfinite(estimate.low) else "[-]"
    return f"{estimate.value:.4g} {interval}"


def _differences(groups: Mapping[str, Group]) -> Iterator[Row]:
    settings = {name: {"algo": group.algo, **group.task, **group.options} for name, group in groups.items()}
    for option in differing(*settings.values()):
        yield {"option": option, **{name: _shown(options, option) for name, options in settings.items()}}


def _shown(options: Mapping[str, Any], option: str) -> str:
    return str(options[option]) if option in options else "-"


def _title(name: str, groups: Mapping[str, Group]) -> str:
    """Returns a group's title: the algorithm, with a few options or the folders if several groups have the same one."""
    group = groups[name]
    same = {key: other for key, other in groups.items() if other.algo == group.algo}
    apart = differing(*(other.options for other in same.values()))
    if 0 < len(apart) <= MOST_OPTIONS:
        options = (f"{option.split('.')[-1]}={_shown(group.options, option)}" for option in apart)
        return ", ".join([f"{name} {group.algo}", *options])
    folders = {key: "+".join(folder.resolve().name for folder in other.folders) for key, other in same.items()}
    differ = 1 < len(same) == len(set(folders.values()))
    return f"{name} {folders[name] if differ else group.algo}"


def _groups_of_run(run: Path) -> list[Group]:
    """Returns the groups of one run: one, or one for each combination of a sweep's values."""
    header, values, records = load_header(run), read_config(run), load_metrics(run, kind="eval")
    options = shared_options({name: value for name, value in values.items() if name != "sweep"})
    workers = load_group("env", "_host")
    task = {"env": header["env"], **simulator_versions(header)}
    task |= {key: options.pop(key) for key in list(options) if key.startswith("env.") and key[4:] not in workers}
    failed = failed_members(run)
    found: dict[str, Group] = {}
    for record in records:
        labels = labels_of(record)
        swept = {key: value for key, value in labels.items() if key != "seed"}
        num_failed = sum(swept.items() <= line.items() for line in failed.values())
        new = Group([run], header["algo"], task, {**library_version(header), **options, **swept}, [], num_failed)
        group = found.setdefault(setting_name(labels), new)
        if member_name(labels) not in failed:
            group.records.append(record)
    return list(found.values())


def _joined(groups: Sequence[Group]) -> list[Group]:
    """Joins groups with equal options.

    Raises:
        ConfigError: if groups that are joined have a seed in common.
    """
    joined: list[Group] = []
    for group in groups:
        index = next((i for i, one in enumerate(joined) if one[1:4] == group[1:4]), None)
        if index is None:
            joined.append(group)
            continue
        same = joined[index]
        twice = {record["seed"] for record in same.records} & {record["seed"] for record in group.records}
        if twice:
            raise ConfigError(f"seed {min(twice)} is in both {same.folders[0]} and {group.folders[0]}")
        joined[index] = Group(
            same.folders + group.folders, *same[1:4], same.records + group.records, same.num_failed + group.num_failed
        )
    return joined


def _refuse_other_versions(groups: Sequence[Group]) -> None:
    """Refuses different games; a version that an older run doesn't record is only reported."""
    games = {
        str(group.folders[0]): {
            name.removeprefix(VERSION): version for name, version in group.task.items() if name.startswith(VERSION)
        }
        for group in groups
    }
    try:
        for line in refuse_other_games(games):
            print(line, file=sys.stderr)
    except ConfigError as error:
        raise ConfigError(f"{error}: figures of different games can't be compared") from None


def _refuse_other_task(group: Group, first: Group) -> None:
    """Refuses other values of an option; one that a run doesn't record, as of an older version, may be the same."""
    for name in differing(first.task, group.task):
        one, other = (each.task.get(name, UNKNOWN) for each in (first, group))
        if UNKNOWN not in (one, other):
            values = f"{first.folders[0]} has {name}={one}, and {group.folders[0]} has {name}={other}"
            raise ConfigError(f"{values}: figures of different tasks can't be compared")


if __name__ == "__main__":
    main()
