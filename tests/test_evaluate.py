import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from wqmix_jax import evaluate, load_config
from wqmix_jax.envs.predator_prey import CATCH, LEFT, RIGHT, STAY
from wqmix_jax.interop.pymarl import save_checkpoint

HUNT = ("env=predator_prey", "env.world_shape=[1,2]", "env.num_agents=1", "env.num_stags=0", "env.num_hares=1")
SHORT = "env.episode_limit=7"


def checkpoint(folder: Path, preferred: list[int]) -> str:
    """A PyMARL checkpoint whose agent likes some actions, the last most, whatever it sees."""
    loaded = load_config("+algo=iql", *HUNT, "algo.hidden_dim=4", "algo.batch_size=1", "algo.buffer_size=1")
    shapes = jax.eval_shape(lambda: loaded.algo.init(jax.random.key(0), loaded.env.spec))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    liking = jnp.zeros(6).at[jnp.array(preferred)].set(1 + jnp.arange(len(preferred), dtype=jnp.float32))
    nothing["agent"]["head"]["bias"] = liking
    save_checkpoint(folder, nothing)
    return f"pymarl={folder}"


@pytest.mark.parametrize(
    ("preferred", "printed"),
    [
        ([LEFT, RIGHT, STAY, CATCH], ["return 1.00", "length 1.00"]),
        ([CATCH, STAY], ["return 0.00", "length 7.00"]),
    ],
    ids=["catches at once", "stays to the end"],
)
def test_a_pymarl_agent_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preferred: list[int], printed: list[str]
) -> None:
    evaluate.main([checkpoint(tmp_path, preferred), *HUNT, SHORT, "episodes=3"])
    assert capsys.readouterr().out.splitlines() == [f"{each} (standard deviation 0.00)" for each in printed]


def test_episodes_are_drawn_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def evaluated(*args: Any, num_episodes: int) -> dict[str, jax.Array]:
        keys = args[-1]
        assert keys.shape == (1,)
        names = ("episode_return", "episode_return_std", "episode_length", "episode_length_std")
        seen.append(num_episodes)
        return dict.fromkeys(names, jax.random.key_data(keys)[0, -1])

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    monkeypatch.setattr(evaluate, "print", lambda line: seen.append(line), raising=False)
    evaluate.main([checkpoint(tmp_path, [STAY]), *HUNT, "episodes=3", "seed=5"])
    assert seen == [3, "return 5.00 (standard deviation 5.00)", "length 5.00 (standard deviation 5.00)"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pymarl=null"], "run is missing: write run=RUN_DIR, or pymarl=FOLDER"),
        (["episodes=0"], "episodes=0 is not allowed: input should be greater than 0"),
        (["seed=-1"], "seed=-1 is not allowed"),
        (["env.obs_radius=1"], "agent.th: fc1.weight has shape (4, 82), expected is (4, 34)"),
        (["env=nowhere"], "nowhere"),
        (["episods=3"], "episods"),
        (["no option"], "no option"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main([*[checkpoint(tmp_path, [STAY]), *HUNT], *overrides])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    [line] = told.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_command_line_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wqmix_jax.evaluate", f"pymarl={tmp_path}"]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'agent.th'} is not there\n"
