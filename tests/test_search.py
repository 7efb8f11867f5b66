"""A search: the values that are chosen, trials that share a call, results, resume, reports, and refused options."""

import csv
import importlib.util
import json
import math
import shlex
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from tests.documentation import arguments_of, commands
from wqmix_jax import api, load_config, load_metrics, table
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.config import RunConfig
from wqmix_jax.errors import ConfigError, RunError
from wqmix_jax.records.run_dir import failed_members, read_config
from wqmix_jax.search import __main__ as search
from wqmix_jax.search import trials
from wqmix_jax.search.report import best_command, importances_of
from wqmix_jax.search.settings import Origin, load_search
from wqmix_jax.search.space import Group, Trial, groups, make_space
from wqmix_jax.search.trials import next_batch, objective, open_study, read_result
from wqmix_jax.training.members import Member

ALGO = load_values("+algo=ow_qmix", "env=matrix_game")["algo"]
RUN = ("+algo=ow_qmix", "env=matrix_game", "logger.progress=false", "num_seeds=2")
LR = "search.lr={low: 1e-4, high: 1e-2, log: true}"

Value = Callable[[RunConfig, Member], float]


class Calls:
    """Takes the place of training: an evaluation at steps 0, 100, 200 and 300, whose return a function gives.

    Attributes:
        value: the return from step 100 on, by the options and the member; nan for a seed that fails.
        configs: the options of each call.
        members: the members of each call.
    """

    def __init__(self, value: Value, progress: bool | None = False) -> None:
        self.value, self.progress = value, progress
        self.configs: list[RunConfig] = []
        self.members: list[tuple[Member, ...]] = []

    def __call__(self, config: RunConfig, members: Sequence[Member], *, progress: bool | None) -> tuple[Any, list[Any]]:
        assert progress is self.progress
        self.configs.append(config)
        self.members.append(tuple(members))
        values = [self.value(config, member) for member in members]
        lines = [
            {"kind": "eval", **member.labels, "env_steps": steps, "episode_return": value if steps else -1.0}
            for steps in (0, 100, 200, 300)
            for member, value in zip(members, values, strict=True)
            if steps == 0 or math.isfinite(value)
        ]
        return types.SimpleNamespace(failed=~np.isfinite(values)), lines

    @property
    def swept(self) -> list[list[dict[str, float]]]:
        """The traced values of the first seed's members in each call."""
        return [[dict(member.swept) for member in each if member.seed == 0] for each in self.members]


def near_best(config: RunConfig, member: Member) -> float:
    """A return that is best for lr=0.001 with adam, and differs between seeds."""
    lr = dict(member.swept).get("lr", 1e-3)
    return member.seed - abs(math.log10(lr) + 3) - (config.algo.optimizer == "rmsprop")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Runs the command line in an empty folder with `Calls` in place of training."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str, value: Value = near_best, progress: bool | None = False) -> Calls:
        calls = Calls(value, progress)
        monkeypatch.setattr(search, "train_members", calls)
        search.main(list(arguments))
        return calls

    return start


def rows(folder: str) -> list[dict[str, str]]:
    with open(Path(folder) / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def values_of(folder: str, *names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in rows(folder)]


# The space.


def test_lists_and_ranges_become_distributions_of_the_option_s_type() -> None:
    given = {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "gamma": {"low": 0, "high": 1},
        "td_lambda": {"low": 0, "high": 1, "step": 0.25},
        "hidden_dim": {"low": 8, "high": 64, "step": 8.0},
        "target_update_interval": {"low": 1, "high": 1e3, "log": True},
        "target_update_tau": [None, 1],
        "optimizer": ["adam", "rmsprop"],
        "double_q": [True, False],
    }
    space = make_space(ALGO | {"returns": "td_lambda"}, given)
    assert space == {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "gamma": FloatDistribution(0.0, 1.0),
        "td_lambda": FloatDistribution(0.0, 1.0, step=0.25),
        "hidden_dim": IntDistribution(8, 64, step=8),
        "target_update_interval": IntDistribution(1, 1000, log=True),
        "target_update_tau": CategoricalDistribution([None, 1.0]),
        "optimizer": CategoricalDistribution(["adam", "rmsprop"]),
        "double_q": CategoricalDistribution([True, False]),
    }
    assert [type(choice) for choice in space["target_update_tau"].choices] == [type(None), float]  # type: ignore[attr-defined]


def test_an_option_has_an_effect_if_it_has_one_with_some_of_the_other_values() -> None:
    searched = {"rms_decay": {"low": 0.9, "high": 0.99}, "optimizer": ["adam", "adamw", "rmsprop"]}
    assert list(make_space(ALGO, searched)) == ["rms_decay", "optimizer"]
    with pytest.raises(ConfigError, match=r"^search.rms_decay is not allowed: with algo.optimizer=adamw it has no eff"):
        make_space(ALGO, searched | {"optimizer": ["adam", "adamw"]})


def test_trials_share_a_call_if_the_values_of_the_program_are_equal() -> None:
    from wqmix_jax.options import build

    params = [
        {"lr": 0.1, "optimizer": "adam", "target_update_tau": 0.5},
        {"lr": 0.2, "optimizer": "rmsprop", "target_update_tau": 0.5},
        {"lr": 0.3, "optimizer": "adam", "target_update_tau": 0.25},
        {"lr": 0.4, "optimizer": "adam", "target_update_tau": None},  # without tau it is another program
    ]
    listed = [Trial(number, each) for number, each in enumerate(params)]
    algos = {trial.number: build("algo", ALGO | trial.params) for trial in listed}
    assert groups(algos, listed) == [
        Group({"optimizer": "adam"}, ("lr", "target_update_tau"), [listed[0], listed[2]]),
        Group({"optimizer": "rmsprop"}, ("lr", "target_update_tau"), [listed[1]]),
        Group({"optimizer": "adam", "target_update_tau": None}, ("lr",), [listed[3]]),
    ]


# Objectives.

LINES = [
    {"kind": "eval", "seed": 0, "env_steps": 0, "win_rate": 0.0},
    {"kind": "eval", "seed": 1, "env_steps": 0, "win_rate": 0.5},
    {"kind": "train", "seed": 0, "env_steps": 100},
    {"kind": "eval", "seed": 0, "env_steps": 100, "win_rate": 0.5},
    {"kind": "eval", "seed": 0, "env_steps": 300, "win_rate": 1.0},
]


@pytest.mark.parametrize(
    ("seed", "last", "expected"),
    [(0, 1, 1.0), (0, 2, 0.75), (0, 9, 0.5), (0, None, (25 + 150) / 300), (1, 1, 0.5), (1, None, 0.5)],
)
def test_objective(seed: int, last: int | None, expected: float) -> None:
    assert objective(LINES, seed, "win_rate", last) == pytest.approx(expected)


def test_an_objective_that_no_evaluation_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="metric=captures is not allowed: the evaluations have kind, seed, env_steps"):
        objective(LINES, 0, "captures", 1)


# The command.


def test_a_search_trains_batches_in_calls_and_reports_them(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = started(*RUN, LR, "search.optimizer=[rmsprop,adam]", "trials=8", "trials_per_call=4", "run_dir=one")
    assert all(2 <= len(members) <= 8 for members in calls.members)
    assert [len({member.seed for member in members}) for members in calls.members] == [2] * len(calls.members)
    found = rows("one")
    assert [row["trial"] for row in found] == [str(number) for number in range(8)]
    for row in found:  # each trial has the results of its values
        lr, is_rmsprop = float(row["lr"]), row["optimizer"] == "rmsprop"
        expected = -abs(math.log10(lr) + 3) - is_rmsprop
        assert [float(row["seed_0"]), float(row["seed_1"])] == pytest.approx([expected, expected + 1])
        assert float(row["objective"]) == pytest.approx(expected + 0.5)
    lrs = {float(row["lr"]) for row in found}
    assert {swept["lr"] for call in calls.swept for swept in call} == lrs
    assert len(lrs) == 8
    assert all(1e-4 <= lr <= 1e-2 for lr in lrs)
    by_optimizer = {config.algo.optimizer for config in calls.configs}
    assert by_optimizer == {"rmsprop", "adam"}
    assert len(calls.configs) <= 4  # two batches, two optimisers
    best = max(found, key=lambda row: float(row["objective"]))
    out = capsys.readouterr().out
    shown = out[out.index("trial  episode_return") :].splitlines()
    assert shown[1].split()[0] == best["trial"]
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[1:3] == ["-m", "wqmix_jax.train"]
    config = load_config(*command[3:])
    assert (config.algo.lr, config.algo.optimizer, config.num_seeds) == (float(best["lr"]), best["optimizer"], 2)
    assert (Path("one") / "importance.png").stat().st_size > 0


def test_the_folder_of_a_trial_is_that_of_a_run(started: Callable[..., Calls]) -> None:
    started(*RUN, LR, "trials=3", "run_dir=one")
    for row in rows("one"):
        folder = Path("one") / "trials" / f"{int(row['trial']):04d}"
        assert read_config(folder)["algo"]["lr"] == float(row["lr"])
        records = load_metrics(folder, kind="eval")
        assert [(line["seed"], line["env_steps"]) for line in records[:3]] == [(0, 0), (1, 0), (0, 100)]
        assert records[-1]["episode_return"] == float(row["seed_1"])
        assert set(records[0]) == {"kind", "seed", "env_steps", "episode_return"}
    listed = table.table(sorted(Path("one/trials").iterdir()))
    assert [float(each["algo.lr"]) for each in listed] == [float(row["lr"]) for row in rows("one")]


def test_the_sampler_learns_from_results(started: Callable[..., Calls]) -> None:
    started(*RUN, "num_seeds=1", LR, "trials=48", "trials_per_call=8", "random_trials=8", "run_dir=one")
    distance = [abs(math.log10(float(row["lr"])) + 3) for row in rows("one")]
    assert np.median(distance[-16:]) < np.median(distance[:16]) / 2
    started(*RUN, "num_seeds=1", LR, "trials=48", "random_trials=8", "run_dir=two", "direction=minimize")
    distance = [abs(math.log10(float(row["lr"])) + 3) for row in rows("two")]
    assert np.median(distance[-16:]) > np.median(distance[:16])


def test_the_same_command_gives_the_same_trials(started: Callable[..., Calls]) -> None:
    for folder in ("one", "two"):
        started(*RUN, LR, "trials=20", f"run_dir={folder}")
    started(*RUN, LR, "trials=20", "seed=1", "run_dir=three")
    assert rows("one") == rows("two")
    assert values_of("one", "lr")[0] != values_of("three", "lr")[0]


def test_equal_values_train_once(started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]) -> None:
    calls = started(*RUN, "search.optimizer=[rmsprop,adam]", "trials=6", "trials_per_call=4", "run_dir=one")
    assert [config.algo.optimizer for config in calls.configs] in (["rmsprop", "adam"], ["adam", "rmsprop"])
    assert [len(members) for members in calls.members] == [2, 2]
    first: dict[str, dict[str, str]] = {}
    for row in rows("one"):
        original = first.setdefault(row["optimizer"], row)
        assert row["objective"] == original["objective"]
        assert row["same_as"] == ("" if original is row else original["trial"])
        assert load_metrics(f"one/trials/{int(row['trial']):04d}")
    assert capsys.readouterr().out.count("; the values of trial ") == 4


def test_the_area_under_the_curve_and_the_lowest_value(started: Callable[..., Calls]) -> None:
    started(*RUN, "num_seeds=1", LR, "trials=6", "last=null", "direction=minimize", "run_dir=one")
    for row in rows("one"):
        value = -abs(math.log10(float(row["lr"])) + 3) - 1
        assert float(row["objective"]) == pytest.approx(((value - 1) / 2 + 2 * value) / 3)
    study = open_study(Path("one"), "minimize")
    assert study.best_value == min(float(row["objective"]) for row in rows("one"))


# Failures.


def test_a_seed_that_diverges_fails_its_trial_alone(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    def value(config: RunConfig, member: Member) -> float:
        lr = dict(member.swept)["lr"]
        return math.nan if lr > 1e-3 and member.seed == 1 else near_best(config, member)

    started(*RUN, LR, "trials=12", "run_dir=one", value=value)
    states = {row["trial"]: row["state"] for row in rows("one")}
    assert states == {row["trial"]: "fail" if float(row["lr"]) > 1e-3 else "complete" for row in rows("one")}
    assert set(states.values()) == {"fail", "complete"}
    number, failed = next((int(row["trial"]), row) for row in rows("one") if row["state"] == "fail")
    assert failed["reason"] == "1 of 2 seeds diverged (non-finite loss or parameters): [1]"
    assert (failed["objective"], failed["seed_1"]) == ("", "")
    assert float(failed["seed_0"]) < 0
    assert list(failed_members(Path(f"one/trials/{number:04d}"))) == ["1"]
    study = open_study(Path("one"), "maximize")
    assert {str(trial.number): trial.state.name.lower() for trial in study.trials} == states
    assert " failed" in capsys.readouterr().out


def test_values_that_do_not_fit_together_fail_their_trial(started: Callable[..., Calls]) -> None:
    space = ("search.batch_size=[16,64]", "search.buffer_size=[32,64]")
    calls = started(*RUN, *space, "trials=16", "run_dir=one")
    for row in rows("one"):
        refused = (row["batch_size"], row["buffer_size"]) == ("64", "32")
        assert row["state"] == ("fail" if refused else "complete")
        message = "algo.buffer_size=32 is not allowed: at least algo.batch_size=64 is needed"
        assert row["reason"] == (message if refused else "")
    assert len(calls.configs) == 3
    assert "fail" in {row["state"] for row in rows("one")}


def test_a_search_whose_trials_all_fail_ends_with_an_error(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        started(*RUN, LR, "trials=2", "run_dir=one", value=lambda config, member: math.nan)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "error: all 2 trials failed, see one/trials.csv\n"
    assert not Path("one/importance.png").exists()


# Resume.


class _Interrupted:
    """Raises an error in a call, and trains in the others."""

    def __init__(self, call: int, error: BaseException) -> None:
        self.left, self.error = call, error

    def __call__(self, config: RunConfig, member: Member) -> float:
        if member.seed == 0:
            self.left -= 1
        if self.left < 0:
            raise self.error
        return near_best(config, member)


@pytest.mark.parametrize("trained", [0, 3, 4, 9])
def test_an_interrupted_search_continues_as_one_that_was_not(
    trained: int, started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    space = (LR, "search.optimizer=[rmsprop,adam]", "trials=16", "trials_per_call=4", "random_trials=3")
    started(*RUN, *space, "run_dir=whole")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        started(*RUN, *space, "run_dir=one", value=_Interrupted(trained, KeyboardInterrupt()))
    assert ended.value.code == 130
    err = capsys.readouterr().err
    assert err.startswith("interrupted; to continue: ")
    assert err.endswith("-m wqmix_jax.search resume=one\n")
    kept = len(list(Path("one/trials").iterdir())) if trained >= 4 else 0
    calls = started("resume=one")
    assert rows("one") == rows("whole")
    retrained = sum(len(call) for call in calls.swept)
    assert retrained <= 16 - kept


def test_a_trial_that_was_written_but_not_reported_is_trained_again(
    started: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trials, "_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            started(*RUN, LR, "trials=4", "run_dir=one")
    assert Path("one/trials/0000/summary.json").is_file()
    calls = started("resume=one")
    assert [len(call) for call in calls.swept] == [4]
    assert len(rows("one")) == 4


def test_a_trial_whose_values_were_not_all_chosen_fails(started: Callable[..., Calls]) -> None:
    started(*RUN, LR, "search.alpha=[0.1,0.5]", "trials=2", "run_dir=one")
    study = open_study(Path("one"), "maximize")
    study.ask().suggest_float("lr", 1e-4, 1e-2, log=True)
    started("resume=one", "trials=4")
    assert [row["state"] for row in rows("one")] == ["complete", "complete", "fail", "complete"]
    assert rows("one")[2]["reason"] == "it was interrupted while its values were chosen"


def test_more_trials_continue_a_finished_search(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    started(*RUN, LR, "trials=4", "run_dir=one")
    before = rows("one")
    shown = capsys.readouterr().out
    assert started("resume=one").configs == []
    again = capsys.readouterr().out
    assert again[again.index("trial  episode_return") :] == shown[shown.index("trial  episode_return") :]
    calls = started("resume=one", "trials=7")
    assert sum(len(call) for call in calls.swept) == 3
    assert rows("one")[:4] == before
    assert len(rows("one")) == 7
    assert load_search(Path("one"), {})[0].trials == 7


def test_an_error_of_training_ends_the_search_with_a_hint(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        started(*RUN, LR, "trials=2", "run_dir=one", value=_Interrupted(0, RunError("too little memory")))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: too little memory; to continue: ")


def test_a_search_that_runs_already_is_refused(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    def value(config: RunConfig, member: Member) -> float:
        with pytest.raises(SystemExit):
            search.main(["resume=one"])
        return 0.0

    started(*RUN, LR, "trials=1", "run_dir=one", value=value)
    assert "resume=one is not allowed: another process is training this run" in capsys.readouterr().err


# Reports.


def test_importance_finds_the_option_that_matters() -> None:
    study = optuna.create_study(direction="maximize")
    space = {"lr": FloatDistribution(0.0, 1.0), "gamma": FloatDistribution(0.0, 1.0)}
    generator = np.random.default_rng(0)
    assert importances_of(study) is None
    for lr, gamma in generator.uniform(size=(100, 2)):
        trial = optuna.trial.create_trial(params={"lr": lr, "gamma": gamma}, distributions=dict(space), value=-lr)
        study.add_trial(trial)
    found = importances_of(study)
    assert found is not None
    assert list(found) == ["lr", "gamma"]
    assert found["lr"] > 0.8
    assert sum(found.values()) == pytest.approx(1)


def test_importance_needs_different_results() -> None:
    study = optuna.create_study(direction="maximize")
    space = {"lr": FloatDistribution(0.0, 1.0)}
    for lr in (0.1, 0.2, 0.3):
        study.add_trial(optuna.trial.create_trial(params={"lr": lr}, distributions=dict(space), value=1.0))
    assert importances_of(study) is None


def test_the_command_of_the_best_values_is_read_as_written() -> None:
    origin = Origin("ow_qmix", "matrix_game", ["+algo=ow_qmix", "env=matrix_game"], None)
    params = {"lr": 1e-05, "target_update_tau": None, "double_q": False, "optimizer": "adam", "hidden_dim": 8}
    algo = load_config(*shlex.split(best_command(origin, params))[3:]).algo
    assert {name: getattr(algo, name) for name in params} == params


def test_the_searches_of_the_documentation_start_and_continue(started: Callable[..., Calls]) -> None:
    page = "docs/pages/tutorials/search.md"
    listed = [found for each in commands(page) if (found := arguments_of("wqmix_jax.search", each)) is not None]
    assert len(listed) == 2
    for arguments in listed:
        started(*arguments, value=near_best, progress=None)
    assert len(rows("outputs/search")) == 20


# Refused options.

REFUSED = [
    ("", "error: an algorithm is missing: write +algo=NAME"),
    ("+algo=ow_qmix", "search={} is not allowed: write search={lr: {low: 1e-4, high: 1e-2, log: true}}"),
    ("+algo=ow_qmix trails=3 {LR}", "trails is unknown: did you mean trials?"),
    ("+algo=ow_qmix num_seed=3 {LR}", "num_seed is unknown: did you mean num_seeds?"),
    ("+algo=ow_qmix {LR} trials=0", "trials=0 is not allowed: input should be greater than 0"),
    ("+algo=ow_qmix {LR} trials=8,16", "trials=8,16 is not allowed: one value is needed"),
    ("+algo=ow_qmix {LR} trials_per_call=0", "trials_per_call=0 is not allowed"),
    ("+algo=ow_qmix {LR} last=0", "last=0 is not allowed"),
    ("+algo=ow_qmix {LR} direction=up", "direction='up' is not allowed: input should be 'maximize' or 'minimize'"),
    ("+algo=ow_qmix {LR} metric=win_rate", "metric=win_rate is not allowed: choose one of episode_return, "),
    ("+algo=ow_qmix {LR} algo.lr=0.1", "algo.lr=0.1 is not allowed: search.lr chooses its values"),
    ("+algo=ow_qmix {LR} sweep.alpha=[0.1,0.5]", "is not allowed: search={..} chooses the values"),
    ("+algo=ow_qmix {LR} hosts=2", "hosts=2 is not allowed: a search trains on one host"),
    ("+algo=ow_qmix {LR} checkpoint.every=5", "checkpoint.every=5 is not allowed: a search writes no checkpoints"),
    ("+algo=ow_qmix {LR} logger.csv=true", "logger.csv=true is not allowed: of the loggers"),
    ("+algo=ow_qmix {LR} num_seeds=0", "num_seeds=0 is not allowed"),
    ("-m +algo=ow_qmix {LR}", "unrecognized arguments: -m"),
    ("+algo=ow_qmix 'search={lrr: [0.1,0.2]}'", "algo.lrr is unknown: did you mean algo.lr?"),
    ("+algo=ow_qmix 'search={algo.lr: [0.1,0.2]}'", "search.algo.lr is not allowed: write search.lr"),
    ("+algo=ow_qmix 'search={lr: 0.1}'", "search.lr=0.1 is not allowed: write a list of values"),
    ("+algo=ow_qmix 'search={lr: [0.1]}'", "search.lr=[0.1] is not allowed: at least two different values"),
    ("+algo=ow_qmix 'search={lr: [0.1,0.1]}'", "at least two different values are needed"),
    ("+algo=ow_qmix 'search={lr: [0.1,-0.1]}'", "algo.lr=-0.1 is not allowed: input should be greater than 0"),
    ("+algo=ow_qmix 'search={share_parameters: [all,[[0,1]]]}'", "a list of numbers, texts or null is needed"),
    (
        "+algo=ow_qmix 'search={optimizer: [adam,sgd]}'",
        "algo.optimizer='sgd' is not allowed: input should be ",
    ),
    ("+algo=ow_qmix 'search={gamma: {low: 0.5, high: 1.5}}'", "algo.gamma=1.5 is not allowed: input should be less"),
    ("+algo=ow_qmix 'search={lr: {low: 0, high: 0.1}}'", "algo.lr=0 is not allowed: input should be greater than 0"),
    ("+algo=ow_qmix 'search={lr: {low: 0.1}}'", "search.lr.high is missing"),
    ("+algo=ow_qmix 'search={lr: {low: 0.1, hgih: 1}}'", "search.lr.hgih is unknown: did you mean search.lr.high?"),
    ("+algo=ow_qmix 'search={lr: {low: 0.1, high: 0.1}}'", "search.lr.high=0.1 is not allowed: it must be above low"),
    ("+algo=ow_qmix 'search={gamma: {low: 0, high: 1, log: true}}'", "with log=true it must be above 0"),
    ("+algo=ow_qmix 'search={lr: {low: 0.1, high: 1, log: true, step: 0.1}}'", "step=0.1 is not allowed with log=true"),
    ("+algo=ow_qmix 'search={hidden_dim: {low: 8, high: 64, step: 10}}'", "must be whole steps apart"),
    ("+algo=ow_qmix 'search={hidden_dim: {low: 8, high: 64, step: 0.5}}'", "step=0.5 is not allowed: the option is an"),
    ("+algo=ow_qmix 'search={hidden_dim: {low: 8.5, high: 64}}'", "algo.hidden_dim=8.5 is not allowed"),
    ("+algo=ow_qmix 'search={double_q: {low: 0, high: 1}}'", "algo.double_q=0 is not allowed"),
    ("+algo=ow_qmix 'search={adam_b1: {low: 0.8, high: 0.9}}'", "with algo.optimizer=rmsprop it has no effect"),
    ("resume=nowhere", "resume=nowhere is not allowed: there is no search in it (search.yaml)"),
    ("resume=done num_seeds=3", "num_seeds=3 is not allowed with resume=done: a search keeps its options, except"),
    ("resume=done 'search={alpha: [0.1,0.5]}'", "is not allowed with resume=done: a search keeps its options"),
    ("resume=done trials=1", "trials=1 is not allowed: this search has 2 trials already"),
    ("resume=done trials=0", "trials=0 is not allowed"),
    ("+algo=ow_qmix env=matrix_game {LR} run_dir=done", "run_dir=done is not allowed: it isn't empty"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a search of two trials."""
    folder = tmp_path_factory.mktemp("refused")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(search, "train_members", Calls(near_best))
        search.main([*RUN, LR, "trials=2", "run_dir=done"])
    return folder


def refusal(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        search.main(shlex.split(arguments.replace("{LR}", shlex.quote(LR))))
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_what_is_refused(
    arguments: str,
    message: str,
    done: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(done)
    monkeypatch.setattr(search, "train_members", None)
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert message in refusal(arguments, capsys)
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before, "nothing is written"


def test_without_optuna_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    message = refusal("+algo=ow_qmix {LR}", capsys)
    assert message.startswith("error: a search needs the package optuna: ")
    assert "search" in message.partition("optuna: ")[2]


def test_a_damaged_search_is_refused(
    started: Callable[..., Calls], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started(*RUN, LR, "trials=1", "run_dir=one")
    capsys.readouterr()
    Path("one/trials/0000/summary.json").write_text(json.dumps({"trial": 3}))
    with pytest.raises(ConfigError, match=r"^one/trials/0000/summary.json is damaged: "):
        read_result(Path("one"), 0)
    Path("one/search.yaml").write_text("options: {}")
    assert refusal("resume=one", capsys).startswith("error: one/search.yaml is damaged: ")


def test_a_batch_is_filled_up_with_new_trials(started: Callable[..., Calls]) -> None:
    with pytest.raises(SystemExit):
        started(*RUN, LR, "trials=10", "trials_per_call=4", "run_dir=one", value=_Interrupted(5, KeyboardInterrupt()))
    study = open_study(Path("one"), "maximize")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4 + [TrialState.RUNNING] * 4
    given = {each.key_or_group: each for each in search.parse_overrides(["resume=one"])}
    assert [trial.number for trial in next_batch(search._resumed(given, None), study)] == [4, 5, 6, 7]


@pytest.mark.slow
def test_members_of_a_search_train_as_those_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains for real: two trials in one call have the records of a sweep over the same values."""
    monkeypatch.chdir(tmp_path)
    small = (
        "+algo=ow_qmix", "env=matrix_game", "total_env_steps=200", "eval_interval=100", "eval_episodes=2",
        "algo.batch_size=4", "algo.buffer_size=16", "algo.hidden_dim=8", "algo.q_star_dim=8", "num_envs=2",
    )  # fmt: skip
    search.main([*small, "search.lr=[0.001,0.01]", "trials=5", "logger.progress=false", "run_dir=one"])
    _, records = api.train_seeds(load_config(*small, "sweep.lr=[0.001,0.01]"), [0], progress=False)
    for row in rows("one"):
        found = load_metrics(f"one/trials/{int(row['trial']):04d}", kind="eval")
        same = [line for line in records if line["kind"] == "eval" and line["algo.lr"] == float(row["lr"])]
        assert [line["episode_return"] for line in found] == [line["episode_return"] for line in same]
    assert {row["lr"] for row in rows("one")} == {"0.001", "0.01"}
