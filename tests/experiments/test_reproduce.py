"""A figure by its command: the runs that are trained, kept and refused, and the contents of the files and the picture.

All tests but one replace training: a run's folder appears with known curves.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Picture

from experiments import figure_data, figures, pictures, reproduce
from experiments.figures import Figure, Panel
from tests.recorded import evaluated, record_run
from tests.running import shared_programs
from wqmix_jax import load_metrics
from wqmix_jax.api import load_policies
from wqmix_jax.config import RunConfig, run_config
from wqmix_jax.errors import SEEDS_FAILED, ConfigError, RunError
from wqmix_jax.records.metrics import HEADER_FILE, METRICS_FILE, MetricsFile, load_header
from wqmix_jax.records.run_dir import SUMMARY_FILE, held

TINY = (
    "algo.batch_size=2",
    "algo.buffer_size=4",
    "algo.hidden_dim=4",
    "total_env_steps=12",
    "eval_interval=4",
    "eval_episodes=3",
)

DRAW = pictures.draw
DRAWN = sorted(reproduce.ROOT.glob("experiments/results/*/*/fig*/made.json"))
"""The figures in the repository."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Figure:
    """A figure of two lines on games of one step."""
    figure = Figure(
        title="Small",
        metric="episode_return",
        env=["matrix_game"],
        overrides=["eval_interval=4"],
        lines={"IQL": ["+algo=iql"], "VDN, slow": ["+algo=vdn", "algo.lr=0.0001"]},
        panels={"game": Panel()},
        passes=[4, 8.5],
        searched={},
    )
    monkeypatch.setattr(reproduce, "load_figure", lambda name: figure)
    return figure


class Faked:
    """Replaces training, and records the calls.

    Attributes:
        started: folders and seeds of new runs.
        groups: their groups in W&B.
        resumed: folders of resumed runs.
        curve: the returns of a seed's evaluations at 0, 4, 8 and 12 steps.
        failing: seeds that fail.
        status: the status of new runs.
    """

    def __init__(self) -> None:
        self.started: list[tuple[str, list[int]]] = []
        self.groups: list[str] = []
        self.resumed: list[str] = []
        self.curve: Callable[[str, int], list[float]] = lambda algo, seed: [0.0, 1.0, 2.0, 3.0 + seed]
        self.failing: tuple[int, ...] = ()
        self.status = "finished"

    def start(self, config: RunConfig, values: dict[str, Any], *, algo: str, env: str) -> Path:
        assert config.run_dir == values["run_dir"]
        folder = Path(values["run_dir"])
        seeds = list(range(values["seed"], values["seed"] + values["num_seeds"]))
        self.started.append((folder.as_posix(), seeds))
        self.groups.append(values["logger"]["group"])
        failed = [seed for seed in seeds if seed in self.failing]
        lines = [
            line
            for seed in seeds
            for line in evaluated(seed, dict(zip((0, 4, 8, 12), self.curve(algo, seed), strict=True)))
        ]
        record_run(folder, values, lines, algo=algo, env=env, failed=failed, status=self.status)
        (folder / "checkpoints" / "8").mkdir(parents=True)
        if failed:
            raise RunError(f"{len(failed)} of {len(seeds)} seeds failed", SEEDS_FAILED)
        return folder

    def resume(self, folder: Path, changes: dict[str, Any]) -> Path:
        assert not changes
        self.resumed.append(folder.as_posix())
        summary = json.loads((folder / SUMMARY_FILE).read_text())
        (folder / SUMMARY_FILE).write_text(json.dumps({**summary, "status": "finished"}))
        if self.failing:
            raise RunError("a seed failed", SEEDS_FAILED)
        return folder


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Faked:
    training = Faked()
    monkeypatch.setattr(reproduce.session, "start", training.start)
    monkeypatch.setattr(reproduce.session, "resume", training.resume)
    monkeypatch.setattr(figure_data, "absolute_metric", lambda folder, factor: absolute(folder))
    monkeypatch.setattr(pictures, "draw", lambda path, *others: path)  # it takes most of the time
    return training


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, faked: Faked) -> list[Picture]:
    """Draws pictures, and collects them."""
    monkeypatch.setattr(pictures, "draw", DRAW)
    figures_drawn: list[Picture] = []
    save = Picture.savefig
    monkeypatch.setattr(
        Picture, "savefig", lambda self, *args, **kw: figures_drawn.append(self) or save(self, *args, **kw)
    )
    return figures_drawn


def absolute(folder: Path) -> dict[str, dict[str, float]]:
    """Returns best policies whose return is ten times their seed."""
    return {str(seed): {"episode_return": 10.0 * seed} for seed in load_header(folder)["seeds"]}


def made(tmp_path: Path, *texts: str) -> int:
    """Runs the command and returns its exit code."""
    try:
        reproduce.main(["fig2", *texts, f"out={tmp_path}/out"])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_figure_is_trained_gathered_and_drawn(small: Figure, tmp_path: Path) -> None:
    """The complete command, with real training."""
    with shared_programs():
        assert made(tmp_path, *TINY, "num_seeds=2", "absolute_factor=2", "lines=[iql]") == 0
    run = tmp_path / "out" / "game" / "iql" / "seeds_0-1"
    last = {line["seed"]: line["episode_return"] for line in load_metrics(run, kind="eval")}
    folder = tmp_path / "out" / "fig2"
    [row] = rows_of(folder / "table.csv")
    assert (row["line"], row["seeds"], row["failed"], row["env_steps"]) == ("IQL", "2", "0", "12")
    np.testing.assert_allclose(float(row["median"]), (last[0] + last[1]) / 2, rtol=1e-3)
    played = json.loads((run / figure_data.ABSOLUTE_FILE).read_text())
    assert played["episodes"] == 6
    assert set(played["seeds"]) == {"0", "1"}
    best = [figures["episode_return"] for figures in played["seeds"].values()]
    np.testing.assert_allclose(float(row["absolute"]), np.mean(best), rtol=1e-3)
    assert (folder / "fig2.png").read_bytes().startswith(b"\x89PNG")
    [how] = json.loads((folder / "made.json").read_text())["runs"]
    assert "algo.hidden_dim=4" in how["command"]
    assert how["status"] == "finished"


def test_only_what_is_missing_is_trained(small: Figure, faked: Faked, tmp_path: Path) -> None:
    assert made(tmp_path, "num_seeds=2") == 0
    assert [seeds for _, seeds in faked.started] == [[0, 1], [0, 1]]
    assert made(tmp_path, "num_seeds=2") == 0
    assert len(faked.started) == 2
    assert made(tmp_path, "num_seeds=4", "lines=[iql]") == 0
    assert faked.started[2:] == [(f"{tmp_path}/out/game/iql/seeds_2-3", [2, 3])]
    assert [row["seeds"] for row in rows_of(tmp_path / "out" / "fig2" / "table.csv")] == ["4"]


def test_the_seeds_of_a_line_share_a_group_in_wandb(small: Figure, faked: Faked, tmp_path: Path) -> None:
    assert made(tmp_path, "lines=[iql]", "num_seeds=1") == 0
    assert made(tmp_path, "lines=[iql]", "num_seeds=3") == 0
    assert [Path(folder).name for folder, _ in faked.started] == ["seed_0", "seeds_1-2"]
    assert faked.groups == [f"{tmp_path.name}/out/game/iql"] * 2
    assert made(tmp_path, "logger.group=mine", "lines=[vdn_slow]") == 0
    assert faked.groups[2:] == ["mine"]


def test_missing_seeds_between_others_are_found(small: Figure, faked: Faked, tmp_path: Path) -> None:
    assert made(tmp_path, "lines=[iql]", "num_seeds=1", "seed=1") == 0
    assert made(tmp_path, "lines=[iql]", "num_seeds=4") == 0
    assert [seeds for _, seeds in faked.started] == [[1], [0], [2, 3]]


def test_an_interrupted_run_goes_on(small: Figure, faked: Faked, tmp_path: Path) -> None:
    faked.status = "interrupted"
    assert made(tmp_path, "lines=[iql]") == 0
    assert json.loads((tmp_path / "out" / "fig2" / "made.json").read_text())["title"][-1] == "not finished yet"
    assert made(tmp_path, "lines=[iql]") == 0
    assert faked.resumed == [faked.started[0][0]]
    assert made(tmp_path, "lines=[iql]") == 0
    assert (len(faked.started), len(faked.resumed)) == (1, 1)


def test_a_run_that_can_not_go_on_is_refused_before_anything_is_trained(
    small: Figure, faked: Faked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked.status = "interrupted"
    assert made(tmp_path, "lines=[vdn_slow]") == 0
    [(folder, _)] = faked.started
    with held(Path(folder)):
        assert made(tmp_path) == 2
    assert f"{folder} is not allowed: another process is training this run" in capsys.readouterr().err
    shutil.rmtree(Path(folder) / "checkpoints")
    assert made(tmp_path) == 2
    assert f"{folder} is not allowed: its checkpoints are gone" in capsys.readouterr().err
    assert (len(faked.started), faked.resumed) == (1, [])
    assert made(tmp_path, "train=false") == 0


def test_what_is_there_is_drawn_without_training(small: Figure, faked: Faked, tmp_path: Path) -> None:
    faked.status = "interrupted"
    assert made(tmp_path, "lines=[iql]") == 0
    assert made(tmp_path, "train=false") == 0
    assert (len(faked.started), faked.resumed) == (1, [])
    assert [row["line"] for row in rows_of(tmp_path / "out" / "fig2" / "table.csv")] == ["IQL"]


def test_seeds_that_fail_are_left_out_and_reported(
    small: Figure, faked: Faked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked.failing = (1,)
    assert made(tmp_path, "num_seeds=3") == SEEDS_FAILED
    assert "error: 1 of 3 seeds failed; 1 of 3 seeds failed" in capsys.readouterr().err
    rows = rows_of(tmp_path / "out" / "fig2" / "table.csv")
    assert [(row["line"], row["seeds"], row["failed"]) for row in rows] == [("IQL", "2", "1"), ("VDN, slow", "2", "1")]
    assert float(rows[0]["median"]) == 4.0  # of 3 and 5
    assert float(rows[0]["absolute"]) == 10.0  # of 0 and 20


def test_a_line_of_which_all_seeds_fail_leaves_the_others_be(
    small: Figure, faked: Faked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(pictures, "draw", lambda path, lines, *_: drawn.extend(line.run.line for line in lines) or path)
    assert made(tmp_path, "lines=[vdn_slow]", "num_seeds=2") == 0
    faked.failing = (0, 1)
    assert made(tmp_path, "num_seeds=2") == SEEDS_FAILED
    assert "error: 2 of 2 seeds failed" in capsys.readouterr().err
    folder = tmp_path / "out" / "fig2"
    rows = rows_of(folder / "table.csv")
    assert [(row["line"], row["seeds"], row["failed"], row["median"]) for row in rows] == [
        ("IQL", "0", "2", ""),
        ("VDN, slow", "2", "0", "3.5"),
    ]
    assert drawn == ["VDN, slow"] * 2
    assert {row["line"] for row in rows_of(folder / "seeds.csv")} == {"VDN, slow"}
    assert list(json.loads((folder / "marl_eval.json").read_text())["matrix_game"]["game"]) == ["VDN, slow"]


def test_a_figure_of_which_all_seeds_fail_is_reported_in_one_line(
    small: Figure, faked: Faked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked.failing = (0,)
    assert made(tmp_path, "num_seeds=1") == SEEDS_FAILED
    message = f"error: all seeds of fig2 in {tmp_path}/out failed: there is nothing to draw\n"
    assert capsys.readouterr().err == message
    assert made(tmp_path, "train=false") == SEEDS_FAILED


def test_the_absolute_metric_is_played_again_for_a_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []
    monkeypatch.setattr(figure_data, "_best_policies", lambda *_: {"0": {"episode_return": float(len(played))}})
    values: dict[str, Any] = {"eval_episodes": 2, "algo": {}, "env": {}}
    folder = record_run(tmp_path / "run", values, evaluated(0, {0: 0.0, 4: 1.0}))
    (folder / "policies").mkdir()
    (folder / "policies" / "best.npz").touch()

    def metric(factor: int = 10) -> float:
        played.append(factor)
        return figure_data.absolute_metric(folder, factor)["0"]["episode_return"]

    assert [metric(), metric(), metric(5), metric(5)] == [1, 1, 3, 3]
    with MetricsFile(folder, num_bytes=(folder / METRICS_FILE).stat().st_size) as metrics:
        metrics.write(evaluated(0, {8: 1.0}))
    assert [metric(5), metric(5)] == [5, 5]


def test_other_seeds_are_trained_where_a_resumed_one_fails(small: Figure, faked: Faked, tmp_path: Path) -> None:
    faked.status, faked.failing = "interrupted", (1,)
    assert made(tmp_path, "num_seeds=2", "lines=[iql]") == SEEDS_FAILED
    assert made(tmp_path, "num_seeds=3", "lines=[iql]") == SEEDS_FAILED
    assert faked.resumed == [faked.started[0][0]]
    assert faked.started[1][1] == [2]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ("algo.lr=0.1",),
            "iql/seed_0 was made with algo.lr=0.0005, and algo.lr=0.1 is asked for; out=FOLDER keeps",
        ),
        (("total_env_steps=9",), "was made with total_env_steps=1000000, and total_env_steps=9 is asked for"),
        (("quick=true",), "was made with eval_episodes=16, and eval_episodes=4 is asked for"),
        (("num_seeds=0",), "error: num_seeds=0 is not allowed"),
        (("lines=[]",), "lines=[] is not allowed: this figure has iql, vdn_slow"),
        (("lines=[iql,coma]",), "lines=['coma'] is not allowed: this figure has iql, vdn_slow"),
        (("algo.lrr=0.1",), "IQL: algo.lrr is unknown: did you mean algo.lr?"),
        (("env=smac",), "env=smac is not allowed: this figure is drawn on matrix_game"),
        (("+algo=vdn",), "+algo=vdn is not allowed: the figure defines its runs"),
        (("++sweep.lr=[1,2]",), "++sweep.lr=[1,2] is not allowed: the figure defines its runs"),
        (("run_dir=here",), "run_dir=here is not allowed"),
        (("quick",), "'quick' can't be read: options are written key=value"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(
    texts: tuple[str, ...],
    message: str,
    small: Figure,
    faked: Faked,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert made(tmp_path, "num_seeds=1", "lines=[iql]") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert made(tmp_path, "num_seeds=1", *texts) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(faked.started) == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_seed_that_is_there_twice_is_refused(
    small: Figure, faked: Faked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(tmp_path, "num_seeds=2", "lines=[iql]") == 0
    runs = tmp_path / "out" / "game" / "iql"
    shutil.copytree(runs / "seeds_0-1", runs / "seeds_1-2")
    for texts in (("num_seeds=4",), ("train=false",)):
        capsys.readouterr()
        assert made(tmp_path, *texts, "lines=[iql]") == 2
        message = f"error: IQL: seed 0 is in both {runs / 'seeds_0-1'} and {runs / 'seeds_1-2'}\n"
        assert capsys.readouterr().err == message
    assert len(faked.started) == 1
    run = figures.runs(small, "matrix_game")[0]
    with pytest.raises(ConfigError, match="seed 0 is in both"):  # where it has come while others trained
        figure_data.gather(run, [runs / "seeds_0-1", runs / "seeds_1-2"], 10)


def test_what_another_process_has_trained_meanwhile_is_not_trained_again(
    small: Figure, faked: Faked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first line trains, the second gets its first two seeds."""
    start = faked.start

    def start_both(config: RunConfig, values: dict[str, Any], *, algo: str, env: str) -> Path:
        if algo == "iql":
            folder = Path(values["run_dir"]).parent.parent / "vdn_slow" / "seeds_0-1"
            part = {**values, "num_seeds": 2, "run_dir": str(folder)}
            start(run_config(part), part, algo="vdn", env=env)
        return start(config, values, algo=algo, env=env)

    monkeypatch.setattr(reproduce.session, "start", start_both)
    assert made(tmp_path, "num_seeds=3") == 0
    assert [(Path(folder).parent.name, seeds) for folder, seeds in faked.started] == [
        ("vdn_slow", [0, 1]),
        ("iql", [0, 1, 2]),
        ("vdn_slow", [2]),
    ]


def test_the_table_says_how_many_seeds_have_a_policy(
    small: Figure, faked: Faked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made(tmp_path, "num_seeds=1", "lines=[iql]") == 0
    monkeypatch.setattr(
        figure_data, "absolute_metric", lambda folder, _: absolute(folder) if "1-2" in folder.name else {}
    )
    assert made(tmp_path, "num_seeds=3", "lines=[iql]") == 0
    [row] = rows_of(tmp_path / "out" / "fig2" / "table.csv")
    assert (row["seeds"], row["absolute_seeds"], row["absolute"]) == ("3", "2", "15")


def test_each_run_is_recorded_with_its_own_failures(small: Figure, faked: Faked, tmp_path: Path) -> None:
    faked.failing = (1,)
    assert made(tmp_path, "num_seeds=2", "lines=[iql]") == SEEDS_FAILED
    faked.failing = ()
    assert made(tmp_path, "num_seeds=3", "lines=[iql]") == 0
    runs = json.loads((tmp_path / "out" / "fig2" / "made.json").read_text())["runs"]
    assert [(run["seeds"], run["failed"]) for run in runs] == [([0, 1], ["1"]), ([2], [])]


def test_an_unknown_figure_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        reproduce.main(["fig1"])
    assert ended.value.code == 2
    assert "figure=fig1 is not allowed: choose one of fig2, " in capsys.readouterr().err


def test_versions_of_a_game_are_not_mixed(
    small: Figure, faked: Faked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(tmp_path) == 0
    for run, version in (("iql", "4.6.2"), ("vdn_slow", "4.10")):
        path = tmp_path / "out" / "game" / run / "seeds_0-2" / HEADER_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"simulator": {"StarCraft II": version}}))
    capsys.readouterr()
    assert made(tmp_path) == 2
    message = "has StarCraft II=unknown, and "
    assert message in capsys.readouterr().err
    assert made(tmp_path, "train=false") == 2
    message = "vdn_slow/seeds_0-2 has StarCraft II=4.10; out=FOLDER keeps them apart"
    assert message in capsys.readouterr().err


def test_the_game_is_played_where_it_is_and_smax_elsewhere(
    faked: Faked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = figures.load_figure("fig4")
    chosen, _ = reproduce._parsed([f"out={tmp_path}"])
    asked = []

    def load_config(*overrides: str) -> None:
        asked.append(overrides[0])
        raise ConfigError("SMAC can't be used: no StarCraft II")

    monkeypatch.setattr(reproduce, "load_config", load_config)
    assert reproduce._environment(figure, chosen, []) == "smax"
    assert asked == ["env=smac"]
    assert "using smax instead of smac: SMAC can't be used: no StarCraft II" in capsys.readouterr().out
    monkeypatch.setattr(reproduce, "load_config", lambda *overrides: None)
    assert reproduce._environment(figure, chosen, []) == "smac"
    chosen, _ = reproduce._parsed([f"out={tmp_path}", "train=false"])
    others = {"smac": "3s5z", "smax": "6h_vs_8z"}  # this figure is of the second map
    for env, panel in others.items():
        record_run(tmp_path / panel / "qmix_50k" / "seed_0", {}, [], env=env)
    assert reproduce._environment(figure, chosen, []) == "smax"
    record_run(tmp_path / "6h_vs_8z" / "qmix_50k" / "seed_1", {}, [], env="smac")
    assert reproduce._environment(figure, chosen, []) == "smac"


def test_the_files_hold_the_curves_and_what_they_come_to(small: Figure, faked: Faked, tmp_path: Path) -> None:
    faked.curve = lambda algo, seed: [0.0, 0.0, 4.0, 8.0] if algo == "iql" else [0.0, seed, 2.0 * seed, 3.0 * seed]
    assert made(tmp_path, "num_seeds=5") == 0
    folder = tmp_path / "out" / "fig2"
    drawn = [row for row in rows_of(folder / "curves.csv") if row["line"] == "VDN, slow"]
    assert len(drawn) == figure_data.NUM_POINTS
    end = drawn[-1]  # 0, 3, 6, 9 and 12
    assert (end["env_steps"], end["median"], end["q25"], end["q75"], end["iqm"]) == ("12", "6", "3", "9", "6")
    assert 0 <= float(end["iqm_low"]) < 6 < float(end["iqm_high"]) <= 12
    halfway = rows_of(folder / "curves.csv")[figure_data.NUM_POINTS // 2]
    assert (halfway["line"], halfway["env_steps"]) == ("IQL", "6")
    assert halfway["median"] == halfway["iqm_low"] == "2"  # between 0 at 4 steps and 4 at 8
    kept = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert len(kept) == 10
    slow = [row for row in rows_of(folder / "seeds.csv") if row["line"] == "VDN, slow"]
    assert [row["seed"] for row in slow] == ["0", "1", "2", "3", "4"]
    assert [row["passes_4"] for row in slow] == ["", "", "8", "8", "4"]  # 0, 3, 6, 9 and 12 in the end
    assert [row["passes_8.5"] for row in slow] == ["", "", "", "12", "12"]
    assert [(row["env_steps"], row["last"], row["absolute"]) for row in slow[3:]] == [
        ("12", "9", "30"),
        ("12", "12", "40"),
    ]
    assert kept[6] == {
        "panel": "game",
        "line": "VDN, slow",
        "seed": 1,
        "env_steps": [0, 4, 8, 12],
        "episode_return": [0.0, 1.0, 2.0, 3.0],
    }


def test_a_single_seed_has_no_interval(small: Figure, faked: Faked, tmp_path: Path) -> None:
    assert made(tmp_path, "num_seeds=1") == 0
    for name in ("table.csv", "curves.csv"):
        last = rows_of(tmp_path / "out" / "fig2" / name)[-1]
        assert (last["iqm"], last["iqm_low"], last["iqm_high"]) == ("3", "", "")


def test_the_export_is_laid_out_as_marl_eval_documents(small: Figure, faked: Faked, tmp_path: Path) -> None:
    assert made(tmp_path, "num_seeds=2") == 0
    exported = json.loads((tmp_path / "out" / "fig2" / "marl_eval.json").read_text())
    assert list(exported) == ["matrix_game"]
    assert list(exported["matrix_game"]) == ["game"]
    assert list(exported["matrix_game"]["game"]) == ["IQL", "VDN, slow"]
    runs = exported["matrix_game"]["game"]["IQL"]
    assert list(runs) == ["0", "1"]
    assert list(runs["1"]) == ["step_0", "step_1", "step_2", "step_3", "absolute_metrics"]
    assert runs["1"]["step_3"] == {"step_count": 12, "episode_return": [4.0]}
    assert runs["1"]["absolute_metrics"] == {"episode_return": [10.0]}


def test_changes_are_in_the_title_and_authors_curves_next_to_ours(
    small: Figure, drawn: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.jsonl").write_text(
        '{"seed": 0, "epsilon_anneal_time": 50000}\n'
        '{"env_steps": 2, "episode_return": -1.0}\n{"env_steps": 400, "episode_return": 90.0}\n'
    )
    figure = small.model_copy(update={"authors": {"IQL": str(tmp_path / "theirs.jsonl")}, "lowest": -0.5})
    monkeypatch.setattr(reproduce, "load_figure", lambda name: figure)
    assert made(tmp_path, "quick=true", "num_seeds=2", "seed=0", "logger.progress=false") == 0
    paper, mean = drawn[0].axes
    [legend] = [axes.get_legend() for axes in (paper, mean) if axes.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == [
        "IQL (2 seeds)",
        "VDN, slow (2 seeds)",
        "IQL, authors' code,\n  epsilon over 50k (1 seed)",
    ]
    assert paper.lines[-1].get_xydata().tolist() == [[2.0, -1.0]]  # theirs end where ours do
    assert len({line.get_color() for line in paper.lines}) == 2
    assert mean.get_ylim() == pytest.approx((-0.5, 4.225))  # a twentieth of what is seen above the highest, 4
    assert (paper.get_xlabel(), paper.get_ylabel()) == ("environment steps", "evaluation return")
    message = "quick run, not as in the paper: total_env_steps=10000, eval_interval=1000, eval_episodes=4"
    assert drawn[0].get_suptitle() == f"Figure 2: Small\n{message}"
    assert json.loads((tmp_path / "out" / "fig2" / "made.json").read_text())["title"] == ["Figure 2: Small", message]


def test_an_axis_stays_upright_where_all_returns_are_below_its_end(
    small: Figure, drawn: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "load_figure", lambda name: small.model_copy(update={"lowest": 9.0}))
    assert made(tmp_path, "num_seeds=1") == 0
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 0 < 3 < high


def test_a_line_looks_the_same_whichever_others_are_there(
    small: Figure, faked: Faked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[dict[str, Any]] = []
    monkeypatch.setattr(pictures, "draw", lambda path, *others: looks.append(others[3]) or path)
    assert made(tmp_path, "lines=[vdn_slow]") == 0
    assert made(tmp_path) == 0
    assert looks[0]["VDN, slow"] == looks[1]["VDN, slow"] != looks[1]["IQL"]


def test_further_lines_are_drawn_if_they_are_named(tmp_path: Path) -> None:
    figure = figures.load_figure("fig2")
    chosen = {"num_seeds": 1, "quick": False, "train": True, "env": None, "absolute_factor": 1, "quick_overrides": []}

    def planned(lines: list[str] | None) -> list[str]:
        options = reproduce.ReproduceOptions(**chosen, lines=lines, out=str(tmp_path))
        return [line.run.line for line in reproduce.plan(figure, "predator_prey", options, [])]

    assert planned(None) == list(figure.lines)
    assert planned(["dcg", "qmix", "pqn_vdn"]) == ["QMIX", "DCG", "PQN-VDN"]


def test_figures_share_the_runs_that_they_have_in_common() -> None:
    folders: dict[Path, set[tuple[str, ...]]] = {}
    for name in figures.figure_names():
        for run in figures.runs(figures.load_figure(name)):
            folders.setdefault(Path(run.env) / run.folder, set()).add(tuple(sorted(set(run.overrides))))
    assert len(folders[Path("predator_prey/cw_qmix")]) == 1
    assert all(len(overrides) == 1 for overrides in folders.values())


def test_a_run_is_named_by_its_task_and_label() -> None:
    run = next(run for run in figures.runs(figures.load_figure("fig9")) if run.panel == "OW-QMIX, 5m_vs_6m")
    assert (run.task, run.label, run.algo) == ("5m_vs_6m", "OW-QMIX, alpha = 0.01", "ow_qmix")
    run = next(run for run in figures.runs(figures.load_figure("fig7")) if run.line == "QMIX + Q*")
    assert (run.task, run.label, run.folder) == ("predator-prey", "QMIX + Q*", Path("qmix_qstar"))


@pytest.mark.parametrize("record", DRAWN, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_figures_in_the_repository_are_what_their_runs_show(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "draw", lambda path, *others: path)
    kept, recorded = record.parent, json.loads(record.read_text())
    shutil.copytree(kept.parent, tmp_path / "out", ignore=shutil.ignore_patterns("fig*", "checkpoints", "policies"))
    reproduce.main([recorded["figure"], "train=false", *recorded["changes"], f"out={tmp_path / 'out'}"])
    drawn = tmp_path / "out" / recorded["figure"]
    for name in ("table.csv", "seeds.csv", "curves.csv"):
        assert columns(drawn / name) == columns(kept / name), name
    assert json.loads((drawn / "marl_eval.json").read_text()) == json.loads((kept / "marl_eval.json").read_text())
    again = json.loads((drawn / "made.json").read_text())
    assert again["title"] == recorded["title"]
    assert [run["seeds"] for run in again["runs"]] == [run["seeds"] for run in recorded["runs"]]
    assert all(run["status"] == "finished" for run in again["runs"])


@pytest.mark.parametrize(
    "path",
    sorted(reproduce.ROOT.glob("experiments/results/**/best.npz")),
    ids=lambda path: "/".join(path.parts[-5:-2]),
)
def test_policies_in_the_repository_are_those_of_the_best_evaluations(path: Path) -> None:
    run_dir = path.parent.parent
    returns = {
        str(seed): [line["episode_return"] for line in load_metrics(run_dir, kind="eval") if line["seed"] == seed]
        for seed in load_header(run_dir)["seeds"]
    }
    _, policies = load_policies(run_dir, which="best")
    assert list(policies) == list(returns)
    with np.load(path) as file:
        assert file["episode_return"].tolist() == [max(values) for values in returns.values()]


def columns(path: Path) -> list[dict[str, str]]:
    """Reads a table without its bootstrap intervals, whose random draws depend on the version of scipy."""
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if not name.endswith(("_low", "_high"))}
            for row in csv.DictReader(file)
        ]


def test_more_seeds_of_a_figure_in_the_repository_are_trained_next_to_those_that_are_there(tmp_path: Path) -> None:
    kept = reproduce.ROOT / "experiments" / "results" / "predator_prey" / "epsilon_50k" / "cw_qmix"
    shutil.copytree(kept, tmp_path / "cw_qmix")
    chosen, changes = reproduce._parsed(["num_seeds=5", "lines=[cw_qmix]", f"out={tmp_path}"])
    [line] = reproduce.plan(figures.load_figure("fig2"), "predator_prey", chosen, changes)
    assert reproduce.missing_seeds(line) == [range(4, 5)]
    assert len(DRAWN) >= 3  # else the tests above would look at nothing
