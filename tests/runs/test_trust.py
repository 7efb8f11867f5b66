"""A run's folder that somebody else has made: what opening it executes."""

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from tests.envs.host.running import WORKERS
from tests.running import ROOT
from wqmix_jax import evaluate, load_config, load_policy, train
from wqmix_jax.api import policies_of_file
from wqmix_jax.cli.syntax import as_text
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import CONFIG_DIR
from wqmix_jax.runs import session
from wqmix_jax.runs.startup import command_to_continue
from wqmix_jax.runs.trust import NOTHING_NAMED, Named, open_config

RECORDED = ROOT / "experiments" / "results" / "predator_prey" / "epsilon_1M" / "vdn" / "seeds_0-1"

HOST = "wqmix_jax.envs.host.bridge.HostEnvironment"

TOUCH = """from pathlib import Path
Path({mark!r}).touch()
from wqmix_jax.algos.qmix import QMIX as Algo
from wqmix_jax.envs.predator_prey import PredatorPrey as Game
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with policies, in a folder of the current one."""
    ignored = shutil.ignore_patterns("summary.json", "*.png", "checkpoints")  # without a summary it could be resumed
    shutil.copytree(RECORDED, tmp_path / "here" / "outputs" / "run", ignore=ignored)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "here" / "outputs" / "run"


def edit(run_dir: Path, **changes: Any) -> None:
    values = yaml.safe_load((RECORDED / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**values, **changes}))


def env(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((RECORDED / "config.yaml").read_text())["env"], **changes}


def module(path: Path, mark: Path) -> None:
    """A module that leaves a mark when it is imported."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(TOUCH.format(mark=str(mark)))


def program(path: Path, mark: Path) -> str:
    """An executable that leaves a mark."""
    path.write_text(f"#!/bin/sh\ntouch {mark}\n")
    path.chmod(0o755)
    return str(path)


def host(**changes: Any) -> dict[str, Any]:
    return {"env": {"_target_": HOST, **WORKERS, "simulator": "mine.py:Mine", "options": {}, **changes}}


def by_evaluate(run_dir: Path) -> None:
    evaluate.main([f"run_dir={run_dir}", "episodes=1"])


def by_resume(run_dir: Path) -> None:
    argv, sys.argv = sys.argv, ["train", f"resume={run_dir}"]
    try:
        train.main()
    finally:
        sys.argv = argv


def by_load_policy(run_dir: Path) -> None:
    try:
        load_policy(run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


MALICIOUS: dict[str, tuple[Callable[[Path, str], dict[str, Any]], str]] = {
    "a program as the environment": (
        lambda run, mark: {"env": {"_target_": "subprocess.Popen", "args": ["touch", mark]}},
        "env._target_='subprocess.Popen' is not allowed: it is not a subclass of wqmix_jax.envs.base.Environment",
    ),
    "a program as the algorithm": (
        lambda run, mark: {"algo": {"_target_": "subprocess.Popen", "args": ["touch", mark]}},
        "algo._target_='subprocess.Popen' is not allowed: it is not a subclass of wqmix_jax.algos.base.Algorithm",
    ),
    "a function": (
        lambda run, mark: {"env": {"_target_": "os.system", "command": f"touch {mark}"}},
        "env._target_='os.system' is not allowed: it is no class",
    ),
    "a function that the package imports": (
        lambda run, mark: {"env": {"_target_": "wqmix_jax.train.os.system", "command": f"touch {mark}"}},
        "wqmix_jax.train.os is not a module of this package",
    ),
    "a class that the package imports": (
        lambda run, mark: {"env": {"_target_": "wqmix_jax.envs.host.pool.subprocess.Popen", "args": ["touch", mark]}},
        "wqmix_jax.envs.host.pool.subprocess is not a module of this package",
    ),
    "attributes of attributes": (
        lambda run, mark: {"env": {"_target_": "wqmix_jax.envs.host.pool:subprocess.Popen", "args": ["touch", mark]}},
        "is not allowed: a class is written MODULE.CLASS",
    ),
    "another class of the package": (
        lambda run, mark: {"env": {"_target_": "wqmix_jax.records.run_dir.Path"}},
        "it is not a subclass of wqmix_jax.envs.base.Environment",
    ),
    "a module in the run's folder": (
        lambda run, mark: {"env": env(_target_="outputs.run.planted.Game")},
        "but must be in the current folder or --config-dir",
    ),
    "a module of the algorithm in the run's folder": (
        lambda run, mark: {"algo": {"_target_": "outputs.run.planted.Algo"}},
        "but must be in the current folder or --config-dir",
    ),
    "a module next to the run's folder": (
        lambda run, mark: {"env": env(_target_="outputs.planted.Game")},
        "but must be in the current folder or --config-dir",
    ),
    "a package in the run's folder": (
        lambda run, mark: {"env": env(_target_="outputs.run.package.planted.Game")},
        "outputs.run.package is ",
    ),
    "a module in another run's folder": (
        lambda run, mark: {"env": env(_target_="other_run.planted.Game")},
        "but must be in the current folder or --config-dir",
    ),
    "a module that is on the path": (
        lambda run, mark: {"env": env(_target_="on_the_path.Game")},
        "but must be in the current folder or --config-dir",
    ),
    "a module of Python": (
        lambda run, mark: {"env": env(_target_="this.Game")},
        "but must be in the current folder or --config-dir",
    ),
    "a module that is nowhere": (
        lambda run, mark: {"env": env(_target_="planted.Game")},
        "can't be imported: module planted is not found; start where it is, or name its folder with --config-dir",
    ),
    "no string": (lambda run, mark: {"env": env(_target_=3)}, "env._target_=3 is not allowed: a class is written"),
    "an interpolation": (
        lambda run, mark: {"env": env(punishment="${oc.env:HOME}")},
        "env.punishment='${oc.env:HOME}' is not allowed: only the yamls of a new run may refer to other values",
    ),
    "an interpolation in a list": (
        lambda run, mark: {"sweep": {"lr": ["${oc.decode:1}"]}},
        "sweep.lr='${oc.decode:1}' is not allowed",
    ),
    "a class inside an option": (
        lambda run, mark: {"env": env(punishment={"_target_": "subprocess.Popen", "args": ["touch", mark]})},
        "env.punishment={'_target_': 'subprocess.Popen'",
    ),
    "a simulator in the run's folder": (
        lambda run, mark: host(simulator=f"{run}/planted.py:Game"),
        "/planted.py must be in the current folder or --config-dir",
    ),
    "a simulator in the run's folder, from here": (
        lambda run, mark: host(simulator="outputs/run/planted.py:Game"),
        "/planted.py must be in the current folder or --config-dir",
    ),
    "a simulator that is installed": (
        lambda run, mark: host(simulator="subprocess:Popen", options={"args": ["touch", mark]}),
        "env.simulator='subprocess:Popen' is not imported: it names an installed module",
    ),
    "an interpreter": (
        lambda run, mark: host(worker_python=str(run / "python")),
        "/python' is not started: if you trust this program, add env.worker_python=",
    ),
    "an interpreter for an adapter of the package": (
        lambda run, mark: {
            "env": {
                **{**WORKERS, "worker_python": str(run / "python")},
                **yaml.safe_load((CONFIG_DIR / "env" / "smaclite.yaml").read_text()),
            }
        },
        "/python' is not started: if you trust this program, add env.worker_python=",
    ),
}


@pytest.mark.parametrize("opened", [by_evaluate, by_resume, by_load_policy])
@pytest.mark.parametrize("case", MALICIOUS)
def test_what_a_folder_names_is_refused_before_it_is_executed(
    case: str,
    opened: Callable[[Path], None],
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    mark, here = tmp_path / "mark", tmp_path / "here"
    for folder in (run_dir, run_dir / "package", here / "outputs", here / "other_run"):
        module(folder / "planted.py", mark)
    module(run_dir / "package" / "__init__.py", mark)
    module(tmp_path / "elsewhere" / "on_the_path.py", mark)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    shutil.copy(run_dir / "run.json", here / "other_run")
    program(run_dir / "python", mark)
    make, message = MALICIOUS[case]
    edit(run_dir, **make(run_dir, str(mark)))
    with pytest.raises(SystemExit) as ended:
        opened(run_dir)
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith(f"error: {run_dir}/config.yaml: ") or case == "a class inside an option"
    assert message in line
    assert not mark.exists()


@pytest.mark.parametrize("opened", [by_evaluate, by_resume, by_load_policy])
def test_yaml_makes_no_objects(
    opened: Callable[[Path], None], run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    with open(run_dir / "config.yaml", "a") as file:
        file.write(f"more: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(SystemExit) as ended:
        opened(run_dir)
    assert ended.value.code == 2
    assert "config.yaml is damaged" in capfd.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["module", "package", "namespace"])
def test_a_module_in_the_current_folder_is_imported_and_named(
    kind: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mark, name = tmp_path / "mark", f"own_{kind}"
    inside = {"module": f"{name}.py", "package": f"{name}/game.py", "namespace": f"{name}/inner/game.py"}[kind]
    (tmp_path / "here" / inside).parent.mkdir(exist_ok=True, parents=True)
    module(tmp_path / "here" / inside, mark)
    if kind == "package":
        (tmp_path / "here" / name / "__init__.py").touch()
    dotted = inside.removesuffix(".py").replace("/", ".")
    edit(run_dir, env=env(_target_=f"{dotted}.Game"))
    values = open_config(run_dir, NOTHING_NAMED)
    assert values["env"]["_target_"] == f"{dotted}.Game"
    assert mark.exists()
    message = capfd.readouterr().err.splitlines()
    assert message[-1] == f"importing {dotted} from {tmp_path / 'here' / inside}, named by {run_dir / 'config.yaml'}"
    assert len(message) == (2 if kind == "package" else 1)


def test_a_module_next_to_the_named_configs_is_imported(run_dir: Path, tmp_path: Path) -> None:
    module(tmp_path / "project" / "named_game.py", tmp_path / "mark")
    (tmp_path / "project" / "configs").mkdir()
    edit(run_dir, env=env(_target_="named_game.Game"))
    with pytest.raises(ConfigError, match="module named_game is not found"):
        load_policy(run_dir)
    assert load_policy(run_dir, config_dir=tmp_path / "project" / "configs").env_spec.num_agents == 8


def test_a_folder_inside_the_run_is_no_place_to_import_from(run_dir: Path, tmp_path: Path) -> None:
    for folder in (run_dir, run_dir / "configs"):
        module(folder / "inside.py", tmp_path / "mark")
    edit(run_dir, env=env(_target_="inside.Game"))
    with pytest.raises(ConfigError, match=r"inside is .*, but must be in the current folder"):
        load_policy(run_dir, config_dir=run_dir / "configs")
    assert not (tmp_path / "mark").exists()


def test_a_run_in_the_current_folder_names_nothing_that_is_there(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(run_dir / "inside_the_run.py", tmp_path / "mark")
    edit(run_dir, env=env(_target_="inside_the_run.Game"))
    for working in (run_dir, run_dir / "policies"):
        monkeypatch.chdir(working)
        with pytest.raises(ConfigError, match="inside_the_run is "):
            open_config(run_dir, NOTHING_NAMED)
    assert not (tmp_path / "mark").exists()


def test_a_class_is_no_way_to_a_module_of_the_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last name of ``MODULE.CLASS`` may be a module, here one inside of a package that is imported already."""
    package = tmp_path / "here" / "used_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    importlib.import_module("used_package")
    evil = Path(shutil.copytree(run_dir, package / "evil"))
    module(evil / "__init__.py", tmp_path / "mark")
    edit(evil, env=env(_target_="used_package.evil"))
    with pytest.raises(ConfigError, match=r"used_package\.evil is .*, but must be in"):
        load_policy(evil)
    assert not (tmp_path / "mark").exists()


def test_a_runs_compilation_cache_is_used_only_if_it_is_repeated(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Compiled programs are code."""
    values = {"compilation_cache": str(run_dir / "cache")}
    assert session._trusted_cache(values, {}) == {"compilation_cache": True}
    assert f"add compilation_cache={run_dir / 'cache'} if you trust it" in capfd.readouterr().err
    assert session._trusted_cache(values, values) == values
    assert session._trusted_cache({"compilation_cache": False}, {}) == {"compilation_cache": False}
    assert capfd.readouterr().err == ""


def test_a_simulator_in_the_current_folder_is_named(
    run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here" / "mine.py").touch()
    edit(run_dir, **host())
    open_config(run_dir, NOTHING_NAMED)
    message = f"workers run {tmp_path / 'here' / 'mine.py'}, named by {run_dir / 'config.yaml'}\n"
    assert capfd.readouterr().err == message


def test_programs_that_the_user_names_are_used(run_dir: Path, tmp_path: Path) -> None:
    python, mark = program(tmp_path / "python", tmp_path / "mark"), tmp_path / "mark"
    edit(run_dir, **host(worker_python=python, simulator="package:Game"))
    with pytest.raises(ConfigError, match=r"env\.simulator='package:Game' is not imported"):
        open_config(run_dir, Named(worker_python=python))
    with pytest.raises(ConfigError, match=r"env\.simulator='package:Game' is not 'other:Game': a run keeps its"):
        open_config(run_dir, Named(worker_python=python, simulator="other:Game"))
    values = open_config(run_dir, Named(worker_python="other", simulator="package:Game"))
    assert values["env"]["worker_python"] == "other"
    with pytest.raises(ConfigError, match="can't be used"):  # it ran, and is no interpreter
        load_policy(run_dir, worker_python=python, simulator="package:Game")
    assert mark.exists()
    edit(run_dir)
    with pytest.raises(ConfigError, match=r"env\.worker_python=other is not allowed: PredatorPrey has no workers"):
        open_config(run_dir, Named(worker_python="other"))


def test_programs_are_repeated_on_the_command_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = "/a b/python's"
    edit(run_dir, **host(worker_python=python, simulator="package:Game"))
    command = command_to_continue(run_dir).partition(" -m wqmix_jax.train ")[2]
    resumed: list[Any] = []
    monkeypatch.setattr(session, "resume", lambda *args, **kwargs: resumed.append((args, kwargs)))
    monkeypatch.setattr(sys, "argv", ["train", *shlex.split(command)])
    train.main()
    programs = {"worker_python": python, "simulator": "package:Game"}
    assert resumed == [((run_dir, {"env": programs}), {"config_dir": None})]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"env\.worker_python=other is not allowed with resume: the run has /a b"):
        session.resume(run_dir, {"env": {"worker_python": "other"}})
    overrides = as_text([f"run_dir={run_dir}", *shlex.split(command)[1:]])
    assert evaluate._named(overrides, "mine") == Named("mine", **programs)
    evaluate._refuse_foreign(overrides)


def test_a_policy_is_loaded_without_its_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copy(RECORDED / "policies" / "best.npz", tmp_path))
    config = load_config("+algo=vdn", "env=predator_prey")
    for member in (0, 1):
        alone, inside = load_policy(path, config=config, member=member), load_policy(RECORDED, member=member)
        assert type(alone.algo) is type(inside.algo)
        jax.tree.map(np.testing.assert_array_equal, alone.params, inside.params)
    with pytest.raises(ConfigError, match=r"^member=2 is not allowed: .*best.npz has members 0 to 1$"):
        load_policy(path, config=config, member=2)
    other = load_config("+algo=vdn", "env=matrix_game")
    with pytest.raises(ConfigError, match=r"doesn't fit: params\.agent\.\S+ is float32\[.*\] there, float32\["):
        load_policy(path, config=other)
    with pytest.raises(SystemExit):
        evaluate.main([f"policy_file={path}", "algo=vdn", "algo.hidden_dim=3"])
    message = f"error: {path} doesn't fit: params.agent.encoder.bias is float32[64] there, float32[3] here\n"
    assert capfd.readouterr().err == message


def test_a_file_of_policies_holds_nothing_that_is_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "mark",))

    np.savez(tmp_path / "best.npz", seed=np.array([Payload()], object))
    with pytest.raises(ConfigError, match=r"best\.npz can't be read: it holds no policies, or is damaged"):
        load_policy(tmp_path / "best.npz", config=load_config("+algo=vdn"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2)}, "is absent there"),
        ({"seed": np.zeros(2, int), "x": np.zeros(3)}, r"is damaged: its arrays are of \[2, 3\] members"),
        ({"seed": np.int32(0)}, r"is damaged: its arrays are of \[0\] members"),
    ],
)
def test_a_damaged_file_of_policies(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "best.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        load_policy(tmp_path / "best.npz", config=load_config("+algo=vdn"))


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--config-path", "--config-name"])
def test_flags_of_hydra_that_open_other_files(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", flag, str(tmp_path), "+algo=vdn"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert capfd.readouterr().err.startswith(f"error: {flag} is not allowed: --config-dir DIR adds yamls")


def test_a_sweep_in_a_file_of_policies_is_named(tmp_path: Path) -> None:
    with np.load(RECORDED / "policies" / "best.npz") as arrays:
        np.savez(tmp_path / "best.npz", **{**arrays, "algo.lr": np.array([0.1, 0.5])})
    config = load_config("+algo=vdn")
    arithmetic = {"matmul_precision": "float32", "compute_dtype": "float32"}
    opened = policies_of_file(tmp_path / "best.npz", config.env, config.algo, arithmetic)
    assert opened.names == ("0-lr0.1", "1-lr0.5")
    assert [policy.algo.lr for policy in opened.policies.values()] == [0.1, 0.5]  # type: ignore[attr-defined]
    assert json.loads((RECORDED / "run.json").read_text())["seeds"] == [0, 1]


def task(name: str) -> dict[str, Any]:
    yamls = [yaml.safe_load((CONFIG_DIR / "env" / f"{part}.yaml").read_text()) for part in ("_host", "pettingzoo")]
    values = {key: value for values in yamls for key, value in values.items() if key != "defaults"}
    return {"env": {**values, "name": name}}


def gymnasium_task(module: str | None) -> dict[str, Any]:
    values = yaml.safe_load((CONFIG_DIR / "env" / "gymnasium.yaml").read_text())
    del values["defaults"]
    return {"env": {**task("")["env"], **values, "module": module}}


PLACE = "must be in the current folder, outside of runs and of folders without __init__.py; if you trust it, add env."


@pytest.mark.parametrize("opened", [by_evaluate, by_resume, by_load_policy])
@pytest.mark.parametrize(
    ("folder", "pythonpath", "name", "message"),
    [
        ("outputs/run", "", "planted", rf"'planted' is not allowed: \S+/run/planted.py {PLACE}KEY=planted"),
        ("outputs/run", "", "package.planted", rf"'package.planted' is not allowed: \S+/package/__init__.py {PLACE}"),
        (".", "", "outputs.run.planted", rf"'outputs.run.planted' is not allowed: \S+/run/planted.py {PLACE}"),
        (".", ".", "outputs.run.planted", rf"'outputs.run.planted' is not allowed: \S+/run/planted.py {PLACE}"),
        (".", ":nowhere", "outputs.run.planted", rf"'outputs.run.planted' is not allowed: \S+/run/planted.py {PLACE}"),
        (".", ".", "outputs.run.package.planted", rf"' is not allowed: \S+/run/package/__init__.py {PLACE}"),
        (".", "outputs/run", "planted", rf"'planted' is not allowed: \S+/run/planted.py {PLACE}"),
        (".", "outputs/run", "extension", rf"'extension' is not allowed: \S+/run/extension\S*.so {PLACE}"),
        (".", "", "own.outputs.other.planted", rf"' is not allowed: \S+/own/outputs/other/planted.py {PLACE}"),
        (".", ".", "loose.planted", rf"'loose.planted' is not allowed: \S+/loose/planted.py {PLACE}"),
        (".", "", "own.nowhere", r"'own.nowhere' can't be imported: own.nowhere is not found; if you trust it"),
        (
            ".",
            "",
            "antigravity",
            "'antigravity' is not imported: it is not in the current folder, and no module of pet",
        ),
        (".", "", "nowhere", "'nowhere' is not imported: .*; if you trust it, add env.KEY=nowhere"),
        (".", "", "sys", "'sys' is not imported: it is not in the current f"),
    ],
)
def test_a_task_from_elsewhere_is_not_imported(
    folder: str,
    pythonpath: str,
    name: str,
    message: str,
    opened: Callable[[Path], None],
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    mark, here = tmp_path / "mark", tmp_path / "here"
    for path in ("planted.py", "package/__init__.py", "package/planted.py"):
        module(run_dir / path, mark)
    (run_dir / f"extension{EXTENSION_SUFFIXES[0]}").touch()
    (here / "loose").mkdir()
    module(here / "loose" / "planted.py", mark)
    other = Path(shutil.copytree(run_dir, here / "own" / "outputs" / "other"))
    (here / "own" / "__init__.py").touch()
    module(other / "planted.py", mark)
    monkeypatch.setenv("PYTHONPATH", pythonpath)
    monkeypatch.chdir(here / folder)
    for key, changes in (("name", task(name)), ("module", gymnasium_task(name))):
        edit(run_dir, **changes)
        with pytest.raises(SystemExit) as ended:
            opened(run_dir)
        assert ended.value.code == 2
        [line] = capfd.readouterr().err.splitlines()
        assert re.match(rf"error: \S+/config.yaml: env.{key}=.*{message.replace('KEY', key)}", line)
        assert not mark.exists()


def test_a_task_in_the_current_folder_or_a_known_package_is_named(
    run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [Path.cwd() / name for name in ("mine.py", "own/__init__.py", "own/inner.py")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for changes, imported in (
        (task("mine"), files[:1]),
        (task("own.inner"), files[1:]),
        (gymnasium_task("mine"), files[:1]),
        (task("mpe2.simple_v3"), ["mpe2.simple_v3"]),
        (gymnasium_task(None), ["lbforaging"]),
        (gymnasium_task("rware"), ["rware"]),
    ):
        edit(run_dir, **changes)
        assert open_config(run_dir, NOTHING_NAMED)["env"] == changes["env"]
        lines = [f"workers import {each}, named by {run_dir}/config.yaml" for each in imported]
        assert capfd.readouterr().err.splitlines() == lines


def test_a_task_that_hides_a_known_package_is_checked(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although this process has imported the package itself."""
    importlib.import_module("mpe2")
    (run_dir / "mpe2").mkdir()
    (run_dir / "mpe2" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(run_dir))
    edit(run_dir, **task("mpe2.simple_v3"))
    with pytest.raises(ConfigError, match=r"env.name='mpe2.simple_v3' is not allowed: \S+/run/mpe2/__init__.py must"):
        open_config(run_dir, NOTHING_NAMED)


@pytest.mark.parametrize("key", ["name", "module"])
def test_a_task_that_is_repeated_is_imported(
    key: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(run_dir, **(task("json.tool") if key == "name" else gymnasium_task("json.tool")))
    with pytest.raises(ConfigError, match=rf"env\.{key}='json\.tool' is not 'other': a run keeps its tasks"):
        open_config(run_dir, Named(**{key: "other"}))
    assert open_config(run_dir, Named(**{key: "json.tool"}))["env"][key] == "json.tool"
    with pytest.raises(ConfigError, match={"name": "no function parallel", "module": "^env.name=Foraging"}[key]):
        load_policy(run_dir, name={"name": "json.tool"}.get(key), module={"module": "json.tool"}.get(key))
    with pytest.raises(SystemExit):
        evaluate.main([f"run_dir={run_dir}", f"env.{key}=json.tool"])
    assert re.search("error: env.name=.* is not allowed: ", capfd.readouterr().err)
    command = command_to_continue(run_dir).partition(" -m wqmix_jax.train ")[2]
    assert command.endswith(f" env.{key}=json.tool")
    resumed: list[Any] = []
    monkeypatch.setattr(session, "resume", lambda *args, **kwargs: resumed.append(args))
    monkeypatch.setattr(sys, "argv", ["train", *shlex.split(command)])
    train.main()
    assert resumed == [(run_dir, {"env": {key: "json.tool"}})]
    overrides = as_text([f"run_dir={run_dir}", f"env.{key}=json.tool"])
    assert evaluate._named(overrides, None) == Named(**{key: "json.tool"})
    evaluate._refuse_foreign(overrides)


def test_a_name_that_is_no_module_may_be_repeated(run_dir: Path) -> None:
    """The command to continue leaves it out."""
    edit(run_dir, env={**env(), "name": "Connector-v3"})
    assert "env.name" not in command_to_continue(run_dir)
    open_config(run_dir, Named(name="Connector-v3"))
    with pytest.raises(ConfigError, match=r"env.name='Connector-v3' is not 'Cleaner-v0': a run keeps its tasks"):
        open_config(run_dir, Named(name="Cleaner-v0"))
    edit(run_dir, **task("mpe2.simple_spread_v3"))
    assert "env.name" not in command_to_continue(run_dir)
