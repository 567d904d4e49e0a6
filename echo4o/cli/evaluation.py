"""echo4o eval geneval++ --data FILE --model DIR --judge-model NAME --out RUN    ·    echo4o eval report RUN"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from echo4o.cli.errors import let_threads_rest, report_errors
from echo4o.cli.options import BaseOption, DeviceOption, Dtype, DtypeOption, QuantizeOption, WeightsOption
from echo4o.config import ConfigError

verbs = typer.Typer(
    help="Benchmarks: draw, judge, score, report. Stopped at any time, the same command goes on.", no_args_is_help=True
)

BENCHMARKS = (
    "geneval++", "imagine-bench", "omnicontext", "geneval", "dpg", "wise", "gedit", "imgedit", "kris", "rise",
)  # fmt: skip


class Stage(str, Enum):
    generate = "generate"
    judge = "judge"
    score = "score"


def _option(help: str, *names: str, panel: str = "Run") -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def _judge(help: str, *names: str) -> Any:
    return _option(help, *names, panel="Judge")


def _command(name: str) -> Callable[..., None]:
    def run(
        out: Annotated[Path, _option("Folder of the run; one folder a benchmark in it.")],
        model: Annotated[Path | None, _option("BAGEL folder, checkpoint or owner/name that draws.")] = None,
        data: Annotated[Path | None, _option("The benchmark's file or folder; default: from the hub.")] = None,
        images: Annotated[Path | None, _option("Pictures made elsewhere, named as upstream names them.")] = None,
        only: Annotated[Stage | None, _option("One stage alone.")] = None,
        limit: Annotated[int | None, _option("The first so many items of each tag: a trial.")] = None,
        seed: Annotated[int, _option("Each picture's own comes from it, its item and its number.")] = 0,
        set: Annotated[list[str] | None, _option("NAME=VALUE of drawing, e.g. num_timesteps=25; repeat.")] = None,
        option: Annotated[list[str] | None, _option("NAME=VALUE of the benchmark (echo4o eval list); repeat.")] = None,
        results: Annotated[Path | None, _option("What the benchmark's own scorer wrote (geneval, dpg).")] = None,
        grids: Annotated[Path | None, _option("dpg: folder for the 2 × 2 sheets that its scorer reads.")] = None,
        batch_size: Annotated[int | None, _option("Pictures at once; default: 4 on a GPU, 1 on a CPU.")] = None,
        dry_run: Annotated[bool, _option("Only count calls, tokens and cost.", "--dry-run")] = False,
        no_report: Annotated[bool, _option("Scores only, no page.", "--no-report")] = False,
        judge_model: Annotated[str | None, _judge("Its exact name, as the server knows it.")] = None,
        judge_url: Annotated[
            str | None, _judge("OpenAI-compatible address up to /v1; default: OpenAI's. Local servers too.")
        ] = None,
        judge_key_env: Annotated[
            str | None, _judge("Environment variable with the key; default OPENAI_API_KEY.")
        ] = None,
        judge_workers: Annotated[int, _judge("Questions at once; default 8.")] = 8,
        requests_per_minute: Annotated[float | None, _judge("Limit of the account.")] = None,
        tokens_per_minute: Annotated[float | None, _judge("Limit of the account.")] = None,
        judge_timeout: Annotated[float, _judge("Seconds for one reply; default 180.")] = 180.0,
        retry_failed: Annotated[bool, _judge("Ask again where a reply held no answer.", "--retry-failed")] = False,
        price_in: Annotated[float | None, _judge("Of a million prompt tokens, for the cost.")] = None,
        price_out: Annotated[float | None, _judge("Of a million completion tokens.")] = None,
        dtype: DtypeOption = Dtype.auto,
        device: DeviceOption = "auto",
        weights: WeightsOption = None,
        base: BaseOption = None,
        quantize: QuantizeOption = None,
    ) -> None:
        def work() -> int:
            let_threads_rest()
            from echo4o.evaluate.client import OPENAI_URL, JudgeOptions
            from echo4o.evaluate.command import Evaluation, Prices, evaluate
            from echo4o.generate.options import ModelOptions  # torch: seconds

            drawn_by = None
            if model is not None:
                kind, bits = weights and weights.value, quantize and quantize.value
                drawn_by = ModelOptions(model, dtype.value, device, kind, base, bits)
            judge = None
            if judge_model is not None:
                judge = JudgeOptions(
                    judge_model, judge_url or OPENAI_URL, judge_key_env, judge_workers, requests_per_minute,
                    tokens_per_minute, judge_timeout,
                )  # fmt: skip
            drawing = _values(_pairs("--set", set))
            wanted = Evaluation(
                name, out, drawn_by, data, images, judge, only and only.value, limit, seed, drawing,
                _pairs("--option", option), batch_size, results, retry_failed, dry_run, Prices(price_in, price_out),
                not no_report,
            )  # fmt: skip
            status = evaluate(wanted, typer.echo)
            if grids is not None and not dry_run:
                from echo4o.evaluate.grids import write_grids

                typer.echo(write_grids(name, out, data, grids))
            return status

        raise typer.Exit(report_errors(work, also=(ValueError, OSError, ImportError)))

    return run


for _name in BENCHMARKS:
    verbs.command(name=_name, help=f"Draw, judge, score and report {_name}.")(_command(_name))


def _pairs(option: str, values: Sequence[str] | None) -> dict[str, str]:
    """NAME=VALUE words as a mapping."""
    pairs = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{option} {text!r}: write NAME=VALUE")
        pairs[name.strip().replace("-", "_")] = value
    return pairs


def _values(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Texts as YAML would read them: numbers, true and false, lists."""
    import yaml

    return {name: yaml.safe_load(value) for name, value in pairs.items()}


@verbs.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; default: the first run's.")] = None,
    link_images: Annotated[
        bool, typer.Option("--link-images", help="Show the pictures' files; the page must then stay where it is.")
    ] = False,
) -> None:
    """One page for one run, or several side by side with tests of their differences; Markdown and JSON too."""

    def work() -> None:
        from echo4o.evaluate.report import write_report

        for path in write_report(runs, out or runs[0], embed=not link_images):
            typer.echo(path)

    raise typer.Exit(report_errors(work, also=(ValueError, OSError)))


@verbs.command(name="list")
def list_all() -> None:
    """The benchmarks, their data and options."""

    def work() -> None:
        from echo4o.evaluate.command import list_benchmarks

        typer.echo("\n".join(list_benchmarks()))

    raise typer.Exit(report_errors(work))
