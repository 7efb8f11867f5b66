"""All commands of the package: ``python -m wqmix_jax`` lists them, ``python -m wqmix_jax train ..`` runs one."""

import difflib
import importlib
import sys

from wqmix_jax.cli.command import command
from wqmix_jax.errors import refuse

COMMANDS = {
    "train": "trains all seeds of a run in one compiled call, or resumes it",
    "evaluate": "plays greedy episodes of trained agents, and draws one",
    "compare": "compares runs of one task: intervals over seeds, and a picture",
    "table": "lists many runs in one table",
    "merge": "joins parts of a run that were trained on several hosts",
    "search": "searches for good values of an algorithm's options",
    "tabular": "projects a payoff matrix as QMIX and Weighted QMIX do, exactly",
}

HOMES = {"search": "wqmix_jax.search.__main__", "tabular": "wqmix_jax.tabular.__main__"}
"""Modules of commands that are not called ``wqmix_jax.COMMAND``."""


@command
def main() -> None:
    """Runs the command that the first argument names, on the others; without arguments it lists all of them."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return
    if name == "--version":
        import wqmix_jax

        print(wqmix_jax.__version__)
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        if "=" in name:
            meant = f"did you mean wqmix_jax train {name}? "
        refuse(f"{name} is unknown: {meant}the commands are {', '.join(COMMANDS)}")
    sys.argv = [f"wqmix_jax {name}", *arguments]
    importlib.import_module(HOMES.get(name, f"wqmix_jax.{name}")).main()


def usage() -> str:
    """Returns the list of commands with their descriptions."""
    lines = (f"  wqmix_jax {name:10}{what}" for name, what in COMMANDS.items())
    return "\n".join(["Weighted QMIX and its baselines in JAX.", "", *lines, "", "wqmix_jax COMMAND --help says more."])


if __name__ == "__main__":
    main()
