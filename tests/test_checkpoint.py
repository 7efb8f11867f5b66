"""Checkpoints hold a whole run: what goes on from one gives the numbers of a run that was never cut."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from tests.running import TINY, last_checkpoint, main, timeless
from wqmix_jax import load_metrics, runner
from wqmix_jax.logger import METRICS_FILE
from wqmix_jax.loop import Loop
from wqmix_jax.trainer import Trainer

CLOCKS = {"seconds", "wall_seconds", "metrics_bytes"}  # the last: a clock's figures differ in length

TORN = '{"kind": "eval", "seed": 3, "env_st'


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

        def advance(trainer: Trainer, loop: Loop, *, real: Any = runner.advance) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(trainer, loop)

        monkeypatch.setattr(runner, "advance", advance)
        assert main(*TINY, *changes, f"run_dir={tmp_path / 'run'}") == 130
        monkeypatch.undo()
        return tmp_path / "run"

    return killed


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert timeless(load_metrics(run_dir)) == timeless(load_metrics(other))
    saved, expected = last_checkpoint(run_dir), last_checkpoint(other)
    assert saved.keys() == expected.keys()
    for name in saved.keys() - CLOCKS:
        np.testing.assert_array_equal(saved[name], expected[name], err_msg=name)


def test_a_killed_run_goes_on_to_the_bit(cut: Callable[..., Path], straight: Path) -> None:
    run_dir = cut(7)
    assert last_checkpoint(run_dir)["num_pending"] > 0, "saved in the middle of an evaluation interval"
    with open(run_dir / METRICS_FILE, "a") as file:
        file.write(TORN)
    assert last_checkpoint(run_dir)["metrics_bytes"] < (run_dir / METRICS_FILE).stat().st_size - len(TORN)
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


def test_a_run_goes_on_with_its_seeds_on_another_number_of_devices(
    cut: Callable[..., Path], straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = cut(7)
    monkeypatch.setattr(runner, "train_sharding", lambda *_: SingleDeviceSharding(jax.local_devices()[1]))
    assert main(f"resume={run_dir}") == 0
    saved, expected = last_checkpoint(run_dir), last_checkpoint(straight)
    for name in saved.keys() - CLOCKS:
        np.testing.assert_allclose(saved[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_run_without_a_checkpoint_starts_over(tmp_path: Path, straight: Path) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints")
    assert main(f"resume={run_dir}") == 0
    assert_same_run(run_dir, straight)


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
    ("arguments", "told"),
    [
        (
            ["total_env_steps=20"],
            "total_env_steps=20 is not allowed with resume: at least 37, what the run was started",
        ),
        (["total_env_steps=many"], "total_env_steps='many' is not allowed: input should be a valid integer"),
        (["num_seeds=3"], "num_seeds=3 is not allowed with resume: a run keeps its options, except total_env_steps,"),
        (["logger.wandb=perhaps"], "logger.wandb='perhaps' is not allowed: input should be 'disabled', "),
        (["checkpoint.evry=1"], "checkpoint.evry is unknown: did you mean checkpoint.every?"),
    ],
)
def test_a_run_can_only_be_made_longer(
    arguments: list[str], told: str, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    assert main(f"resume={straight}", *arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_another_shape_is_named(tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("hidden_dim: 4", "hidden_dim: 5"))
    assert main(f"resume={run_dir}") == 2
    err = capfd.readouterr().err
    assert "doesn't fit the run: state.learner.opt_state.nu.agent" in err
    assert err.count("\n") == 1


def test_lost_lines_are_noticed(tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    metrics = run_dir / METRICS_FILE
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    assert main(f"resume={run_dir}") == 2
    assert "metrics.jsonl is damaged: it has lost lines" in capfd.readouterr().err
