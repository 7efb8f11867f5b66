"""The lines that are printed before a run starts, and the run's folder."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from wqmix_jax import load_config, make_trainer
from wqmix_jax.cli.overrides import load_values
from wqmix_jax.config import run_config
from wqmix_jax.envs.base import ExternalPackage
from wqmix_jax.errors import ConfigError
from wqmix_jax.records.metrics import load_header
from wqmix_jax.records.run_dir import make_run_dir, new_run_dir, read_config
from wqmix_jax.runs import session, startup
from wqmix_jax.runs.startup import device_lines, plan_lines

TRAINER = make_trainer(load_config("+algo=ow_qmix"))


def test_the_plan_of_the_default_run() -> None:
    config = load_config("+algo=ow_qmix", "num_seeds=4", "seed=10")
    lines = list(plan_lines(config, make_trainer(config), config.num_seeds))
    assert lines[0] == "seeds 10..13, 1,000,000 environment steps each"
    per_seed, in_total = map(float, re.findall(r"([\d.]+) MB", lines[1]))
    assert per_seed <= 64
    assert in_total == pytest.approx(4 * per_seed, abs=0.3)
    assert lines[2:] == [
        "evaluation: every 50 iterations (10,000 environment steps of full episodes)",
        "learner steps per environment step: 0.005 (1 per full episode of 200 steps)",
    ]


def test_the_ratio_of_learner_steps_follows_the_options() -> None:
    config = load_config("+algo=ow_qmix", "num_envs=8", "updates_per_iteration=2", "eval_interval=1")
    lines = list(plan_lines(config, make_trainer(config), config.num_seeds))
    assert lines[0] == "seed 0, 1,000,000 environment steps each"
    assert lines[2:] == [
        "evaluation: every 1 iteration (1,600 environment steps of full episodes)",
        "learner steps per environment step: 0.00125 (2 per 8 full episodes of 200 steps)",
    ]


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ("nvidia", ["An NVIDIA GPU is present but unused: INSTALL cuda makes JAX use it."]),
        ("tpu", ["A TPU is present but unused: INSTALL tpu makes JAX use it."]),
        ("nothing", []),
    ],
)
def test_an_idle_accelerator_is_told_with_what_to_install(
    present: str, message: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if present == "nvidia" else None)
    monkeypatch.setattr(startup.os.path, "exists", lambda _: False)
    monkeypatch.setattr(startup, "install_extra", lambda extra: f"INSTALL {extra}")
    monkeypatch.setattr(startup.glob, "glob", lambda _: ["/dev/accel0"] if present == "tpu" else [])
    monkeypatch.delenv("TPU_NAME", raising=False)
    first, *rest = device_lines(TRAINER)
    assert first.startswith("device: cpu (")
    assert rest == message


def test_a_used_accelerator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

    devices: list[Any] = [Device(), Device()]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert list(device_lines(TRAINER)) == ["device: gpu (NVIDIA H200), training on 1 of 2 devices"]


def test_runs_without_a_folder_get_dated_ones_that_never_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(3):
        wanted = new_run_dir(None, algo="ow_qmix", env="predator_prey")
        assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_ow_qmix_predator_prey", wanted.as_posix())
        assert not wanted.exists()
        run_dir = make_run_dir(Path("outputs/same_second"), numbered=True)
        assert run_dir.is_dir()
        seen.add(run_dir.name)
    assert seen == {"same_second", "same_second_2", "same_second_3"}


def test_runs_that_begin_in_the_same_second_each_train_in_their_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "new_run_dir", lambda *_, **__: Path("outputs/now"))
    trained: list[str] = []
    monkeypatch.setattr(session.Session, "run", lambda self: trained.append(self.run_dir.as_posix()))
    given = [load_values("+algo=vdn", f"seed={seed}") for seed in (3, 4)]
    folders = [session.start(run_config(values), values, algo="vdn", env="x") for values in given]
    assert trained == [folder.as_posix() for folder in folders] == ["outputs/now", "outputs/now_2"]
    assert [load_header(folder)["seeds"] for folder in folders] == [[3], [4]]
    assert [read_config(folder)["run_dir"] for folder in folders] == trained


def test_an_empty_folder_can_be_used(tmp_path: Path) -> None:
    assert new_run_dir(str(tmp_path), algo="iql", env="coin") == tmp_path


def test_a_run_goes_on_in_the_same_version_of_its_game(capsys: pytest.CaptureFixture[str]) -> None:
    here = {"jaxmarl": "0.2.0"}
    session._refuse_other_game(Path("run"), {"simulator": here}, here)
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError) as refused:
        session._refuse_other_game(Path("run"), {"simulator": {"jaxmarl": "0.1.0"}}, here)
    message = "resume=run is not allowed: run has jaxmarl=0.1.0, and this installation has jaxmarl=0.2.0"
    assert str(refused.value) == message
    session._refuse_other_game(Path("run"), {}, here)  # made before the version was recorded
    message = "run doesn't record its version of jaxmarl, and this installation has jaxmarl=0.2.0"
    assert capsys.readouterr().err == f"warning: {message}: these may be different games\n"
    with pytest.raises(ConfigError, match="has toy=unknown, and this installation has toy=1"):
        session._refuse_other_game(Path("run"), {}, {"toy": "1"})  # such versions were always recorded


def test_a_game_of_a_package_has_the_packages_version() -> None:
    assert ExternalPackage("jax").versions() == {"jax": jax.__version__}
    assert ExternalPackage("no_such_package").versions() == {"no_such_package": "unknown"}
