"""One figure of the paper: ``python -m experiments.reproduce fig2 [num_seeds=8] [quick=true] [key=value ..]``.

Trains what is missing, each line's seeds in one call and one run's folder, has the best policies play, and writes data
and picture to ``OUT/fig2``. Runs that are finished are kept, those that were interrupted go on; figures that have runs
in common share them. ``configs/reproduce.yaml`` has the options; all other keys are options of every run.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from omegaconf import OmegaConf

from experiments import pictures, results
from experiments.figures import Figure, Run, figure_names, load_figure, runs
from wqmix_jax.cli.command import command
from wqmix_jax.cli.overrides import load_config, load_values
from wqmix_jax.cli.parser import OneLineParser
from wqmix_jax.config import run_config
from wqmix_jax.errors import REFUSED, SEEDS_FAILED, ConfigError, RunError
from wqmix_jax.options import CONFIG_DIR, PositiveInt, checked, options
from wqmix_jax.records.metrics import HEADER_FILE, load_header, load_metrics
from wqmix_jax.records.plotting import styles
from wqmix_jax.records.run_dir import (
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
DEFAULTS = CONFIG_DIR / "reproduce.yaml"
GAMES = {
    "smac": ", on StarCraft II",
    "smax": ", on SMAX (JaxMARL), which is not StarCraft II and not comparable with it",
}
"""How environments that stand for each other are told apart."""

_CHOSEN_HERE = ("resume", "run_dir", "hosts", "host", "distributed", "sweep")
_NO_MATTER = ("seed=", "logger", "checkpoint", "chunk_iterations", "compilation_cache", "env.worker_python")


@options
class ReproduceOptions:
    """What is drawn and how much is trained.

    Attributes:
        num_seeds: of every line.
        quick: whether runs are shortened by ``quick_overrides``.
        train: whether what is missing is trained.
        env: which of the figure's environments.
        lines: the lines that are drawn, by the names of their folders; all when absent.
        out: the folder of all runs and figures.
        absolute_factor: how many times the episodes of an evaluation the best policies play in the end.
        quick_overrides: of the runs.
    """

    num_seeds: PositiveInt
    quick: bool
    train: bool
    env: str | None
    lines: list[str] | None
    out: str | None
    absolute_factor: PositiveInt
    quick_overrides: list[str]

    @property
    def folder(self) -> Path:
        """Where runs and figures go."""
        return Path(self.out or ("outputs/figures_quick" if self.quick else "outputs/figures"))


class Planned(NamedTuple):
    """One line, and what there is of it.

    Attributes:
        run: what it shows.
        values: the options of its runs.
        folder: where they are.
        made: those that have been begun.
    """

    run: Run
    values: dict[str, Any]
    folder: Path
    made: list[Path]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    parser = OneLineParser(
        prog="python -m experiments.reproduce",
        description="Makes a figure of the paper: trains what is missing, gathers and draws.",
        epilog=DEFAULTS.read_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figure", help=", ".join(figure_names()))
    parser.add_argument(
        "options", nargs="*", default=[], metavar="key=value", help="of this command (below) or of every run"
    )
    args = parser.parse_args(arguments)
    try:
        failed = reproduce(args.figure, args.options)
    except ConfigError as error:
        _end(str(error), REFUSED)
    except RunError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    if failed:
        _end("; ".join(failed), SEEDS_FAILED)


def reproduce(name: str, texts: Sequence[str]) -> list[str]:
    """Makes a figure.

    Args:
        name: ``fig2`` to ``fig9``.
        texts: options as on the command line.

    Returns:
        What is to be told of seeds that failed.

    Raises:
        ConfigError: if an option is not allowed, or runs that are there have others (nothing was trained then), or if
            another process has begun to train the same meanwhile.
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
    lines = [results.gather(line.run, _made(line.folder), chosen.absolute_factor) for line in planned if _begun(line)]
    if not lines:
        raise ConfigError(f"train=False is not allowed: there is no run of {name} in {chosen.folder}")
    if not any(line.records for line in lines):
        raise RunError(f"all seeds of {name} in {chosen.folder} failed: there is nothing to draw", SEEDS_FAILED)
    _publish(name, figure, env, chosen, overrides, lines)
    return failed


def plan(figure: Figure, env: str, chosen: ReproduceOptions, overrides: Sequence[str]) -> list[Planned]:
    """What the figure consists of, and what there is of it.

    Raises:
        ConfigError: if an option is not allowed, a run was made with other options or another version of the game or
            can't be resumed, or two have a seed in common.
    """
    known = sorted({run.folder.name for run in runs(figure, env)})
    if (unknown := sorted(set(chosen.lines or []) - set(known))) or chosen.lines == []:
        raise ConfigError(f"lines={unknown} is not allowed: this figure has {', '.join(known)}")
    games: dict[str, dict[str, str]] = {}
    planned = []
    for run in (run for run in runs(figure, env) if run.folder.name in (chosen.lines or known)):
        run = run._replace(overrides=(*run.overrides, *_changes(chosen, overrides)))
        folder = chosen.folder / env / run.folder
        try:
            composed = load_values(*run.overrides, f"num_seeds={chosen.num_seeds}")
            line = Planned(run, with_host(composed, {}), folder, _made(folder))
            if chosen.train:  # what is only drawn needs no game
                games["this installation"] = run_config(line.values).env.host.versions()
            refuse_common_seeds(line.made)
            for made in line.made:
                _refuse_others(made, line.values)
                _refuse_other_games(games, made)
                if chosen.train and not _is_finished(made):
                    session.refuse_lost_checkpoints(made)
                    with held(made):  # refuses one that another process trains
                        pass
        except ValueError as error:
            raise ConfigError(f"{run.label}: {error}") from None
        planned.append(line)
    return planned


def train(line: Planned, failed: list[str]) -> None:
    """Trains what is missing of a line, and adds to ``failed`` what is to be told of seeds that failed.

    Raises:
        ConfigError: if by now another process trains some of it.
        RunError: if a run had to stop.
    """
    line = line._replace(made=_made(line.folder))  # the lines before may have taken hours
    for made in line.made:
        if not _is_finished(made):
            with _collecting(failed):
                session.resume(made, _programs(line.values))
    for seeds in missing_seeds(line):
        folder = line.folder / f"seeds_{seeds[0]}-{seeds[-1]}"
        part = {"seed": seeds[0], "num_seeds": len(seeds), "run_dir": str(folder)}
        with _collecting(failed):
            values = {**line.values, **part}
            session.start(run_config(values), values, algo=line.run.algo, env=line.run.env)


def _programs(values: dict[str, Any]) -> dict[str, Any]:
    """The interpreter that a resumed run may start: the one that this command names."""
    python = values["env"].get("worker_python")
    return {} if python is None else {"env": {"worker_python": python}}


def missing_seeds(line: Planned) -> list[range]:
    """The wanted seeds that no run has, in ranges without gaps."""
    first, there = line.values["seed"], {seed for made in line.made for seed in load_header(made)["seeds"]}
    ranges: list[range] = []
    for seed in range(first, first + line.values["num_seeds"]):
        if seed in there:
            continue
        if ranges and ranges[-1].stop == seed:
            ranges[-1] = range(ranges[-1].start, seed + 1)
        else:
            ranges.append(range(seed, seed + 1))
    return ranges


def _parsed(texts: Sequence[str]) -> tuple[ReproduceOptions, list[str]]:
    """The options of this command, and those of the runs."""
    own, overrides = [], []
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} can't be read: options are written key=value")
        name = key.lstrip("+~")
        if name == "algo" or name.split(".")[0] in _CHOSEN_HERE:
            raise ConfigError(f"{text} is not allowed: the figure says which runs it has, and out=FOLDER where they go")
        is_own = key in ReproduceOptions.__dataclass_fields__  # type: ignore[attr-defined]
        (own if is_own else overrides).append(text)
    try:
        raw = dict(text.split("=", 1) for text in own if text.startswith(("out=", "env=")))
        names = {key: None if value == "null" else value for key, value in raw.items()}  # never a number or a boolean
        merged = OmegaConf.merge(OmegaConf.load(DEFAULTS), OmegaConf.from_dotlist(own), names)
        values: Any = OmegaConf.to_container(merged)
    except Exception as error:  # of omegaconf or its yaml parser
        raise ConfigError(" ".join(str(error).split())) from None
    return checked(ReproduceOptions, values, prefix=""), overrides


def _environment(figure: Figure, chosen: ReproduceOptions, overrides: Sequence[str]) -> str:
    """The environment that was asked for, or the first that can be used here."""
    if chosen.env is not None:
        return runs(figure, chosen.env)[0].env
    if not chosen.train:
        there = (env for env in figure.env if any(_made(chosen.folder / env / run.folder) for run in runs(figure, env)))
        return next(there, figure.env[-1])
    for env, substitute in zip(figure.env, figure.env[1:], strict=False):
        try:
            load_config(*runs(figure, env)[0].overrides, *_changes(chosen, overrides))
        except ConfigError as error:
            print(f"{substitute} takes the place of {env}: {error}", flush=True)
        else:
            return env
    return figure.env[-1]


def _changes(chosen: ReproduceOptions, overrides: Sequence[str]) -> list[str]:
    """What is not as in the paper."""
    return [*(chosen.quick_overrides if chosen.quick else []), *overrides]


def _made(folder: Path) -> list[Path]:
    """The folders of runs that have been begun."""
    return sorted(path.parent for path in folder.rglob(HEADER_FILE))


def _is_finished(made: Path) -> bool:
    return read_summary(made).get("status") == "finished"


def _begun(line: Planned) -> bool:
    """Whether there is anything to draw."""
    return any(load_metrics(made, kind="eval") for made in _made(line.folder))


def _refuse_others(made: Path, values: dict[str, Any]) -> None:
    found, wanted = shared_options(read_config(made)), shared_options(values)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            told = f"{made} was made with {name}={found.get(name)}, and {name}={wanted.get(name)} is asked for"
            raise ConfigError(f"{told}; out=FOLDER keeps them apart")


def _refuse_other_games(games: dict[str, dict[str, str]], made: Path) -> None:
    """Adds the versions of a run's game to ``games``, where all must be equal."""
    games[str(made)] = load_header(made).get("simulator", {})
    try:
        for line in refuse_other_games(games):
            if str(made) in line:
                print(line, file=sys.stderr)
    except ConfigError as error:
        raise ConfigError(f"{error}; out=FOLDER keeps them apart") from None


@contextlib.contextmanager
def _collecting(failed: list[str]) -> Iterator[None]:
    """Goes on where only seeds failed."""
    try:
        yield
    except RunError as error:
        if error.exit_code != SEEDS_FAILED:
            raise
        failed.append(str(error))


def _publish(
    name: str, figure: Figure, env: str, chosen: ReproduceOptions, overrides: Sequence[str], lines: list[results.Line]
) -> None:
    """Writes the data and the picture, and prints the table."""
    game = load_header(lines[0].folders[0]).get("simulator", {})
    versions = ", ".join(f"{key} {value}" for key, value in game.items())
    changes = [text for text in _changes(chosen, overrides) if not text.startswith(_NO_MATTER)]
    unfinished = not all(_is_finished(folder) for line in lines for folder in line.folders)
    told = [
        f"Figure {name.removeprefix('fig')}: {figure.title}{GAMES.get(env, '')}{versions and f' ({versions})'}",
        *([f"{'quick run, ' if chosen.quick else ''}not as in the paper: {', '.join(changes)}"] if changes else []),
        *(["not finished yet"] if unfinished else []),
    ]
    made = {"figure": name, "title": told, "env": env, "quick": chosen.quick, "changes": changes}
    made |= {"absolute_factor": chosen.absolute_factor}
    folder = chosen.folder / (name if len(figure.env) == 1 else f"{name}_{env}")
    task = f"{env} ({versions})" if versions else env
    rows = results.write(folder, lines, figure.metric, task, made, figure.passes)
    same_task = not any(text.startswith("env.") for text in changes)
    authors = {line: ROOT / path for line, path in figure.authors.items() if same_task}
    looks = styles(list(figure.lines))  # of all, so that a line looks the same whichever others are there
    sound = [line for line in lines if line.records]
    picture = pictures.draw(folder / f"{folder.name}.png", sound, figure.metric, told, looks, authors, figure.lowest)
    print("\n".join(told))
    show(rows)
    print(f"picture and data: {picture.parent}")


def _end(message: str, exit_code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
