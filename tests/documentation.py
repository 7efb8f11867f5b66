"""The commands and programs of the README and of the pages in ``docs/pages``, as a reader would paste them."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import wqmix_jax
from tests.running import ROOT
from wqmix_jax import load_config
from wqmix_jax.config import names

PAGES = ("README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/pages").rglob("*.md")))

FENCED = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w+)?(?P<options>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)

INCLUDED = re.compile(r'^--8<-- "(?P<path>[^"]+)"\n', re.M)
"""A line that the site replaces by a file of the repository."""

SHELL = ("sh", "bash", "console")

# These make a run of seconds of any training; with `resume` only the first may change.
SHORT = ("total_env_steps=200", "eval_episodes=2", "algo.batch_size=2", "algo.buffer_size=8")
SHORT_EPISODES = "env.episode_limit=20"

CLONE = ("configs", "experiments", "tests", "wqmix_jax", "Makefile", "pyproject.toml")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: the page's path in the repository.
        language: of its fence.
        title: the file that the block shows, where it names one.
        text: without the indentation of the fence.
    """

    page: str
    language: str
    title: str | None
    text: str


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    return [_block(page, found) for found in FENCED.finditer((ROOT / page).read_text())]


def _block(page: str, found: re.Match[str]) -> Block:
    title = re.search(r'title="([^"]+)"', found["options"])
    text = re.sub(f"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
    text = INCLUDED.sub(lambda line: (ROOT / line["path"]).read_text(), text)
    return Block(page, found["language"] or "", title and title[1], text)


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks; in a console block those after a ``$``."""
    shell = [block for block in blocks(page) if block.language in SHELL and block.title is None]
    return [command for block in shell for command in commands_of(block)]


def commands_of(block: Block) -> Iterator[str]:
    """The commands of a shell block, each on one line and without its comment."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console":
            line = line.removeprefix("$ ") if line.startswith("$ ") else ""
        if line.strip() and not line.startswith("#"):
            yield " ".join(line.partition(" # ")[0].split())


def programs(page: str) -> list[str]:
    """The Python blocks of a page that are no file."""
    return [block.text for block in blocks(page) if block.language == "python" and block.title is None]


def arguments_of(module: str, command: str) -> list[str] | None:
    """Returns the arguments of ``python -m MODULE`` in a command; None if it runs something else."""
    words = shlex.split(command)
    name = module.removeprefix("wqmix_jax.")
    for start in (["python", "-m", module], ["python", "-m", "wqmix_jax", name], ["wqmix_jax", name]):
        for index in range(len(words)):
            if words[index : index + len(start)] == start:
                return words[index + len(start) :]
    return None


def shortened(command: str) -> str:
    """The command with options that make its training one of seconds; others as they are."""
    if (arguments := arguments_of("wqmix_jax.search", command)) is not None:
        resumes = any(text.startswith("resume=") for text in arguments)
        return _with(command, ["trials=3"] if resumes else [*SHORT, "trials=2"])
    arguments = arguments_of("wqmix_jax.train", command)
    if arguments is None or "--help" in arguments or "--cfg" in arguments:
        return command
    if any(text.startswith("resume=") for text in arguments):
        return _with(command, ["total_env_steps=400"])
    known = [text for text in SHORT if not re.search(rf" {text.partition('=')[0]}=\S*,", command)]
    if _is_on_policy(arguments):  # whose batches fill an iteration's episodes
        known = [text for text in known if not text.startswith("algo.")]
    return " ".join([_with(command, known), *_short_episodes(arguments)])


def _is_on_policy(arguments: Sequence[str]) -> bool:
    chosen = next((text.removeprefix("+algo=") for text in arguments if text.startswith("+algo=")), "")
    return chosen in names("algo").split(", ") and load_config(f"+algo={chosen}").algo.is_on_policy


def _with(command: str, options: Sequence[str]) -> str:
    """The command with these options in place of those of the same names."""
    for text in options:
        command = re.sub(rf" {re.escape(text.partition('=')[0])}=\S+", "", command)
    return " ".join([command, *options])


def _short_episodes(arguments: Sequence[str]) -> list[str]:
    """The option that shortens episodes, where the environment has it."""
    chosen = next((text[4:] for text in arguments if text.startswith("env=")), "predator_prey")
    return [SHORT_EPISODES] if chosen == "predator_prey" and "+preset=smax" not in arguments else []


def write_files(page: str, folder: Path) -> None:
    """Writes the files that a page shows with their names."""
    for block in blocks(page):
        if block.title is not None:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # in a clone it may be a link
            path.write_text(block.text)


def make_clone(folder: Path) -> None:
    """Fills a folder as a clone: with folders, and links to the files of this checkout."""
    for name in CLONE:
        if (ROOT / name).is_file():
            (folder / name).symlink_to(ROOT / name)
            continue
        for path in (ROOT / name).rglob("*"):
            inside = folder / path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in path.parts and "outputs" not in path.parts:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.symlink_to(path)


def texts_of_package() -> str:
    """The strings of the package and the experiments, a line each; of an f-string its fixed parts."""
    sources = [*(ROOT / "wqmix_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts = [str(node.value) for node in constants if id(node) not in docstrings]
    makefile = (ROOT / "Makefile").read_text().splitlines()
    return "\n".join(["", *(_bare(text) for text in (*texts, *makefile)), ""])


def unknown_part(message: str, texts: str) -> str:
    """The first part of a message that the texts don't make up; empty where they make up all of it.

    Names and values differ between messages: words in capitals, and those with an equals sign, are skipped. What is
    between two of these is a part of one text, or the end of one and the start of another.
    """
    shortened = message.removeprefix("error: ").removeprefix("warning: ")
    parts = map(_bare, re.split(r"\S*[A-Z][A-Z_]+\S*|\S+=\S*", shortened))
    return next((part for part in parts if part not in texts and not _is_joined(part.split(), texts)), "")


def _is_joined(words: list[str], texts: str) -> bool:
    """Returns True if the words are the end of one text and then the start of another."""
    splits = ((_bare(" ".join(words[:n])), _bare(" ".join(words[n:]))) for n in range(1, len(words)))
    return any(f"{end}\n" in texts and f"\n{start}" in texts for end, start in splits)


def _bare(text: str) -> str:
    """A text on one line, without the punctuation around it."""
    return " ".join(text.split()).strip(" :;,()?.'\"@")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as in a shell, with this interpreter as ``python``."""
    return _run(["bash", "-c", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; {command}'], folder)


def run_program(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in a new process, its trainings shortened."""
    return _run([sys.executable, "-c", f"from tests.documentation import shorten; shorten()\n{program}"], folder)


def shorten() -> None:
    """Makes `wqmix_jax.load_config` add options of a short training."""
    real = wqmix_jax.load_config

    def short(*overrides: str, **options: Any) -> Any:
        given = [text for text in overrides if text.partition("=")[0] not in [each.partition("=")[0] for each in SHORT]]
        return real(*given, *SHORT, *_short_episodes(given), **options)

    wqmix_jax.load_config = short  # type: ignore[assignment]


def _run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compilation is most of a short run's time
    env = os.environ | fast | {"PYTHONPATH": paths}
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=1200)
