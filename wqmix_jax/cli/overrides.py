"""Composes options from the yamls of the package, those of a user's folder and the overrides of a command line.

Hydra does the composing, in `compose`; its errors become one line.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from wqmix_jax.cli.checks import GROUPS, check_overrides, refuse_incomplete
from wqmix_jax.cli.syntax import as_text, keys_of, parse_overrides
from wqmix_jax.config import PROGRAMS, RunConfig, run_config
from wqmix_jax.errors import ConfigError, install_extra
from wqmix_jax.foreign_names import translated
from wqmix_jax.options import CONFIG_DIR, add_import_paths


class Composed(NamedTuple):
    """Composed options.

    Attributes:
        values: the options as nested mappings, every default included.
        choices: the names of the chosen yamls by their groups.
        given: the dotted names of the options that overrides set.
    """

    values: dict[str, Any]
    choices: Mapping[str, str]
    given: tuple[str, ...]


def load_config(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> RunConfig:
    """Returns the options that the command line would run with.

    Args:
        *overrides: as on the command line: ``"+algo=ow_qmix", "num_seeds=8"``.
        config_dir: a folder with your own yamls, as ``--config-dir``.

    Returns:
        The options, with the algorithm and the environment built.

    Raises:
        ConfigError: if an option is not allowed.
    """
    return run_config(load_values(*overrides, config_dir=config_dir))


def load_values(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Returns the options as nested mappings, every default included, as in ``config.yaml`` of a run folder.

    Raises:
        ConfigError: if an option is not known; values are checked by `run_config`.
    """
    prepared = prepare(overrides)
    add_import_paths(config_dir)
    refuse_incomplete(config_dir)
    check_overrides(prepared, config_dir)
    return compose_run(prepared, config_dir).values


def prepare(arguments: Sequence[str]) -> list[str]:
    """Rewrites arguments for hydra: paths and names as text, keys of open mappings added, the preset last.

    ``sweep.NAME=..``, ``env.options.NAME=..`` and the like name keys that the yamls can't list, and with ``resume``
    no yaml lists ``env.worker_python``. Hydra merges in the order of the command line, and a preset changes values of
    the algorithm's yaml, so it must come after the algorithm.

    Raises:
        ConfigError: if one has the name of another library's option.
    """
    for argument in arguments:
        if argument.startswith("--") and (foreign := translated(argument.partition("=")[0])) is not None:
            raise ConfigError(f"{argument} is unknown: {foreign}")
    texts = [f"++{text}" if _IN_OPEN_MAPPING.match(text) else text for text in as_text(arguments)]
    return sorted(texts, key=lambda text: text.startswith("+preset="))


_IN_OPEN_MAPPING = re.compile(rf"sweep\.|(algo|env)\.\w+(\.|=\s*\{{)|env\.({'|'.join(PROGRAMS)})=")


def compose_run(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> Composed:
    """Composes ``train.yaml``.

    Raises:
        ConfigError: if an option is not known, or a yaml is not right.
    """
    with errors_in_one_line(), unknown_keys_refused(overrides, config_dir):
        return _compose("train", overrides, config_dir)


def compose_evaluation(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> Composed:
    """Composes ``evaluate.yaml``; unknown keys are added, so that the class of the options refuses them.

    Raises:
        ConfigError: if a group's choice is not known, or a yaml is not right.
    """
    plain = [text.removeprefix("+") if text.startswith("+algo=") else text for text in overrides]
    forced = [text if text.startswith(("env=", "algo=", "+", "~")) else f"++{text}" for text in plain]
    uses_yamls = "run_dir" not in keys_of(overrides)  # otherwise the run's algorithm and environment play
    with errors_in_one_line():
        composed = _compose("evaluate", forced, config_dir, reports_replaced=uses_yamls)
    # An algorithm's yaml may set options of the run that trains it, which are of no use here.
    allowed = {*yaml.safe_load((CONFIG_DIR / "evaluate.yaml").read_text()), *GROUPS, *composed.given}
    unused = [name for name in RunConfig.__dataclass_fields__ if name not in allowed]  # type: ignore[attr-defined]
    return composed._replace(values={name: each for name, each in composed.values.items() if name not in unused})


def compose_search(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Composes ``search.yaml``, the options of a search without those of its runs; unknown keys are added.

    Raises:
        ConfigError: if an option can't be read.
    """
    with errors_in_one_line():
        return _compose("search", [f"++{text}" for text in overrides], config_dir).values


def _compose(
    primary: str,
    overrides: Sequence[str],
    config_dir: str | os.PathLike[str] | None,
    *,
    reports_replaced: bool = True,
) -> Composed:
    """Composes ``PRIMARY.yaml`` as `hydra.main` would."""
    with users_first(config_dir), hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra.compose(primary, overrides=list(overrides), return_hydra_config=True)
        if reports_replaced:
            _report_replaced(primary, overrides, config_dir)
        choices = {group: str(name) for group, name in composed.hydra.runtime.choices.items()}
        with _hydra_split_off(composed):
            return Composed(plain(composed), choices, tuple(keys_of(overrides)))


@contextlib.contextmanager
def _hydra_split_off(composed: DictConfig) -> Iterator[None]:
    """Removes hydra's own values; others may refer to them, as in ``run_dir=outputs/${hydra:runtime.choices.algo}``."""
    current = HydraConfig.instance()
    before = current.cfg
    try:
        current.set_config(composed)
        with open_dict(composed):
            del composed["hydra"]
        yield
    finally:
        current.cfg = before


def plain(composed: DictConfig) -> dict[str, Any]:
    """Returns a composed config as nested mappings, interpolations resolved.

    Raises:
        ConfigError: if an interpolation can't be resolved.
    """
    try:
        return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key} is not allowed: {str(error).splitlines()[0]}") from None


def given_values(composed: Composed) -> dict[str, Any]:
    """Returns the values of the options that were given with ``resume``, as nested mappings."""
    found: dict[str, Any] = {}
    for key in composed.given:
        if key == "resume" or key.startswith(("hydra.", "hydra/")):
            continue
        *groups, name = key.split(".")
        source, target = composed.values, found
        for group in groups:
            source, target = source[group], target.setdefault(group, {})
        target[name] = source.get(name)
    return found


class _UsersFirst(SearchPathPlugin):
    """Puts a user's folder before all others: hydra puts that of ``--config-dir`` after the package's."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the folder."""
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


_reported: set[str] = set()


def _report_replaced(primary: str, overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> None:
    """Prints which of the package's yamls those of ``config_dir`` replace, each once; hydra must be initialized."""
    if config_dir is None:
        return
    loader = GlobalHydra.instance().config_loader()
    for default in loader.compute_defaults_list(primary, list(overrides), RunMode.RUN).defaults:
        path = f"{default.config_path}.yaml"
        if (CONFIG_DIR / path).is_file() and (own := Path(config_dir).absolute() / path).is_file():
            line = f"using {own} instead of the built-in {str(default.config_path).replace('/', '=')}"
            if line not in _reported:
                _reported.add(line)
                print(line, file=sys.stderr, flush=True)


INHERITS_ITSELF = (
    "a yaml lists itself in its defaults: one that replaces a built-in yaml can't inherit it; choose another name, or "
    "copy the options"
)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
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
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_joined(error)) from None


@contextlib.contextmanager
def unknown_keys_refused(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """Lets the class of the options refuse an unknown key of a run, because it knows the others.

    Composes once more with all keys added. Hydra's error is kept if that shows nothing.
    """
    try:
        yield
    except MissingConfigException:
        raise
    except ConfigCompositionException:
        parsed = zip(overrides, parse_overrides(overrides), strict=True)
        forced = [text if known.key_or_group in GROUPS or known.is_add() else f"++{text}" for text, known in parsed]
        if not any(text.startswith("+algo=") for text in forced):  # with resume: any will do
            forced.append("+algo=iql")
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            run_config(_compose("train", forced, config_dir).values)
        raise


def _joined(error: Exception) -> str:
    """Joins an error and its cause to one line."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("See http", "Set the env")))
