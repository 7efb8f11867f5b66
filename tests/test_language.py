"""Everything that a reader sees is plain technical English, see "Language" in CONTRIBUTING.md."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYTHON = sorted(path for folder in ("wqmix_jax", "experiments", "tests") for path in (ROOT / folder).rglob("*.py"))
PYTHON.remove(Path(__file__))

TEXTS = sorted(
    [
        *ROOT.glob("*.md"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
        *(path for folder in ("configs", "experiments") for path in (ROOT / folder).rglob("*.yaml")),
        *(path for folder in ("docs", "experiments", "tests", "wqmix_jax") for path in (ROOT / folder).rglob("*.md")),
    ]
)

NO_SENTENCE_STARTS_SO = re.compile(r"(What|Whether|Of|How|Which|Where|When|Who|That)\b")

AVOIDED = re.compile(
    r"\b(tell|tells|told|telling|beside|lie|lies|lay|lays|lying|anew|at once|stands|go on|goes on|going on|went on"
    r"|gone on|comes to"
    r"|come to|came to|came of|comes of|in the making|likewise|nobody|of one's own|of its own|of a user's own"
    r"|of their own|what becomes of|wants)\b",
    re.IGNORECASE,
)

IDENTIFIERS = re.compile(r"^_*(told|tell|of_run|of_swept|of)(_|$)")


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python(path: Path) -> None:
    source = path.read_text()
    assert [*starts(source), *words_of_python(source), *identifiers(source)] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_texts(path: Path) -> None:
    assert list(words(path.read_text())) == []


def test_the_axis_letters_are_the_same_everywhere() -> None:
    files = ("wqmix_jax/types.py", "docs/pages/architecture.md", "docs/pages/api.md")
    texts = [" ".join((ROOT / file).read_text().replace("`", "").split()) for file in files]
    legends = [re.findall(r"S seeds \(.*?leading axes\.", text) for text in texts]
    assert [len(legend) for legend in legends] == [1, 1, 1]
    assert legends[0] == legends[1] == legends[2]


def test_what_is_avoided_is_found() -> None:
    source = '"""What a run says."""\ntold = f"{1} stands beside it"  # lies\n'
    assert list(starts(source)) == ["line 1: 'What a run says.'"]
    assert list(words_of_python(source)) == ["line 2: stands", "line 2: beside", "line 2: lies"]
    assert list(identifiers(source)) == ["line 2: told"]
    assert list(words("It goes\non until it Lies there.")) == ["line 1: goes on", "line 2: Lies"]


def starts(source: str) -> Iterator[str]:
    """Yields the docstrings that begin with a relative clause in place of a verb or a noun."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if NO_SENTENCE_STARTS_SO.match(text):
                yield f"line {getattr(node, 'lineno', 1)}: {text.splitlines()[0]!r}"
            for statement in node.body[1:]:  # the descriptions of constants and attributes
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))) if NO_SENTENCE_STARTS_SO.match(text):
                        yield f"line {statement.lineno}: {text.splitlines()[0]!r}"


def words_of_python(source: str) -> Iterator[str]:
    """Yields the avoided words in strings and comments."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield from words(token.string, token.start[0])


def words(text: str, first_line: int = 1) -> Iterator[str]:
    """Yields the avoided words of a text, also where they are spread over two lines."""
    for found in AVOIDED.finditer(re.sub(r"\s", " ", text)):
        yield f"line {first_line + text.count(chr(10), 0, found.start())}: {found.group()}"


def identifiers(source: str) -> Iterator[str]:
    """Yields the names of variables, arguments and functions that say nothing."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                if IDENTIFIERS.match(name):
                    yield f"line {node.lineno}: {name}"
