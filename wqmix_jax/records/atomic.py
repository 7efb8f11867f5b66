"""Files that a reader sees as a whole: the old one or the new one, never a part."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``, and moves the file written there to ``path`` at the end.

    The temporary path ends like ``path``, because some writers choose a format by the ending. If the block raises, the
    temporary file is removed and ``path`` stays as it was.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, see `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text)
