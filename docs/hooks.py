"""Hooks of MkDocs: links from a page into the repository, and equations as MathML, which needs no script."""

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


def on_page_content(content: str, **_: Any) -> str:
    """Converts the equations of a page."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return CASES.sub('<mtable class="cases">', convert(html.unescape(found[3]).strip(), display=display))

    return EQUATION.sub(mathml, content)
