"""echo4o train configs/tiny_cpu.yaml --lr 2e-5"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from echo4o.cli.errors import let_threads_rest, report_errors
from echo4o.config import RunConfig, flag_help, load_config

if TYPE_CHECKING:
    from echo4o.train.evaluating import Sampler

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

        start(config, sampler_of(config))

    return report_errors(work)


def sampler_of(config: RunConfig) -> Sampler | None:
    """What draws the run's ``eval_requests``; None without any.

    Raises:
        ConfigError: if the requests cannot be used.
    """
    training = config.training
    if not training.eval_every or not training.eval_requests:
        return None
    if not Path(training.eval_requests).expanduser().is_file():
        return None  # the check of all settings says so, beside all else that is wrong
    from echo4o.evaluate.during_training import RequestSampler

    return RequestSampler(training.eval_requests, Path(training.results_dir).name)
