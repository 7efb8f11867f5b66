"""Checkpoints hold a whole run: one that continues from them gives the numbers of an uninterrupted run."""

import functools
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from jax.sharding import SingleDeviceSharding

from tests.running import TINY, USER_FOLDER, last_checkpoint, main, process, shared_programs, timeless, to_continue
from wqmix_jax import evaluate, load_config, load_metrics, load_policy
from wqmix_jax.algos.base import AgentInputs
from wqmix_jax.errors import SEEDS_FAILED, ConfigError
from wqmix_jax.networks import functional
from wqmix_jax.records.metrics import METRICS_FILE, create_metrics, load_header
from wqmix_jax.records.run_dir import SUMMARY_FILE, held
from wqmix_jax.runs import checkpoint_pieces, checkpoints, playing, session
from wqmix_jax.runs.checkpoint_pieces import Pieces
from wqmix_jax.training.compiled_loop import Trainer
from wqmix_jax.training.host_loop import Loop

CLOCKS = {"seconds", "wall_seconds", "metrics_bytes"}  # the last: a clock's figures differ in length

WORDS = {"run", "options", "machine", "members", "callbacks", "crc32"}

TORN = '{"kind": "eval", "seed": 3, "env_st'


class Killed(BaseException):
    """Ends a run immediately."""


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never cut."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert main(*TINY, f"run_dir={run_dir}") == 0
    return run_dir


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run that ends after some chunks, as if its process had been killed."""

    def killed(after: int, *changes: str) -> Path:
        left = iter(range(after))

        def advance(trainer: Trainer, loop: Loop, *, real: Any = session.advance) -> Any:
            if next(left, None) is None:
                raise Killed
            return real(trainer, loop)

        monkeypatch.setattr(session, "advance", advance)
        with pytest.raises(Killed):
            main(*TINY, *changes, f"run_dir={tmp_path / 'run'}")
        monkeypatch.undo()
        return tmp_path / "run"

    return killed


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert timeless(load_metrics(run_dir)) == timeless(load_metrics(other))
    saved, expected = last_checkpoint(run_dir), last_checkpoint(other)
    assert saved.keys() == expected.keys()
    for name in saved.keys() - CLOCKS - {"run"}:
        np.testing.assert_array_equal(saved[name], expected[name], err_msg=name)


def test_a_killed_run_goes_on_to_the_bit(cut: Callable[..., Path], straight: Path) -> None:
    run_dir = cut(9)
    assert last_checkpoint(run_dir)["num_pending"] > 0, "saved in the middle of an evaluation interval"
    with open(run_dir / METRICS_FILE, "a") as file:
        file.write(TORN)
    assert last_checkpoint(run_dir)["metrics_bytes"] < (run_dir / METRICS_FILE).stat().st_size - len(TORN)
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_swept_failed_and_finished_members_go_on_to_the_bit(cut: Callable[..., Path], tmp_path: Path) -> None:
    """With a learning rate that makes parameters infinite, two environments each, and members that end apart."""
    changes = ("sweep.lr=[0.0005,1e38]", "num_envs=2", "algo.batch_size=4", "total_env_steps=36")
    assert main(*TINY, *changes, f"run_dir={tmp_path / 'whole'}") == SEEDS_FAILED
    run_dir = cut(5, *changes)
    saved = last_checkpoint(run_dir)
    assert saved["failed"] == [False, False, True, True]
    assert main(f"resume={run_dir}") == SEEDS_FAILED
    assert not list(run_dir.glob("unusable_checkpoint_*"))
    assert_same_run(run_dir, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_its_seeds_on_another_number_of_devices(
    cut: Callable[..., Path], straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = cut(9)
    monkeypatch.setattr(session, "train_sharding", lambda *_: SingleDeviceSharding(jax.local_devices()[1]))
    assert main(f"resume={run_dir}") == 0
    message = "warning: device count is 1, and was 2 when the checkpoint was made; the numbers will not be equal"
    assert message in capfd.readouterr().err
    saved, expected = last_checkpoint(run_dir), last_checkpoint(straight)
    for name in saved.keys() - CLOCKS - WORDS:
        np.testing.assert_allclose(saved[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path, straight: Path) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / SUMMARY_FILE).unlink()
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


@pytest.mark.parametrize(("status", "emptied"), [("finished", False), ("interrupted", True), ("running", True)])
def test_a_run_whose_checkpoints_were_deleted_keeps_its_records(
    status: str, emptied: bool, tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints")
    if emptied:
        (run_dir / "checkpoints").mkdir()
    summary = run_dir / SUMMARY_FILE
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": status}))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(f"resume={run_dir}", "total_env_steps=60") == 2
    message = f"error: resume={run_dir} is not allowed: its checkpoints are gone; a new run_dir=FOLDER starts "
    assert capfd.readouterr().err.startswith(message)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_while_it_wrote_its_first_checkpoint_starts_over(tmp_path: Path, straight: Path) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir(parents=True)
    summary = run_dir / SUMMARY_FILE
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_a_run_that_another_process_trains_is_left_alone(
    tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with held(run_dir):
        assert main(f"resume={run_dir}", "total_env_steps=60") == 2
        message = f"error: resume={run_dir} is not allowed: another process is training this run\n"
        assert capfd.readouterr().err == message
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert main(f"resume={run_dir}", "total_env_steps=60") == 0


def test_of_two_runs_that_begin_in_one_folder_only_the_first_does(tmp_path: Path) -> None:
    begin = functools.partial(create_metrics, tmp_path, version="0", env="coin", members=[{"seed": 0}])
    begin(algo="iql")
    with pytest.raises(ConfigError, match="is not allowed: another run has just begun there"):
        begin(algo="vdn")
    assert load_header(tmp_path)["algo"] == "iql"


def test_a_longer_total_gives_the_longer_run(tmp_path: Path, straight: Path) -> None:
    run_dir = tmp_path / "run"
    assert main(*TINY, "total_env_steps=22", f"run_dir={run_dir}") == 0
    assert load_metrics(run_dir)[-1]["env_steps"] < 37
    assert main(f"resume={run_dir}", "total_env_steps=37") == 0
    assert_same_run(run_dir, straight)


def test_a_finished_run_stays_as_it_is(tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "moved"))
    assert main(f"resume={run_dir}") == 0
    assert "compiled" not in capfd.readouterr().out
    assert_same_run(run_dir, straight)


def test_the_latest_are_kept(straight: Path, tmp_path: Path) -> None:
    kept = sorted(int(path.name) for path in (straight / "checkpoints").iterdir())
    assert len(kept) == 2
    assert kept[-1] == load_slowest(straight)


def load_slowest(run_dir: Path) -> int:
    return min(load_metrics(run_dir, kind="eval", seed=seed)[-1]["env_steps"] for seed in (3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["total_env_steps=20"],
            "total_env_steps=20 is not allowed with resume: at least 37, what the run was started",
        ),
        (["total_env_steps=many"], "total_env_steps='many' is not allowed: input should be a valid integer"),
        (
            ["num_seeds=3"],
            "num_seeds=3 is not allowed with resume={run}: it has num_seeds=2, and a run keeps its options",
        ),
        (["logger.wandb=perhaps"], "logger.wandb='perhaps' is not allowed: input should be 'disabled', "),
        (["checkpoint.evry=1"], "checkpoint.evry is unknown: did you mean checkpoint.every?"),
    ],
)
def test_a_run_can_only_be_made_longer(
    arguments: list[str], message: str, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert main(f"resume={straight}", *arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {message.replace('{run}', str(straight))}")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def change_host(step: Path, **changes: Any) -> None:
    """Changes the item ``host`` of a checkpoint."""
    path = step / "host" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(step: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Changes a checkpoint's arrays, and their checksum with them."""
    folder = step.absolute() / "arrays"
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as orbax:
        warnings.filterwarnings("ignore", "Sharding info not provided")
        arrays = change(orbax.restore(folder))
        orbax.save(folder, arrays, force=True)
    change_host(step, crc32=checkpoints._checksum({name: Pieces(leaf) for name, leaf in arrays.items()}))


def truncate(step: Path) -> None:
    """Cuts every file of a checkpoint's arrays in half."""
    for path in (step / "arrays").glob("**/d/*"):
        os.truncate(path, path.stat().st_size // 2)


def replace_by_foreign_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()
    (step / "thesis.txt").write_text("precious")


UNUSABLE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "OUT_OF_RANGE: "),
    (lambda step: change_host(step, crc32=0), "its arrays are not those that were saved (crc32)"),
    (lambda step: edit(step / "host" / "metadata", '"schema":', '"schema"'), "Expecting ':' delimiter"),
    (lambda step: change_host(step, run="another1"), "it is of another run (another1, and this is "),
    (replace_by_foreign_folder, 'Item "host" was not found'),
    (
        lambda step: rewrite(step, lambda arrays: arrays | {"state.failed": np.zeros(3, bool)}),
        "it doesn't fit the run: state.failed is bool[3] there, bool[2] here",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), UNUSABLE, ids=["torn", "bits", "host", "run", "foreign", "shape"])
def test_a_spoilt_checkpoint_is_named_and_the_one_before_it_used(
    spoil: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    straight: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    earlier, latest = sorted((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    spoil(latest)
    assert main(f"resume={run_dir}") == 0
    shown = capfd.readouterr()
    assert f"warning: {latest} can't be used: " in shown.err
    assert message in shown.err
    assert f"resumed at {earlier.name} environment steps" in shown.out
    assert (run_dir / f"unusable_checkpoint_{latest.name}").is_dir()
    assert_same_run(run_dir, straight)


def test_pending_records_of_more_than_an_interval_are_read(cut: Callable[..., Path], straight: Path) -> None:
    """Earlier versions wrote them after two failed evaluations; the evaluation that is due is made first."""
    run_dir = cut(7)
    latest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    count, whole = last_checkpoint(run_dir)["num_pending"], 6

    def lengthen(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([leaf[:count], leaf[:count], leaf[:count], leaf[:count]])
            if name.startswith("pending.")
            else leaf
            for name, leaf in arrays.items()
        }

    assert 4 * count > whole
    rewrite(latest, lengthen)
    change_host(latest, num_pending=4 * count)
    assert main(f"resume={run_dir}") == 0
    assert not list(run_dir.glob("unusable_checkpoint_*"))
    saved, expected = last_checkpoint(run_dir), last_checkpoint(straight)
    for name in (name for name in saved if name.startswith("state.")):
        np.testing.assert_array_equal(saved[name], expected[name], err_msg=name)


def chunk_shapes(step: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Shape of each array of a checkpoint, and of the chunks that it is stored in."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": str(step / "arrays") + "/"}}
    store = tensorstore.KvStore.open(spec).result()
    names = [key.decode() for key in store.list().result() if key.endswith(b"/.zarray")]
    found = {name.removesuffix("/.zarray"): json.loads(store[name]) for name in names}
    return {name: (array["shape"], array["chunks"]) for name, array in found.items()}


def test_large_arrays_are_written_and_read_in_pieces(
    cut: Callable[..., Path], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as small:  # `cut` undoes what `monkeypatch` has set
        small.setattr(checkpoint_pieces, "PIECE_BYTES", 16)
        small.setattr(checkpoints, "BATCH_BYTES", 32)
        run_dir = cut(7)
    monkeypatch.setattr(checkpoint_pieces, "PIECE_BYTES", 16)
    stored = chunk_shapes(max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    shape, chunks = stored["state.replay.experience"]
    assert chunks == list(checkpoint_pieces.piece_shape(tuple(shape), np.uint8)) != shape
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_a_checkpoint_whose_arrays_were_written_whole_is_read(
    cut: Callable[..., Path], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all were before arrays were written in pieces."""
    run_dir = cut(7)
    latest = max((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    rewrite(latest, lambda arrays: arrays)
    monkeypatch.setattr(checkpoint_pieces, "PIECE_BYTES", 16)
    shape, chunks = chunk_shapes(latest)["state.replay.experience"]
    assert chunks == shape != list(checkpoint_pieces.piece_shape(tuple(shape), np.uint8))
    assert main(f"resume={run_dir}") == 0
    assert not list(run_dir.glob("unusable_checkpoint_*"))
    assert_same_run(run_dir, straight)


def test_an_accelerators_state_is_copied_and_written_while_training_goes_on(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, waited = [], []

    def save(self: Any, *args: Any, real: Any = ocp.CheckpointManager.save, **kwargs: Any) -> Any:
        begun.append(args)
        return real(self, *args, **kwargs)

    def wait(self: Any, real: Any = checkpoints.Checkpoints.wait) -> None:
        waited.append(len(begun))
        real(self)

    monkeypatch.setattr(checkpoints.Checkpoints, "_has_room_for_copies", lambda _: True)
    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    monkeypatch.setattr(checkpoints.Checkpoints, "wait", wait)
    run_dir = tmp_path / "run"
    assert main(*TINY, f"run_dir={run_dir}") == 0
    assert waited[: len(begun)] == list(range(len(begun))), "only before the next, and at the end"
    assert_same_run(run_dir, straight)


@pytest.mark.parametrize(("platform", "left", "copied"), [("cpu", 10**12, False), ("gpu", 10**12, True),
                                                          ("gpu", None, True), ("gpu", 10**6, False)])  # fmt: skip
def test_a_state_is_copied_where_there_is_room(platform: str, left: int | None, copied: bool) -> None:
    devices = SimpleNamespace(device_set=[SimpleNamespace(platform=platform)])
    run = SimpleNamespace(_sharding=devices, _memory_left=lambda: left, num_bytes=10**6)
    assert checkpoints.Checkpoints._has_room_for_copies(run) == copied  # type: ignore[arg-type]


def test_a_checkpoint_is_not_blamed_for_a_lack_of_memory(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 3.00 GiB")

    monkeypatch.setattr(checkpoints, "assemble", fail)
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    assert main(f"resume={run_dir}") == 1
    assert "can't be read: Unable to allocate 3.00 GiB; to continue: " in capfd.readouterr().err
    assert not list(run_dir.glob("unusable_checkpoint_*"))


def test_arrays_without_elements_need_no_file() -> None:
    state = {"learner": {"weights": np.ones((2, 3)), "nothing": np.zeros((2, 0), np.float32)}}
    named = checkpoints._named(state, {}, {})  # type: ignore[arg-type]
    assert list(named) == ["state.learner.weights"]
    restored = checkpoints._unflat("state", named, state)
    assert restored["learner"]["nothing"].shape == (2, 0)


def test_without_a_usable_checkpoint_everything_stays(
    tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    for step in (run_dir / "checkpoints").iterdir():
        truncate(step)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(f"resume={run_dir}") == 2
    err = capfd.readouterr().err
    assert err.count("can't be used") == 2
    assert err.endswith("; a new run_dir=FOLDER starts over, and the records can still be read\n")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda run_dir: edit(run_dir / "config.yaml", "hidden_dim: 4", "hidden_dim: 5"),
            "was made with algo.hidden_dim=4, but the run's config.yaml has 5",
        ),
        (
            lambda run_dir: edit(
                run_dir / "config.yaml", "huber_iql.HuberIQL", "wqmix_jax.algos.iql.IQL", "  delta: 1.0\n"
            ),
            "was made with algo._target_='huber_iql.HuberIQL', but the run's config.yaml has 'wqmix_jax.algos.iql.IQL'",
        ),
        (
            lambda run_dir: [change_host(step, schema=1) for step in (run_dir / "checkpoints").iterdir()],
            "has schema 1; this version of wqmix_jax reads schema 2",
        ),
    ],
    ids=["option", "algorithm", "schema"],
)
def test_another_run_in_the_same_folder_is_refused(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    spoil(run_dir)
    assert main(f"resume={run_dir}") == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default(
    tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    edit(run_dir / "config.yaml", "compute_dtype: float32\n", "")
    steps = sorted((run_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    truncate(steps.pop())  # so that something is left to do
    for step in steps:
        options = json.loads((step / "host" / "metadata").read_text())["options"]
        change_host(step, options={name: value for name, value in options.items() if name != "compute_dtype"})
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)
    edit(run_dir / "config.yaml", "compute_dtype: float32\n", "compute_dtype: bfloat16\n")
    assert main(f"resume={run_dir}") == 2  # older checkpoints have the default
    assert "was made with compute_dtype='float32', but the run's config.yaml has 'bfloat16'" in capfd.readouterr().err


def edit(path: Path, old: str, new: str, without: str = "") -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new).replace(without, ""))


def test_another_shape_is_named(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The options are the same, the code has changed."""
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    monkeypatch.setattr(session, "kept_options", lambda _: last_checkpoint(straight)["options"])
    edit(run_dir / "config.yaml", "hidden_dim: 4", "hidden_dim: 5")
    assert main(f"resume={run_dir}") == 2
    err = capfd.readouterr().err
    message = (
        "can't be used: it doesn't fit the run: best.params.agent.encoder.bias is float32[2, 4] there, float32[2, 5] "
    )
    assert err.count(message) == 2, "both checkpoints are named"
    assert err.count("\n") == 1


def test_another_jax_is_told(tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    for step in (run_dir / "checkpoints").iterdir():
        change_host(step, machine={"jax": "0.0.1", "device kind": "TPU v9", "device count": 2})
    assert main(f"resume={run_dir}") == 0
    message = "was {} when the checkpoint was made; the numbers will not be equal to the last bit"
    err = capfd.readouterr().err
    assert f"warning: jax is {jax.__version__}, and {message.format('0.0.1')}\n" in err
    assert f"warning: device kind is cpu, and {message.format('TPU v9')}\n" in err
    assert "device count" not in err


def test_lost_lines_are_noticed(tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    metrics = run_dir / METRICS_FILE
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    assert main(f"resume={run_dir}") == 2
    assert "metrics.jsonl is damaged: it is shorter than when the last checkpoint was written" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_chunk(
    number: signal.Signals,
    tmp_path: Path,
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chunks = iter(range(100))

    def advance(trainer: Trainer, loop: Loop, *, real: Any = session.advance) -> Any:
        if next(chunks) == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the handler's thread has heard of it by then
        return real(trainer, loop)

    monkeypatch.setattr(session, "advance", advance)
    run_dir = tmp_path / "run"
    assert main(*TINY, "checkpoint.every=1000", f"run_dir={run_dir}") == 128 + number
    assert next(chunks) == 3, "nothing is trained after the chunk"
    err = capfd.readouterr().err
    assert f"{number.name}: saving at the end of this chunk" in err
    assert err.endswith(f"interrupted; {to_continue(run_dir)}\n")
    assert last_checkpoint(run_dir)["env_steps"] == [6, 6]
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert main(f"resume={run_dir}", "checkpoint.every=15") == 0
    assert_same_run(run_dir, straight)


def test_checkpoints_that_name_the_length_of_their_chunks_are_read(tmp_path: Path, straight: Path, cut: Any) -> None:
    """As they did when a length was compiled in."""
    run_dir = cut(5)
    for step in (run_dir / "checkpoints").iterdir():
        change_host(step, chunk_iterations=1)
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_a_run_that_could_not_save_even_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert main(*TINY, f"run_dir={tmp_path / 'run'}") == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: run_dir={tmp_path / 'run'} is not allowed: a checkpoint may take ")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_next_checkpoint_stops_the_run(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: SimpleNamespace(free=100 if (run_dir / "checkpoints" / "15").exists() else 10**9),
    )
    assert main(*TINY, f"run_dir={run_dir}") == 1
    err = capfd.readouterr().err.splitlines()[-1]
    assert f"no checkpoint could be written to {run_dir / 'checkpoints'}: one may take " in err
    assert err.endswith(f"the last good one is {run_dir / 'checkpoints' / '15'}; {to_continue(run_dir)}")
    monkeypatch.undo()
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_a_save_that_fails_in_its_threads_stops_the_run(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

    run_dir = tmp_path / "run"
    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", fail)
    assert main(*TINY, f"run_dir={run_dir}") == 1
    err = capfd.readouterr().err.splitlines()[-1]
    assert err == (
        f"error: no checkpoint could be written to {run_dir / 'checkpoints'}: No space left on device; there is none "
        f"before it; {to_continue(run_dir)}"
    )
    monkeypatch.undo()
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


@pytest.mark.slow
def test_files_that_may_not_grow_stop_the_run(tmp_path: Path, straight: Path) -> None:
    """A real fault in the middle of a save, which needs no separate filesystem."""
    run_dir = tmp_path / "run"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))"
    done = process(*TINY, f"run_dir={run_dir}", first=limit)
    assert done.returncode == 1
    err = done.stderr.splitlines()[-1]
    assert "File too large" in err
    assert err.endswith(to_continue(run_dir))
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_the_best_policy_of_each_seed_is_kept(straight: Path) -> None:
    with np.load(straight / "policies" / "best.npz") as best:
        for index, seed in enumerate((3, 4)):
            returns = [
                (line["episode_return"], -line["env_steps"])
                for line in load_metrics(straight, kind="eval", seed=seed)
                if line["learner_steps"] > 0
            ]
            assert (best["episode_return"][index], -best["env_steps"][index]) == max(returns)
            assert best["seed"][index] == seed


def test_the_last_policy_is_the_checkpoints(straight: Path) -> None:
    saved, name = last_checkpoint(straight), "params.agent.encoder.kernel"
    with np.load(straight / "policies" / "last.npz") as last:
        np.testing.assert_array_equal(last[name], saved[f"state.learner.{name}"])
        assert not [name for name in last if "mixer" in name or "opt_state" in name]


def test_policies_can_be_played(straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate.main([f"run_dir={straight}", "policy=last", "episodes=3"])
    played, *trained = capfd.readouterr().out.splitlines()
    assert played == f"the last policies of {straight} play 3 greedy episodes each"
    assert [line.split(" ")[:3] for line in trained[:2]] == [["seed", "3:", "trained"], ["seed", "4:", "trained"]]
    assert [line.split(" ")[:3] for line in trained[2:]] == [
        [*whose, what]
        for whose in (["seed", "3:"], ["seed", "4:"], ["2", "seeds:"])
        for what in ("return", "length", "win_rate")
    ]
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={straight / 'policies'}"])
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={straight}", f"render={straight / 'film.gif'}"])
    assert "render=" in capfd.readouterr().err
    assert not list(straight.glob("*.gif"))


@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
def test_a_policy_acts_on_local_observations(straight: Path, batch_shape: tuple[int, ...]) -> None:
    """As the trained agents do on the same parameters, member by member; what was done before is remembered."""
    config = load_config(*TINY, config_dir=USER_FOLDER / "configs")
    with np.load(straight / "policies" / "last.npz") as last:
        kernels = last["params.agent.encoder.kernel"]
    obs = jax.random.bernoulli(jax.random.key(0), shape=(*batch_shape, 2, 2)).astype(jnp.float32)
    avail = jnp.ones((*batch_shape, 2, 2), bool)
    for member in (0, 1):
        policy = load_policy(straight, member=member, which="last")
        np.testing.assert_array_equal(policy.params["agent"]["encoder"]["kernel"], kernels[member])
        carry = policy.initial_carry(batch_shape)
        hidden, last_action = config.algo.initial_carry((*batch_shape, 2)), jnp.full((*batch_shape, 2), -1)
        for _ in range(3):
            inputs = AgentInputs(obs, last_action, avail)
            hidden, agent_qs = config.algo.step(policy.params["agent"], hidden, inputs)
            last_action = agent_qs.argmax(-1)
            joint_action, carry = policy.act(carry, obs, avail)
            np.testing.assert_array_equal(joint_action, last_action)
        np.testing.assert_allclose(carry.recurrent, hidden, rtol=1e-6)
        only_first = avail.at[..., 1].set(False)
        assert not policy.act(carry, obs, only_first)[0].any()
    with pytest.raises(AssertionError):
        policy.act(policy.initial_carry((7,)), obs, avail)


def test_policies_play_as_they_were_trained_to_compute(straight: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    edit(run_dir / "config.yaml", "compute_dtype: float32\n", "compute_dtype: bfloat16\n")
    acted = []
    for folder in (straight, run_dir):
        policy = load_policy(folder)
        spec = policy.env_spec
        inputs = jnp.full((spec.num_agents, spec.obs_dim), 1 / 3), jnp.ones((spec.num_agents, spec.num_actions), bool)
        acted.append(policy.act(policy.initial_carry(), *inputs)[1].recurrent)
    assert (acted[0] != acted[1]).any()
    np.testing.assert_allclose(acted[1], acted[0], atol=0.05)


def test_policies_are_evaluated_as_they_were_trained_to_compute(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    edit(run_dir / "config.yaml", "compute_dtype: float32\n", "compute_dtype: bfloat16\n")
    seen: list[str] = []
    step = playing.greedy_episodes
    multiplied = lambda *args, **kw: seen.append(functional._compute_dtype.get()) or step(*args, **kw)  # noqa: E731
    monkeypatch.setattr(playing, "greedy_episodes", multiplied)
    evaluate.main([f"run_dir={run_dir}", "episodes=2"])
    assert set(seen) == {"bfloat16"}


def test_a_file_of_policies_that_was_cut_is_told(straight: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    path = run_dir / "policies" / "best.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"best\.npz can't be read: it holds no policies, or is damaged"):
        load_policy(run_dir)


def test_a_member_that_is_not_there(straight: Path) -> None:
    with pytest.raises(ConfigError, match=r"^member=2 is not allowed: .* has members 0 to 1$"):
        load_policy(straight, member=2)
