"""echo4o data validate my_data.yaml    ·    echo4o data preview my_data.yaml --out page.html"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.errors import report_errors

verbs = typer.Typer(help="Convert, check, see, count and cache data.", no_args_is_help=True)

DataPath = Annotated[
    Path, typer.Argument(help="Run's YAML, YAML of data set groups, or a data set as it lies on disk.")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(help="Model folder whose tokenizer counts; default: the run's model, else words.", show_default=False),
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Of a data set; default: recognised.", show_default=False)
]
ImagesOption = Annotated[
    str | None, typer.Option(help="Folder or archive of a data set's images, if elsewhere.", show_default=False)
]
CacheDirOption = Annotated[
    Path | None, typer.Option(help="Where archives are unpacked; default: beside the data.", show_default=False)
]


@verbs.command()
def validate(
    path: DataPath,
    sample: Annotated[
        int | None, typer.Option(help="Rows of each group, spread evenly; default: all.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 4,
    decode: Annotated[bool, typer.Option("--decode/--headers-only", help="Decode every picture.")] = True,
    near: Annotated[
        bool, typer.Option("--near/--no-near", help="Look for targets that are the same to the eye.")
    ] = True,
    tokenizer: TokenizerOption = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    cache_dir: CacheDirOption = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Say what is wrong with data, row by row, and what to do about it; exit status 1 if training would skip rows."""

    def work() -> int:
        from echo4o.data.inspection.opening import open_data
        from echo4o.data.inspection.report import report_json, report_text
        from echo4o.data.inspection.validate import validate as look

        opened = open_data(path, tokenizer=tokenizer, format=format, images=images, cache_dir=cache_dir)
        report = look(opened, sample=sample, workers=workers, decode=decode, near=near)
        typer.echo((report_json if json else report_text)(report))
        return int(report.has_errors)

    raise typer.Exit(report_errors(work))


@verbs.command()
def preview(
    path: DataPath,
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("preview.html"),
    rows: Annotated[int, typer.Option(help="Of each group, spread evenly.")] = 12,
    layouts: Annotated[bool, typer.Option("--layouts/--no-layouts", help="Draw how each row is packed.")] = True,
    tokenizer: TokenizerOption = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    cache_dir: CacheDirOption = None,
) -> None:
    """Show rows on one self-contained page: references, text and target as the model will see them."""

    def work() -> None:
        from echo4o.data.inspection.opening import open_data
        from echo4o.data.inspection.page import write_page

        opened = open_data(path, tokenizer=tokenizer, format=format, images=images, cache_dir=cache_dir)
        typer.echo(write_page(opened, out, rows=rows, layouts=layouts))

    raise typer.Exit(report_errors(work))


@verbs.command()
def stats(
    path: DataPath,
    steps: Annotated[int, typer.Option(help="Optimiser steps to count.")] = 200,
    ranks: Annotated[int, typer.Option(help="Processes of the run.")] = 1,
    tokenizer: TokenizerOption = None,
    format: FormatOption = None,
    images: ImagesOption = None,
    cache_dir: CacheDirOption = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Count what a mixture really yields: shares in samples and tokens, fill, references, epochs. Decodes nothing."""

    def work() -> None:
        from echo4o.data.inspection.opening import open_data
        from echo4o.data.inspection.stats import mixture_stats, stats_json, stats_text

        opened = open_data(path, tokenizer=tokenizer, format=format, images=images, cache_dir=cache_dir)
        found = mixture_stats(opened, steps=steps, ranks=ranks)
        typer.echo(stats_json(found) if json else stats_text(found, opened))

    raise typer.Exit(report_errors(work))


@verbs.command()
def draw(
    dataset_config: Annotated[Path, typer.Argument(help="YAML of data set groups, or a run's YAML that names one.")],
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("layout.png"),
    row: Annotated[int, typer.Option(help="Which row, in the order of training.")] = 0,
    group: Annotated[str | None, typer.Option(help="Which group; default: the first.")] = None,
    num_refs: Annotated[int | None, typer.Option(help="Count only rows with this many references.")] = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Draw how one sample is packed: its images, its tokens, and who may attend to whom."""

    def work() -> None:
        from echo4o.data.preview import draw_row

        draw_row(dataset_config, out, row=row, group=group, num_refs=num_refs, tokenizer=tokenizer)
        typer.echo(out)

    raise typer.Exit(report_errors(work))
