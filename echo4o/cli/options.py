"""Options that several verbs share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


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
