import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pydantic import Field

from tests.recorded import evaluated, record_run
from tests.running import ROOT
from wqmix_jax import evaluate, load_config, load_policy, trained_policy
from wqmix_jax.algos.base import TRACED
from wqmix_jax.algos.iql import IQL
from wqmix_jax.api import load_policies
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.config import run_config
from wqmix_jax.envs.predator_prey.task import CATCH, LEFT, RIGHT, STAY, PredatorPrey
from wqmix_jax.errors import ConfigError
from wqmix_jax.interop.pymarl import save_checkpoint
from wqmix_jax.options import build, options
from wqmix_jax.runs import playing
from wqmix_jax.runs.saved_policies import Policy, save_policy
from wqmix_jax.training.members import Member, make_members
from wqmix_jax.training.rollout import Figures

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
    ids=["catches immediately", "stays to the end"],
)
def test_a_pymarl_agent_plays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preferred: list[int], printed: list[tuple[str, str]]
) -> None:
    evaluate.main([checkpoint(tmp_path, preferred), *HUNT, SHORT, "episodes=3"])
    message = [f"{what} {mean} (95% interval {mean} to {mean}, standard deviation 0.00)" for what, mean in printed]
    assert capsys.readouterr().out.splitlines() == [f"the agents of {tmp_path} play 3 greedy episodes", *message]


def test_episodes_are_drawn_from_the_seed_and_failed_ones_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def played(*args: Any, num_episodes: int) -> Figures:
        keys = args[-1]
        assert (keys.shape, num_episodes) == ((1,), 3)
        seed = jax.random.key_data(keys)[0, -1].astype(jnp.float32)
        returns = jnp.array([[1.0, 3.0, 100.0]]) + seed
        return Figures(returns, returns, {"win_rate": jnp.array([[1.0, 0.0, 1.0]])}, jnp.array([[True, True, False]]))

    monkeypatch.setattr(playing, "greedy_episodes", played)
    evaluate.main([checkpoint(tmp_path, [STAY]), *HUNT, "episodes=3", "seed=5"])
    # The mean 7 of 6 and 8: 12.7062 is the 97.5% point of Student's t with one degree of freedom, the standard error 1.
    assert capsys.readouterr().out.splitlines()[1:] == [
        "return 7.00 (95% interval -5.71 to 19.71, standard deviation 1.00)",
        "length 7.00 (95% interval 1.00 to 19.71, standard deviation 1.00)",  # no episode has fewer steps than 1
        "win_rate 0.50 (95% interval 0.09 to 0.91, standard deviation 0.50)",  # Wilson's of one success in two
    ]


LIKED = {0: [LEFT, RIGHT, STAY, CATCH], 1: [CATCH, STAY], 2: [CATCH, STAY], 3: [LEFT, RIGHT, STAY, CATCH]}
"""The seeds of `recorded`: the first and the last catch immediately, the others stay to the end."""


@options
class Chooser(IQL):
    """Always plays the same action.

    Attributes:
        choice: the action.
    """

    choice: Annotated[int, Field(ge=0), TRACED]

    def act(self, params: Any, carry: Any, inputs: Any, hp: Any, ctx: Any, key: Any) -> tuple[Any, Any]:
        """The option's action, whatever the agents see."""
        return jnp.broadcast_to(hp.choice, inputs.last_action.shape).astype(jnp.int32), carry


def values_of_run(**algo: Any) -> dict[str, Any]:
    small = ("algo.hidden_dim=4", "algo.batch_size=1", "algo.buffer_size=1")
    values = load_values("+algo=iql", *HUNT, SHORT, *small)
    return {**values, "algo": {**values["algo"], **algo}}


def recorded(
    folder: Path, env_steps: list[int], not_finite: Sequence[int] = (), which: str = "best", **record: Any
) -> str:
    """A run of seeds that like the actions of `LIKED`, whose policies have been trained for ``env_steps``."""
    values, num_seeds = values_of_run(), len(env_steps)
    lines = [line for seed in range(num_seeds) for line in evaluated(seed, {0: 0.0})]
    record_run(folder, values, lines, env="predator_prey", **record)
    algo, spec = build("algo", values["algo"]), build("env", values["env"]).spec
    shapes = jax.eval_shape(lambda: algo.acting_params(algo.init(jax.random.key(0), spec)))
    params = jax.tree.map(lambda leaf: np.zeros((num_seeds, *leaf.shape), leaf.dtype), shapes)
    for seed, liked in LIKED.items():
        if seed < num_seeds:
            params["agent"]["head"]["bias"][seed, liked] = 1 + np.arange(len(liked))
    params["agent"]["head"]["bias"][list(not_finite), 0] = np.nan
    policy = Policy(params, np.array(env_steps, np.int32), np.zeros(num_seeds, np.float32))
    save_policy(folder / "policies" / f"{which}.npz", policy, [Member(seed) for seed in range(num_seeds)])
    return f"run_dir={folder}"


def test_it_says_what_it_plays_and_leaves_failed_seeds_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([recorded(tmp_path / "run", [0, 5000, 80, 20], failed=[2], not_finite=[]), "episodes=3"])
    out = capsys.readouterr().out.splitlines()
    assert out[:5] == [
        f"the best policies of {tmp_path / 'run'} play 3 greedy episodes each",
        "seed 0: untrained",
        "seed 1: trained for 5,000 environment steps",
        "seed 2: trained for 80 environment steps, failed at 70 environment steps, left out of the means over seeds",
        "seed 3: trained for 20 environment steps",
    ]
    assert "seed 2: return 0.00 (95% interval 0.00 to 0.00, standard deviation 0.00)" in out
    assert [line.split(" (")[0] for line in out[-3:]] == [
        "3 seeds: return 0.67",
        "3 seeds: length 3.00",
        "3 seeds: captures 0.67",
    ]
    low, high = map(float, out[-2].split("interval ")[1].split(",")[0].split(" to "))
    assert (low, high) == (1, 7)  # episodes have one to seven steps: between the ends of Student's interval


def test_another_version_of_the_game_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([recorded(tmp_path / "run", [5], simulator={"hunt": "2"}), "episodes=1"])
    message = (
        f"warning: {tmp_path / 'run'} has hunt=2, and this installation has hunt=unknown: this may be another game"
    )
    assert capsys.readouterr().out.splitlines()[0] == f"{message} than the one of the training"


def test_parameters_that_are_not_finite_are_never_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path / "run", [70, 80], failed=[0], not_finite=[0], which="last")
    evaluate.main([run, "episodes=1", "policy=last"])
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        f"the last policies of {tmp_path / 'run'} play 1 greedy episode each",
        "seed 0: failed at 70 environment steps, its parameters are not finite, left out",
        "seed 1: trained for 80 environment steps",
    ]
    assert [line.split(" (")[0] for line in out[3:]] == [
        "seed 1: return 0.00",
        "seed 1: length 7.00",
        "seed 1: captures 0.00",
    ]
    with pytest.raises(SystemExit) as ended:
        evaluate.main([run, "policy=last", f"render={tmp_path / 'film.gif'}"])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: member=0 is not allowed: the parameters of seed 0 are not finite\n"


def test_a_run_without_any_finite_parameters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path / "run", [70, 80], failed=[0, 1], not_finite=[0, 1], which="last")
    with pytest.raises(SystemExit) as ended:
        evaluate.main([run, "policy=last"])
    assert ended.value.code == 2
    path = tmp_path / "run" / "policies" / "last.npz"
    message = f"error: {path} can't be played: no seed has finite parameters; try policy=best\n"
    assert capsys.readouterr() == ("", message)


def test_python_refuses_or_names_parameters_that_are_not_finite(tmp_path: Path) -> None:
    recorded(tmp_path / "run", [70, 80], not_finite=[0])
    with pytest.raises(ConfigError, match=r"^member=0 is not allowed: the parameters of seed 0 are not finite$"):
        load_policy(tmp_path / "run", member=0)
    assert load_policy(tmp_path / "run", member=1).env_steps == 80
    with pytest.warns(UserWarning, match="seed 0 is left out: its parameters are not finite$"):
        _, policies = load_policies(tmp_path / "run")
    assert list(policies) == ["1"]


def test_a_member_acts_with_its_own_swept_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = values_of_run(_target_=f"{__name__}.Chooser", choice=STAY)
    folder, choices = tmp_path / "run", (STAY, CATCH)
    lines = [line for choice in choices for line in evaluated(0, {0: 0.0}, **{"algo.choice": choice})]
    record_run(folder, {**values, "sweep": {"choice": list(choices)}}, lines, env="predator_prey")
    env, algo = build("env", values["env"]), build("algo", values["algo"])
    params = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), algo.init(jax.random.key(0), env.spec))
    members = make_members(algo, [0], {"choice": list(choices)})
    save_policy(
        folder / "policies" / "best.npz", Policy(params, np.ones(2, np.int32), np.zeros(2, np.float32)), members
    )
    evaluate.main([f"run_dir={folder}", "episodes=1"])
    out = capsys.readouterr().out
    assert f"seed 0-choice{STAY}: return 0.00" in out
    assert f"seed 0-choice{CATCH}: return 1.00" in out

    spec = env.spec
    seen = jnp.zeros((spec.num_agents, spec.obs_dim)), jnp.ones((spec.num_agents, spec.num_actions), bool)
    config = dataclasses.replace(run_config(values), sweep={"choice": list(choices)})
    state: Any = SimpleNamespace(
        failed=np.zeros(2, bool),
        learner=SimpleNamespace(params=params),
        hp=SimpleNamespace(choice=np.array(choices, np.int32)),
        counters=SimpleNamespace(env_steps=np.array([7, 9], np.int32)),
    )
    for member, choice in enumerate(choices):
        for policy in (load_policy(folder, member=member), trained_policy(config, state, member=member)):
            assert policy.act(policy.initial_carry(), *seen)[0].tolist() == [choice]
    with pytest.raises(ConfigError, match=r"^member=2 is not allowed: choose one of 0 to 1$"):
        trained_policy(config, state, member=2)
    state.learner.params["agent"]["head"]["bias"][1] = np.nan
    with pytest.raises(ConfigError, match=r"^member=1 is not allowed: its parameters are not finite$"):
        trained_policy(config, state, member=1)


@pytest.mark.slow
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
    assert "render=" in (message := capsys.readouterr().err)
    assert "is not allowed: the file is there already; overwrite=true replaces it" in message
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
        (["episodes=[3"], "'episodes=[3' can't be read: options are written key=value"),
        (["algo=qmix"], "algo=qmix is not allowed: the agents of a run or of a PyMARL checkpoint play"),
        (["+algo=qmix"], "+algo=qmix is not allowed: the agents of a run or of a PyMARL checkpoint play"),
        (["member=1"], "member=1 is not allowed: choose one of 0 to 0"),
        (["episodes=0"], "episodes=0 is not allowed: input should be greater than 0"),
        (["seed=-1"], "seed=-1 is not allowed"),
        (["env.obs_radius=1"], "agent.th: fc1.weight has shape (4, 82), expected is (4, 34)"),
        (["env=nowhere"], "env=nowhere is not allowed: choose one of gymnasium, jaxmarl, jumanji, "),
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
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (None, "there is no such folder"),
        ({}, "there is no config.yaml in it"),
    ],
)
def test_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], holds: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "run"
    if holds is not None:
        folder.mkdir()
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={folder}"])
    assert capsys.readouterr().err == f"error: run_dir={folder} is not allowed: {message}\n"


def test_a_run_without_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ROOT / "experiments" / "results" / "predator_prey" / "epsilon_1M" / "qmix" / "seeds_0-1"
    shutil.copytree(kept, tmp_path / "run", ignore=shutil.ignore_patterns("policies"))
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={tmp_path / 'run'}"])
    message = capsys.readouterr().err
    assert message.endswith(
        "is not there: a run writes its policies with its checkpoints, "
        "and the policies of a merged run are in its parts\n"
    )
    assert message.count("\n") == 1


def test_what_has_no_viewer_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PredatorPrey, "viewer_class", None)
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
