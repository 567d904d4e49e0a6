"""echo4o export results/checkpoints/latest --out DIR    ·    echo4o verify DIR    ·    echo4o push DIR user/name"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from echo4o.cli.errors import report_errors
from echo4o.cli.options import MergedDtype, Weights

verbs = typer.Typer()


class Layout(str, Enum):
    both = "both"
    bagel = "bagel"
    hf = "hf"
    adapter = "adapter"


class ExportDtype(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"
    float16 = "float16"
    auto = "auto"


Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.", show_default=False)]
WeightsOf = Annotated[Weights | None, typer.Option(help="Default: ema where there is one.", show_default=False)]


@verbs.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, run (its newest), BAGEL folder, or owner/name.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    layout: Annotated[
        Layout,
        typer.Option(
            help="bagel: upstream's files. hf: shards and code for transformers. both: one folder for all. adapter: "
            "LoRA alone, for peft."
        ),
    ] = Layout.both,
    weights: WeightsOf = None,
    dtype: Annotated[
        ExportDtype | None,
        typer.Option(help="Default: bfloat16; adapters stay as they are. auto: as they are.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="BAGEL folder or owner/name: fills what the checkpoint lacks; LoRA's base.", show_default=False
        ),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="What to call the base, e.g. ByteDance-Seed/BAGEL-7B-MoT.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of layout hf.")] = "5GB",
    max_latent_size: Annotated[
        int | None, typer.Option(help="Side of a larger position table, for larger pictures.", show_default=False)
    ] = None,
    revision: Revision = None,
    grid: Annotated[
        Path | None, typer.Option(help="Picture for the model card (echo4o generate --grid).", show_default=False)
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="JSON with scores for the model card.", show_default=False)
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="owner/name of a data set on the hub, for the card; repeat for more.", show_default=False),
    ] = None,
    forward: Annotated[
        bool | None,
        typer.Option(
            "--forward/--no-forward",
            help="Compare a forward pass with the checkpoint's. Default: where the model fits into memory.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Make a complete Hugging Face folder of any checkpoint, and verify it.

    echo4o export results/checkpoints/latest --out my-bagel

    What is written is compared with the checkpoint; if anything is wrong, nothing is left behind.
    """

    def work() -> None:
        from echo4o.checkpoint.hf.command import ExportRequest, run_export, show_plan  # torch: seconds

        request = ExportRequest(
            checkpoint, out, layout.value, weights and weights.value, dtype and dtype.value, base, base_name,
            max_shard_size, max_latent_size, revision, grid, evaluation, forward, dataset or (),
        )  # fmt: skip
        (show_plan if dry_run else run_export)(request, typer.echo)

    raise typer.Exit(report_errors(work, also=(OSError,)))


@verbs.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Any model folder, also a downloaded one; or owner/name.")],
    weights: Annotated[Weights | None, typer.Option(help="Default: all there are.", show_default=False)] = None,
    base: Annotated[Path | None, typer.Option(help="Of adapters: where their base is now.", show_default=False)] = None,
    revision: Revision = None,
    quick: Annotated[bool, typer.Option("--quick", help="Headers, shapes and configs only: seconds.")] = False,
    forward: Annotated[
        bool | None,
        typer.Option(
            "--forward/--no-forward", help="Run a tiny forward pass. Default: where it fits.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Say what is wrong with a model folder, and what to do about it; exit status 1 if anything is."""

    def work() -> int:
        from echo4o.checkpoint.hf.findings import exit_status, report_json, report_text
        from echo4o.checkpoint.hf.verify import verify as examine
        from echo4o.checkpoint.hub import local_folder

        place = folder if folder.exists() else local_folder(folder, revision)
        kind = weights and weights.value
        findings = examine(place, weights=kind, values=not quick, forward=False if quick else forward, base=base)
        typer.echo((report_json if json else report_text)(findings, folder))
        return exit_status(findings)

    raise typer.Exit(report_errors(work, also=(OSError,)))


@verbs.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Folder, checkpoint or owner/name, e.g. the base.")],
    b: Annotated[Path, typer.Argument(help="Another, e.g. the trained one.")],
    weights_a: WeightsOf = None,
    weights_b: WeightsOf = None,
    base: Annotated[Path | None, typer.Option(help="Of adapters: where their base is now.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="Tensors to list, largest difference first.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Say which tensors differ and by how much: did anything train?"""

    def work() -> None:
        from echo4o.checkpoint.hf.difference import diff as compare
        from echo4o.checkpoint.hf.difference import difference_json, difference_text
        from echo4o.checkpoint.hub import local_folder

        kinds = {"weights_a": weights_a and weights_a.value, "weights_b": weights_b and weights_b.value}
        found = compare(local_folder(a), local_folder(b), base=base, **kinds)
        typer.echo(difference_json(found) if json else difference_text(found, limit))

    raise typer.Exit(report_errors(work, also=(OSError, ValueError)))


@verbs.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that echo4o export has written.")],
    repository: Annotated[str, typer.Argument(help="user/name on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; default: main.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, and list what would be sent.")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Remove the repository's other files.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Send it although something is wrong.")] = False,
) -> None:
    """Publish a folder on the Hugging Face hub, with its model card, as one commit. Log in first: hf auth login.

    echo4o push my-bagel user/my-bagel
    """

    def work() -> None:
        from echo4o.checkpoint.hf.push import push as send

        send(
            folder, repository, private=private, revision=revision, message=message, dry_run=dry_run, mirror=mirror,
            force=force, say=typer.echo,
        )  # fmt: skip

    raise typer.Exit(report_errors(work, also=(OSError,)))


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
    """Merge LoRA adapters into their base: a BAGEL folder to go on training from. To publish: echo4o export."""

    def work() -> None:
        from echo4o.checkpoint.merging import write_merged

        kind, number = weights and weights.value, dtype and dtype.value
        typer.echo(write_merged(checkpoint, out, base=base, weights=kind, dtype=number))

    raise typer.Exit(report_errors(work))
