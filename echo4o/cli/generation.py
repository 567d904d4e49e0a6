"""echo4o generate runs/tiny_bagel --prompt "A red disc"    ·    echo4o app runs/tiny_bagel"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from echo4o.cli.errors import let_threads_rest, report_errors
from echo4o.cli.options import (
    BaseOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelFolder,
    OffloadOption,
    QuantizeOption,
    WeightsOption,
)

verbs = typer.Typer()


def _option(help: str, *names: str, panel: str = "Request") -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def _setting(help: str, *names: str) -> Any:
    return _option(help, *names, panel="Settings (default: the preset's)")


def _many(help: str, *names: str) -> Any:
    return _option(help, *names, panel="Files")


@verbs.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
def generate(
    model: ModelFolder,
    prompt: Annotated[str | None, _option("<image N> in it puts reference N there; others come first.")] = None,
    image: Annotated[list[Path] | None, _option("A reference; repeat for more, in order.")] = None,
    preset: Annotated[str | None, _option("t2i, edit, multi_ref or understand; default: by references.")] = None,
    seed: Annotated[int | None, _option("Default 0. Of requests in a file: together with their id.")] = None,
    height: Annotated[int | None, _option("Of the picture, in pixels; with --width.")] = None,
    width: Annotated[int | None, _option("Default: as the last reference; 1024 without.")] = None,
    size_from: Annotated[str | None, _option("first, last or N: the reference whose size is taken.")] = None,
    num_images: Annotated[int | None, _option("Pictures, with seeds from --seed on.")] = None,
    think: Annotated[bool | None, _option("Let the model plan in words first.", "--think/--no-think")] = None,
    understand: Annotated[bool, _option("Answer in text instead of drawing.", "--understand")] = False,
    no_inline: Annotated[bool, _option("Leave <image N> in the text.", "--no-inline")] = False,
    like: Annotated[Path | None, _option("Take all of this from a picture drawn before, references too.")] = None,
    out: Annotated[Path | None, _many("Default out.png; for several out_0.png …; NAME.txt for an answer.")] = None,
    grid: Annotated[Path | None, _many("Contact sheet: references beside results.")] = None,
    requests: Annotated[Path | None, _many("JSONL file, a request a line; --out is a folder then.")] = None,
    skip_bad: Annotated[bool, _many("Leave out lines that cannot be used.", "--skip-bad")] = False,
    overwrite: Annotated[bool, _many("Also do again what is finished in --out.", "--overwrite")] = False,
    batch_size: Annotated[int | None, _many("Pictures at once; default: 4 on a GPU, 1 on a CPU.")] = None,
    num_timesteps: Annotated[int | None, _setting("Points of the time grid; one fewer steps.")] = None,
    timestep_shift: Annotated[float | None, _setting("Above 1: more steps on layout, fewer on details.")] = None,
    cfg_text_scale: Annotated[float | None, _setting("Guidance by the text; 1 turns all guidance off.")] = None,
    cfg_img_scale: Annotated[float | None, _setting("Guidance by the references; 1 turns it off.")] = None,
    cfg_interval: Annotated[str | None, _setting("lo,hi: times with guidance, e.g. 0.4,1.0.")] = None,
    cfg_renorm_type: Annotated[str | None, _setting("global, channel or text_channel.")] = None,
    cfg_renorm_min: Annotated[float | None, _setting("Least factor of the renorm; 1 turns it off.")] = None,
    max_think_tokens: Annotated[int | None, _setting("Of a thought or an answer.")] = None,
    do_sample: Annotated[bool | None, _setting("Draw words instead of the likeliest.", "--do-sample/--greedy")] = None,
    temperature: Annotated[float | None, _setting("Of drawn words.")] = None,
    top_p: Annotated[float | None, _setting("Of drawn words: the likeliest of this probability.")] = None,
    taylorseer: Annotated[
        bool | None, _setting("Forecast most of the steps: faster, not the same.", "--taylorseer/--no-taylorseer")
    ] = None,
    branch_cache: Annotated[int | None, _setting("Guidance branches only every N steps; 1: always.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Slow first picture, faster ones after.", rich_help_panel="Model")
    ] = False,
) -> None:
    """Draw from a prompt and references, or answer about them; one request, or a file of them.

    echo4o generate MODEL --image cat.jpg --image sofa.png --prompt "The cat of image 1 on the sofa of image 2."

    echo4o generate MODEL --requests requests.jsonl --out results/

    A second call of that kind goes on where the first was stopped; torchrun shares the requests among GPUs. Options
    given beside --requests hold for the lines that do not state them.
    """
    values = {
        "prompt": prompt, "images": image, "preset": preset, "seed": seed, "height": height, "width": width,
        "size_from": size_from, "num_images": num_images, "think": think, "understand": understand or None,
        "inline": False if no_inline else None, "num_timesteps": num_timesteps, "timestep_shift": timestep_shift,
        "cfg_text_scale": cfg_text_scale, "cfg_img_scale": cfg_img_scale, "cfg_interval": cfg_interval,
        "cfg_renorm_type": cfg_renorm_type, "cfg_renorm_min": cfg_renorm_min, "max_think_tokens": max_think_tokens,
        "do_sample": do_sample, "temperature": temperature, "top_p": top_p, "taylorseer": taylorseer,
        "branch_cache": branch_cache,
    }  # fmt: skip
    options = {
        "dtype": dtype.value, "device": device, "weights": weights and weights.value, "base": base,
        "quantize": quantize and quantize.value, "offload": offload and offload.value, "compile": compile,
    }  # fmt: skip
    files = {
        "out": out, "grid": grid, "requests": requests, "like": like, "skip_bad": skip_bad, "overwrite": overwrite,
        "batch_size": batch_size,
    }  # fmt: skip

    def work() -> int:
        let_threads_rest()
        from echo4o.generate import command  # torch: seconds
        from echo4o.generate.item import printable

        given = {name: value for name, value in values.items() if value is not None}
        return command.generate(
            command.ModelOptions(model, **options), given, **files, say=lambda text: typer.echo(printable(text))
        )

    raise typer.Exit(report_errors(work, also=(ValueError, OSError)))


@verbs.command(name="app")
def web_page(
    model: ModelFolder,
    host: Annotated[str, typer.Option(help="127.0.0.1: only this machine; 0.0.0.0: all that reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the page.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="A public address through Gradio's tunnel.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    weights: WeightsOption = None,
    base: BaseOption = None,
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
) -> None:
    """Show the web page of a model: draw from text or references, edit, ask."""

    def work() -> None:
        let_threads_rest()
        from echo4o.app import serve
        from echo4o.generate.command import ModelOptions  # torch: seconds

        serve(
            model, host=host, port=port, share=share, dtype=ModelOptions(model, dtype.value, device).number_type,
            device=device, weights=weights and weights.value, base=base, quantize=quantize and quantize.value,
            offload=offload and offload.value,
        )  # fmt: skip

    raise typer.Exit(report_errors(work, also=(ValueError, OSError, ImportError)))
