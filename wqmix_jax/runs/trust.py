"""The rules for opening a run's folder: which code its ``config.yaml`` may have executed.

Runs are passed around, and a ``config.yaml`` names code: the classes of the algorithm and the environment, the file of
a simulator, the module of a task, the interpreter of its workers. Classes of this package are always allowed. Other
modules and simulators are imported only from places that the user has named, never from the folder itself, and a
program is started only if the user has named it. Installed modules of tasks are imported if their packages are
well-known or the user has named them.
"""

import importlib
import os
import re
import shlex
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

from wqmix_jax.config import PROGRAMS
from wqmix_jax.envs.host.bridge import BridgedEnvironment, HostEnvironment, simulator_file
from wqmix_jax.envs.host.farama import (
    KNOWN_PACKAGES,
    FaramaEnvironment,
    imported_module,
    is_known,
    is_module_name,
    module_file,
    module_option,
)
from wqmix_jax.errors import ConfigError
from wqmix_jax.options import add_import_paths, part_class
from wqmix_jax.records.metrics import HEADER_FILE
from wqmix_jax.records.run_dir import CONFIG_FILE, read_config
from wqmix_jax.runs.output import report

_TARGET = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*)[.:][^\W\d]\w*")

_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}

_INSTALLED_ALSO = {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
"""Places of packages that are not those where this interpreter's pip installs."""

_HOW = "start where it is, or name its folder with --config-dir (config_dir= in Python)"

_PLACES = "the current folder or --config-dir (config_dir= in Python), outside of runs and installed packages"

_PLACES_OF_TASKS = "the current folder, outside of runs and of folders without __init__.py"


class Named(NamedTuple):
    """The places and programs that the user has named for opening a folder.

    Attributes:
        config_dir: a folder of yamls; modules may come from it and from its parent, as from the current folder.
        worker_python: the interpreter of the workers.
        simulator: the run's ``env.simulator``, which then may come from anywhere.
        name: the run's ``env.name``; the same holds if it is a module.
        module: the run's ``env.module``; the same holds.
    """

    config_dir: str | os.PathLike[str] | None = None
    worker_python: str | None = None
    simulator: str | None = None
    name: str | None = None
    module: str | None = None


NOTHING_NAMED = Named()


def open_config(run_dir: Path, named: Named, *, option: str = "run_dir") -> dict[str, Any]:
    """Reads a run's options as `wqmix_jax.records.run_dir.read_config`, and checks the code that building them runs.

    One line on stderr names each module and simulator that is not part of this package and will be imported.

    Args:
        run_dir: the run's folder.
        named: the places and programs that the user has named.
        option: the option that named the folder.

    Returns:
        The options, with the programs that the user has named.

    Raises:
        ConfigError: if the folder is not a run's, or names code from elsewhere; nothing of it has been executed then.
    """
    values, config = read_config(run_dir, option=option), run_dir / CONFIG_FILE
    add_import_paths(named.config_dir)
    try:
        lines = {
            group: _checked_target(run_dir, group, values[group].get("_target_"), named) for group in ("algo", "env")
        }
        _report(f"importing {line}, named by {config}" for line in lines["env"])
        env_class = part_class("env", values["env"]["_target_"])
        values["env"] = _checked_programs(run_dir, env_class, values["env"], named)
        _report(f"importing {line}, named by {config}" for line in lines["algo"])
        part_class("algo", values["algo"]["_target_"])
    except ConfigError as error:
        raise ConfigError(f"{config}: {error}") from error
    return values


def refuse_foreign_callbacks(run_dir: Path, callbacks: Any, named: Named) -> None:
    """Checks the code that building a run's callbacks executes, by the rules of `open_config`.

    Args:
        run_dir: the run's folder.
        callbacks: the option ``callbacks`` in its ``config.yaml``.
        named: the places that the user has named.

    Raises:
        ConfigError: if a callback is from elsewhere; nothing of it has been executed then.
    """
    config = run_dir / CONFIG_FILE
    for index, value in enumerate(callbacks if isinstance(callbacks, list) else ()):
        target = value.get("_target_") if isinstance(value, Mapping) else value
        try:
            lines = _checked_target(run_dir, f"callbacks.{index}", target, named)
        except ConfigError as error:
            raise ConfigError(f"{config}: {error}; callbacks=[] resumes without them") from error
        _report(f"importing {line}, named by {config}" for line in lines)


def _report(lines: Iterable[str]) -> None:
    for line in lines:
        report(line)


def _checked_target(run_dir: Path, group: str, target: Any, named: Named) -> list[str]:
    """Returns the modules that a class's import will execute, without importing anything.

    Raises:
        ConfigError: if such a module is not allowed.
    """
    option = f"{group}._target_={target!r}"
    match = _TARGET.fullmatch(target) if isinstance(target, str) else None
    if match is None:
        raise ConfigError(f"{option} is not allowed: a class is written MODULE.CLASS")
    module, lines = match["module"], []
    if module.split(".")[0] == __name__.split(".")[0]:
        if not _is_module_of_package(module):
            raise ConfigError(f"{option} is not allowed: {module} is not a module of this package")
        return []
    # `pkgutil.resolve_name` tries the last name of MODULE.CLASS as a module, too.
    for name, file in _files_to_import(module if ":" in target else target):
        if file is None and name == target:
            continue  # a class
        if file is None:
            raise ConfigError(f"{option} can't be imported: module {name} is not found; {_HOW}")
        if not _is_allowed(file, run_dir, named):
            raise ConfigError(f"{option} is not allowed: {name} is {file}, but must be in {_PLACES}")
        lines.append(f"{name} from {file}")
    return lines


def _is_module_of_package(module: str) -> bool:
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return path.with_name(f"{path.name}.py").is_file() or (path / "__init__.py").is_file()


def _files_to_import(module: str, path: Iterable[str] | None = None) -> Iterator[tuple[str, Path | None]]:
    """Yields the modules that importing ``module`` executes, outermost package first, with their files.

    The file is None if it is not found or unknown, as for a built-in module. Nothing is imported here.

    Args:
        module: its dotted name.
        path: the folders where another process looks for modules. Without it, this process imports the module, and
            modules that it has imported already are left out, because they are not executed again.
    """
    parts, search, here = module.split("."), path, path is None
    for index in range(len(parts)):
        name = ".".join(parts[: index + 1])
        if here and name in sys.modules:
            search = getattr(sys.modules[name], "__path__", None)
        else:
            spec = _spec(name, search)
            if spec is None or (spec.origin is None and spec.submodule_search_locations is None):
                yield name, None
                return
            search = spec.submodule_search_locations
            if spec.origin is not None:  # not a namespace package, which has no file
                yield name, Path(spec.origin).resolve() if spec.has_location else None
            elif index + 1 == len(parts):
                yield name, None
        if search is None and index + 1 < len(parts):  # not a package
            yield ".".join(parts[: index + 2]), None
            return


def _spec(name: str, search: Iterable[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, search)  # type: ignore[arg-type]
        except KeyError:  # a namespace package inside one that is not imported: the finder would need its parent
            spec = ModuleSpec(name, None, is_package=True)
            folders = (Path(folder, name.rpartition(".")[2]) for folder in search or ())
            spec.submodule_search_locations = [str(folder) for folder in folders if folder.is_dir()]
        if spec is not None:
            return spec
    return None


def _is_allowed(file: Path, run_dir: Path, named: Named) -> bool:
    """Checks that ``file``, resolved, is in a place that the user has named, outside of runs and packages."""
    run_dir, working = run_dir.resolve(), Path.cwd().resolve()
    places = [] if working.is_relative_to(run_dir) else [working]
    if named.config_dir is not None:
        config_dir = Path(named.config_dir).resolve()
        places += [place for place in (config_dir, config_dir.parent) if not place.is_relative_to(run_dir)]
    return any(_is_users(file, place, run_dir) for place in places)


def _is_users(file: Path, place: Path, run_dir: Path) -> bool:
    """Checks that ``file`` is in ``place``, outside of the folders in it that hold a run or installed packages."""
    if not file.is_relative_to(place):
        return False
    inside = [folder for folder in file.parents if folder != place and folder.is_relative_to(place)]
    on_the_way = {folder for folder in (run_dir, *run_dir.parents) if folder != place and folder.is_relative_to(place)}
    foreign = [*_INSTALLED, *on_the_way]
    return not any(
        folder in foreign or folder.name == "site-packages" or (folder / HEADER_FILE).is_file() for folder in inside
    )


def _checked_programs(run_dir: Path, env_class: type, options: Mapping[str, Any], named: Named) -> dict[str, Any]:
    """Returns the options of the environment, with the programs that the user has named.

    Raises:
        ConfigError: if they name a program that the user hasn't.
    """
    programs = {name: value for name in PROGRAMS if (value := getattr(named, name)) is not None}
    if not issubclass(env_class, BridgedEnvironment):
        for name in programs.keys() & {"worker_python", "simulator"}:
            raise ConfigError(f"env.{name}={programs[name]} is not allowed: {env_class.__name__} has no workers")
    else:
        _check_worker_python(options.get("worker_python"), named.worker_python)
    for name in programs.keys() & {"name", "module"}:
        if options.get(name) != programs[name]:
            raise ConfigError(f"env.{name}={options.get(name)!r} is not {programs[name]!r}: a run keeps its tasks")
    if issubclass(env_class, HostEnvironment):
        _check_simulator(run_dir, str(options.get("simulator")), named)
    if issubclass(env_class, FaramaEnvironment):
        _check_task(run_dir, options, named)
    return {**options, **programs}


def _check_worker_python(python: Any, named: str | None) -> None:
    """Refuses an interpreter that the user hasn't named."""
    if python is not None and python != sys.executable and named is None:
        repeat = f"env.worker_python={shlex.quote(str(python))} (worker_python= in Python)"
        raise ConfigError(f"env.worker_python={python!r} is not started: if you trust this program, add {repeat}")


def _check_simulator(run_dir: Path, simulator: str, named: Named) -> None:
    """Refuses a simulator outside the places that the user has named, unless it is named itself."""
    if named.simulator is not None:
        if named.simulator != simulator:
            raise ConfigError(f"env.simulator={simulator!r} is not {named.simulator!r}: a run keeps its simulator")
        return
    option, file = f"env.simulator={simulator!r}", simulator_file(simulator)
    repeat = f"if you trust it, add env.simulator={shlex.quote(simulator)} (simulator= in Python)"
    if file is None:
        raise ConfigError(f"{option} is not imported: it names an installed module; {repeat}")
    if not _is_allowed(file.resolve(), run_dir, named):
        raise ConfigError(f"{option} is not allowed: {file} must be in {_PLACES}; {repeat}")
    _report([f"workers run {file}, named by {run_dir / CONFIG_FILE}"])


def _check_task(run_dir: Path, options: Mapping[str, Any], named: Named) -> None:
    """Refuses a task's module outside of the current folder and of well-known packages, unless it is named itself."""
    module, key = imported_module(options), module_option(options)
    if module is None or not is_module_name(module):  # the class of the options refuses the latter
        return
    if getattr(named, key) == module:
        return
    option = f"env.{key}={module!r}"
    repeat = f"if you trust it, add env.{key}={module} ({key}= in Python)"
    imported = list(_files_to_import(module, _path_of_workers(module)))
    if all(file is None or _is_installed(file) for _, file in imported):
        if not is_known(module):
            listed = ", ".join(KNOWN_PACKAGES[:-1]) + f" or {KNOWN_PACKAGES[-1]}"
            reason = f"it is not in the current folder, and no module of {listed}"
            raise ConfigError(f"{option} is not imported: {reason}; {repeat}")
        _report([f"workers import {module}, named by {run_dir / CONFIG_FILE}"])
        return
    in_folder = module_file(module) is not None
    for name, file in imported:
        if file is None:
            raise ConfigError(f"{option} can't be imported: {name} is not found; {repeat}")
        if not in_folder or not _is_allowed(file, run_dir, Named()):
            raise ConfigError(f"{option} is not allowed: {file} must be in {_PLACES_OF_TASKS}; {repeat}")
    _report(f"workers import {file}, named by {run_dir / CONFIG_FILE}" for _, file in imported)


def _path_of_workers(module: str) -> list[str]:
    """Returns the folders where workers look for a task's module, and after them all that this process has, too.

    Workers have the current folder if a file of the module is in it, and inherit PYTHONPATH. A module that is found
    only in a folder that workers lack is not installed, so it is refused.
    """
    importlib.invalidate_caches()
    inherited = os.environ.get("PYTHONPATH")
    folders = ["" if module_file(module) is not None else None, *(inherited.split(os.pathsep) if inherited else ())]
    return [str(Path(folder).absolute()) for folder in folders if folder is not None] + sys.path


def _is_installed(file: Path) -> bool:
    return any(file.is_relative_to(place) for place in _INSTALLED | _INSTALLED_ALSO)
