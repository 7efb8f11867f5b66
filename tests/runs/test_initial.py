"""``init_from``: a run starts from the parameters of another run, and then needs its folder no more."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.running import TINY, USER_FOLDER, killed_after, last_checkpoint, main, shared_programs, timeless
from wqmix_jax import load_config, load_metrics, train_seeds
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.metrics import HEADER_FILE
from wqmix_jax.runs import session
from wqmix_jax.runs.initial import Initial, read_initial
from wqmix_jax.runs.saved_policies import read_arrays
from wqmix_jax.training.learner import LearnerState, init_learner
from wqmix_jax.training.members import make_members

# At most six episodes, too few for a learner step.
UNTRAINED = ("total_env_steps=6", "algo.batch_size=8")

BUILT_IN = [text for text in TINY if not text.startswith(("+algo=", "algo.delta"))]

PARAMS, TARGET, OPTIMIZER = (f"state.learner.{name}." for name in ("params", "target", "opt_state"))


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the seeds 3 and 4."""
    run_dir = tmp_path_factory.mktemp("source")
    assert main(*TINY, f"run_dir={run_dir}") == 0
    return run_dir


def leaves(run_dir: Path, prefix: str) -> dict[str, np.ndarray]:
    return {name: leaf for name, leaf in last_checkpoint(run_dir).items() if name.startswith(prefix)}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], places: Any = slice(None)) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name][places], err_msg=name)


def test_each_seed_takes_the_parameters_of_its_equal(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(*TINY, *UNTRAINED, "algo.lr=0.9", f"init_from={source}", f"run_dir={run_dir}") == 0
    [path] = [path for path in (source / "checkpoints").iterdir() if path.name == latest(source)]
    assert f"first parameters: agent of {path} (each of its seeds)\n" in capfd.readouterr().out
    params = leaves(source, PARAMS)
    assert_equal(leaves(run_dir, PARAMS), params)
    assert_equal({name.replace(TARGET, PARAMS): leaf for name, leaf in leaves(run_dir, TARGET).items()}, params)
    assert all((leaf == 0).all() for leaf in leaves(run_dir, OPTIMIZER).values())
    assert last_checkpoint(run_dir)["state.counters.learner_steps"].tolist() == [0, 0]


def latest(run_dir: Path) -> str:
    return max((path.name for path in (run_dir / "checkpoints").iterdir()), key=int)


def test_the_optimiser_is_kept_if_asked_for(source: Path, tmp_path: Path) -> None:
    arguments = (f"init_from={source}", "init_from_optimizer=true", f"run_dir={tmp_path / 'run'}")
    assert main(*TINY, *UNTRAINED, *arguments) == 0
    assert_equal(leaves(tmp_path / "run", PARAMS), leaves(source, PARAMS))
    assert_equal(leaves(tmp_path / "run", OPTIMIZER), leaves(source, OPTIMIZER))
    assert any((leaf != 0).any() for leaf in leaves(source, OPTIMIZER).values())


def initial_of(*arguments: str) -> Initial:
    """Returns what a run of some options would start from."""
    config = load_config(*arguments, config_dir=USER_FOLDER / "configs")
    members = make_members(config.algo, config.seeds, config.sweep)

    def learner(seed: jax.Array) -> LearnerState:
        return init_learner(config.algo, config.algo.init(jax.random.key(seed), config.env.spec))

    seeds = jax.ShapeDtypeStruct((len(members),), np.uint32)
    return read_initial(config, members, jax.eval_shape(jax.vmap(learner), seeds))


def assert_taken(initial: Initial, expected: dict[str, np.ndarray], places: Any = slice(None)) -> None:
    assert_equal({f"state.learner.{name}": leaf for name, leaf in initial.arrays.items()}, expected, places)


def labelled(source: Path, copy: Path, *members: dict[str, Any]) -> Path:
    """Copies a run of two members and gives them other labels."""
    shutil.copytree(source, copy)
    header = json.loads((copy / HEADER_FILE).read_text())
    (copy / HEADER_FILE).write_text(json.dumps({**header, "members": members}))
    return copy


@pytest.mark.parametrize(
    ("given", "places"),
    [
        (("seed=4", "num_seeds=1"), [1]),
        (("seed=8", "num_seeds=3", "init_from_seed=4"), [1, 1, 1]),
        (("sweep.lr=[0.1,0.2]",), [0, 1, 0, 1]),
    ],
)
def test_seeds_are_chosen(given: tuple[str, ...], places: list[int], source: Path) -> None:
    assert_taken(initial_of(*TINY, *given, f"init_from={source}"), leaves(source, PARAMS), places)


def test_the_only_seed_is_taken_by_all(source: Path, tmp_path: Path) -> None:
    one = Path(shutil.copytree(source, tmp_path / "one"))
    arrays = {name: leaf[:1] + 7 if leaf.ndim == 1 else leaf[:1] for name, leaf in read_arrays(last(one)).items()}
    np.savez(last(one), **arrays)  # type: ignore[arg-type]
    initial = initial_of(*TINY, f"init_from={one}", "init_from_policy=last")
    assert_taken(initial, leaves(source, PARAMS), [0, 0])
    assert initial.lines == [f"first parameters: agent of {last(one)} (seed 10 for 3, seed 10 for 4)"]


def last(run_dir: Path) -> Path:
    return run_dir / "policies" / "last.npz"


def test_a_sweep_starts_from_the_equal_members_of_a_sweep(source: Path, tmp_path: Path) -> None:
    swept = labelled(source, tmp_path / "swept", {"seed": 3, "algo.lr": 0.1}, {"seed": 3, "algo.lr": 0.01})
    arguments = (*TINY, "num_seeds=1", f"init_from={swept}")
    assert_taken(initial_of(*arguments, "sweep.lr=[0.01,0.1]"), leaves(source, PARAMS), [1, 0])
    with pytest.raises(ConfigError) as refused:
        initial_of(*arguments)
    assert str(refused.value) == f"init_from={swept} is not allowed: it has seed 3 several times: 3-lr0.1, 3-lr0.01"


def test_hosts_find_their_seeds_in_the_parts_of_another_run(source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for host in (0, 1):
        labelled(source, parts / f"host_{host}", {"seed": 2 * host + 3}, {"seed": 2 * host + 4})
    initial = initial_of(*TINY, "seed=4", f"init_from={parts}")
    assert_taken(initial, leaves(source, PARAMS), [1, 0])
    assert [line.split(" (")[1] for line in initial.lines] == ["each of its seeds)"] * 2


@pytest.mark.parametrize("which", ["best", "last"])
def test_policies_are_taken_instead_of_the_checkpoint(which: str, source: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "copy"))
    shutil.rmtree(copied / "checkpoints")
    arrays = read_arrays(source / "policies" / f"{which}.npz")
    policy = {f"state.learner.{name}": leaf for name, leaf in arrays.items() if name.startswith("params.")}
    assert_taken(initial_of(*TINY, f"init_from={copied}", f"init_from_policy={which}"), policy)


@pytest.mark.slow
def test_other_algorithms_share_nets(source: Path, tmp_path: Path) -> None:
    run_dir, arguments = tmp_path / "run", (*BUILT_IN, *UNTRAINED)
    assert main("+algo=ow_qmix", *arguments, f"init_from={source}", f"run_dir={run_dir}") == 0
    found = leaves(run_dir, PARAMS)
    assert_equal(
        {name: leaf for name, leaf in found.items() if name.startswith(f"{PARAMS}agent.")}, leaves(source, PARAMS)
    )
    nets = {name.removeprefix(PARAMS).split(".")[0] for name in found}
    assert nets > {"agent", "mixer"}
    assert all((leaf[0] != leaf[1]).any() for name, leaf in found.items() if name.endswith("kernel")), "drawn per seed"

    for given, taken in (("init_from_nets=[mixer]", {"mixer"}), ("init_from_nets=null", {"agent", "mixer"})):
        initial = initial_of("+algo=qmix", *arguments, f"init_from={run_dir}", given, "init_from_optimizer=true")
        both = {**found, **leaves(run_dir, OPTIMIZER)}
        assert_taken(initial, {name: leaf for name, leaf in both.items() if taken & set(name.split("."))})


def test_adams_counter_is_common_to_all_nets(source: Path) -> None:
    """It would be wrong for nets that are drawn."""
    options = (*BUILT_IN, f"init_from={source}", "init_from_optimizer=true", "algo.optimizer=adam")
    message = "init_from_optimizer=true is not allowed: adam counts the steps of all nets together, and mixer is drawn"
    with pytest.raises(ConfigError) as refused:
        initial_of("+algo=qmix", *options)
    assert str(refused.value) == message


@pytest.mark.slow
def test_moments_are_taken_where_both_runs_have_them(source: Path, tmp_path: Path) -> None:
    run_dir, options = tmp_path / "run", (*TINY, "algo.standardise_returns=true")
    assert main(*options, f"run_dir={run_dir}") == 0
    moments = leaves(run_dir, "state.learner.moments.")
    assert len(moments) == 3
    assert_taken(initial_of(*options, f"init_from={run_dir}"), {**leaves(run_dir, PARAMS), **moments})
    assert_taken(initial_of(*TINY, f"init_from={run_dir}"), leaves(run_dir, PARAMS))
    assert_taken(initial_of(*options, f"init_from={source}"), leaves(source, PARAMS))
    tuned = tmp_path / "tuned"
    assert main(*options, *UNTRAINED, f"init_from={run_dir}", f"run_dir={tuned}") == 0
    assert_equal(leaves(tuned, "state.learner.moments."), moments)


def test_a_run_needs_the_other_folder_no_more(source: Path, tmp_path: Path) -> None:
    arguments = (*TINY, f"init_from={tmp_path / 'copy'}", "init_from_optimizer=true")
    shutil.copytree(source, tmp_path / "copy")
    assert main(*arguments, f"run_dir={tmp_path / 'straight'}") == 0
    for name, chunks in (("early", 0), ("late", 9)):
        with killed_after(chunks):
            main(*arguments, f"run_dir={tmp_path / name}")
        assert (chunks > 0) == any((tmp_path / name / "checkpoints").glob("[0-9]*"))
    shutil.rmtree(tmp_path / "copy")
    drawn = load_metrics(source)
    for name in ("early", "late"):
        assert main(f"resume={tmp_path / name}") == 0
        records = load_metrics(tmp_path / name)
        assert timeless(records) == timeless(load_metrics(tmp_path / "straight"))
        assert timeless(records) != timeless(drawn)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["init_from=nowhere"], "init_from=nowhere is not allowed: there is no such folder"),
        (["init_from=."], f"init_from=. is not allowed: there is no run in it ({HEADER_FILE})"),
        (["init_from_nets=[agent]"], "init_from_nets=['agent'] is not allowed without init_from=RUN_DIR"),
        (["init_from_seed=0"], "init_from_seed=0 is not allowed without init_from=RUN_DIR"),
        (["init_from_optimizer=true"], "init_from_optimizer=True is not allowed without init_from=RUN_DIR"),
        (
            ["init_from={source}", "init_from_policy=best", "init_from_optimizer=true"],
            "init_from_optimizer=True is not allowed: not with init_from_policy=best, a file without an optimiser",
        ),
        (["init_from={source}", "init_from_policy=worst"], "init_from_policy='worst' is not allowed: input should be "),
        (
            ["init_from={source}", "init_from_nets=[mixer]"],
            "init_from_nets=['mixer'] is not allowed: that run has agent, and this one agent",
        ),
        (
            ["init_from={source}", "algo.hidden_dim=5"],
            "init_from={source} is not allowed: params.agent.encoder.bias is float32[4] there and float32[5] here; "
            "init_from_nets=[NET,..] chooses the nets",
        ),
        (
            ["init_from={source}", "num_seeds=3"],
            "init_from={source} is not allowed: seed 5 is not among its seeds 3, 4; init_from_seed=SEED takes one",
        ),
        (["init_from={source}", "init_from_seed=5"], "init_from_seed=5 is not allowed: seed 5 is not among its seeds"),
        (
            ["init_from={source}", "algo.share_parameters=[[0],[1]]"],
            "init_from={source} is not allowed: it has algo.share_parameters=all, and this run ((0,), (1,))",
        ),
        (
            ["init_from={source}", "algo.agent_id=false"],
            "init_from={source} is not allowed: it has algo.agent_id=True, and this run False",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(
    given: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "compile_within_memory", None)
    arguments = [text.replace("{source}", str(source)) for text in given]
    assert main(*TINY, *arguments, f"run_dir={tmp_path / 'run'}") == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.replace('{source}', str(source))}")
    assert not (tmp_path / "run").exists()


def test_a_source_without_usable_parameters_is_refused(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "copy"))
    refused = (*TINY, f"init_from={copied}", f"run_dir={tmp_path / 'run'}")
    for path in (copied / "checkpoints" / latest(copied) / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:20])
    before = sorted(copied.rglob("*"))
    assert main(*refused) == 2
    refusal = f"error: init_from={copied} is not allowed: "
    assert f"{refusal}{copied / 'checkpoints' / latest(copied)} can't be read: " in capfd.readouterr().err
    assert sorted(copied.rglob("*")) == before, "a folder that is only read stays as it is"
    shutil.rmtree(copied / "checkpoints")
    assert main(*refused) == 2
    remedy = "init_from_policy=best takes the nets that act from its policies"
    assert capfd.readouterr().err == f"{refusal}{copied / 'checkpoints'} has no checkpoint; {remedy}\n"

    diverged = tmp_path / "diverged"
    assert main(*TINY, "algo.lr=1e38", f"run_dir={diverged}") == 3
    assert json.loads((diverged / "summary.json").read_text())["failed"]
    assert main(*TINY, f"init_from={diverged}", f"run_dir={tmp_path / 'run'}") == 2
    message = f"error: init_from={diverged} is not allowed: parameters of its seed 3 are not finite\n"
    assert capfd.readouterr().err.endswith(message)


def test_a_run_keeps_where_it_came_from(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(*TINY, *UNTRAINED, f"init_from={source}", f"run_dir={run_dir}") == 0
    assert main(f"resume={run_dir}", "init_from=elsewhere") == 2
    assert f"it has init_from={source}, and a run keeps its options" in capfd.readouterr().err
    assert main(f"resume={run_dir}", f"init_from={source}", "total_env_steps=8") == 0


def test_train_seeds_starts_from_another_run(source: Path) -> None:
    made = load_config(*TINY, *UNTRAINED, f"init_from={source}", config_dir=USER_FOLDER / "configs")
    state, _ = train_seeds(made, [4, 3])
    flat = jax.tree_util.tree_leaves_with_path(state.learner.params)
    found = {PARAMS + jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    assert_equal(found, leaves(source, PARAMS), [1, 0])
