"""The environments. Importing this package makes ``jumanji.make("PredatorPrey-v0")`` work."""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

JUMANJI_ID = "PredatorPrey-v0"


def _register() -> None:
    from jumanji.registration import register, registered_environments

    if JUMANJI_ID not in registered_environments():
        register(id=JUMANJI_ID, entry_point="wqmix_jax.envs.predator_prey.jumanji:PredatorPreyJumanji")


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers as soon as somebody imports jumanji.

    To import it here would cost each run two seconds, load matplotlib and start jax's backend before its settings are
    made.
    """

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """jumanji's own spec, whose loader registers once the module is complete; None for all other modules."""
        if fullname != "jumanji" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


if "jumanji" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
