"""echo4o train configs/tiny_cpu.yaml --lr 2e-5    ·    echo4o generate runs/tiny_bagel --prompt "A red disc"

The verbs. Everything here parses and delegates.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from echo4o.config import ConfigError, flag_help, load_config
from echo4o.train.failures import USER_ERRORS

app = typer.Typer(
    name="echo4o",
    help="Fine-tune BAGEL on several reference images, and generate with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(data, name="data")


class Weights(str, Enum):
    ema = "ema"
    model = "model"


class Dtype(str, Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Quantize(str, Enum):
    int8 = "int8"
    nf4 = "nf4"


class Offload(str, Enum):
    cpu = "cpu"
    disk = "disk"
    auto = "auto"


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


ModelFolder = Annotated[
    Path, typer.Argument(help="BAGEL folder, checkpoint of a run, or owner/name on the hub.", show_default=False)
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Of the weights; auto: bfloat16 on a GPU, float32 on a CPU.", rich_help_panel="Model")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel="Model")]
WeightsOption = Annotated[
    Weights | None, typer.Option(help="Default: ema where there is one.", rich_help_panel="Model")
]
BaseOption = Annotated[
    Path | None,
    typer.Option(help="Where the base of LoRA adapters is now, if not where they say.", rich_help_panel="Model"),
]
QuantizeOption = Annotated[Quantize | None, typer.Option(help="Weights in fewer bits.", rich_help_panel="Model")]
OffloadOption = Annotated[
    Offload | None, typer.Option(help="Where layers lie while they are not computed.", rich_help_panel="Model")
]


def _option(help: str, *names: str, panel: str = "Request") -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def _setting(help: str, *names: str) -> Any:
    return _option(help, *names, panel="Settings (default: the preset's)")


def _many(help: str, *names: str) -> Any:
    return _option(help, *names, panel="Files")


@app.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
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
        _let_threads_rest()
        from echo4o.generate import command  # torch: seconds
        from echo4o.generate.item import printable

        given = {name: value for name, value in values.items() if value is not None}
        return command.generate(
            command.ModelOptions(model, **options), given, **files, say=lambda text: typer.echo(printable(text))
        )

    raise typer.Exit(_report_errors(work, also=(ValueError, OSError)))


@app.command(name="app")
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
        _let_threads_rest()
        from echo4o.app import serve
        from echo4o.generate.command import ModelOptions  # torch: seconds

        serve(
            model, host=host, port=port, share=share, dtype=ModelOptions(model, dtype.value, device).number_type,
            device=device, weights=weights and weights.value, base=base, quantize=quantize and quantize.value,
            offload=offload and offload.value,
        )  # fmt: skip

    raise typer.Exit(_report_errors(work, also=(ValueError, OSError, ImportError)))


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

    _let_threads_rest()
    # What sockets and stores say when a rank is gone: our own message is the readable one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def work() -> None:
        config = load_config(argv)
        from echo4o.train.trainer import train as start  # torch and transformers: seconds

        start(config)

    return _report_errors(work)


def _let_threads_rest() -> None:
    """Idle threads of torch's CPU kernels wait by spinning. On two cores a long spin is 10 % faster than a short one if
    nothing else runs, and several times slower if anything does. Read once, when torch is loaded."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _report_errors(work: Callable[[], int | None], also: tuple[type[Exception], ...] = ()) -> int:
    """Run `work`; what the user can mend is one message, not a traceback (ECHO4O_TRACEBACK=1 shows it all the same).

    Args:
        also: errors that count as the user's beside those of `USER_ERRORS`.

    Returns:
        The exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        return work() or 0
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:
        kind = type(error).__name__
        if os.environ.get("ECHO4O_TRACEBACK") or not (kind in USER_ERRORS or isinstance(error, also)):
            raise
        if _speaks_for_all():
            typer.echo(f"{kind}: {error}", err=True)
        return 2 if isinstance(error, ConfigError) else 1


def _speaks_for_all() -> bool:
    """Whether to print an error that every process of a run of several may have; training has its own way."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from echo4o.launch import first_on_this_host, name_of_start

    return first_on_this_host(f"{name_of_start()}-error")


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
