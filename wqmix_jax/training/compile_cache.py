"""JAX's persistent compilation cache, turned on by default: a program that was compiled before is read from the disk.

JAX's keys contain the program itself, the versions of jaxlib and the backend, XLA's flags and the compile options, so a
new version of this package or of JAX never reads a program that an old one wrote. JAX locks the folder while it reads
and writes, and removes the entries that were used least recently.
"""

import contextlib
import hashlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

MAX_BYTES = 500_000_000
"""Size of the folder, above which the least recently used entries are removed; a run adds about 1 MB."""

MIN_COMPILE_SECONDS = 0.2
"""Programs that compile faster are not stored: reading and writing their entries would cost as much."""

LOCK_SECONDS = 10
"""Time to wait for another process that holds the folder's lock; JAX waits as long."""

_JAX_DEFAULTS = {"jax_compilation_cache_max_size": -1, "jax_persistent_cache_min_compile_time_secs": 1.0}
_SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
}

_FAULT = r"Error (reading|writing) persistent compilation cache entry"

_HIT = "/jax/compilation_cache/cache_hits"


class _Process:
    """State of this process.

    Attributes:
        folder: the folder that `use_compilation_cache` gave to JAX; None while the cache is off or set by the user.
        hits: programs read from the cache so far; None before anything counts them.
    """

    folder: str | None = None
    hits: int | None = None


def use_compilation_cache(setting: bool | str) -> None:
    """Turns JAX's persistent compilation cache on or off, unless the user has configured it through JAX itself.

    ``JAX_COMPILATION_CACHE_DIR``, ``jax.config`` and ``JAX_ENABLE_COMPILATION_CACHE=false`` win over ``setting``. A
    folder that can't be used costs a warning on stderr and nothing else.

    Args:
        setting: true for `default_folder`, a folder, or false for none.
    """
    if _setting("jax_compilation_cache_dir") != _Process.folder or not _setting("jax_enable_compilation_cache"):
        return
    wanted = _wanted_folder(setting)
    folder = None if wanted is None or not _is_usable(wanted, own=setting is True) else str(wanted)
    if folder == _Process.folder:
        return
    _Process.folder = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    for name, value in _SETTINGS.items():
        if _setting(name) == _JAX_DEFAULTS[name]:
            jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX keeps the folder with which it first compiled


def _wanted_folder(setting: bool | str) -> Path | None:
    if setting is False:
        return None
    try:
        return default_folder() if setting is True else Path(setting).expanduser().absolute()
    except RuntimeError as error:  # a user without a home folder, as in some containers
        _warn("in the home folder" if setting is True else setting, str(error))
        return None


def default_folder() -> Path:
    """The folder of this machine's kind of processor in the user's cache folder.

    A program for one CPU may contain instructions that another lacks, and clusters share home folders.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return caches / "wqmix_jax" / "jax" / _processor()


def compile_program(lowered: Any, options: Mapping[str, str | bool | float] | None = None) -> tuple[Any, bool]:
    """Compiles what ``jax.jit(..).lower(..)`` returned.

    Returns:
        The program, and whether it was read from the cache.
    """
    with cache_faults_in_one_line():
        before = _count_hits()
        program = lowered.compile(dict(options or {}))
        return program, _count_hits() > before


@contextlib.contextmanager
def cache_faults_in_one_line() -> Iterator[None]:
    """Prints JAX's warnings that the cache failed as one line on stderr; other warnings stay as they are."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=_FAULT)
            yield
    finally:
        _show(caught)


def _show(caught: list[warnings.WarningMessage]) -> None:
    faults = [str(warning.message) for warning in caught if re.match(_FAULT, str(warning.message))]
    for warning in caught:
        if str(warning.message) not in faults:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if faults:
        _warn(_setting("jax_compilation_cache_dir"), faults[0].partition("': ")[2])


def _setting(name: str) -> Any:
    return getattr(jax.config, name)  # which declares none of its attributes


def _is_usable(folder: Path, *, own: bool) -> bool:
    """Makes the folder, and sees to entries without a time of last use, which would make JAX's next writes fail.

    In this package's ``own`` folder, an interrupted process left them half written: they are removed. In another they
    may belong to other programs, and get the time 0.

    Returns:
        Whether entries can be written there; if not, a line on stderr says why.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write there can run code as this user
        with filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
            for entry in folder.glob("*-cache"):
                used = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
                if used.exists():
                    continue
                if own:
                    entry.unlink()
                else:  # other programs' entries, kept without times because they don't bound the folder's size
                    used.write_bytes(bytes(8))
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        _warn(folder, getattr(error, "strerror", None) or str(error))
        return False
    return True


def _warn(folder: Any, reason: str) -> None:
    hint = "compilation_cache=FOLDER chooses another folder, compilation_cache=false none"
    reason = " ".join(reason.split())
    print(f"warning: the compilation cache {folder} can't be used: {reason}; {hint}", file=sys.stderr, flush=True)


def _count_hits() -> int:
    """Programs that this process has read from the cache since the first call."""
    if _Process.hits is None:
        _Process.hits = 0
        jax.monitoring.register_event_listener(_listen)
    return _Process.hits


def _listen(event: str, **_: Any) -> None:
    _Process.hits = (_Process.hits or 0) + (event == _HIT)


def _processor() -> str:
    """A name for this kind of processor and its instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = sorted({line for line in lines if line.split("\t")[0].strip() in ("model name", "flags", "Features")})
    digest = hashlib.sha256("\n".join(facts or [platform.processor()]).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"
