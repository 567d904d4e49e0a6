"""echo4o train configs/tiny_cpu.yaml --lr 2e-5"""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from echo4o.cli.errors import let_threads_rest, report_errors
from echo4o.config import flag_help, load_config

verbs = typer.Typer()

TRAIN_USAGE = """\
Usage: echo4o train [CONFIG.yaml] [--flag value ...]

Defaults < YAML < flags. Flags may be written with dashes, and shortened while unambiguous; booleans as --flag True.
"""


@verbs.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train. `echo4o train --help` lists every flag."""
    raise typer.Exit(run_training(context.args))


def run_training(argv: Sequence[str]) -> int:
    """Train with the settings of a command line; returns the exit status."""
    if any(word in ("-h", "--help") for word in argv):
        typer.echo(f"{TRAIN_USAGE}\n{flag_help()}")
        return 0

    let_threads_rest()
    # What sockets and stores say when a rank is gone: our own message is the readable one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def work() -> None:
        config = load_config(argv)
        from echo4o.train.trainer import train as start  # torch and transformers: seconds

        start(config)

    return report_errors(work)
