"""The README's example works literally, in a separate folder."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.envs.host.running import called
from tests.running import main
from wqmix_jax import load_config
from wqmix_jax.envs import host

PAGE = (Path(host.__file__).parent / "README.md").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the example's two files into a folder and makes it the current one."""
    [source] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    [values] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert len(source.splitlines()) < 40
    (tmp_path / "corridor.py").write_text(source)
    (tmp_path / "configs" / "env").mkdir(parents=True)
    (tmp_path / "configs" / "env" / "corridor.yaml").write_text(values)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_is_played(folder: Path) -> None:
    env = load_config("+algo=vdn", "env=corridor", config_dir="configs").env
    assert env.spec == (2, 2, 2, 2, 12)
    with env.external.running([0]):
        called(env.external.supervisor, "reset", np.array([1, 2]))
        for _ in range(3):  # all the way to the right; an agent that has arrived waits
            *_, metrics, reward, terminated, _, failed = called(env.external.supervisor, "step", np.ones((2, 2), int))
    assert terminated.all()
    assert not failed.any()
    np.testing.assert_array_equal(reward, [1, 1])
    np.testing.assert_array_equal(metrics, [[1], [1]])


@pytest.mark.slow
def test_the_examples_command_trains(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = ["total_env_steps=40", "eval_interval=20", "eval_episodes=2", "algo.batch_size=2", "run_dir=run"]
    assert main("+algo=vdn", "env=corridor", *small, config_dir=folder / "configs") == 0
    out = capfd.readouterr().out
    assert "worker processes: 1 to train and 1 to evaluate" in out
    assert "one device trains all seeds" in out
