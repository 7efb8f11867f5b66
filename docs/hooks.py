"""Hooks of MkDocs for links into the repository, equations as MathML, narrow tables, messages and images."""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

REPOSITORY = Path(__file__).parent.parent

LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")
"""A link of markdown to a path, with or without an anchor."""

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""An equation as `pymdownx.arithmatex` leaves it in its generic mode."""

CASES = re.compile(r'<mo stretchy="true" fence="true" form="prefix">&#x0007B;</mo><mtable>')
"""The brace of LaTeX's ``cases``. A browser stretches it only in a mathematical font, so the site's style draws it."""


MESSAGE = re.compile(r'<div class="language-text highlight">(<pre>.*?<code>)(.*?)(?=\n)', re.DOTALL)
"""A block of messages, with its first line."""

MESSAGES = "troubleshooting.md"
"""The page whose text blocks are messages."""

CELL = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)

INLINE_CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")

IMAGE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Points relative links that leave ``docs/pages`` at the same file in the repository.

    Raises:
        PluginError: if there is no such file.
    """
    folder = posixpath.join("docs/pages", posixpath.dirname(page.file.src_uri))

    def address(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if path.startswith("docs/pages/"):
            return link[0]
        found = REPOSITORY / path
        if not found.exists():
            raise PluginError(f"{page.file.src_uri}: {link[2]} is not a file of this repository")
        kind = "tree" if found.is_dir() else "blob"
        return f"{link[1]}{config.repo_url}/{kind}/main/{path}{link[3] or ''}{link[4]}"

    return LINK.sub(address, markdown)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Converts equations, marks where code in tables may break, links images to themselves, and names messages."""
    content = EQUATION.sub(_mathml, content)
    content = CELL.sub(lambda cell: INLINE_CODE.sub(_breakable, cell[0]), content)
    content = IMAGE.sub(r'<a href="\1">\g<0></a>', content)
    return MESSAGE.sub(_named_message, content) if page.file.src_uri == MESSAGES else content


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    return CASES.sub('<mtable class="cases">', convert(html.unescape(found[3]).strip(), display=display))


def _breakable(code: re.Match[str]) -> str:
    """Allows a line break after each ``_``, ``.``, ``/`` and ``=`` inside a name."""
    return re.sub(r"([_./=])(?=\w)", r"\1<wbr>", code[0])


def _named_message(block: re.Match[str]) -> str:
    """Gives a block of messages an anchor: the words of its first line."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"<[^>]*>|&\w+;|&#\d+;", "", block[2]).lower())
    return f'<div class="language-text highlight message no-copy" id="{"-".join(words)}">{block[1]}{block[2]}'
