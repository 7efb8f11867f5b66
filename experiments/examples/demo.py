"""Learning in minutes on a laptop: ``python -m experiments.demo [--out FOLDER]``, or ``make demo``.

Trains QMIX and OW-QMIX on the paper's Table 2, a game of one step that QMIX gets wrong, and on a small predator-prey
task with the paper's punishment for capturing alone. Two trainings run at a time, on the CPU. The folder then holds the
curves (``demo.png``) and an episode that OW-QMIX plays (``predator_prey.gif``).
"""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from wqmix_jax.cli.command import command

Records = list[dict[str, Any]]


class Task(NamedTuple):
    """A task, and the seeds that are trained on it.

    Attributes:
        title: the title of its panel.
        overrides: options of the runs, as on the command line.
        num_seeds: the number of seeds that one call trains.
        best: the highest possible return.
    """

    title: str
    overrides: tuple[str, ...]
    num_seeds: int
    best: float


TASKS = {
    "table2": Task(
        "Table 2's game",
        (
            "env=matrix_game", "env.payoff=table2", "num_envs=8", "total_env_steps=1000", "eval_interval=40",
            "eval_episodes=1", "chunk_iterations=50", "algo.batch_size=64", "algo.buffer_size=500",
            "algo.epsilon_start=1.0", "algo.epsilon_finish=1.0",
        ),
        num_seeds=64,  # 28% play the optimum before any learning, so that fewer seeds show little
        best=8.0,
    ),
    "predator_prey": Task(
        "a small predator-prey",
        (
            "env=predator_prey", "env.world_shape=[4,4]", "env.num_agents=3", "env.num_stags=1", "env.episode_limit=20",
            "num_envs=4", "total_env_steps=40000", "eval_interval=5000", "eval_episodes=32", "chunk_iterations=100",
            "algo.batch_size=32", "algo.buffer_size=1000", "algo.hidden_dim=32", "algo.lr=0.001",
            "algo.epsilon_anneal_steps=15000", "algo.target_update_interval=100",
        ),
        num_seeds=4,
        best=10.0,
    ),
}  # fmt: skip

NARROW = {"ow_qmix": ("algo.q_star_dim=64",)}
"""Options of one algorithm: small networks for small tasks."""

# Okabe and Ito's colours, and a line style each: distinct for any colour vision, and in grey.
ALGORITHMS = {"ow_qmix": ("OW-QMIX", "#D55E00", "-"), "qmix": ("QMIX", "#0072B2", "--")}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command with ``arguments``, by default those of this process."""
    from wqmix_jax.cli.parser import OneLineParser
    from wqmix_jax.errors import ConfigError, refuse
    from wqmix_jax.records.run_dir import make_run_dir, new_run_dir

    parser = OneLineParser(prog="python -m experiments.demo", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", help="a new folder; by default a dated one under outputs")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        out = new_run_dir(args.out, algo="demo", env="table2_predator_prey")
        out = make_run_dir(out, numbered=args.out is None)
    except ConfigError as error:
        refuse(str(error).replace("run_dir=", "--out "))
    print(f"Table 2's game and a small predator-prey, into {out}; compilation comes first")
    records = train_all(out)
    draw(records, out / "demo.png")
    for (name, algo), lines in records.items():
        print(f"{ALGORITHMS[algo][0]} on {TASKS[name].title}: {verdict(TASKS[name], lines)}")
    print(f"done in {time.perf_counter() - started:.0f} s: {out / 'demo.png'}, {out / 'predator_prey.gif'}")


def train_all(out: Path) -> dict[tuple[str, str], Records]:
    """Returns the eval records of each task and algorithm; the longest trainings start first."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # inherited by the workers, which could not share an accelerator
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
    with concurrent.futures.ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        waiting = {
            (name, algo): pool.submit(train, TASKS[name], algo, film if algo == "ow_qmix" else None)
            for name, film in (("predator_prey", out / "predator_prey.gif"), ("table2", None))
            for algo in ALGORITHMS
        }
        return {key: future.result() for key, future in waiting.items()}


def train(task: Task, algo: str, film: Path | None = None) -> Records:
    """Returns the eval records of all seeds of one training; ``film`` is the file for an episode of the first seed."""
    import jax

    from wqmix_jax import load_config, play_episode, train_seeds, trained_policy

    latest: dict[int, float] = {}

    def report(line: dict[str, Any]) -> None:
        if line["kind"] == "eval":
            latest[line["seed"]] = line["episode_return"]
            if line["seed"] == task.num_seeds - 1:  # the last seed of an evaluation
                mean = sum(latest.values()) / len(latest)
                print(f"{ALGORITHMS[algo][0]}, {task.title}: {line['env_steps']:,} steps, mean return {mean:.1f}")

    config = load_config(f"+algo={algo}", *task.overrides, *NARROW.get(algo, ()))
    state, records = train_seeds(config, range(task.num_seeds), callback=report, progress=False)
    if film is not None:
        moments = play_episode(config.env, trained_policy(config, state), jax.random.key(0))
        config.env.viewer().film(moments, str(film))
    return [line for line in records if line["kind"] == "eval"]


def verdict(task: Task, records: Records) -> str:
    """Returns a sentence with the number of seeds that reach the best return, first and last."""
    first, last = ({line["seed"]: line["episode_return"] for line in order} for order in (records[::-1], records))
    before, after = (sum(value >= 0.8 * task.best for value in ends.values()) for ends in (first, last))
    return f"{after} of {len(last)} seeds end at 80% or more of the best return, {task.best:g} ({before} untrained)"


def draw(records: dict[tuple[str, str], Records], picture: Path) -> None:
    """Draws a panel per task: the share of seeds that play the optimum of the game, and returns of predator-prey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASKS))
    for axes, (name, task) in zip(panels, TASKS.items(), strict=True):
        draw_curves = _draw_shares if name == "table2" else _draw_returns
        draw_curves(axes, task, {algo: records[name, algo] for algo in ALGORITHMS})
        axes.set(title=f"{task.title}, {task.num_seeds} seeds", xlabel="environment steps")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center right")
    figure.savefig(picture, dpi=130)


def _draw_shares(axes: Axes, task: Task, records: dict[str, Records]) -> None:
    """Draws the share of seeds whose greedy joint action is the optimum."""
    for algo, lines in records.items():
        label, colour, style = ALGORITHMS[algo]
        optimal: dict[int, list[bool]] = {}
        for line in lines:
            optimal.setdefault(line["env_steps"], []).append(line["episode_return"] == task.best)
        shares = [100 * sum(seeds) / len(seeds) for seeds in optimal.values()]
        axes.plot(list(optimal), shares, color=colour, linestyle=style, linewidth=1.8, label=label)
    axes.set_ylabel(f"seeds that play the optimum, {task.best:g} (%)")
    axes.set_ylim(-4, 104)


def _draw_returns(axes: Axes, task: Task, records: dict[str, Records]) -> None:
    """Draws median and quartiles of the return over seeds, as in the paper's figures."""
    from wqmix_jax.records.statistics import quartiles, seed_curves

    for algo, lines in records.items():
        label, colour, style = ALGORITHMS[algo]
        curves = seed_curves(lines, "episode_return")
        median, low, high = quartiles(curves.values)
        axes.plot(curves.env_steps, median, color=colour, linestyle=style, linewidth=1.8, label=label)
        axes.fill_between(curves.env_steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(task.best, color="0.4", linewidth=1, linestyle=":", label=f"best possible, {task.best:g}")
    axes.set_ylabel("evaluation return (median, quartiles)")


if __name__ == "__main__":
    main()
