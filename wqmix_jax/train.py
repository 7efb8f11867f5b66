"""The command line: ``python -m wqmix_jax.train +algo=ow_qmix [key=value ..]``.

Hydra composes the options from the package's yamls and those of a user's own folder (``--config-dir``); whatever is
wrong with them is told in one line on stderr, with exit code 2, before anything is compiled or written.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wqmix_jax.cli import help
from wqmix_jax.cli.command import command, copied_checkout
from wqmix_jax.cli.overrides import as_text, parse_overrides, quoted
from wqmix_jax.config import PROGRAMS, RESUMABLE, RunConfig, run_config
from wqmix_jax.errors import ConfigError, RunError, install_extra, refuse
from wqmix_jax.foreign_names import translated
from wqmix_jax.options import CONFIG_DIR, add_import_paths, whole
from wqmix_jax.runs.hosts import (
    SLURM,
    abandon_others,
    connected,
    refuse_step_of_tasks,
    refuse_unexpected_processes,
    unused_tasks,
    with_host,
)

_GROUPS = ("algo", "env")

_IN_A_MAPPING = re.compile(rf"sweep\.|(algo|env)\.\w+(\.|=\s*\{{)|env\.({'|'.join(PROGRAMS)})=")

_PROGRAMS = tuple(f"env.{name}" for name in PROGRAMS)
"""Options that may be repeated with ``resume``: the folder alone is not trusted with them, see `runs.trust`."""

_REFUSED_FLAGS = ("config_path", "config_name", "experimental_rerun")
"""Hydra's flags that would compose, or unpickle, other files than the package's yamls and those of ``--config-dir``."""


@command
def main() -> None:
    """Runs the command line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises its errors as they are, for `_in_one_line`
    with _refusals():
        parser = get_args_parser()
        parser.error = refuse  # type: ignore[method-assign]
        sys.argv = [sys.argv[0], *_prepared(sys.argv[1:])]
        args = parser.parse_intermixed_args()
        sys.argv = [sys.argv[0], *_flags_first(sys.argv[1:], args.overrides)]  # for hydra, which parses them again
        multirun = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
        _refuse_flags(args)
        add_import_paths(args.config_dir)
        _refuse_incomplete(args.config_dir)
        _register_help(args.config_dir)
        shows_only = args.help or args.hydra_help or args.cfg or args.info or args.shell_completion
        if not shows_only:
            repeated = check_overrides(args.overrides, args.config_dir, multirun=multirun)
            sys.argv = [text for text in sys.argv if text not in repeated]
            if (checkout := copied_checkout()) is not None:
                told = f"edits in {checkout} have no effect on its copy in .venv; make setup replaces the copy"
                print(f"warning: {told}", file=sys.stderr)
        if multirun and not shows_only:
            _share_gpu_if_side_by_side(args.overrides)
            refuse_step_of_tasks(os.environ)
            _check_each_run(args.overrides, args.config_dir)
            folder = _make_sweep_dir(args.overrides)
            sys.argv = [*_with_late_options(sys.argv, args.overrides), f"hydra.sweep.dir={folder}"]  # hydra's own key
        with users_first(args.config_dir), _in_one_line(args.overrides, args.config_dir):
            _run()


def _refuse_flags(args: argparse.Namespace) -> None:
    for name in _REFUSED_FLAGS:
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is not allowed: --config-dir DIR adds yamls, resume=RUN_DIR continues a run")
    modes = ("multirun", "run", "cfg", "info", "shell_completion")
    first, *others = [f"--{name.replace('_', '-')}" for name in modes if getattr(args, name)] or [""]
    if others:
        raise ConfigError(f"{others[0]} is not allowed with {first}: choose one of them")


def _refuse_incomplete(config_dir: str | os.PathLike[str] | None) -> None:
    """Refuses a user's own ``train.yaml`` that lacks what the built-in one has."""
    own = Path(config_dir or "", "train.yaml")
    if config_dir is None or not own.is_file():
        return
    try:
        found, built_in = (yaml.safe_load(path.read_text()) for path in (own, CONFIG_DIR / "train.yaml"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{own} can't be read: {_joined(error)}") from None
    missing = [name for name in built_in if not isinstance(found, dict) or name not in found]
    if missing:
        raise ConfigError(f"{own} lacks {', '.join(missing)}: it replaces the built-in train.yaml as a whole")


def load_config(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> RunConfig:
    """The options that the command line would run with.

    Args:
        *overrides: as on the command line: ``"+algo=ow_qmix", "num_seeds=8"``.
        config_dir: a folder of one's own yamls, as ``--config-dir``.

    Raises:
        ConfigError: where an option is not allowed.
    """
    return run_config(load_values(*overrides, config_dir=config_dir))


def load_values(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The same as nested mappings, every default included, as ``config.yaml`` of a run folder holds them.

    Raises:
        ConfigError: where an option is not known; values are checked when `run_config` builds what they describe.
    """
    overrides = tuple(_prepared(overrides))
    add_import_paths(config_dir)
    _refuse_incomplete(config_dir)
    check_overrides(overrides, config_dir)
    with _in_one_line(overrides, config_dir):
        return _plain(_compose(overrides, config_dir))


def names(group: str, config_dir: str | os.PathLike[str] | None = None) -> str:
    """Lists the choices of ``algo``, ``env`` or ``preset``: the names of the package's yamls and of a user's own."""
    folders = [CONFIG_DIR] if config_dir is None else [CONFIG_DIR, Path(config_dir)]
    stems = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
    return ", ".join(sorted(stem for stem in stems if not stem.startswith("_")))


def _register_help(config_dir: str | None) -> None:
    """What the help in ``train.yaml`` refers to: a group's names, and options with what they mean."""

    def described() -> str:
        folders = [Path(config_dir or CONFIG_DIR), CONFIG_DIR]
        path = next(path for folder in folders if (path := folder / "train.yaml").is_file())
        options = path.read_text().partition("\nnum_seeds:")
        return "".join(options[1:]).partition("\n# Hydra")[0].strip()

    def chosen(*, _root_: DictConfig) -> str:
        groups = {name: _plain(_root_[name]) for name in reversed(_GROUPS) if name in _root_}
        return "\n\n".join(help.described(name, values) for name, values in groups.items())

    resolvers = {"names": lambda group: names(group, config_dir), "described": described, "chosen": chosen}
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(f"wqmix_jax.{name}", resolver, replace=True)


def _make_sweep_dir(overrides: Sequence[str]) -> str:
    """Makes the folder of several runs, a new one of its own where none is given.

    Hydra itself would make it, shows a traceback for what forbids that, and lets two sweeps of one second share one.

    Returns:
        The folder as an override has it.

    Raises:
        ConfigError: if it can't be made, or isn't empty.
    """
    from wqmix_jax.records.run_dir import make_run_dir, new_run_dir

    [given] = [each for each in parse_overrides(overrides) if each.key_or_group == "run_dir"] or [None]
    if given is None or given.value() is None:
        return quoted(str(make_run_dir(new_run_dir(None, algo="sweep", env=None), numbered=True)))
    if "${" not in str(given.value()):  # hydra has yet to work it out
        make_run_dir(new_run_dir(str(given.value()), algo="sweep", env=None))
    return str(given.input_line).partition("=")[2]


def check_overrides(
    overrides: Sequence[str], config_dir: str | os.PathLike[str] | None, *, multirun: bool = False
) -> list[str]:
    """Refuses what hydra would take or tell less clearly: how algorithms and environments are chosen, and resuming.

    Args:
        overrides: as on the command line.
        config_dir: a folder of one's own yamls.
        multirun: whether several values of an option make several runs.

    Returns:
        Those overrides that only repeat what a resumed run says itself.

    Raises:
        ConfigError: where something is refused.
    """
    parsed = _without_search_path(parse_overrides(overrides))
    by_key = {override.key_or_group: override for override in parsed}
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        if key in by_key:
            raise ConfigError(f"{by_key[key].input_line} is not allowed: write run_dir=FOLDER")
    if "resume" in by_key and by_key["resume"].value() is not None:
        return _check_resume(parsed, multirun)
    _check_preset(by_key.get("preset"), config_dir)
    _check_choices(parsed, config_dir, multirun)
    return []


def _check_choices(parsed: Sequence[Override], config_dir: str | os.PathLike[str] | None, multirun: bool) -> None:
    """Refuses what hydra would take or tell less clearly of a new run."""
    by_key = {override.key_or_group: override for override in parsed}
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not multirun and swept[0].key_or_group not in _GROUPS:
        several = "several values make several runs with -m, and a list is written [A,B]"
        raise ConfigError(f"{swept[0].input_line} is not allowed: {several}")
    if multirun:
        _check_hosts_of_sweep(by_key)
    env, algo = by_key.get("env"), by_key.get("algo")
    if env is not None and env.is_sweep_override() and not multirun:
        raise ConfigError(f"{env.input_line} is not allowed: several environments make several runs with -m")
    if env is not None and (env.is_add() or not _is_choice(env, multirun)):
        raise ConfigError(f"{env.input_line} is not allowed: write env=NAME, NAME one of {names('env', config_dir)}")
    listed = names("algo", config_dir)
    if algo is None:
        raise ConfigError(f"an algorithm is missing: write +algo=NAME, NAME one of {listed}")
    if len([override for override in parsed if override.key_or_group == "algo"]) > 1:
        chosen = ", ".join(str(override.input_line) for override in parsed if override.key_or_group == "algo")
        several = "-m +algo=NAME,NAME runs several one after the other"
        raise ConfigError(f"{chosen} is not allowed: an algorithm is chosen once; {several}")
    if not algo.is_add() or algo.is_force_add() or not _is_choice(algo, multirun):
        if algo.is_sweep_override() and not multirun:
            raise ConfigError(f"{algo.input_line} is not allowed: several algorithms make several runs with -m")
        name = algo.value() if isinstance(algo.value(), str) else "NAME"
        raise ConfigError(f"{algo.input_line} is not allowed: write +algo={name} (NAME is one of {listed})")


def _without_search_path(parsed: list[Override]) -> list[Override]:
    """Refuses hydra's own way to add a folder, which puts it after the package's."""
    for override in parsed:
        if override.key_or_group == "hydra.searchpath":
            raise ConfigError(f"{override.input_line} is not allowed: --config-dir DIR adds the yamls of a folder")
    return parsed


def _check_preset(preset: Override | None, config_dir: str | os.PathLike[str] | None) -> None:
    if preset is not None and (not preset.is_add() or preset.is_force_add() or preset.value() is None):
        listed = names("preset", config_dir)
        raise ConfigError(f"{preset.input_line} is not allowed: write +preset=NAME, NAME one of {listed}")


def _check_hosts_of_sweep(by_key: Mapping[str, Override]) -> None:
    """Refuses to spread several runs over hosts that number themselves."""
    if "distributed" in by_key and by_key["distributed"].value() is not False:
        raise ConfigError(f"{by_key['distributed'].input_line} is not allowed with -m: connected hosts train one run")
    if "hosts" in by_key and by_key["hosts"].value() == SLURM:
        raise ConfigError(f"hosts={SLURM} is not allowed with -m: each run of a sweep trains all its seeds")


def _check_each_run(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> None:
    """Refuses a sweep before its first run where one of them is not allowed.

    For SLURM's launcher nothing is built: what a run needs, StarCraft II for example, may be there and not here.
    """
    parsed = parse_overrides(overrides)
    launchers = [str(override.value()) for override in parsed if override.key_or_group == "hydra/launcher"]
    check = load_values if any("submitit" in launcher for launcher in launchers) else load_config
    from wqmix_jax.training.devices import claim_cores, refuse_missing_backend

    claim_cores()  # before an environment's library starts the backend
    refuse_missing_backend()
    for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
        for run in batch:
            check(*run, config_dir=config_dir)


def _share_gpu_if_side_by_side(overrides: Sequence[str]) -> None:
    """Before the backend starts: the launcher's processes inherit the environment."""
    parsed = parse_overrides(overrides)
    launchers = {str(override.value()) for override in parsed if override.key_or_group == "hydra/launcher"}
    if launchers & {"joblib", "submitit_local"}:
        from wqmix_jax.training.devices import share_gpu

        share_gpu()


def _with_late_options(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Lets the options of an algorithm or environment be set where several of these are swept.

    Hydra composes all that is not swept once before the first run, when such an option has no place yet; as a sweep of
    one value it waits for its run.
    """
    parsed = parse_overrides(overrides)
    swept = [each.key_or_group for each in parsed if each.is_sweep_override() and each.key_or_group in _GROUPS]
    prefixes = tuple(f"{group}." for group in swept)
    late = {}
    for override in parsed:
        if override.key_or_group.startswith(prefixes) and not override.is_sweep_override():
            key, _, value = str(override.input_line).partition("=")
            late[override.input_line] = f"{key}=choice({value})"
    return [late.get(text, text) for text in arguments]


def _is_choice(override: Override, multirun: bool) -> bool:
    return isinstance(override.value(), str) or (multirun and override.is_sweep_override())


def _flags_first(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Argparse refuses a ``key=value`` after a flag that comes after others."""
    flags = list(arguments)
    for text in overrides:
        flags.remove(text)
    return [*flags, *overrides]


def _prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments as hydra must have them: paths and names as text, keys of open mappings added.

    Raises:
        ConfigError: if one has the name of another library's option.
    """
    for argument in arguments:
        if argument.startswith("--") and (foreign := translated(argument.partition("=")[0])) is not None:
            raise ConfigError(f"{argument} is unknown: {foreign}")
    return _with_open_keys(as_text(arguments))


def _with_open_keys(arguments: Sequence[str]) -> list[str]:
    """Lets ``sweep.NAME=..``, ``env.options.NAME=..`` and the like be written as any option.

    They are mappings whose names the yamls can't list; ``env.worker_python`` with ``resume`` has no yaml that lists it.
    A preset moves to the end: hydra merges in the order of the command line, and a preset changes what the algorithm's
    yaml says.
    """
    opened = [f"++{text}" if _IN_A_MAPPING.match(text) else text for text in arguments]
    return sorted(opened, key=lambda text: text.startswith("+preset="))


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _run(cfg: DictConfig) -> None:
    """One run, its options composed; one of several with ``--multirun``, maybe in a process of its own."""
    hydra_config = HydraConfig.get()
    several = hydra_config.mode == RunMode.MULTIRUN
    with contextlib.nullcontext() if several else _refusals():  # several: hydra collects the errors
        sources = hydra_config.runtime.config_sources
        config_dir = next((source.path for source in sources if source.provider == "command-line"), None)
        add_import_paths(config_dir)
        values = _plain(cfg)
        # They are compared before they are checked.
        values |= {name: whole(values[name]) for name in ("hosts", "host", "num_seeds")}
        if values["resume"] is None:
            if not several:  # otherwise all are told before the first run
                tell_replaced("train", [*hydra_config.overrides.hydra, *hydra_config.overrides.task], config_dir)
            if several:
                values["run_dir"] = os.path.relpath(hydra_config.runtime.output_dir)
            given = [override.key_or_group for override in parse_overrides(hydra_config.overrides.task)]
            environ = {} if several else os.environ  # each run of a sweep trains all its seeds
            note = unused_tasks(values, environ)
            _start(with_host(values, environ), hydra_config.runtime.choices, given, note, config_dir)
        else:
            from wqmix_jax.runs import session

            changes = _changes(cfg, hydra_config.overrides.task)
            session.resume(Path(str(values["resume"])), changes, config_dir=config_dir)


def _start(
    values: dict[str, Any], choices: Mapping[str, str], given: Sequence[str], note: str | None, config_dir: str | None
) -> None:
    from wqmix_jax.training.devices import claim_cores, refuse_missing_backend

    claim_cores()  # before an environment's library starts the backend
    values = connected(values, os.environ)
    refuse_missing_backend()
    config = run_config(values)  # refuses before the slow imports
    refuse_unexpected_processes(values)
    for name, because in config.algo.without_effect().items():
        if f"algo.{name}" in given:
            print(f"warning: algo.{name} has no effect with {because}", file=sys.stderr, flush=True)
    if note is not None:
        print(note, file=sys.stderr, flush=True)
    from wqmix_jax.runs import session

    session.start(config, values, algo=choices["algo"], env=choices["env"], config_dir=config_dir)


def _check_resume(parsed: Sequence[Override], multirun: bool) -> list[str]:
    """Refuses other options than the run's own, those of its ``config.yaml``.

    Returns:
        The overrides that repeat the run's own.
    """
    [resume] = [override for override in parsed if override.key_or_group == "resume"][-1:]
    if multirun or resume.is_sweep_override():
        raise ConfigError(f"{resume.input_line} is not allowed: runs are resumed one at a time, without -m")
    if resume.value() == "":
        raise ConfigError("resume= is not allowed: it names no folder")
    own, repeated = None, []
    for override in parsed:
        key = override.key_or_group
        if key.split(".")[0] in (*RESUMABLE, "resume", "hydra") or key.startswith("hydra/") or key in _PROGRAMS:
            continue
        own = _own_options(Path(str(resume.value()))) if own is None else own
        if override.is_delete() or key not in own or override.value() != own[key]:
            has = f"it has {key}={own[key]}, and " if key in own else ""
            kept = f"{has}a run keeps its options, except {', '.join(RESUMABLE)}"
            raise ConfigError(f"{override.input_line} is not allowed with resume={resume.value()}: {kept}")
        repeated.append(str(override.input_line))
    return repeated


def _own_options(run_dir: Path) -> dict[str, Any]:
    """A run's options by their dotted names, and the names of its algorithm and environment."""
    from wqmix_jax.records.metrics import load_header
    from wqmix_jax.records.run_dir import kept_options, read_config

    values, header = read_config(run_dir), load_header(run_dir)
    named = {group: header[group] for group in _GROUPS} | {"chunk_iterations": values["chunk_iterations"]}
    return kept_options(values) | named


def _changes(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of the options that were given with ``resume``, as nested mappings."""
    changes = OmegaConf.create()
    for override in parse_overrides(overrides):
        if override.key_or_group != "resume":
            OmegaConf.update(changes, override.key_or_group, OmegaConf.select(cfg, override.key_or_group))
    return _plain(changes)


def _compose(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> DictConfig:
    """What `hydra.main` would hand over."""
    with users_first(config_dir), hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra.compose("train", overrides=list(overrides))
        tell_replaced("train", overrides, config_dir)
        return composed


class _UsersFirst(SearchPathPlugin):
    """Puts a user's folder before all others: hydra puts that of ``--config-dir`` after the package's."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.prepend("command-line", f"file://{self.folder}")


@contextlib.contextmanager
def users_first(config_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """Lets hydra find the yamls of ``config_dir`` before the package's of the same names."""
    Plugins.instance().register(_UsersFirst)
    before, _UsersFirst.folder = _UsersFirst.folder, None if config_dir is None else Path(config_dir).absolute()
    try:
        yield
    finally:
        _UsersFirst.folder = before


def tell_replaced(name: str, overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> None:
    """Prints which of the package's yamls those of ``config_dir`` replace, while hydra is initialized.

    Args:
        name: the primary yaml, without its ending.
        overrides: as on the command line.
        config_dir: a folder of one's own yamls.
    """
    if config_dir is None:
        return
    loader = GlobalHydra.instance().config_loader()
    for default in loader.compute_defaults_list(name, list(overrides), RunMode.RUN).defaults:
        path = f"{default.config_path}.yaml"
        if (CONFIG_DIR / path).is_file() and (own := Path(config_dir).absolute() / path).is_file():
            _tell_once(f"using {own} instead of the built-in {str(default.config_path).replace('/', '=')}")


_told: set[str] = set()  # joblib's launcher pickles this module's functions, which `functools.cache` would forbid


def _tell_once(line: str) -> None:
    if line not in _told:
        _told.add(line)
        print(line, file=sys.stderr, flush=True)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} is not allowed: {str(error).splitlines()[0]}") from None


INHERITS_ITSELF = (
    "a yaml lists itself in its defaults: one that replaces a built-in yaml can't inherit it; choose another name, or "
    "copy the options"
)


@contextlib.contextmanager
def _in_one_line(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turns hydra's and omegaconf's errors into a `ConfigError`."""
    try:
        yield
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if not error.options:
            raise ConfigError(_joined(error)) from None
        options = ", ".join(option for option in error.options if not option.startswith("_"))
        extra = f"; more come with an extra: {install_extra('launchers')}" if group == "hydra/launcher" else ""
        raise ConfigError(f"{group}={name} is not allowed: choose one of {options}{extra}") from None
    except RecursionError:
        raise ConfigError(INHERITS_ITSELF) from None
    except ConfigCompositionException as error:
        _refuse_unknown_key(overrides, config_dir)
        raise ConfigError(_joined(error)) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_joined(error)) from None


def _refuse_unknown_key(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> None:
    """Where an override's key is the trouble: lets the schema say so, which knows the others."""
    parsed = zip(overrides, parse_overrides(overrides), strict=True)
    forced = [text if known.key_or_group in _GROUPS or known.is_add() else f"++{text}" for text, known in parsed]
    if not any(text.startswith("+algo=") for text in forced):  # with resume: any will do
        forced.append("+algo=iql")
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        run_config(_plain(_compose(forced, config_dir)))


def _joined(error: Exception) -> str:
    """An error and its cause, on one line."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("See http", "Set the env")))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Ends the process with one line where a `ConfigError`, a `RunError` or Ctrl-C reaches it."""
    try:
        yield
    except ConfigError as error:
        try:
            refuse(str(error))
        finally:
            abandon_others()
    except RunError as error:
        refuse(str(error), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
