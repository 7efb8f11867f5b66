"""Fakes of StarCraft's packages and game, as folders for the workers' path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MAPS = ("3s5z", "3m", "8m", "10gen_terran")


@contextmanager
def faked(folder: Path, *, package: str = "fakes") -> Iterator[Path]:
    """Puts the fakes on the workers' path, and a game with its maps into ``folder``."""
    maps = folder / "Maps" / "SMAC_Maps"
    maps.mkdir(parents=True, exist_ok=True)
    for name in MAPS:
        (maps / f"{name}.SC2Map").touch()
    for build in ("Base69232", "Base75689"):
        program = folder / "Versions" / build / "SC2_x64"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE / package), os.environ.get("PYTHONPATH")])))
        patch.setenv("SC2PATH", str(folder))
        yield folder
