"""echo4o train configs/tiny_cpu.yaml --lr 2e-5    ·    echo4o data draw data_examples/dataset.yaml --out layout.png

The verbs. Everything here parses and delegates.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from echo4o.config import ConfigError, flag_help, load_config
from echo4o.train.failures import USER_ERRORS

app = typer.Typer(
    name="echo4o",
    help="Fine-tune BAGEL on several reference images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(data, name="data")


class Weights(str, Enum):
    ema = "ema"
    model = "model"


class MergedDtype(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


TRAIN_USAGE = """\
Usage: echo4o train [CONFIG.yaml] [--flag value ...]

Defaults < YAML < flags. Flags may be written with dashes, and shortened while unambiguous; booleans as --flag True.
"""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train. `echo4o train --help` lists every flag."""
    raise typer.Exit(run_training(context.args))


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with LoRA adapters (adapter_config.json).")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    base: Annotated[
        Path | None, typer.Option(help="Where the adapters' base is now, if not where their config says.")
    ] = None,
    weights: Annotated[Weights | None, typer.Option(help="Default: ema where there is one.")] = None,
    dtype: Annotated[MergedDtype | None, typer.Option(help="Default: each tensor's in the base.")] = None,
) -> None:
    """Merge LoRA adapters into their base: a complete BAGEL folder, with configs, tokenizer and VAE."""

    def work() -> None:
        from echo4o.checkpoint.merging import write_merged

        kind, number = weights and weights.value, dtype and dtype.value
        typer.echo(write_merged(checkpoint, out, base=base, weights=kind, dtype=number))

    raise typer.Exit(_report_errors(work))


@data.command()
def draw(
    dataset_config: Annotated[Path, typer.Argument(help="YAML of data set groups, or a run's YAML that names one.")],
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("layout.png"),
    row: Annotated[int, typer.Option(help="Which row, in the order of training.")] = 0,
    group: Annotated[str | None, typer.Option(help="Which group; default: the first.")] = None,
    num_refs: Annotated[int | None, typer.Option(help="Count only rows with this many references.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model folder whose tokenizer counts; default: the run's model, else words.")
    ] = None,
) -> None:
    """Draw how one sample is packed: its images, its tokens, and who may attend to whom."""

    def work() -> None:
        from echo4o.data.preview import draw_row

        draw_row(dataset_config, out, row=row, group=group, num_refs=num_refs, tokenizer=tokenizer)
        typer.echo(out)

    raise typer.Exit(_report_errors(work))


def run_training(argv: Sequence[str]) -> int:
    """Train with the settings of a command line; returns the exit status."""
    if any(word in ("-h", "--help") for word in argv):
        typer.echo(f"{TRAIN_USAGE}\n{flag_help()}")
        return 0

    # Idle threads of torch's CPU kernels wait by spinning. On two cores a long spin is 10 % faster than a short one if
    # nothing else runs, and several times slower if anything does. Read once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # What sockets and stores say when a rank is gone: our own message is the readable one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def work() -> None:
        config = load_config(argv)
        from echo4o.train.trainer import train as start  # torch and transformers: seconds

        start(config)

    return _report_errors(work)


def _report_errors(work: Callable[[], None]) -> int:
    """Run `work`; what the user can mend is one message, not a traceback (ECHO4O_TRACEBACK=1 shows it all the same)."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        work()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:
        kind = type(error).__name__
        if os.environ.get("ECHO4O_TRACEBACK") or kind not in USER_ERRORS:
            raise
        typer.echo(f"{kind}: {error}", err=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
