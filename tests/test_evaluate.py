import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.running import ROOT
from wqmix_jax import evaluate, load_config
from wqmix_jax.envs.base import Environment
from wqmix_jax.envs.predator_prey import CATCH, LEFT, RIGHT, STAY, PredatorPrey
from wqmix_jax.evaluator import Figures
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
        ([LEFT, RIGHT, STAY, CATCH], [("return", "1.00"), ("length", "1.00"), ("captures", "1.00")]),
        ([CATCH, STAY], [("return", "0.00"), ("length", "7.00"), ("captures", "0.00")]),
    ],
    ids=["catches at once", "stays to the end"],
)
def test_a_pymarl_agent_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preferred: list[int], printed: list[tuple[str, str]]
) -> None:
    evaluate.main([checkpoint(tmp_path, preferred), *HUNT, SHORT, "episodes=3"])
    told = [f"{what} {mean} (95% interval {mean} to {mean}, standard deviation 0.00)" for what, mean in printed]
    assert capsys.readouterr().out.splitlines() == told


def test_episodes_are_drawn_from_the_seed_and_failed_ones_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def played(*args: Any, num_episodes: int) -> Figures:
        keys = args[-1]
        assert (keys.shape, num_episodes) == ((1,), 3)
        seed = jax.random.key_data(keys)[0, -1].astype(jnp.float32)
        returns = jnp.array([[1.0, 3.0, 100.0]]) + seed
        return Figures(returns, returns, {"win_rate": jnp.array([[1.0, 0.0, 1.0]])}, jnp.array([[True, True, False]]))

    monkeypatch.setattr(evaluate, "greedy_episodes", played)
    evaluate.main([checkpoint(tmp_path, [STAY]), *HUNT, "episodes=3", "seed=5"])
    # The mean 7 of 6 and 8: 12.7062 is the 97.5% point of Student's t with one degree of freedom, the standard error 1.
    interval = "(95% interval -5.71 to 19.71, standard deviation 1.00)"
    assert capsys.readouterr().out.splitlines() == [
        f"return 7.00 {interval}",
        f"length 7.00 {interval}",
        "win_rate 0.50 (95% interval 0.09 to 0.91, standard deviation 0.50)",  # Wilson's of one success in two
    ]


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(1000, 30))
    covered = [told.low <= 1 <= told.high for told in map(evaluate.estimate, draws)]
    assert 0.9 < np.mean(covered) < 0.96  # a little less than 0.95: the draws are skewed
    wins = np.random.default_rng(1).binomial(1, 0.9, size=(1000, 30))
    covered = [told.low <= 0.9 <= told.high for told in (evaluate.estimate(each, is_share=True) for each in wins)]
    assert 0.92 < np.mean(covered) < 0.98


def test_one_value_has_no_interval_and_a_share_never_leaves_its_range() -> None:
    assert np.isnan(evaluate.estimate(np.array([3.0])).low)
    assert evaluate.estimate(np.array([0.9, 1.0]), is_share=True)[1:3] == (pytest.approx(0.3147, abs=1e-4), 1.0)


def test_an_episode_is_drawn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the hare is caught, and after, which stays for a while."""
    picture = tmp_path / "hunt.gif"
    arguments = [checkpoint(tmp_path, [LEFT, RIGHT, STAY, CATCH]), *HUNT, SHORT, "episodes=1", f"render={picture}"]
    evaluate.main(arguments)
    assert capsys.readouterr().out.splitlines()[-1] == f"drawn: {picture} (return 1.00, 1 steps)"
    with Image.open(picture) as drawn:
        frames, durations = [], []
        for frame in range(drawn.n_frames):
            drawn.seek(frame)
            frames.append(np.array(drawn.convert("RGB")))
            durations.append(drawn.info["duration"])
    assert sum(durations[1:]) > 4 * durations[0]
    hare, star = (0x00, 0x9E, 0x73), (0xF0, 0xE4, 0x42)
    assert [near(each, hare) > near(each, star) for each in frames] == [True] + [False] * (len(frames) - 1)
    written = picture.read_bytes()
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert "render=" in (told := capsys.readouterr().err)
    assert "is not allowed: the file is there already; overwrite=true replaces it" in told
    assert picture.read_bytes() == written
    evaluate.main([*arguments, "overwrite=true", "seed=1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.th", "hunt.gif"]


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Pixels of about a colour: a GIF has few."""
    return int((np.abs(picture.astype(int) - np.array(colour)[None, None]).max(-1) < 24).sum())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pymarl=null"], "run_dir is missing: write run_dir=RUN_DIR, or pymarl=FOLDER"),
        (["pymarl=null", "run_dir=here"], "env=predator_prey is not allowed with run_dir: a run's own"),
        (["pymarl=null", "++run_dir=here"], "env=predator_prey is not allowed with run_dir: a run's own"),
        (["pymarl=nowhere"], "pymarl=nowhere is not allowed: there is no such folder"),
        (["render=[film.gif"], "'render=[film.gif' can't be read: options are written key=value"),
        (["algo=qmix"], "algo=qmix is not allowed: the agents of a run or of a PyMARL checkpoint play"),
        (["+algo=qmix"], "+algo=qmix is not allowed: the agents of a run or of a PyMARL checkpoint play"),
        (["member=1"], "member=1 is not allowed: choose one of 0 to 0"),
        (["episodes=0"], "episodes=0 is not allowed: input should be greater than 0"),
        (["seed=-1"], "seed=-1 is not allowed"),
        (["env.obs_radius=1"], "agent.th: fc1.weight has shape (4, 82), expected is (4, 34)"),
        (["env=nowhere"], "env=nowhere is not allowed: choose one of jumanji, matrix_game, predator_prey, "),
        (["episods=3"], "episods is unknown: did you mean episodes? known keys are run_dir, "),
        (["run=here"], "run is unknown: did you mean run_dir?"),
        (["no option"], "'no option' can't be read: options are written key=value, as in run_dir=outputs/first"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not allowed: there is no such folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["policy=first"], "policy='first' is not allowed: input should be 'best' or 'last'"),
        (["render=film.mp4"], "render=film.mp4 is not allowed: pictures are animated GIFs, render=film.gif"),
        (["render=nowhere/film.gif"], "render=nowhere/film.gif is not allowed: there is no folder nowhere"),
        (["render=film.gif", "member=1"], "member=1 is not allowed: choose one of 0 to 0"),
        (["render=film.gif", "overwrite=maybe"], "overwrite='maybe' is not allowed: input should be a valid boolean"),
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


@pytest.mark.parametrize(
    ("holds", "told"),
    [
        (None, "there is no such folder"),
        ({}, "there is no config.yaml in it"),
    ],
)
def test_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], holds: dict[str, str] | None, told: str
) -> None:
    folder = tmp_path / "run"
    if holds is not None:
        folder.mkdir()
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={folder}"])
    assert capsys.readouterr().err == f"error: run_dir={folder} is not allowed: {told}\n"


def test_a_run_without_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ROOT / "experiments" / "figures_1M" / "predator_prey" / "predator_prey" / "qmix" / "seeds_0-1"
    shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns("policies"))
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={tmp_path / 'run'}"])
    told = capsys.readouterr().err
    assert told.endswith(
        "is not there: a run writes its policies with its checkpoints; of a merged run the parts have them\n"
    )
    assert told.count("\n") == 1


def test_what_has_no_viewer_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PredatorPrey, "viewer", Environment.viewer)
    monkeypatch.setattr(jax, "jit", None)
    with pytest.raises(SystemExit) as ended:
        evaluate.main([checkpoint(tmp_path, [STAY]), *HUNT, f"render={tmp_path / 'film.gif'}"])
    assert ended.value.code == 2
    assert "nothing draws PredatorPrey; predator_prey and smax can be drawn" in capsys.readouterr().err


def test_help_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "python -m wqmix_jax.evaluate run_dir=RUN_DIR" in out
    for name in evaluate.EvaluateOptions.__dataclass_fields__:  # type: ignore[attr-defined]
        assert f"  {name}: " in out


def test_the_command_line_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wqmix_jax.evaluate", f"pymarl={tmp_path}"]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'agent.th'} is not there\n"
