"""One figure of the paper: ``python -m experiments.reproduce fig2 [num_seeds=8] [quick=true] [key=value ..]``.

Trains the missing seeds of each line in one call, evaluates the best policies, and writes data and picture to
``OUT/fig2``. Finished runs are kept and interrupted runs are resumed; figures share the runs that they have in common.
``experiments/configs/reproduce.yaml`` lists the options; all other keys are options of every run.

The runs of a line are in ``OUT/LINE/seeds_0-7`` (a single seed in ``OUT/LINE/seed_0``), below a folder of the map where
the figure has several: ``OUT/MAP/LINE/seeds_0-7``. ``OUT`` holds one environment, by default
``outputs/figures/ENVIRONMENT``.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from experiments import figure_data, pictures
from experiments.figures import CONFIGS, Figure, Run, figure_names, load_figure, runs
from wqmix_jax.cli.command import command
from wqmix_jax.cli.help import described
from wqmix_jax.cli.overrides import load_config, load_values
from wqmix_jax.cli.parser import OneLineParser
from wqmix_jax.config import run_config
from wqmix_jax.errors import SEEDS_FAILED, ConfigError, RunError, refuse
from wqmix_jax.options import PositiveInt, checked, options
from wqmix_jax.records.metrics import HEADER_FILE, load_header, load_metrics
from wqmix_jax.records.plotting import styles
from wqmix_jax.records.run_dir import (
    differing,
    held,
    read_config,
    read_summary,
    refuse_common_seeds,
    refuse_other_games,
    shared_options,
)
from wqmix_jax.records.text_table import show
from wqmix_jax.runs import session
from wqmix_jax.runs.hosts import with_host
from wqmix_jax.training.devices import claim_cores

ROOT = Path(__file__).parent.parent
DEFAULTS = CONFIGS / "reproduce.yaml"
GAMES = {
    "smac": ", on StarCraft II",
    "smax": ", on SMAX (JaxMARL), which is not StarCraft II and not comparable with it",
}
"""Text that names the environment in the title of a figure which several environments can show."""

_CHOSEN_HERE = ("resume", "run_dir", "hosts", "host", "distributed", "sweep")
_NO_MATTER = ("seed=", "logger", "checkpoint", "chunk_iterations", "compilation_cache", "env.worker_python")


@options
class ReproduceOptions:
    """Options of this command: the lines to draw, and how much to train.

    Attributes:
        num_seeds: seeds of every line; the paper doesn't give its number.
        quick: shortens all runs by ``quick_overrides``, to check that everything works.
        train: trains the missing seeds; if false, only existing runs are drawn.
        env: one of the figure's environments; null: the first that is installed.
        lines: the lines to draw, by the names of their folders, ``[cw_qmix,qmix]`` for example; null: all of the
            paper's. A figure's yaml may have ``further`` lines, ``[dcg,mappo]`` for example.
        out: the folder of one environment's runs and figures; null: outputs/figures/ENV, or outputs/figures_quick/ENV.
        absolute_factor: the final evaluation of the best policies plays this many times ``eval_episodes``.
        quick_overrides: options of the runs if ``quick`` is set.
    """

    num_seeds: PositiveInt
    quick: bool
    train: bool
    env: str | None
    lines: list[str] | None
    out: str | None
    absolute_factor: PositiveInt
    quick_overrides: list[str]

    def folder(self, env: str) -> Path:
        """Returns the folder of an environment's runs and figures."""
        return Path(self.out) if self.out else Path("outputs", "figures_quick" if self.quick else "figures", env)


class Planned(NamedTuple):
    """One line of the figure, and its existing runs.

    Attributes:
        run: the line's place in the figure, and its overrides.
        values: the options of its runs.
        folder: the folder that holds its runs.
        made: the folders of the runs that exist.
    """

    run: Run
    values: dict[str, Any]
    folder: Path
    made: list[Path]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with ``arguments``, by default those of this process."""
    parser = OneLineParser(
        prog="python -m experiments.reproduce",
        description="Reproduces a figure of the paper: trains the missing seeds, evaluates and draws.",
        epilog="\n".join(described(ReproduceOptions, yaml.safe_load(DEFAULTS.read_text()))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figure", help=", ".join(figure_names()))
    parser.add_argument(
        "options", nargs="*", default=[], metavar="key=value", help="an option of this command (below) or of every run"
    )
    args = parser.parse_args(arguments)
    failed = reproduce(args.figure, args.options)
    if failed:
        refuse("; ".join(failed), SEEDS_FAILED)


def reproduce(name: str, texts: Sequence[str]) -> list[str]:
    """Trains, evaluates and draws a figure.

    Args:
        name: ``fig2`` to ``fig9``.
        texts: options as on the command line.

    Returns:
        Messages about seeds that failed.

    Raises:
        ConfigError: if an option is not allowed or existing runs have different options (nothing was trained then), or
            if another process started to train the same runs in the meantime.
        RunError: if a run had to stop, or all seeds of all lines failed.
    """
    claim_cores()  # before an environment's library starts the backend
    figure = load_figure(name)
    chosen, overrides = _parsed(texts)
    env = _environment(figure, chosen, overrides)
    planned = plan(figure, env, chosen, overrides)
    failed: list[str] = []
    if chosen.train:
        for line in planned:
            train(line, failed)
    drawn = [line for line in planned if _has_evaluations(line)]
    lines = [figure_data.gather(line.run, _made(line.folder), chosen.absolute_factor) for line in drawn]
    if not lines:
        raise ConfigError(f"train=False is not allowed: there is no run of {name} in {chosen.folder(env)}")
    if not any(line.records for line in lines):
        raise RunError(f"all seeds of {name} in {chosen.folder(env)} failed: there is nothing to draw", SEEDS_FAILED)
    _publish(name, figure, env, chosen, overrides, lines)
    return failed


def plan(figure: Figure, env: str, chosen: ReproduceOptions, overrides: Sequence[str]) -> list[Planned]:
    """Returns the lines of the figure with their existing runs.

    Raises:
        ConfigError: if an option is not allowed, if an existing run has different options or another version of the
            game or can't be resumed, or if two runs have a seed in common.
    """
    known = {run.folder.name: run.line in figure.lines for run in runs(figure, env)}
    if (unknown := sorted(set(chosen.lines or []) - set(known))) or chosen.lines == []:
        raise ConfigError(f"lines={unknown} is not allowed: this figure has {', '.join(sorted(known))}")
    wanted = chosen.lines or [name for name, is_the_papers in known.items() if is_the_papers]
    games: dict[str, dict[str, str]] = {}
    planned = []
    for run in (run for run in runs(figure, env) if run.folder.name in wanted):
        run = run._replace(overrides=(*run.overrides, *_changes(chosen, overrides)))
        folder = chosen.folder(env) / run.folder
        try:
            composed = load_values(*run.overrides, f"num_seeds={chosen.num_seeds}")
            composed["logger"]["group"] = composed["logger"]["group"] or _wandb_group(chosen.folder(env), run)
            line = Planned(run, with_host(composed, {}), folder, _made(folder))
            if chosen.train:  # drawing alone needs no game
                games["this installation"] = run_config(line.values).env.external.versions()
            refuse_common_seeds(line.made)
            for made in line.made:
                _refuse_others(made, line.values)
                _refuse_other_games(games, made)
                if chosen.train and not _is_finished(made):
                    session.refuse_lost_checkpoints(made)
                    with held(made):  # raises if another process trains it
                        pass
        except ValueError as error:
            raise ConfigError(f"{run.label}: {error}") from None
        planned.append(line)
    return planned


def train(line: Planned, failed: list[str]) -> None:
    """Trains the missing seeds of a line, and adds a message to ``failed`` for each run with failed seeds.

    Raises:
        ConfigError: if another process has started to train some of them.
        RunError: if a run had to stop.
    """
    line = line._replace(made=_made(line.folder))  # training the previous lines may have taken hours
    for made in line.made:
        if not _is_finished(made):
            with _collecting(failed):
                session.resume(made, _programs(line.values))
    for seeds in missing_seeds(line):
        part = {"seed": seeds[0], "num_seeds": len(seeds), "run_dir": str(line.folder / seeds_folder(seeds))}
        with _collecting(failed):
            values = {**line.values, **part}
            session.start(run_config(values), values, algo=line.run.algo, env=line.run.env)


def seeds_folder(seeds: range) -> str:
    """Returns the name of the folder of a run with these seeds: ``seeds_0-7``, or ``seed_0``."""
    return f"seed_{seeds[0]}" if len(seeds) == 1 else f"seeds_{seeds[0]}-{seeds[-1]}"


def _wandb_group(out: Path, run: Run) -> str:
    """Returns the group that all runs of a line share in W&B: ``figures/predator_prey/cw_qmix``."""
    return "/".join([*out.resolve().parts[-2:], *run.folder.parts])


def _programs(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the interpreter that a resumed run may start: the one in this command's options."""
    python = values["env"].get("worker_python")
    return {} if python is None else {"env": {"worker_python": python}}


def missing_seeds(line: Planned) -> list[range]:
    """Returns the requested seeds that no run has, in ranges without gaps."""
    first, existing = line.values["seed"], {seed for made in line.made for seed in load_header(made)["seeds"]}
    ranges: list[range] = []
    for seed in range(first, first + line.values["num_seeds"]):
        if seed in existing:
            continue
        if ranges and ranges[-1].stop == seed:
            ranges[-1] = range(ranges[-1].start, seed + 1)
        else:
            ranges.append(range(seed, seed + 1))
    return ranges


def _parsed(texts: Sequence[str]) -> tuple[ReproduceOptions, list[str]]:
    """Separates the options of this command from those of the runs."""
    own, overrides = [], []
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} can't be read: options are written key=value")
        name = key.lstrip("+~")
        if name == "algo" or name.split(".")[0] in _CHOSEN_HERE:
            raise ConfigError(f"{text} is not allowed: the figure defines its runs, and out=FOLDER their folder")
        is_own = key in ReproduceOptions.__dataclass_fields__  # type: ignore[attr-defined]
        (own if is_own else overrides).append(text)
    try:
        raw = dict(text.split("=", 1) for text in own if text.startswith(("out=", "env=")))
        names = {key: None if value == "null" else value for key, value in raw.items()}  # names stay strings: out=1
        merged = OmegaConf.merge(OmegaConf.load(DEFAULTS), OmegaConf.from_dotlist(own), names)
        values: Any = OmegaConf.to_container(merged)
    except Exception as error:  # from omegaconf or its yaml parser
        raise ConfigError(" ".join(str(error).split())) from None
    return checked(ReproduceOptions, values, prefix=""), overrides


def _environment(figure: Figure, chosen: ReproduceOptions, overrides: Sequence[str]) -> str:
    """Returns the chosen environment; otherwise the first that is installed, or that has runs if nothing is trained."""
    if chosen.env is not None:
        return runs(figure, chosen.env)[0].env
    if not chosen.train:
        return next((env for env in figure.env if _has_runs(figure, env, chosen.folder(env))), figure.env[-1])
    for env, substitute in zip(figure.env, figure.env[1:], strict=False):
        try:
            load_config(*runs(figure, env)[0].overrides, *_changes(chosen, overrides))
        except ConfigError as error:
            print(f"using {substitute} instead of {env}: {error}", flush=True)
        else:
            return env
    return figure.env[-1]


def _has_runs(figure: Figure, env: str, out: Path) -> bool:
    """Returns True if ``out`` holds a run of the figure on this environment."""
    folders = (made for run in runs(figure, env) for made in _made(out / run.folder))
    return any(load_header(made)["env"] == env for made in folders)


def _changes(chosen: ReproduceOptions, overrides: Sequence[str]) -> list[str]:
    """Returns the options that differ from the paper's."""
    return [*(chosen.quick_overrides if chosen.quick else []), *overrides]


def _made(folder: Path) -> list[Path]:
    """Returns the folders of the runs inside a line's folder, in the order of their seeds."""
    made = (path.parent for path in folder.rglob(HEADER_FILE))
    return sorted(made, key=lambda run_dir: (load_header(run_dir)["seeds"], run_dir))


def _is_finished(made: Path) -> bool:
    return read_summary(made).get("status") == "finished"


def _has_evaluations(line: Planned) -> bool:
    """Returns True if a run of the line has been evaluated."""
    return any(load_metrics(made, kind="eval") for made in _made(line.folder))


def _refuse_others(made: Path, values: dict[str, Any]) -> None:
    found, wanted = shared_options(read_config(made)), shared_options(values)
    for name in sorted(differing(found, wanted)):
        message = f"{made} was made with {name}={found.get(name)}, and {name}={wanted.get(name)} is asked for"
        raise ConfigError(f"{message}; out=FOLDER keeps them apart")


def _refuse_other_games(games: dict[str, dict[str, str]], made: Path) -> None:
    """Adds the versions of a run's game to ``games``, and raises unless all are equal."""
    games[str(made)] = load_header(made).get("simulator", {})
    try:
        for line in refuse_other_games(games):
            if str(made) in line:
                print(line, file=sys.stderr)
    except ConfigError as error:
        raise ConfigError(f"{error}; out=FOLDER keeps them apart") from None


@contextlib.contextmanager
def _collecting(failed: list[str]) -> Iterator[None]:
    """Continues if only some seeds failed, and adds the message to ``failed``."""
    try:
        yield
    except RunError as error:
        if error.exit_code != SEEDS_FAILED:
            raise
        failed.append(str(error))


def _publish(
    name: str,
    figure: Figure,
    env: str,
    chosen: ReproduceOptions,
    overrides: Sequence[str],
    lines: list[figure_data.Line],
) -> None:
    """Writes the data and the picture, and prints the table."""
    game = load_header(lines[0].folders[0]).get("simulator", {})
    versions = ", ".join(f"{key} {value}" for key, value in game.items())
    changes = [text for text in _changes(chosen, overrides) if not text.startswith(_NO_MATTER)]
    unfinished = not all(_is_finished(folder) for line in lines for folder in line.folders)
    title = [
        f"Figure {name.removeprefix('fig')}: {figure.title}{GAMES.get(env, '')}{versions and f' ({versions})'}",
        *([f"{'quick run, ' if chosen.quick else ''}not as in the paper: {', '.join(changes)}"] if changes else []),
        *(["not finished yet"] if unfinished else []),
    ]
    made = {"figure": name, "title": title, "env": env, "quick": chosen.quick, "changes": changes}
    made |= {"absolute_factor": chosen.absolute_factor}
    folder = chosen.folder(env) / (name if len(figure.env) == 1 else f"{name}_{env}")
    task = f"{env} ({versions})" if versions else env
    rows = figure_data.write(folder, lines, figure.metric, task, made, figure.passes)
    same_task = not any(text.startswith("env.") for text in changes)
    authors = {line: ROOT / path for line, path in figure.authors.items() if same_task}
    looks = styles(list(figure.all_lines))  # for all lines, so that a line looks the same with and without the others
    shown = [line for line in lines if line.records]
    picture = pictures.draw(folder / f"{folder.name}.png", shown, figure.metric, title, looks, authors, figure.lowest)
    print("\n".join(title))
    show(rows)
    print(f"picture and data: {picture.parent}")


if __name__ == "__main__":
    main()
