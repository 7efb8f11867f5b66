"""Compiled programs are kept by default, what the user has set wins, and a folder that can't be used costs a line."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.running import ROOT, TINY, main, process
from wqmix_jax import load_config
from wqmix_jax.errors import ConfigError
from wqmix_jax.training import compile_cache
from wqmix_jax.training.compile_cache import compile_program, default_folder, use_compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)

UNSET = "import os; os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)"


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Resets JAX's cache to its defaults, and makes every program slow enough to be kept."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setitem(compile_cache._SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compile_cache._Process.folder = None
        compilation_cache.reset_cache()


def is_known(number: float, options: dict[str, str | bool] | None = None) -> bool:
    """Returns True if a small program is read from the cache."""
    return compile_program(jax.jit(lambda x: x * number + 1).lower(SHAPE), options)[1]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


@pytest.mark.usefixtures("unset")
def test_by_default_programs_are_kept_in_the_users_cache_folder(tmp_path: Path) -> None:
    use_compilation_cache(True)
    assert default_folder().parent == tmp_path / "user" / "wqmix_jax" / "jax"
    assert [is_known(1.5), is_known(2.5), is_known(1.5)] == [False, False, True]
    assert len(entries(default_folder())) == 2
    assert default_folder().stat().st_mode & 0o777 == 0o700, "who can write there can run code"
    assert jax.config.jax_compilation_cache_max_size == compile_cache.MAX_BYTES


@pytest.mark.usefixtures("unset")
def test_the_folder_can_be_moved_and_the_cache_turned_off(tmp_path: Path) -> None:
    use_compilation_cache(str(tmp_path / "own"))
    assert [is_known(1.5), is_known(1.5)] == [False, True]
    use_compilation_cache(False)
    assert [is_known(1.5), is_known(1.5)] == [False, False]
    use_compilation_cache(True)
    assert not is_known(1.5)
    use_compilation_cache(str(tmp_path / "own"))
    assert is_known(1.5)


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(("name", "value"), [(NAMES[0], "theirs"), (NAMES[1], False)])
def test_what_the_user_has_set_in_jax_wins(name: str, value: str | bool, tmp_path: Path) -> None:
    jax.config.update(name, str(tmp_path / value) if isinstance(value, str) else value)
    before = {name: getattr(jax.config, name) for name in NAMES}
    for setting in (True, False, str(tmp_path / "own")):
        use_compilation_cache(setting)
        assert {name: getattr(jax.config, name) for name in NAMES} == before
    assert not (tmp_path / "own").exists()


@pytest.mark.usefixtures("unset")
def test_another_version_or_setting_of_jax_never_reads_what_this_one_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compilation_cache(True)
    assert [is_known(1.5), is_known(1.5)] == [False, True]
    with monkeypatch.context() as patch:
        patch.setattr("jax._src.cache_key.jaxlib_version_str", "0.0.1")
        assert not is_known(1.5)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert not is_known(1.5)
    unoptimised = {"xla_backend_optimization_level": "0"}
    assert [is_known(1.5, unoptimised), is_known(1.5, unoptimised), is_known(1.5)] == [False, True, True]


@pytest.mark.usefixtures("unset")
def test_the_least_recently_used_entries_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compilation_cache(True)
    is_known(1.5)
    [first] = entries(default_folder())
    use_compilation_cache(False)
    monkeypatch.setitem(compile_cache._JAX_DEFAULTS, "jax_compilation_cache_max_size", compile_cache.MAX_BYTES)
    monkeypatch.setitem(compile_cache._SETTINGS, "jax_compilation_cache_max_size", int(2.5 * first.stat().st_size))
    use_compilation_cache(True)
    assert [is_known(2.5), is_known(1.5), is_known(3.5), is_known(1.5), is_known(2.5)] == [
        False,
        True,
        False,
        True,
        False,
    ]


@pytest.mark.usefixtures("unset")
def test_an_entry_that_an_interrupted_process_left_is_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    """JAX writes an entry before its time of use, and each later write needs the times of all."""
    use_compilation_cache(True)
    is_known(1.5)
    [entry] = entries(default_folder())
    entry.write_bytes(entry.read_bytes()[:100])
    entry.with_name(entry.name.replace("-cache", "-atime")).unlink()
    use_compilation_cache(False)
    use_compilation_cache(True)
    assert [is_known(2.5), is_known(1.5), is_known(1.5)] == [False, False, True]
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("unset")
def test_entries_of_other_programs_stay_in_a_folder_of_the_users(tmp_path: Path) -> None:
    """By default JAX doesn't bound a folder's size, and so writes no times of use."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "other-cache").write_bytes(b"a program")
    use_compilation_cache(str(tmp_path / "own"))
    assert [is_known(1.5), is_known(1.5)] == [False, True]
    assert (tmp_path / "own" / "other-cache").read_bytes() == b"a program"


@pytest.mark.usefixtures("unset")
def test_a_user_without_a_home_folder_has_no_cache(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as without an entry of the user in /etc/passwd
    use_compilation_cache(True)
    assert [is_known(1.5), is_known(1.5)] == [False, False]
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: the compilation cache in the home folder can't be used: ")


@pytest.mark.usefixtures("unset")
def test_a_folder_that_cannot_be_used_costs_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    use_compilation_cache(str(tmp_path / "file" / "folder"))
    assert capfd.readouterr().err == (
        f"warning: the compilation cache {tmp_path}/file/folder can't be used: Not a directory; "
        "compilation_cache=FOLDER chooses another folder, compilation_cache=false none\n"
    )
    assert [is_known(1.5), is_known(1.5)] == [False, False]


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("what", ["full", "damaged"])
def test_a_cache_that_fails_later_costs_one_line_each_time(
    what: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    use_compilation_cache(True)
    if what == "full":
        monkeypatch.setattr("jax._src.lru_cache.LRUCache.put", fail)
    else:
        is_known(1.5)
        [entry] = entries(default_folder())
        entry.write_bytes(b"damaged")
    assert not is_known(1.5)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: the compilation cache {default_folder()} can't be used: ")
    assert what == "damaged" or "No space left on device; compilation_cache=FOLDER" in line


@pytest.mark.usefixtures("unset")
def test_other_warnings_stay_as_they_are() -> None:
    with pytest.raises(UserWarning, match="from a user"), compile_cache.cache_faults_in_one_line():
        warnings.warn("from a user", stacklevel=1)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Each compiles the same twenty programs; none fails, and a third process reads them all."""
    code = f"""
{UNSET}
import jax, jax.numpy as jnp
from wqmix_jax.training import compile_cache
compile_cache._SETTINGS["jax_persistent_cache_min_compile_time_secs"] = 0.0
compile_cache.use_compilation_cache({str(tmp_path)!r})
x = jnp.zeros(3)
known = [compile_cache.compile_program(jax.jit(lambda x: x * n).lower(x))[1] for n in range(20)]
print(sum(known))
"""
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    done = [running.communicate(timeout=300) for running in [start(), start()]]
    assert [err for _, err in done] == ["", ""]
    assert start().communicate(timeout=300) == ("20\n", "")


@pytest.mark.slow  # three processes
def test_a_run_says_when_its_programs_come_from_the_cache(tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    first = f"{UNSET}; os.environ['XDG_CACHE_HOME'] = {str(tmp_path / 'user')!r}"
    notes, numbers = [], []
    for name, option in (("cold", ()), ("warm", ()), ("off", ("compilation_cache=false",))):
        done = process(*TINY, *option, f"run_dir={tmp_path / name}", first=first)
        assert (done.returncode, "warning" in done.stderr) == (0, False), done.stderr
        notes += re.findall(r"^compiled in [\d.]+ s(.*)$", done.stdout, re.MULTILINE)
        metrics = (tmp_path / name / "metrics.jsonl").read_text()
        numbers.append(re.sub(r'"steps_per_second": [^}]*', "", metrics))
    assert notes == ["", ", from cache", ""]
    assert numbers == [numbers[0]] * 3


@pytest.mark.parametrize("value", ["off", "null"])
def test_a_setting_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"compilation_cache=.* is not allowed: choose true, false or a folder"):
        load_config("+algo=vdn", f"compilation_cache={value}")


@pytest.mark.slow
def test_it_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    assert main(*TINY, "total_env_steps=1", f"run_dir={tmp_path / 'run'}") == 0
    assert main(f"resume={tmp_path / 'run'}", "compilation_cache=false") == 0
