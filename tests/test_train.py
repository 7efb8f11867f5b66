"""The command line: what it refuses and how, what a run leaves behind, and a user's own parts."""

import datetime
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import matplotlib.image
import pytest
import yaml

import wqmix_jax
from tests.running import TINY, copy_user_folder, main, timeless
from wqmix_jax import load_config, load_metrics, train
from wqmix_jax.cli.sweeps import make_sweep_dir
from wqmix_jax.cli.syntax import as_text
from wqmix_jax.config import RunConfig, names
from wqmix_jax.errors import ConfigError
from wqmix_jax.records import run_dir as run_dir_module
from wqmix_jax.records.metrics import load_header
from wqmix_jax.runs import session, startup

ROOT = Path(__file__).parent.parent
ALGORITHMS = ", ".join(sorted(["huber_iql", *names("algo").split(", ")]))

REFUSED = [
    ([], f"an algorithm is missing: write +algo=NAME, NAME one of {names('algo')}"),
    (["algo=ow_qmix"], "algo=ow_qmix is not allowed: write +algo=ow_qmix"),
    (["+algo=nonsense"], "algo=nonsense is not allowed: choose one of cen_iql, coma, cw_qmix, "),
    (["+algo=_base"], "algo._target_ is missing"),
    (["+algo=ow_qmix", "env=nonsense"], "env=nonsense is not allowed: choose one of "),
    (["+algo=ow_qmix", "+env=predator_prey"], "+env=predator_prey is not allowed: write env=NAME, NAME one of "),
    (["+algo=ow_qmix", "env=null"], "env=null is not allowed: write env=NAME, NAME one of "),
    (["+algo=ow_qmix", "~env"], "~env is not allowed: write env=NAME, NAME one of "),
    (["+algo=null"], "+algo=null is not allowed: write +algo=NAME (NAME is one of "),
    (["+algo=[iql,vdn]"], "+algo=[iql,vdn] is not allowed: write +algo=NAME (NAME is one of "),
    (["+algo=ow_qmix", "algo.lr=abc"], "algo.lr='abc' is not allowed: input should be a valid number"),
    (["+algo=ow_qmix", "algo.lr=-1"], "algo.lr=-1 is not allowed: input should be greater than 0"),
    (["+algo=ow_qmix", "algo.alpha=2"], "algo.alpha=2 is not allowed: input should be less than or equal to 1"),
    (["+algo=ow_qmix", "algo.alpha=0"], "algo.alpha=0 is not allowed: input should be greater than 0"),
    (["+algo=ow_qmix", "algo.gamma=1.5"], "algo.gamma=1.5 is not allowed: input should be less than or equal to 1"),
    (["+algo=ow_qmix", "algo.batch_size=0"], "algo.batch_size=0 is not allowed: input should be greater than 0"),
    (["+algo=ow_qmix", "num_seeds=0"], "num_seeds=0 is not allowed: input should be greater than 0"),
    (
        ["+algo=ow_qmix", "num_seeds=1000000000"],
        "num_seeds=1000000000 is not allowed: input should be less than or equal to",
    ),
    (["+algo=ow_qmix", "sweep.alpha=[[1],[2]]"], "algo.alpha=[1] is not allowed: input should be a valid number"),
    (["-m", "resume=one"], "resume=one is not allowed: runs are resumed one at a time, without -m"),
    (["resume=one,two"], "resume=one,two is not allowed: there is no such folder"),
    (["env=jumanji", "+algo=iql", "env.generator.sides=3"], "env.generator={'sides': 3} is not allowed: "),
    (
        ["+algo=iql", "env.num_agents.least=3"],
        "env.num_agents={'least': 3} is not allowed: input should be a valid integer",
    ),
    (["+algo=iql", "--config-dir", ".", "num_seeds=0"], "num_seeds=0 is not allowed: input should be greater than 0"),
    (["+algo=ow_qmix", "num_seeds=1.5"], "num_seeds=1.5 is not allowed: input should be a valid integer"),
    (["+algo=ow_qmix", "total_env_steps=-5"], "total_env_steps=-5 is not allowed: input should be greater than 0"),
    (["+algo=ow_qmix", "env.world_shape=[3,3]"], "env.world_shape=(3, 3) is not allowed: its 9 cells must hold"),
    (["+algo=ow_qmix", "algo.lrr=1"], "algo.lrr is unknown: did you mean algo.lr? known keys are gamma, "),
    (["+algo=ow_qmix", "+algo.lrr=1"], "algo.lrr is unknown: did you mean algo.lr? known keys are gamma, "),
    (["+algo=ow_qmix", "num_seed=1"], "num_seed is unknown: did you mean num_seeds? known keys are algo, "),
    (["+algo=ow_qmix", "+num_seed=1"], "num_seed is unknown: did you mean num_seeds? known keys are algo, "),
    (["+algo=ow_qmix", "a.b.c=1"], "a is unknown: known keys are algo, "),
    (
        ["+algo=ow_qmix", "+num_seeds=2"],
        "Could not append to config. An item is already at 'num_seeds'. Either remove +",
    ),
    (["+algo=ow_qmix", "num_seeds"], "'num_seeds' can't be read: options are written key=value (missing EQUAL"),
    (["+algo=ow_qmix", "num_seeds=[1"], "'num_seeds=[1' can't be read: options are written key=value"),
    (["+algo=ow_qmix", "num_seeds=${nonsense}"], "num_seeds is not allowed: Interpolation key 'nonsense' not found"),
    (["+algo=ow_qmix", "--config-dir", "nowhere"], "--config-dir nowhere is not allowed: there is no such folder"),
    (["+algo=ow_qmix", "--nonsense"], "unrecognized arguments: --nonsense"),
    (
        ["+algo=ow_qmix", "num_seeds=1,2"],
        "num_seeds=1,2 is not allowed: several values make several runs with -m, and a",
    ),
    (
        ["+algo=ow_qmix", "+algo=qmix"],
        "+algo=ow_qmix, +algo=qmix is not allowed: an algorithm is chosen once; -m +algo=",
    ),
    (["+algo=ow_qmix", "algo=qmix"], "+algo=ow_qmix, algo=qmix is not allowed: an algorithm is chosen once; -m +algo="),
    (["+algo=ow_qmix", "lr=0.1"], "lr is unknown: did you mean algo.lr?"),
    (["+algo=ow_qmix", "punishment=-1"], "punishment is unknown: did you mean env.punishment?"),
    (["+algo=ow_qmix", "hosts=0"], "hosts=0 is not allowed: a positive integer is needed"),
    (
        ["+algo=ow_qmix", "total_env_steps=1.5"],
        "total_env_steps=1.5 is not allowed: input should be a valid integer",
    ),
    (["+algo=qmix,vdn"], "+algo=qmix,vdn is not allowed: several algorithms make several runs with -m"),
    (["+algo=qmix", "env=smax,jumanji"], "env=smax,jumanji is not allowed: several environments make several runs "),
    (["+algo=qmix", "run_dir="], "run_dir= is not allowed: it names no folder"),
    (["ow_qmix"], "'ow_qmix' can't be read: options are written key=value"),
    (["resume=nowhere"], "resume=nowhere is not allowed: there is no such folder"),
    (["resume="], "resume= is not allowed: it names no folder"),
    (["resume=nowhere", "+algo=ow_qmix"], "resume=nowhere is not allowed: there is no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_refused_in_one_line_with_nothing_left_behind(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        train.main()
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_refused_as_a_process(tmp_path: Path) -> None:
    ended = _process("+algo=ow_qmix", "algo.alpha=2", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: algo.alpha=2 is not allowed: input should be less than or equal to 1\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("results")
    assert main(*TINY, f"run_dir={tmp_path}") == 2
    assert capfd.readouterr().err == (
        f"error: run_dir={tmp_path} is not allowed: it isn't empty; resume={tmp_path} continues a run\n"
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["results"]


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(*TINY, f"run_dir={tmp_path / 'file'}") == 2
    assert capfd.readouterr().err == f"error: run_dir={tmp_path / 'file'} is not allowed: it is a file\n"
    assert main(*TINY, f"run_dir={tmp_path / 'file' / 'run'}") == 2
    assert capfd.readouterr().err == f"error: run_dir={tmp_path / 'file' / 'run'} can't be made: Not a directory\n"
    assert main("-m", *TINY, f"run_dir={tmp_path / 'file'}") == 2
    assert capfd.readouterr().err == f"error: run_dir={tmp_path / 'file'} is not allowed: it is a file\n"


def test_a_sweeps_folder_is_the_one_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its quotes, and not where hydra has yet to work it out."""
    monkeypatch.chdir(tmp_path)
    for name in ("'my runs'", "it's", "1e3", "a,b"):
        make_sweep_dir(as_text([f"run_dir={name}"]))
    assert make_sweep_dir(["run_dir=${oc.env:HOME}/runs"]) == "${oc.env:HOME}/runs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1e3", "a,b", "it's", "my runs"]


def test_sweeps_that_start_in_the_same_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime.datetime(2026, 11, 30, 12)
    monkeypatch.setattr(run_dir_module, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda: now)))
    seen = []
    monkeypatch.setattr(session, "start", lambda config, values, **_: seen.append(values["run_dir"]))
    for _ in range(2):
        assert main("-m", "+algo=qmix,vdn") == 0
    first = "outputs/2026-11-30_12-00-00_sweep"
    assert seen == [f"{first}/0", f"{first}/1", f"{first}_2/0", f"{first}_2/1"]


def test_a_users_algorithms_are_listed_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    assert capfd.readouterr().err == f"error: an algorithm is missing: write +algo=NAME, NAME one of {ALGORITHMS}\n"


def test_help_is_short_and_lists_what_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert main("--help") == 0
    out = capfd.readouterr().out
    assert out.startswith("Trains one algorithm on one environment")
    assert f"algo: {ALGORITHMS}\n" in out
    assert "Hydra" not in out
    assert re.search(
        r"^total_env_steps: 1000000 +# environment steps after which a seed is finished\n", out, re.MULTILINE
    )
    assert re.search(r"^  every: 100000 +# environment steps ", out, re.MULTILINE)
    assert re.search(r"^  punishment: -2 +# reward, at most 0, ", out, re.MULTILINE)
    assert "lr:" not in out
    assert main("+algo=ow_qmix", "env=matrix_game", "--help") == 0
    out = capfd.readouterr().out
    assert re.search(r"^  alpha: 0.1 +# the weight of joint actions ", out, re.MULTILINE)
    assert re.search(r"^  payoff: table2 +# the reward of every joint action ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["+algo=vdn", "algo.lr=0.25", "--cfg", "job"], "  lr: 0.25\n"),
        (["+algo=vdn", "--cfg", "job", "--package", "checkpoint"], "# @package checkpoint\nevery: 100000\nkeep: 2\n"),
    ],
    ids=lambda value: "",
)
def test_flags_that_print_something_start_nothing(
    arguments: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "start", None)
    assert main(*arguments) == 0
    assert printed in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--info", "searchpath"], "/configs"),
        (["--hydra-help"], "== Flags =="),
        (["--shell-completion", "install=bash"], "hydra_bash_completion"),
    ],
    ids=["info", "hydra-help", "shell-completion"],
)
def test_flags_of_hydra_itself(arguments: list[str], printed: str, tmp_path: Path) -> None:
    """In another process, because hydra sets up logging there."""
    ended = _process(*arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert printed in ended.stdout


def test_main_builds_the_options_once_and_starts_the_session_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[RunConfig] = []
    started: list[tuple[RunConfig, list[str]]] = []

    def count(values: Any, real: Any = train.run_config) -> RunConfig:
        built.append(real(values))
        return built[-1]

    def start(config: RunConfig, values: Any, **names: Any) -> None:
        stack = [frame for frame in traceback.extract_stack()[:-1] if f"{os.sep}wqmix_jax{os.sep}" in frame.filename]
        started.append((config, [frame.name for frame in stack]))
        assert (values["num_seeds"], names["algo"], names["env"]) == (2, "huber_iql", "coin")

    for module in (train, session):
        monkeypatch.setattr(module, "run_config", count)
    monkeypatch.setattr(session, "start", start)
    assert main(*TINY) == 0
    [(config, frames)] = started
    assert [id(config)] == [id(each) for each in built]
    assert frames == ["run", "main"]  # the decorator that all commands have, and the command


def test_load_config_reads_what_the_command_line_reads(tmp_path: Path) -> None:
    config = load_config("+algo=cw_qmix", "num_seeds=8", "env.punishment=-1.5", "algo.lr=1e-3")
    assert isinstance(config, RunConfig)
    assert (config.num_seeds, config.env.punishment, config.algo.lr, config.algo.weighting) == (
        8,
        -1.5,
        1e-3,
        "central",
    )
    for overrides in (["algo=iql"], ["+algo=iql", "algo.q_star_dim=8"], ["+algo=iql", "num_seeds="]):
        with pytest.raises(ConfigError):
            load_config(*overrides)


@pytest.mark.parametrize(
    "texts",
    [
        ["env.generator={grid_size: 6, fov: 3, num_agents: 2, num_food: 1, force_coop: true}"],
        [
            "env.generator={grid_size: 6, fov: 3, num_agents: 2}",
            "env.generator.num_food=1",
            "env.generator.force_coop=true",
        ],
        ["env.generator={grid_size: 6, fov: 3, num_agents: 2}", "++env.generator={num_food: 1, force_coop: true}"],
    ],
)
def test_what_an_environment_passes_on_is_written_like_any_option(texts: list[str]) -> None:
    config = load_config("+algo=iql", "env=jumanji", *texts)
    assert config.env.generator == {"grid_size": 6, "fov": 3, "num_agents": 2, "num_food": 1, "force_coop": True}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as a user outside the repository makes it, in a separate process."""
    folder = copy_user_folder(tmp_path_factory.mktemp("outside") / "my project's, files")
    ended = _process(*TINY, "--config-dir", "configs", "run_dir=first/run", cwd=folder)  # in the midst of the options
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "coin.py", "configs", "first", "huber_iql.py", "watchers.py",
    ]  # fmt: skip
    (folder / "first" / "stdout").write_text(ended.stdout)
    (folder / "first" / "stderr").write_text(ended.stderr)
    return folder / "first" / "run"


def test_a_run_says_what_it_does(run_dir: Path) -> None:
    said = (run_dir.parent / "stdout").read_text().splitlines()
    assert said[0] == "run: first/run"
    assert said[1].startswith("device: ")
    assert "seeds 3..4, 37 environment steps each" in said
    assert [line for line in said if line.startswith("replay: ")]
    assert "evaluation: every 6 iterations (12 environment steps of full episodes)" in said
    assert "learner steps per environment step: 0.5 (1 per full episode of 2 steps)" in said
    assert [line for line in said if line.startswith("compiled in ")]
    assert said[-1] == "done: first/run"
    shown = (run_dir.parent / "stderr").read_text()
    # Before it jax may warn of an entry of the tests' compilation cache that a killed run left half written.
    assert [line for line in shown.splitlines() if line.startswith("2 seeds | 0 of 37 steps | eval return ")]
    assert "37 of 37 steps" in shown.splitlines()[-1]


def test_a_run_leaves_these_files(run_dir: Path) -> None:
    found = sorted(path.name for path in run_dir.iterdir())
    assert found == [
        "checkpoints", "config.yaml", "learning_curve.png", "metrics.jsonl", "policies", "run.json", "summary.json"
    ]  # fmt: skip


def test_config_yaml_holds_every_option(run_dir: Path) -> None:
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert values["algo"]["_target_"] == "huber_iql.HuberIQL"
    assert values["env"] == {"_target_": "coin.Coin", "episode_limit": 2, "end_probability": 0.5}
    assert (values["run_dir"], values["resume"], values["num_seeds"]) == ("first/run", None, 2)
    assert set(values) == set(RunConfig.__dataclass_fields__)


def test_metrics_have_their_schema(run_dir: Path) -> None:
    header = load_header(run_dir)
    assert {key: header[key] for key in ("schema", "version", "algo", "env", "seeds")} == {
        "schema": 1,
        "version": wqmix_jax.__version__,
        "algo": "huber_iql",
        "env": "coin",
        "seeds": [3, 4],
    }
    counters = ["kind", "seed", "env_steps", "learner_steps", "episodes", "episode_return", "episode_length"]
    for record in load_metrics(run_dir, kind="eval"):
        assert list(record)[:7] == counters
        assert set(record) == {*counters, "episode_return_std", "episode_length_std", "win_rate"}
    for record in load_metrics(run_dir, kind="train"):
        assert set(record) >= {*counters, "epsilon", "steps_per_second", "loss", "grad_norm"}


def test_each_seed_is_recorded_from_before_learning_until_it_gets_there(run_dir: Path) -> None:
    for seed in (3, 4):
        evaluated = load_metrics(run_dir, kind="eval", seed=seed)
        trained = load_metrics(run_dir, kind="train", seed=seed)
        assert (evaluated[0]["env_steps"], evaluated[0]["episodes"]) == (0, 0)
        assert [record["env_steps"] for record in evaluated[1:]] == [record["env_steps"] for record in trained]
        assert [record["episodes"] for record in evaluated[:-1]] == list(range(0, 6 * len(trained), 6))
        assert evaluated[-2]["env_steps"] < 37 <= evaluated[-1]["env_steps"] <= 38


def test_summary_has_the_final_figures(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert set(summary["versions"]) >= {"python", "wqmix_jax", "jax", "jaxlib", "flax", "optax"}
    assert summary["device"]["platform"] == "cpu"
    assert 0 < summary["compile_seconds"] < summary["wall_seconds"]
    for seed in ("3", "4"):
        assert summary["final"][seed] == load_metrics(run_dir, kind="eval", seed=int(seed))[-1]


def test_the_picture_can_be_seen(run_dir: Path) -> None:
    pixels = matplotlib.image.imread(run_dir / "learning_curve.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05


def test_another_process_gives_the_same_numbers(run_dir: Path, tmp_path: Path) -> None:
    assert main(*TINY, f"run_dir={tmp_path}") == 0
    assert timeless(load_metrics(tmp_path)) == timeless(load_metrics(run_dir))


def test_an_option_without_effect_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = "warning: algo.td_lambda has no effect with algo.returns=one_step"
    short = ["env=matrix_game", "total_env_steps=2", "eval_interval=2", "eval_episodes=1", "algo.hidden_dim=2"]
    assert main("+algo=iql", *short, "algo.td_lambda=0.5", f"run_dir={tmp_path / 'in_vain'}") == 0
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")] == [message]
    assert main("+algo=iql", *short, f"run_dir={tmp_path / 'default'}") == 0
    assert "warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "texts",
    [
        ["total_env_steps=1e3", "num_seeds=2.0", "algo.batch_size=8.0", "env.world_shape=[1e1,10]", "hosts=1.0"],
        ["total_env_steps=1000", "num_seeds=2", "algo.batch_size=8", "env.world_shape=[10,10]", "hosts=1"],
    ],
)
def test_whole_floats_are_integers_also_in_the_runs_folder(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[RunConfig] = []
    monkeypatch.setattr(session.Session, "run", lambda self: trained.append(self.config))
    assert main("+algo=vdn", *texts, "algo.max_grad_norm=10", f"run_dir={tmp_path}") == 0
    [config] = trained
    integers = (config.total_env_steps, config.num_seeds, config.algo.batch_size, *config.env.world_shape, config.hosts)
    assert integers == (1000, 2, 8, 10, 10, 1)
    assert {type(number) for number in integers} == {int}
    written = (tmp_path / "config.yaml").read_text()
    for line in ("total_env_steps: 1000\n", "num_seeds: 2\n", "  batch_size: 8\n", "  - 10\n", "max_grad_norm: 10.0\n"):
        assert line in written


def test_whole_floats_are_integers_in_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(session, "start", lambda config, *_, **__: seen.append(config.total_env_steps))
    assert main("-m", "+algo=vdn", "total_env_steps=1e3,2e3", f"run_dir={tmp_path}") == 0
    assert seen == [1000, 2000]
    swept = load_config("+algo=vdn", "sweep.epsilon_anneal_steps=[5e4,100000]").sweep["epsilon_anneal_steps"]
    assert (swept, [type(value) for value in swept]) == ([50000, 100000], [int, int])


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has just begun, and whose resumption trains nothing either."""
    monkeypatch.setattr(session.Session, "run", lambda self: None)
    folder = tmp_path / "it's a, run\\"
    assert main(*TINY, f"run_dir={folder}") == 0
    return folder


@pytest.mark.parametrize(
    "repeated", [["+algo=huber_iql"], ["+algo=huber_iql", "env=coin"], [*TINY], ["seed=3", "total_env_steps=1e2"]]
)
def test_resume_takes_options_that_are_the_runs_own(
    repeated: list[str], started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[int] = []
    monkeypatch.setattr(session.Session, "run", lambda self: resumed.append(self.config.total_env_steps))
    assert main(*repeated, f"resume={started}") == 0
    assert resumed == [100 if "total_env_steps=1e2" in repeated else 37]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("+algo=vdn", "+algo=vdn is not allowed with resume={run}: it has algo=huber_iql, and a run keeps its options"),
        (
            "env=smax",
            "env=smax is not allowed with resume={run}: it has env=coin, and a run keeps its options, except ",
        ),
        ("seed=4", "seed=4 is not allowed with resume={run}: it has seed=3, and a run keeps its options"),
        ("algo.new=4", "algo.new=4 is not allowed with resume={run}: a run keeps its options, except total_env_steps"),
    ],
)
def test_resume_refuses_other_options(
    other: str, message: str, started: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert main(other, f"resume={started}") == 2
    assert capfd.readouterr().err.startswith(f"error: {message.format(run=started)}")


def test_a_run_knows_the_command_that_resumes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command names the folder of the user's modules and yamls, for a new run and a resumed one."""
    commands: list[str] = []
    monkeypatch.setattr(session.Session, "run", lambda self: commands.append(self.hint.partition(": ")[2]))
    monkeypatch.chdir(tmp_path)
    project = copy_user_folder(tmp_path / "my project's")
    for arguments in ([*TINY, "run_dir=1e3"], ["resume=1e3"]):
        assert main(*arguments, config_dir=Path("my project's/configs")) == 0
    python = startup._python()
    assert commands == 2 * [f"""{python} -m wqmix_jax.train --config-dir 'my project'"'"'s/configs' resume=1e3"""]
    monkeypatch.setattr(sys, "argv", ["train", "+algo=vdn", "run_dir=no_own"])
    train.main()
    assert commands[-1] == f"{python} -m wqmix_jax.train resume=no_own"
    assert project.is_dir()


def _process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wqmix_jax.train", *arguments]
    as_here = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(jax.config.read("jax_disable_most_optimizations"))}
    env = os.environ | {"PYTHONPATH": str(ROOT)} | as_here
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
