"""echo4o merge CHECKPOINT --out DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.errors import report_errors
from echo4o.cli.options import MergedDtype, Weights

verbs = typer.Typer()


@verbs.command()
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

    raise typer.Exit(report_errors(work))
