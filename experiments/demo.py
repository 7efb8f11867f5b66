"""Learning in minutes on a laptop: ``python -m experiments.demo [--out FOLDER]``, or ``make demo``.

QMIX and OW-QMIX on the paper's Table 2, a game of one step that QMIX gets wrong, and on a predator-prey task that is
small enough to be solved, with the paper's punishment for catching alone. Two trainings run side by side, on the CPU.
The folder then holds the curves (``demo.png``) and an episode that OW-QMIX plays (``predator_prey.gif``).
"""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wqmix_jax.cli.command import command

Records = list[dict[str, Any]]


class Task(NamedTuple):
    """What is trained on.

    Attributes:
        title: of its curves.
        overrides: as on the command line.
        num_seeds: side by side in one call.
        best: the highest return that is possible.
    """

    title: str
    overrides: tuple[str, ...]
    num_seeds: int
    best: float


TASKS = {
    "table2": Task(
        "Table 2's game",
        (
            "env=matrix_game", "env.payoff=table2", "num_envs=8", "total_env_steps=3200", "eval_interval=200",
            "eval_episodes=1", "chunk_iterations=50", "algo.batch_size=64", "algo.buffer_size=500",
            "algo.epsilon_start=1.0", "algo.epsilon_finish=1.0",
        ),
        num_seeds=8,
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
"""Small nets for small tasks."""

# Okabe and Ito's colours and a line style each: told apart with any colour vision, and in grey.
ALGORITHMS = {"ow_qmix": ("OW-QMIX", "#D55E00", "-"), "qmix": ("QMIX", "#0072B2", "--")}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line on ``arguments``, by default the process's own."""
    from wqmix_jax.cli.parser import OneLineParser
    from wqmix_jax.errors import ConfigError, refuse
    from wqmix_jax.records.run_dir import make_run_dir, new_run_dir

    parser = OneLineParser(prog="python -m experiments.demo", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", help="a new folder; a dated one under outputs when left out")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        out = new_run_dir(args.out, algo="demo", env="table2_predator_prey")
        out = make_run_dir(out, numbered=args.out is None)
    except ConfigError as error:
        refuse(str(error).replace("run_dir=", "--out "))
    print(f"Table 2's game and a small predator-prey, into {out}; compiling comes first")
    records = train_all(out)
    draw(records, out / "demo.png")
    for (name, algo), lines in records.items():
        print(f"{ALGORITHMS[algo][0]} on {TASKS[name].title}: {verdict(TASKS[name], lines)}")
    print(f"done in {time.perf_counter() - started:.0f} s: {out / 'demo.png'}, {out / 'predator_prey.gif'}")


def train_all(out: Path) -> dict[tuple[str, str], Records]:
    """The eval records of each task and algorithm, the longest trainings first."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # inherited by the workers: an accelerator can't be shared so
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
    with concurrent.futures.ProcessPoolExecutor(max_workers=2, mp_context=context) as pool:
        waiting = {
            (name, algo): pool.submit(train, TASKS[name], algo, film if algo == "ow_qmix" else None)
            for name, film in (("predator_prey", out / "predator_prey.gif"), ("table2", None))
            for algo in ALGORITHMS
        }
        return {key: future.result() for key, future in waiting.items()}


def train(task: Task, algo: str, film: Path | None = None) -> Records:
    """The eval records of all seeds of one training; the last policy of the first draws an episode if asked to."""
    import jax

    from wqmix_jax import load_config, play_episode, train_seeds, trained_policy

    def tell(line: dict[str, Any]) -> None:
        if line["kind"] == "eval" and line["seed"] == 0:
            print(
                f"{ALGORITHMS[algo][0]}, {task.title}: {line['env_steps']:,} steps, return {line['episode_return']:.1f}"
            )

    config = load_config(f"+algo={algo}", *task.overrides, *NARROW.get(algo, ()))
    state, records = train_seeds(config, range(task.num_seeds), callback=tell, progress=False)
    if film is not None:
        moments = play_episode(config.env, trained_policy(config, state), jax.random.key(0))
        config.env.viewer().film(moments, str(film))
    return [line for line in records if line["kind"] == "eval"]


def verdict(task: Task, records: Records) -> str:
    """How the seeds ended."""
    last = {line["seed"]: line["episode_return"] for line in records}
    solved = sum(value >= 0.8 * task.best for value in last.values())
    return f"{solved} of {len(last)} seeds end at 80% or more of the best return, {task.best:g}"


def draw(records: dict[tuple[str, str], Records], picture: Path) -> None:
    """One panel per task: median and quartiles over seeds, as in the paper's figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from wqmix_jax.records.statistics import quartiles, seed_curves

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASKS))
    for axes, (name, task) in zip(panels, TASKS.items(), strict=True):
        for algo, (label, colour, style) in ALGORITHMS.items():
            curves = seed_curves(records[name, algo], "episode_return")
            median, low, high = quartiles(curves.values)
            axes.plot(curves.env_steps, median, color=colour, linestyle=style, linewidth=1.8, label=label)
            axes.fill_between(curves.env_steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axhline(task.best, color="0.4", linewidth=1, linestyle=":", label=f"best possible, {task.best:g}")
        axes.set(title=f"{task.title}, {task.num_seeds} seeds", xlabel="environment steps")
        axes.set_ylabel("evaluation return (median, quartiles)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center right")
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main()
