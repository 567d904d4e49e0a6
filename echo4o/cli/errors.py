"""What a user can mend is one message, not a traceback."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import typer

from echo4o.config import ConfigError
from echo4o.train.failures import USER_ERRORS


def let_threads_rest() -> None:
    """Idle threads of torch's CPU kernels wait by spinning. On two cores a long spin is 10 % faster than a short one if
    nothing else runs, and several times slower if anything does. Read once, when torch is loaded."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def report_errors(work: Callable[[], int | None], also: tuple[type[Exception], ...] = ()) -> int:
    """Run `work`; what the user can mend is one message, not a traceback (ECHO4O_TRACEBACK=1 shows it all the same).

    Args:
        also: errors that count as the user's beside those of `USER_ERRORS`.

    Returns:
        The exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        return work() or 0
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:
        kind = type(error).__name__
        if os.environ.get("ECHO4O_TRACEBACK") or not (kind in USER_ERRORS or isinstance(error, also)):
            raise
        if _speaks_for_all():
            typer.echo(f"{kind}: {error}", err=True)
        return 2 if isinstance(error, ConfigError) else 1


def _speaks_for_all() -> bool:
    """Whether to print an error that every process of a run of several may have; training has its own way."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from echo4o.launch import first_on_this_host, name_of_start

    return first_on_this_host(f"{name_of_start()}-error")
