"""Behaviour that all command lines share: how they end if the reader, the Python or the devices are missing."""

import functools
import importlib.metadata
import json
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from wqmix_jax.errors import CLOSED_PIPE, refuse
from wqmix_jax.runs.output import discard, is_broken

P = ParamSpec("P")

FIRST_UNSUPPORTED = (3, 14)
"""Python's argparse checks help texts from 3.14 on, and hydra 1.3 has one that isn't a string."""


def command(main: Callable[P, None]) -> Callable[P, None]:
    """Makes ``main`` end as a program should.

    A reader that is gone (``| head``) ends it quietly with exit code 141, Ctrl-C with 130. Devices that JAX can't start
    (``JAX_PLATFORMS=cuda`` without a GPU) and an unsupported Python are refused in one line, with exit code 2.
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
            if (told := _backend_failure()) is None:
                raise
            refuse(told)

    return run


def copied_checkout() -> Path | None:
    """The checkout in whose ``.venv`` this package is a copy, made by ``pip install .``; None where it is none.

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
    """Says why JAX can't start its devices, where something has imported it."""
    if "jax" not in sys.modules:
        return None
    from wqmix_jax.training.devices import backend_failure

    return backend_failure()
