"""Behaviour that all command lines share: exit codes and one-line errors."""

import contextlib
import functools
import importlib.metadata
import json
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

from wqmix_jax.errors import CLOSED_PIPE, ConfigError, RunError, refuse
from wqmix_jax.runs.hosts import abandon_others
from wqmix_jax.runs.output import discard, is_broken

P = ParamSpec("P")

FIRST_UNSUPPORTED = (3, 14)
"""Python's argparse checks help texts from 3.14 on, and hydra 1.3 has one that isn't a string."""


def command(main: Callable[P, None]) -> Callable[P, None]:
    """Makes ``main`` end as a program should.

    A `ConfigError` is printed as one line, with exit code 2; so are devices that JAX can't start
    (``JAX_PLATFORMS=cuda`` without a GPU) and an unsupported Python. A `RunError` is printed with its own exit code. A
    reader that is gone (``| head``) ends it quietly with exit code 141, Ctrl-C with 130.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if sys.version_info >= FIRST_UNSUPPORTED:
            newest = ".".join(map(str, sys.version_info[:2]))
            refuse(
                f"Python {newest} is not supported, because hydra 1.3 can't be used there: choose 3.11, 3.12 or 3.13"
            )
        try:
            try:
                with _one_line_errors():
                    main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not any(map(is_broken, (sys.stdout, sys.stderr))):
                raise  # of a worker's socket, say
            discard(sys.stdout, sys.stderr)
            sys.exit(CLOSED_PIPE)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception:
            if (reason := _backend_failure()) is None:
                raise
            refuse(reason)

    return run


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        try:
            refuse(str(error))
        finally:
            abandon_others()
    except RunError as error:
        refuse(str(error), error.exit_code)


def warn_of_copied_checkout() -> None:
    """Prints a warning if the checkout's environment holds a copy of this package, which edits don't reach."""
    if (checkout := copied_checkout()) is not None:
        reason = f"edits in {checkout} have no effect on its copy in .venv; make setup replaces the copy"
        print(f"warning: {reason}", file=sys.stderr)


def copied_checkout() -> Path | None:
    """Returns the checkout in whose ``.venv`` this package is a copy, made by ``pip install .``; None otherwise.

    Edits in the checkout don't reach a copy.
    """
    try:
        text = importlib.metadata.distribution("wqmix_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    source = json.loads(text or "{}")
    if "dir_info" not in source or source["dir_info"].get("editable", False):
        return None
    folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(source["url"]).path))
    is_used = Path(__file__).is_relative_to(sys.prefix)  # and not the checkout in the current folder
    return folder if is_used and Path(sys.prefix) == folder / ".venv" else None


def _backend_failure() -> str | None:
    """Explains why JAX can't start its devices, if something has imported it; None otherwise."""
    if "jax" not in sys.modules:
        return None
    from wqmix_jax.training.devices import backend_failure

    return backend_failure()
