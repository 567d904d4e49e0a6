"""echo4o data draw data_examples/dataset.yaml --out layout.png"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.errors import report_errors

verbs = typer.Typer(help="Look at data.", no_args_is_help=True)


@verbs.command()
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

    raise typer.Exit(report_errors(work))
