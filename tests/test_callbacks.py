"""Callbacks see each evaluation, add metrics, end runs, and continue where they were when a run is resumed."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from tests.running import TINY, USER_FOLDER, killed_after, last_checkpoint, main, shared_programs, timeless, to_continue
from wqmix_jax import load_config, load_metrics, train_seeds
from wqmix_jax.callbacks import Callback, Callbacks, EarlyStopping, Evaluation, Outcome
from wqmix_jax.errors import RunError
from wqmix_jax.options import options as declare
from wqmix_jax.records.run_dir import read_summary
from wqmix_jax.training.host_loop import Loop
from wqmix_jax.training.members import Member

COUNTS = "callbacks=[watchers.ParamNorm,watchers.Counts]"

ADDED = {"param_norm", "seen"}


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without callbacks."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert main(*TINY, f"run_dir={run_dir}") == 0
    return run_dir


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two callbacks that was never cut."""
    run_dir = tmp_path_factory.mktemp("counted")
    assert main(*TINY, COUNTS, f"run_dir={run_dir}") == 0
    return run_dir


def without_added(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return timeless([{name: value for name, value in record.items() if name not in ADDED} for record in records])


def counts(**given: Any) -> str:
    options = ",".join(f"{name}:{value}" for name, value in given.items())
    return f"callbacks=[watchers.ParamNorm,{{_target_:watchers.Counts,{options}}}]"


def test_metrics_are_in_the_records_and_nothing_else_changes(counted: Path, straight: Path) -> None:
    records = load_metrics(counted)
    assert without_added(records) == timeless(load_metrics(straight))
    assert all(("param_norm" in record) == (record["kind"] == "eval") for record in records)
    assert [record["seen"] for record in records][:3] == [1, 1, 2]
    saved = last_checkpoint(counted)
    params = [leaf for name, leaf in saved.items() if name.startswith("state.learner.params.")]
    for place, seed in enumerate((3, 4)):
        norm = math.sqrt(sum(float(np.square(leaf[place].astype(np.float64)).sum()) for leaf in params))
        assert load_metrics(counted, kind="eval", seed=seed)[-1]["param_norm"] == pytest.approx(norm, rel=1e-5)
    assert saved["callbacks"] == {"watchers.ParamNorm": None, "watchers.Counts": {"seen": records[-1]["seen"]}}


def test_a_callback_ends_a_run_in_order(tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(*TINY, counts(stops_after=2), f"run_dir={run_dir}") == 0
    out, err = capfd.readouterr()
    assert f"\nstopped by watchers.Counts: 2 were enough\ndone: {run_dir}\n" in out
    assert "interrupted" not in err
    summary = read_summary(run_dir)
    assert summary["status"] == "stopped"
    assert summary["stopped"] == {"callback": "watchers.Counts", "reason": "2 were enough"}
    records = load_metrics(run_dir)
    assert {record["seen"] for record in records} == {1, 2}
    assert last_checkpoint(run_dir)["env_steps"] == [r["env_steps"] for r in records[-2:]]
    assert (run_dir / "policies" / "last.npz").is_file()

    assert main(f"resume={run_dir}") == 0, "the callback's state is that of the checkpoint"
    assert {record["seen"] for record in load_metrics(run_dir)} == {1, 2, 3}
    assert main(f"resume={run_dir}", "callbacks=[]") == 0
    assert without_added(load_metrics(run_dir)) == timeless(load_metrics(straight))
    assert read_summary(run_dir)["status"] == "finished"
    assert "stopped" not in read_summary(run_dir)


def test_a_killed_run_continues_with_the_states(tmp_path: Path, counted: Path) -> None:
    with killed_after(9):
        main(*TINY, COUNTS, f"run_dir={tmp_path / 'run'}")
    assert last_checkpoint(tmp_path / "run")["callbacks"]["watchers.Counts"]["seen"] > 1
    assert main(f"resume={tmp_path / 'run'}") == 0
    assert timeless(load_metrics(tmp_path / "run")) == timeless(load_metrics(counted))


def test_a_callback_that_fails_is_named_and_the_run_saved(
    tmp_path: Path, counted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, broken = tmp_path / "run", tmp_path / "broken"
    broken.touch()
    assert main(*TINY, counts(fails_at=3, broken=broken), f"run_dir={run_dir}") == 1
    *_, line = capfd.readouterr().err.splitlines()
    place = f"in {USER_FOLDER / 'watchers.py'}, line "
    assert line.startswith(f"error: callback watchers.Counts failed (ValueError: no luck, {place}")
    assert line.endswith(to_continue(run_dir))
    assert max(record["seen"] for record in load_metrics(run_dir)) == 2
    assert read_summary(run_dir)["status"] == "failed"
    saved = last_checkpoint(run_dir)
    assert saved["num_pending"] > 0
    assert min(saved["env_steps"]) > max(record["env_steps"] for record in load_metrics(run_dir))
    broken.unlink()
    assert main(f"resume={run_dir}") == 0
    assert timeless(load_metrics(run_dir)) == timeless(load_metrics(counted)), "the evaluation is repeated"


def test_the_first_evaluation_may_fail_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    assert main(*TINY, counts(fails_at=1, broken=broken), f"run_dir={tmp_path / 'run'}") == 1
    assert "callback watchers.Counts failed (ValueError: no luck, " in capfd.readouterr().err.splitlines()[-1]
    assert load_metrics(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("callbacks=watchers.Counts", "callbacks='watchers.Counts' is not allowed: input should be a valid list"),
        ("callbacks=[3]", "callbacks.0=3 is not allowed: write MODULE.CLASS, or {_target_: MODULE.CLASS, NAME: VALUE}"),
        ("callbacks=[watchers.Nothing]", "callbacks.0._target_='watchers.Nothing' can't be imported: "),
        ("callbacks=[absent.Nothing]", "callbacks.0._target_='absent.Nothing' can't be imported: No module named"),
        ("callbacks=[{stops_after: 2}]", "callbacks.0._target_ is missing: it names the class of these options"),
        (
            "callbacks=[watchers.ParamNorm,{_target_: watchers.Counts, stop_after: 2}]",
            "callbacks.1.stop_after is unknown: did you mean callbacks.1.stops_after? ",
        ),
        (
            "callbacks=[{_target_: watchers.Counts, stops_after: 0}]",
            "callbacks.0.stops_after=0 is not allowed: input should be greater than 0",
        ),
        (
            "callbacks=[wqmix_jax.algos.iql.IQL]",
            "callbacks.0._target_='wqmix_jax.algos.iql.IQL' is not allowed: it is not a subclass of "
            "wqmix_jax.callbacks.Callback",
        ),
        (
            "callbacks=[{_target_: wqmix_jax.callbacks.EarlyStopping, patience: 1.5}]",
            "callbacks.0.patience=1.5 is not allowed: input should be a valid integer",
        ),
    ],
)
def test_bad_input_is_refused(given: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(*TINY, given, f"run_dir={tmp_path / 'run'}") == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_folder_names_only_code_from_allowed_places(
    tmp_path: Path, counted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(counted, tmp_path / "run"))
    (run_dir / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    process = {"_target_": "subprocess.Popen", "args": ["touch", str(tmp_path / "mark")]}
    for entry, reason in (("evil.Evil", "resumes without them"), (process, "not a subclass of wqmix_jax.callbacks.C")):
        (run_dir / "config.yaml").write_text(yaml.safe_dump({**values, "callbacks": [entry]}))
        assert main(f"resume={run_dir}", config_dir=run_dir) == 2
        *_, line = capfd.readouterr().err.splitlines()
        assert "callbacks.0._target_=" in line
        assert reason in line
        assert not (tmp_path / "mark").exists()
    assert main(f"resume={run_dir}", "callbacks=[]") == 0


def config(*changes: str) -> Any:
    return load_config(*TINY, *changes, config_dir=USER_FOLDER / "configs")


def test_train_seeds_has_the_same_callbacks() -> None:
    made = config(counts(stops_after=2), "sweep.lr=[0.01,1e-9]")
    (state, records), (_, again) = train_seeds(made, [4, 3]), train_seeds(made, [4, 3])
    assert timeless(records) == timeless(again), "a config holds no state"
    assert {record["seen"] for record in records} == {1, 2}
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.learner.params)]
    last = [record for record in records if record["kind"] == "eval"][-4:]
    assert [(record["seed"], record["algo.lr"]) for record in last] == [(4, 0.01), (3, 0.01), (4, 1e-9), (3, 1e-9)]
    for place, record in enumerate(last):
        norm = math.sqrt(sum(float(np.square(leaf[place]).sum()) for leaf in leaves))
        assert record["param_norm"] == pytest.approx(norm, rel=1e-5)


def evaluation_of(*returns: float) -> Evaluation:
    records = [{"kind": "eval", "seed": seed, "episode_return": value} for seed, value in enumerate(returns)]
    members = tuple(Member(seed) for seed in range(len(returns)))
    return Evaluation([{"kind": "train", "seed": 0}, *records], None, members, None)  # type: ignore[arg-type]


def test_early_stopping_counts_evaluations_without_a_new_best_mean() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.5)
    state, stops = stopping.initial_state(), []
    for returns in ((0.0, 2.0), (1.4, 1.4), (1.0, 2.5), (2.0, 2.0), (9.0, -9.0)):
        outcome = stopping.on_evaluation(evaluation_of(*returns), state)
        assert outcome is not None
        state = json.loads(json.dumps(outcome.state))
        stops.append(outcome.stop)
    # Means: 1.0 is the first; 1.4 and 1.75 - the second is 0.75 better; 2.0 is only 0.25 better; 0.0.
    assert stops == [None, None, None, None, "episode_return has not improved for 2 evaluations; its best mean is 1.75"]
    assert state == {"best": 1.75, "since": 2}


def test_early_stopping_takes_nan_for_no_improvement() -> None:
    state = EarlyStopping().initial_state()
    for returns in ((math.nan, 1.0), (-3.0, -1.0), (math.nan, math.nan)):
        outcome = EarlyStopping().on_evaluation(evaluation_of(*returns), state)
        assert outcome is not None
        state = outcome.state
    assert state == {"best": -2.0, "since": 1}
    with pytest.raises(ValueError, match=r"^metric=gain is not allowed: eval records have kind, seed, episode_return$"):
        EarlyStopping(metric="gain").on_evaluation(evaluation_of(1.0), state)


def test_early_stopping_ends_at_a_target() -> None:
    stopping = EarlyStopping(target=3.0)
    assert stopping.on_evaluation(evaluation_of(2.0, 3.9), stopping.initial_state()) == Outcome(
        {"best": 2.95, "since": 0}
    )
    ended = stopping.on_evaluation(evaluation_of(2.0, 4.0), {"best": 2.95, "since": 0})
    assert ended is not None
    assert ended.stop == "episode_return is 3, the target is 3"
    assert stopping.on_evaluation(evaluation_of(), {"best": 2.95, "since": 0}) is None


@declare
class Does(Callback):
    """Does something that it may not do, or may."""

    action: Any

    def on_evaluation(self, evaluation: Evaluation, state: Any) -> Any:
        return self.action(evaluation)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda seen: seen.records[1].update(episode_return=9.0), "to change episode_return of a record: use another"),
        (lambda seen: seen.records[0].pop("seed"), "to change seed of a record: use another name"),
        (lambda seen: seen.records.pop(), "to change the list of records: it may only add metrics to them"),
        (lambda seen: seen.records[0].update(note="text"), "to add note='text' to a record: a number is needed"),
        (lambda seen: seen.records[0].update(many=np.ones(2)), "to add many=array"),
        (lambda seen: seen.records[0].update({"algo.lr": 1.0}), "to add 'algo.lr' to a record: use another name"),
        (lambda seen: 3, "to return 3: return an Outcome or None"),
    ],
)
def test_more_than_metrics_is_refused(action: Callable[[Evaluation], Any], message: str) -> None:
    def act(seen: Evaluation) -> Any:
        result = action(seen)
        return result if result == 3 else None

    with pytest.raises(RunError, match=r"callback tests.test_callbacks.Does is not allowed") as refused:
        seen_by(Does(action=act))
    assert message in str(refused.value)


def test_a_state_is_plain_data() -> None:
    with pytest.raises(RunError, match=r"callback tests.test_callbacks.Does has a state that is not plain data: "):
        seen_by(Does(action=lambda _: Outcome(object())))
    assert seen_by(Does(action=lambda _: Outcome((1, 2)))).states == {"tests.test_callbacks.Does": [1, 2]}


@declare
class Counts(Does):
    """Changes its state in place."""

    def initial_state(self) -> Any:
        return {"seen": 0}

    def on_evaluation(self, evaluation: Evaluation, state: Any) -> Any:
        state["seen"] += 1
        return self.action(Outcome(state))


def test_a_state_that_is_changed_in_place_counts_only_if_it_is_returned() -> None:
    name = "tests.test_callbacks.Counts"
    assert seen_by(Counts(action=lambda outcome: outcome)).states == {name: {"seen": 1}}
    assert seen_by(Counts(action=lambda _: None)).states == {name: {"seen": 0}}
    evaluation = evaluation_of(1.0)
    failing = Does(action=lambda _: 1 / 0)
    options = SimpleNamespace(callbacks=(Counts(action=lambda outcome: outcome), failing))
    made = Callbacks(options)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="ZeroDivisionError"):
        made.see(Loop(None, evaluation.members, (), np.zeros(1), 0.0), evaluation.records)  # type: ignore[arg-type]
    assert made.states[name] == {"seen": 0}


@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float32, jnp.int32])
def test_a_metric_may_have_any_kind_of_number(kind: Any) -> None:
    def act(seen: Evaluation) -> None:
        seen.records[0].update(half=jnp.asarray(2, kind))

    seen_by(Does(action=act))


def test_two_of_one_class_have_their_own_states() -> None:
    one, other = Does(action=lambda _: Outcome("one")), Does(action=lambda _: Outcome("other", stop="it\nends"))
    seen = seen_by(one, other)
    name = "tests.test_callbacks.Does"
    assert seen.states == {name: "one", f"{name}#2": "other"}
    assert seen.stopped == (f"{name}#2", "it ends")
    seen.restore({name: "saved", "others.Gone": 3})
    assert seen.states == {name: "saved", f"{name}#2": "other"}


def seen_by(*callbacks: Callback) -> Callbacks:
    """Shows an evaluation of one seed to some callbacks."""
    evaluation, made = evaluation_of(1.0), Callbacks(SimpleNamespace(callbacks=callbacks))  # type: ignore[arg-type]
    made.see(Loop(None, evaluation.members, (), np.zeros(1), 0.0), evaluation.records)  # type: ignore[arg-type]
    return made
