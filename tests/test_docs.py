"""The README and the documentation: its commands and programs work as they are pasted, and its site builds."""

import fnmatch
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import wqmix_jax
from tests.documentation import (
    PAGES,
    SHELL,
    arguments_of,
    blocks,
    commands,
    commands_of,
    make_clone,
    programs,
    run,
    run_program,
    shortened,
    texts_of_package,
    unknown_part,
    write_files,
)
from tests.running import ROOT, make
from wqmix_jax import evaluate, foreign_names, load_config
from wqmix_jax.cli.checks import check_overrides
from wqmix_jax.cli.overrides import compose_evaluation, load_values, prepare

NOT_RUN = {
    "* env.worker_python=/path/to/python": "needs StarCraft II",
    "* hydra/launcher=*": "needs the extra `launchers`, or SLURM",
    "*FOLDER*": "names a folder of the reader's own",
    "srun *": "needs SLURM",
    "wandb sync *": "needs the network",
    "tensorboard *": "is a server, which never ends",
    "make *": "needs the package index, or takes minutes; a dry run checks the target",
    "cd wqmix_jax": "follows git clone",
    "python -m experiments.accelerators *": "needs the extras `tpu` and `cuda`, and takes minutes",
    "mkdir *": "makes the folders of the files that a page shows",
    "git clone *": "needs the network",
    "pip install *": "needs the package index",
    "source .venv/bin/activate": "needs the environment that make creates",
}
"""Commands that are not run, by a pattern, and the reason."""

TROUBLESHOOTING = "docs/pages/troubleshooting.md"

COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
PROGRAMS = [(page, program) for page in PAGES for program in programs(page)]
TRAININGS = [(page, command) for page, command in COMMANDS if arguments_of("wqmix_jax.train", command) is not None]
EVALUATIONS = [(page, command) for page, command in COMMANDS if arguments_of("wqmix_jax.evaluate", command) is not None]


def not_run(command: str) -> bool:
    """Returns True if `NOT_RUN` lists the command."""
    return any(fnmatch.fnmatchcase(command, pattern) for pattern in NOT_RUN)


def test_commands_and_programs_are_found() -> None:
    assert len(COMMANDS) > 40
    assert len(TRAININGS) > 15
    assert len(PROGRAMS) > 5


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_known_language(page: str) -> None:
    known = ("", *SHELL, "python", "yaml", "text", "json", "bibtex", "csv")
    assert {block.language for block in blocks(page)} <= set(known)


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_every_command_that_is_not_run_occurs(pattern: str) -> None:
    assert [command for _, command in COMMANDS if fnmatch.fnmatchcase(command, pattern)]


def test_every_command_is_of_a_known_kind() -> None:
    for page, command in COMMANDS:
        if not_run(command) or command.startswith("python -c "):
            continue
        module = re.search(r"(?:^|[ ;&])(?:python -m (\S+)|(wqmix_jax) )", command)
        assert module, f"{page}: {command}"
        name = module[1] or module[2]
        assert find_spec(name) or find_spec(f"{name}.__main__"), f"{page}: {command}"


@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS if command.startswith("make")}))
def test_every_make_target_is_there(command: str) -> None:
    planned = make("-n", *shlex.split(command)[1:])
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize(("page", "command"), TRAININGS, ids=lambda text: text)
def test_the_options_of_every_training_compose(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(page, tmp_path)
    folder = re.search(r"cd (\S+)", command)
    monkeypatch.chdir(ROOT / folder[1] if folder else tmp_path)
    arguments = arguments_of("wqmix_jax.train", command) or []
    multirun = "-m" in arguments or "--multirun" in arguments
    config_dir = arguments[arguments.index("--config-dir") + 1] if "--config-dir" in arguments else None
    overrides = [text for text in arguments if "=" in text and not text.startswith("hydra")]
    if any(text.startswith("resume=") for text in overrides):
        return
    check_overrides(prepare(overrides), config_dir, multirun=multirun)
    for choice in (0, -1) if multirun else (0,):
        pairs = [text.split("=", 1) for text in overrides]
        chosen = [f"{key}={value.split(',')[choice] if multirun else value}" for key, value in pairs]
        if any(text.startswith("+algo=") for text in chosen):
            compose = load_values if not_run(command) else load_config  # what can't be run can't be built
            compose(*chosen, config_dir=config_dir)


@pytest.mark.parametrize(("page", "command"), EVALUATIONS, ids=lambda text: text)
def test_the_options_of_every_evaluation_compose(page: str, command: str) -> None:
    arguments = [text for text in arguments_of("wqmix_jax.evaluate", command) or [] if "=" in text]
    if arguments and "--config-dir" not in command:
        values = compose_evaluation(arguments, None).values
        del values["env"], values["algo"]
        evaluate._options(values)


@pytest.mark.parametrize(("page", "program"), PROGRAMS)
def test_every_program_uses_what_the_package_offers(page: str, program: str) -> None:
    compile(program, page, "exec")
    for imported in re.findall(r"^from wqmix_jax import (.*)", program, re.MULTILINE):
        assert set(imported.split(", ")) <= set(wqmix_jax.__all__)


@pytest.mark.parametrize("page", PAGES)
def test_every_python_file_that_a_page_shows_compiles(page: str) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page, "exec")


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for path in re.findall(r"\]\((?!http|#)([^)#\s]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_the_pages_have_the_tables_of_the_error_messages() -> None:
    page = (ROOT / "docs/pages/coming_from.md").read_text()
    for library in foreign_names.TABLES:
        assert f"\n\n{foreign_names.table(library)}\n\n" in page


def test_troubleshooting_quotes_texts_of_the_package() -> None:
    texts = texts_of_package()
    quoted = [line for block in blocks(TROUBLESHOOTING) if block.language == "text" for line in block.text.splitlines()]
    assert len(quoted) > 60
    assert [(message, part) for message in quoted if (part := unknown_part(message, texts))] == []
    assert unknown_part("error: KEY=VALUE is not allowed: it is not a colour", texts)


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs/mkdocs.yml", "-d", tmp_path / "site"],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]+src="?(?:https?:)?//[^>]*>', text), page
        links = re.findall(r'<link[^>]+href="(?:https?:)?//[^>]*>', text)
        assert not [link for link in links if 'rel="canonical"' not in link], page
        assert 'class="arithmatex"' not in text
        assert 'class="mermaid"' not in text, "the theme would load mermaid from another host"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page) or programs(page)])
def test_the_commands_and_programs_of_a_page_run_in_their_order(page: str, tmp_path: Path) -> None:
    """In a clone where the page names the clone's files, otherwise in an empty folder."""
    if any("experiments" in command for command in commands(page)):
        make_clone(tmp_path)
    write_files(page, tmp_path)
    for block in blocks(page):
        if block.title is None and block.language == "python":
            ended = run_program(block.text, tmp_path)
            assert ended.returncode == 0, (block.text, ended.stdout, ended.stderr)
        elif block.title is None and block.language in SHELL:
            for command in commands_of(block):
                if not not_run(command):
                    ended = run(shortened(command), tmp_path)
                    assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
                other_host = command.replace(" host=0", " host=1")
                if other_host != command and other_host not in commands(page):  # which the page runs elsewhere
                    ended = run(shortened(other_host), tmp_path)
                    assert ended.returncode == 0, (other_host, ended.stdout, ended.stderr)
