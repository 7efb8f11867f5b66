"""The wheel holds all that a run needs and works from any folder; what the project says about itself agrees."""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import wqmix_jax
from wqmix_jax import foreign_names
from wqmix_jax.options import CONFIG_DIR

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built offline with the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it, to be put on the path before this checkout."""
    folder = tmp_path_factory.mktemp("site")
    _pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


def test_the_console_script_lists_the_commands(site: Path) -> None:
    listed = subprocess.run(
        [site / "bin" / "wqmix_jax"], env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True
    )
    assert (listed.returncode, listed.stderr) == (0, b"")
    for name in ("train", "evaluate", "compare", "merge", "table", "search", "tabular"):
        assert f"wqmix_jax {name} ".encode() in listed.stdout


def test_wheel_holds_the_package_and_its_configs_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "wqmix_jax").rglob("*.py")}
    configs = {f"wqmix_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert names == package | configs | {"wqmix_jax/py.typed", "wqmix_jax/envs/host/README.md"}


def test_metadata(wheel: Path) -> None:
    metadata, names = _metadata(wheel)
    assert metadata["Version"] == wqmix_jax.__version__
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {name.rsplit("/", 1)[-1] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    extras = {
        "cuda",
        "tpu",
        "smax",
        "jaxmarl",
        "pettingzoo",
        "gymnasium",
        "tensorboard",
        "torch",
        "launchers",
        "search",
        "notebooks",
        "docs",
        "dev",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_nothing_installed_needs_replacing_by_something_older(wheel: Path) -> None:
    """Run-time requirements have no upper bounds, so that an environment keeps the jax that it has."""
    metadata, _ = _metadata(wheel)
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed
    assert [line for line in needed if re.search(r"<|==|~=|!=", line)] == []


def test_installed_package_finds_its_own_configs(site: Path, tmp_path: Path) -> None:
    code = (
        "import json, pathlib, wqmix_jax\n"
        "from wqmix_jax.config import CONFIG_DIR\n"
        "yamls = sorted(path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob('*.yaml'))\n"
        "print(json.dumps([str(pathlib.Path(wqmix_jax.__file__).parent), str(CONFIG_DIR), yamls]))\n"
    )
    package, config_dir, yamls = json.loads(_python(site, tmp_path, "-c", code))
    assert Path(package) == site / "wqmix_jax"
    assert Path(config_dir) == site / "wqmix_jax" / "configs"
    assert yamls == sorted(path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob("*.yaml"))


@pytest.mark.slow
def test_installed_package_trains_from_any_folder(site: Path, tmp_path: Path) -> None:
    _python(
        site, tmp_path, "-m", "wqmix_jax.train", "+algo=ow_qmix", "total_env_steps=400", "eval_episodes=2",
        "algo.batch_size=2", "algo.buffer_size=8", "run_dir=first",
    )  # fmt: skip
    kept = {path.name for path in (tmp_path / "first").iterdir()}
    assert kept >= {"config.yaml", "metrics.jsonl", "summary.json", "learning_curve.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


@pytest.mark.slow
def test_the_lowest_versions_that_are_allowed_train(wheel: Path, tmp_path: Path) -> None:
    """In a separate environment; indirect requirements are the newest that fit."""
    lowest = _lowest_versions(wheel, extra="launchers")
    (tmp_path / "lowest.txt").write_text("".join(f"{name}=={version}\n" for name, version in lowest.items()))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    probe = [*pip, "download", "--no-deps", "--dest", tmp_path, f"omegaconf=={lowest['omegaconf']}"]
    if subprocess.run(probe, capture_output=True, timeout=500, check=False).returncode != 0:
        pytest.skip("the package index can't be reached")
    _run([*pip, "install", "--quiet", "-c", tmp_path / "lowest.txt", f"{wheel}[launchers]"], cwd=tmp_path, env={})

    short = (
        "total_env_steps=400",
        "eval_episodes=2",
        "algo.batch_size=2",
        "algo.buffer_size=8",
        "logger.progress=false",
    )
    runs = [
        ("train", "+algo=ow_qmix", *short, "run_dir=first", "logger.wandb=offline"),
        ("train", "resume=first", "total_env_steps=600"),
        ("evaluate", "run_dir=first", "episodes=2", "render=first.gif"),
        ("train", "-m", "hydra/launcher=joblib", "+algo=vdn,masac", *short, "run_dir=sweep"),
        ("merge", "sweep/0", "--out", "merged"),
        ("compare", "first", "merged", "--out", "comparison.png"),
    ]
    for module, *arguments in runs:
        _run([python, "-m", f"wqmix_jax.{module}", *arguments], cwd=tmp_path, env={"WANDB_MODE": "offline"})
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept >= {"first", "sweep", "merged", "first.gif", "comparison.png"}


def _lowest_versions(wheel: Path, extra: str) -> dict[str, str]:
    """The lower bound of each requirement of the wheel and of one of its extras, on this Python."""
    lowest: dict[str, str] = {}
    for line in _metadata(wheel)[0].get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            [bound] = [each.version for each in requirement.specifier if each.operator == ">="]
            lowest[requirement.name] = max(bound, lowest.get(requirement.name, bound), key=Version)
    return lowest


def test_checkout_reads_its_own_configs() -> None:
    assert CONFIG_DIR == ROOT / "configs"


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == wqmix_jax.__version__
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2006.10800"


def test_the_repository_has_one_address() -> None:
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner, name = repository.removeprefix("https://github.com/").split("/")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == repository
    addresses = r"^(site_url|repo_url|repo_name): (\S+)"
    site = dict(re.findall(addresses, (ROOT / "docs" / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = f"https://{owner}.github.io/{name}/"
    assert site == {"site_url": pages, "repo_url": repository, "repo_name": f"{owner}/{name}"}
    for path in ("README.md", "experiments/examples/demo.ipynb", "experiments/examples/tabular.ipynb"):
        text = (ROOT / path).read_text()
        assert repository in text
        badges = re.findall(r"colab\.research\.google\.com/github/([\w-]+)/([\w-]+)/blob/main/([\w/]+\.ipynb)", text)
        assert badges
        assert {(place[0], place[1]) for place in badges} == {(owner, name)}
        assert all((ROOT / place[2]).is_file() for place in badges)


def test_changelog_has_this_version() -> None:
    assert f"## [{wqmix_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_name_of_ours_in_the_tables_exists() -> None:
    rows = itertools.chain.from_iterable(foreign_names.TABLES.values())
    names = {name.lstrip("+").split("=")[0] for row in rows for name in row.ours}
    assert len(names) > 40
    known = {"algo", "env"}
    for key, value in yaml.safe_load((ROOT / "configs" / "train.yaml").read_text()).items():
        known |= {key} | {f"{key}.{inner}" for inner in (value if isinstance(value, dict) else ())}
    for group in ("algo", "env"):
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            known |= {f"{group}.{key}" for key in yaml.safe_load(path.read_text())}
    assert names - known == set()


def test_a_row_has_a_name_of_ours_for_each_of_theirs_or_says_why_not() -> None:
    for row in itertools.chain.from_iterable(foreign_names.TABLES.values()):
        assert len(row.ours) in (0, len(row.theirs))
        assert row.ours or row.note


def _metadata(wheel: Path) -> tuple[Message, list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [path] = [name for name in names if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(path).decode()), names


def _pip(*arguments: str | Path) -> None:
    _run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], cwd=ROOT, env={})


def _python(site: Path, cwd: Path, *arguments: str) -> str:
    """Returns what Python prints in ``cwd`` with the installed package first on its path."""
    return _run([sys.executable, *arguments], cwd=cwd, env={"PYTHONPATH": str(site), "WANDB_MODE": "disabled"})


def _run(command: list[str | Path], *, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout
