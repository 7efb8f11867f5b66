"""Plausible mistakes on each command line end in one line that says what to do, with exit code 2."""

import importlib
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import ROOT, make
from wqmix_jax import __main__ as commands
from wqmix_jax.config import load_group
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import build

TRAINED = ROOT / "experiments" / "results" / "predator_prey" / "epsilon_1M" / "vdn" / "seeds_0-1"
"""A run without checkpoints; `run` in the commands below is a copy of it."""

TRAIN = [
    # The algorithm and the environment.
    ("", "an algorithm is missing: write +algo=NAME"),
    ("ow_qmix", "'ow_qmix' can't be read: options are written key=value"),
    ("--algo=ow_qmix", "unrecognized arguments: --algo=ow_qmix"),
    ("--algo ow_qmix", "unrecognized arguments: --algo"),
    ("algo=ow_qmix", "write +algo=ow_qmix"),
    ("+algo=OW_QMIX", "algo=OW_QMIX is not allowed: choose one of cen_iql, coma, cw_qmix, "),
    ("+algo=ow-qmix", "algo=ow-qmix is not allowed: choose one of cen_iql, coma, cw_qmix, "),
    ("+algo=happo", "algo=happo is not allowed: choose one of cen_iql, coma, cw_qmix, "),
    ("+algo=qmix,vdn", "several algorithms make several runs with -m"),
    ("+algo=qmix +algo=vdn", "an algorithm is chosen once"),
    ("+algo=qmix +env=smax", "write env=NAME"),
    ("+algo=qmix env=sc2", "env=sc2 is not allowed: choose one of gymnasium, "),
    ("+algo=qmix env=3s5z", "env=3s5z is not allowed: choose one of gymnasium, "),
    ("+algo=qmix env=smax map=3s5z", "map is unknown: did you mean env.map?"),
    (
        "+algo=qmix env=smax env.map_name=3s5z",
        "env.map_name is unknown: did you mean env.map (PyMARL's env_args.map_name)?",
    ),
    ("+algo=qmix env.map=3s5z", "env.map is unknown: it is an option of smac, smaclite, smacv2, smax; known keys are"),
    # Options.
    ("+algo=qmix num_seed=4", "num_seed is unknown: did you mean num_seeds?"),
    ("+algo=qmix seeds=4", "seeds is unknown: "),
    ("+algo=qmix num_seeds=[0,1]", "num_seeds=[0, 1] is not allowed: input should be a valid integer"),
    ("+algo=qmix num_seeds=1.5", "num_seeds=1.5 is not allowed: input should be a valid integer"),
    ("+algo=qmix num_seeds=four", "num_seeds='four' is not allowed: input should be a valid integer"),
    ("+algo=qmix num_seeds 4", "'num_seeds' can't be read: options are written key=value"),
    ("+algo=qmix --num_seeds=4", "unrecognized arguments: --num_seeds=4"),
    ("+algo=qmix num_seeds =4", "'num_seeds' can't be read: options are written key=value"),
    ("+algo=qmix seed=-1", "seed=-1 is not allowed: input should be greater than or equal to 0"),
    ("+algo=qmix seed=0,1,2", "several values make several runs with -m"),
    ("+algo=qmix total_env_steps=1M", "total_env_steps='1M' is not allowed: input should be a valid integer"),
    ("+algo=qmix total_env_steps=1,000", "several values make several runs with -m"),
    ("+algo=qmix total_env_steps=1e10", "total_env_steps=10000000000 is not allowed: input should be less than"),
    ("+algo=qmix lr=0.001", "lr is unknown: did you mean algo.lr?"),
    ("+algo=qmix algo.lr=1e-3x", "algo.lr='1e-3x' is not allowed: input should be a valid number"),
    ("+algo=qmix algo.learning_rate=1e-3", "algo.learning_rate is unknown: "),
    ("+algo=qmix algo.alpha=0.5", "algo.alpha is unknown: it is an option of cen_iql, cw_qmix, hysteretic_iql, "),
    ("+algo=ow_qmix algo.alpha=75%", "algo.alpha='75%' is not allowed: input should be a valid number"),
    ("+algo=ow_qmix alpha=0.5", "alpha is unknown: did you mean algo.alpha?"),
    ("+algo=ow_qmix sweep.alpha=0.1,0.5", "several values make several runs with -m, and a list is written [A,B]"),
    ("+algo=ow_qmix sweep.alpha=0.1", "sweep.alpha=0.1 is not allowed: input should be a valid list"),
    ("+algo=ow_qmix sweep.alfa=[0.1]", "algo.alfa is unknown: did you mean algo.alpha?"),
    ("+algo=ow_qmix logger.wandb=true", "logger.wandb=True is not allowed: input should be 'disabled', 'offline' or"),
    ("+algo=ow_qmix wandb=online", "wandb is unknown: did you mean logger.wandb?"),
    ("+algo=ow_qmix checkpoint=10000", "checkpoint=10000 is not allowed: a group of options is needed"),
    ("+algo=ow_qmix -m hydra/launcher=joblob", "hydra/launcher=joblob is not allowed: choose one of basic"),
    ("+algo=qmix --resolve", "--resolve is not allowed without --cfg"),
    ("-m +algo=qmix,vdn --cfg job", "--cfg is not allowed with --multirun: choose one of them"),
    ("+algo=ow_qmix --config-dir nowhere", "--config-dir nowhere is not allowed: there is no such folder"),
    # Folders.
    ("+algo=ow_qmix run_dir=run", "run_dir=run is not allowed: it isn't empty; resume=run continues a run"),
    ("+algo=ow_qmix run_dir=run/config.yaml", "run_dir=run/config.yaml is not allowed: it is a file"),
    ("+algo=ow_qmix 'run_dir=~/runs'", "run_dir=~/runs is not allowed: the shell didn't replace ~"),
    (r"+algo=ow_qmix 'run_dir=\${x}'", "run_dir='${x}' is not allowed: "),
    ("-m +algo=vdn,qmix run_dir=run", "run_dir=run is not allowed: it isn't empty"),
    ("+algo=ow_qmix hydra.run.dir=x", "hydra.run.dir=x is not allowed: write run_dir=FOLDER"),
    (
        "+algo=ow_qmix hydra.verbose=true",
        "hydra.verbose=true is not allowed without -m: hydra's settings are those of a sweep",
    ),
    ("-m +algo=ow_qmix,vdn hydra.sweep.dir=x", "hydra.sweep.dir=x is not allowed: write run_dir=FOLDER"),
    # Resuming.
    ("resume=", "resume= is not allowed: it names no folder"),
    ("resume=nowhere", "resume=nowhere is not allowed: there is no such folder"),
    ("resume=.", "resume=. is not allowed: it holds the runs run; write resume=run"),
    ("resume=run/checkpoints/30000", "is not allowed: it is inside the folder of a run; write resume=run"),
    (
        "resume=run/checkpoints",
        "resume=run/checkpoints is not allowed: it is inside the folder of a run; write resume=run",
    ),
    ("resume=run/policies/best.npz", "is not allowed: it is inside the folder of a run; write resume=run"),
    ("resume=run/config.yaml", "is not allowed: it is inside the folder of a run; write resume=run"),
    ("--resume run", "unrecognized arguments: --resume"),
    ("resume=run", "resume=run is not allowed: its checkpoints are gone; a new run_dir=FOLDER starts over"),
    (
        "resume=run +algo=qmix",
        "+algo=qmix is not allowed with resume=run: it has algo=vdn, and a run keeps its options",
    ),
    ("resume=run env=smax", "env=smax is not allowed with resume=run: it has env=predator_prey, and a run keeps"),
    (
        "resume=run num_seeds=4",
        "num_seeds=4 is not allowed with resume=run: it has num_seeds=2, and a run keeps its options",
    ),
    (
        "resume=run algo.lr=1",
        "algo.lr=1 is not allowed with resume=run: it has algo.lr=0.0005, and a run keeps its options",
    ),
    ("resume=run +algo=vdn num_seeds=2 algo.lr=5e-4", "resume=run is not allowed: its checkpoints are gone"),
    ("-m resume=run", "runs are resumed one at a time, without -m"),
    # Names of other libraries.
    (
        "--config=qmix --env-config=sc2 with t_max=1",
        "--config=qmix is unknown: PyMARL's --config=NAME is +algo=NAME here",
    ),
    ("--env-config=sc2", "--env-config=sc2 is unknown: PyMARL's --env-config=sc2 is env=smac here"),
    ("+algo=qmix with t_max=1000", "'with' can't be read: options are written key=value"),
    ("+algo=qmix t_max=1000", "t_max is unknown: PyMARL's t_max is total_env_steps here"),
    ("+algo=qmix batch_size_run=8", "batch_size_run is unknown: PyMARL's batch_size_run is num_envs here"),
    ("+algo=qmix env_args.map_name=3m", "env_args is unknown: PyMARL's env_args.map_name is env.map here"),
    (
        "+algo=qmix target_update_interval_or_tau=1",
        "EPyMARL's target_update_interval_or_tau is algo.target_update_interval",
    ),
    ("+algo=qmix NUM_ENVS=8", "NUM_ENVS is unknown: JaxMARL's NUM_ENVS is num_envs here"),
    ("+algo=qmix TOTAL_TIMESTEPS=1e6", "TOTAL_TIMESTEPS is unknown: JaxMARL's TOTAL_TIMESTEPS is total_env_steps here"),
    ("+algo=qmix alg=qmix", "alg is unknown: JaxMARL's alg is +algo=NAME here"),
    (
        "+algo=qmix use_cuda=True",
        "use_cuda is unknown: PyMARL's use_cuda is not an option here: JAX uses the accelerator",
    ),
    ("+algo=qmix algo.w=0.1", "algo.w is unknown: PyMARL's w is algo.alpha here"),
]

EVALUATE = [
    ("", "run_dir is missing: write run_dir=RUN_DIR, or pymarl=FOLDER"),
    ("run", "'run' can't be read: options are written key=value, as in run_dir=outputs/first"),
    ("run_dir=nowhere", "run_dir=nowhere is not allowed: there is no such folder"),
    ("run_dir=1e3", "run_dir=1e3 is not allowed: there is no such folder"),
    ("run_dir=run/policies/best.npz", "is not allowed: it is inside the folder of a run; write run_dir=run"),
    ("run_dir=run episodes=1.5", "episodes=1.5 is not allowed: input should be a valid integer"),
    ("run_dir=run num_episodes=3", "num_episodes is unknown: did you mean episodes?"),
    ("run_dir=run policy=first", "policy='first' is not allowed: input should be 'best' or 'last'"),
    ("run_dir=run member=2", "member=2 is not allowed: choose one of 0 to 1"),
    ("run_dir=run render=film.mp4", "render=film.mp4 is not allowed: pictures are animated GIFs, render=film.gif"),
    ("run_dir=run render=no/film.gif", "render=no/film.gif is not allowed: there is no folder no"),
    ("run_dir=run env.punishment=0", "env.punishment=0 is not allowed with run_dir: a run's own algorithm and"),
    ("run_dir=run pymarl=run", "pymarl is not allowed with run_dir"),
    ("run_dir=run --episodes 3", "unrecognized arguments: --episodes"),
    ("pymarl=nowhere", "pymarl=nowhere is not allowed: there is no such folder"),
]

OTHERS = [
    ("compare", "", "the following arguments are required: RUN"),
    ("compare", "nowhere", "nowhere is not allowed: there is no run in it (run.json)"),
    ("compare", "run/policies", "run/policies is not allowed: it is inside the run run"),
    ("compare", "run", "two runs with evaluations are needed"),
    ("compare", "run --out no/picture.png", "no/picture.png is not allowed: there is no folder no"),
    ("merge", "run", "the following arguments are required: --out"),
    ("merge", "run run --out run", "--out=run is not allowed: it isn't empty"),
    ("merge", "nowhere --out new", "nowhere is not allowed: there is no run in it (run.json)"),
    ("table", "", "the following arguments are required: RUN"),
    ("table", "nowhere", "nowhere is not allowed: there is no run in it (run.json)"),
    ("table", "run --csv no/table.csv", "no/table.csv is not allowed: there is no folder no"),
    ("tabular", "", "the following arguments are required: payoff"),
    ("tabular", "table3", "table3 is not there: name table1, table2"),
    ("tabular", "table1 --alpha 2 --weighting optimistic", "alpha=2.0 is not allowed"),
    ("tabular", "table1 --weighting ow", "invalid choice: 'ow'"),
    ("tabular", "table1 --greedy 0 1.5", "1.5 is not allowed: choose a whole number"),
]

MAKE = [
    ("train algo=qmix", "algo=qmix: make knows no such variable. Write ALGO=qmix."),
    ("train +algo=qmix", "+algo=qmix: make knows no such variable. Write ALGO=qmix."),
    ("train num_seeds=4", 'num_seeds=4: make knows no such variable. Write ARGS="num_seeds=4".'),
    ("train num_seeds=4 seed=1", 'Write ARGS="num_seeds=4 seed=1".'),
    ("test arg=x", 'arg=x: make knows no such variable. Write ARGS="arg=x".'),
    ("setup extras=smax", "extras=smax: make knows no such variable. Write EXTRAS=smax."),
    ("setup 'EXTRAS=smax cuda'", "EXTRAS=smax cuda is not allowed: write commas between extras and no spaces."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a run."""
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(TRAINED, folder / "run")
    return folder


@pytest.fixture
def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[str, str], str]:
    """Runs a command in this process and returns what it writes to stderr."""

    def run(command: str, arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [command, *shlex.split(arguments)])
        before = sorted(folder.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(commands.HOMES.get(command, f"wqmix_jax.{command}")).main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert (err.count("\n"), err[:7]) == (1, "error: ")
        assert sorted(folder.rglob("*")) == before, "nothing is written"
        return err

    return run


@pytest.mark.parametrize(("arguments", "message"), TRAIN, ids=[arguments for arguments, _ in TRAIN])
def test_train(arguments: str, message: str, refused: Callable[[str, str], str]) -> None:
    assert message in refused("train", arguments)


@pytest.mark.parametrize(("arguments", "message"), EVALUATE, ids=[arguments for arguments, _ in EVALUATE])
def test_evaluate(arguments: str, message: str, refused: Callable[[str, str], str]) -> None:
    assert message in refused("evaluate", arguments)


@pytest.mark.parametrize(
    ("command", "arguments", "message"), OTHERS, ids=[f"{name} {text}" for name, text, _ in OTHERS]
)
def test_other_commands(command: str, arguments: str, message: str, refused: Callable[[str, str], str]) -> None:
    assert message in refused(command, arguments)


@pytest.mark.parametrize(("arguments", "message"), MAKE, ids=[arguments for arguments, _ in MAKE])
def test_make(arguments: str, message: str) -> None:
    ended = make("--dry-run", *shlex.split(arguments))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert message in ended.stderr


def test_a_simulator_in_another_folder_is_found_with_config_dir() -> None:
    values = {"_target_": "wqmix_jax.envs.host.bridge.HostEnvironment", "simulator": "nowhere.py:Game", "options": {}}
    with pytest.raises(
        ConfigError, match=r"^env.simulator='nowhere.py:Game' is not allowed: there is no such file; .* --c"
    ):
        build("env", load_group("env", "_host") | values)


def test_the_command_of_all_commands(refused: Callable[[str, str], str]) -> None:
    message = "the commands are train, evaluate, compare, table, merge, search, tabular"
    for arguments, meant in {
        "trian": "did you mean train? ",
        "+algo=qmix": "did you mean wqmix_jax train +algo=qmix? ",
        "--config-dir": "",
    }.items():
        assert refused("__main__", arguments) == f"error: {arguments} is unknown: {meant}{message}\n"
