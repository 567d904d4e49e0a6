"""echo4o data convert /data/Echo-4o-Image echo    ·    echo4o data preview echo/dataset.yaml --out page.html"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from echo4o.cli.errors import let_threads_rest, report_errors
from echo4o.data.errors import DataError

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


def _columns(text: str | None) -> dict[str, Any]:
    """``instruction=caption,input_images=a+b`` as a mapping; several columns with +."""
    columns: dict[str, Any] = {}
    for pair in (text or "").split(","):
        name, equals, value = pair.partition("=")
        if pair and (not equals or not value):
            raise DataError(f"--columns {text!r}: write NAME=COLUMN, several columns of images as NAME=A+B")
        if pair:
            columns[name.strip()] = value.split("+") if "+" in value else value.strip()
    return columns


@verbs.command()
def convert(
    source: Annotated[str, typer.Argument(help="Data set: folder, file or URL; owner/name with --from hf_dataset.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; complete or absent.")],
    to: Annotated[str, typer.Option(help="bagel_parquet, native, omnigen2 or blip3o.")] = "bagel_parquet",
    from_: Annotated[str, typer.Option("--from", help="Format of the source; auto recognises it.")] = "auto",
    images: ImagesOption = None,
    columns: Annotated[
        str | None,
        typer.Option(help="instruction=caption,input_images=a+b,output_image=c: the source's own.", show_default=False),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a hub data set.", show_default=False)] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a hub data set in place.")] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Only rows of this kind: t2i, multi_ref, edit, vlm; repeat.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.", show_default=False)] = None,
    phrasings: Annotated[str, typer.Option(help="all phrasings of a text, or the first.")] = "all",
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one a core, at most 8.", show_default=False)
    ] = None,
    rows_per_part: Annotated[int, typer.Option(help="Rows of a file, and those done anew after a kill.")] = 1024,
    max_bad_share: Annotated[float, typer.Option(help="More bad rows than this share are an error.")] = 0.1,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away an unfinished one with other options.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look: rows, kinds, where images are.")] = False,
    cache_dir: CacheDirOption = None,
) -> None:
    """Convert a data set, without encoding an image anew. Stopped at any time, the same command goes on.

    echo4o data convert /data/Echo-4o-Image echo --to bagel_parquet
    """

    def work() -> None:
        from echo4o.data.formats.convert import ConvertOptions
        from echo4o.data.formats.convert import convert as run
        from echo4o.data.formats.convert_progress import ConvertProgress
        from echo4o.data.formats.convert_report import report_lines
        from echo4o.data.formats.first_look import first_look

        options = ConvertOptions(
            source, to, from_, images, _columns(columns), cache_dir, split, streaming, tuple(kind or ()), limit,
            phrasings, rows_per_part,
        )  # fmt: skip
        if dry_run:
            typer.echo("\n".join(first_look(options).lines()))
            return
        with ConvertProgress() as progress:
            report = run(
                options, destination, workers=workers, max_bad_share=max_bad_share, restart=restart, progress=progress
            )
        typer.echo("\n".join([*report.problems, *report_lines(report)]))

    raise typer.Exit(report_errors(work))


@verbs.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cache(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="Run's YAML; flags of echo4o train may follow.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the cache; default: the settings' latent_cache.", show_default=False)
    ] = None,
    stored: Annotated[str, typer.Option(help="How moments are stored: float32 or bfloat16.")] = "float32",
    vit: Annotated[bool, typer.Option("--vit", help="Also what a frozen vision encoder makes of images.")] = False,
    images_per_shard: Annotated[int, typer.Option(help="That a killed process loses at most.")] = 64,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say how many images and bytes.")] = False,
) -> None:
    """Encode every image of a run once, so that training neither decodes nor encodes it again. Under torchrun, shared.

    echo4o data cache configs/tiny_cpu.yaml --out cache
    """

    def work() -> None:
        let_threads_rest()
        from echo4o.train.latent_cache import run  # torch: seconds

        run(
            config, out, overrides=context.args, dtype=stored, vit=vit, images_per_shard=images_per_shard,
            dry_run=dry_run,
        )  # fmt: skip

    raise typer.Exit(report_errors(work))


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
