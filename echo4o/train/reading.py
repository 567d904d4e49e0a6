"""Filling a model's pieces from weights files: each process reads its own bytes, and says how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from torch import Tensor

from echo4o.checkpoint.names import is_adapter, public_name
from echo4o.checkpoint.pieces import Piece
from echo4o.checkpoint.slices import LayeredReader
from echo4o.config import ConfigError
from echo4o.model import Bagel
from echo4o.model.embeddings import PositionTable, sincos_2d
from echo4o.model.vit import VisionRope
from echo4o.train.memory import size_text

_SECONDS_BETWEEN_LINES = 10.0


def check_weights(model: Bagel, reader: LayeredReader, source: str) -> list[str]:
    """Compare names and shapes before anything is read; the file's unused names are returned for the banner.

    Raises:
        ConfigError: if a tensor is missing or has another shape.
    """
    found, tables = reader.shapes(), set(model.table_names())
    expected = {public_name(name): tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    missing = [name for name in expected if reader.find(name) is None and name not in tables and not is_adapter(name)]
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors, e.g. {', '.join(missing[:3])}. "
            "It is incomplete or of another architecture: check layer_module, llm_qk_norm, visual_gen and visual_und, "
            "or fill a partial checkpoint from its base model."
        )
    for name, shape in expected.items():
        held = found.get(name, shape)
        if held != shape and not (_grows(name) and held[1:] == shape[1:] and held[0] < shape[0]):
            raise ConfigError(
                f"{source} holds {name} as {held}, the config asks for {shape}; "
                "use the config that belongs to these weights."
            )
    return [name for name in found if name not in expected and not is_adapter(name)]


def _grows(name: str) -> bool:
    """The vocabulary may have been enlarged for marker tokens (`WeightsReader.fill`)."""
    return name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def reading(
    model: Bagel,
    reader: LayeredReader,
    source: str,
    *,
    fill_adapters: Callable[[Mapping[str, Piece]], None] | None = None,
    show: bool = True,
    on_progress: Callable[[], None] | None = None,
) -> Callable[[Mapping[str, Piece]], None]:
    """A function that fills the pieces it is given, by name: from the reader, or, the fixed tables, by their formula.

    Args:
        fill_adapters: fills adapters that no file has (a new LoRA run).
        show: print progress (rank 0).
        on_progress: called after every tensor.
    """
    tables = _fixed_tables(model)

    def read(pieces: Mapping[str, Piece]) -> None:
        progress = _Progress(source, sum(p.values.numel() * p.values.element_size() for p in pieces.values()), show)
        fresh = {}
        for name, piece in pieces.items():
            if (found := reader.find(name)) is not None:
                try:
                    found[0].fill(found[1], piece)
                except ValueError as error:
                    raise ConfigError(str(error)) from error
            elif name in tables:
                piece.values.copy_(tables[name]().reshape(-1)[piece.start : piece.stop])
            elif is_adapter(name):
                fresh[name] = piece
            else:
                raise ConfigError(f"{source} lacks {name}")
            progress.advance(piece.values.numel() * piece.values.element_size())
            if on_progress is not None:
                on_progress()
        if fresh:
            if fill_adapters is None:
                raise ConfigError(f"{source} lacks {len(fresh)} adapter weights, e.g. {next(iter(fresh))}")
            fill_adapters(fresh)
        progress.end()

    return read


def _fixed_tables(model: Bagel) -> dict[str, Callable[[], Tensor]]:
    """Name → formula of the tables that need no file: sin-cos positions and the ViT's rotations."""
    tables: dict[str, Callable[[], Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PositionTable):
            dim, side = module.pos_embed.shape[1], module.side
            tables[f"{path}.pos_embed"] = lambda dim=dim, side=side: sincos_2d(dim, side)
        elif isinstance(module, VisionRope):
            for name, _ in module.named_buffers(recurse=False):
                tables[f"{path}.{name}"] = lambda m=module, name=name: _rotations(m.head_dim, m.side)[name]
    return tables


def _rotations(head_dim: int, side: int) -> Mapping[str, Tensor]:
    with torch.device("cpu"):
        rope = VisionRope(head_dim, side)
        rope.reset_parameters()
    return dict(rope.named_buffers())


class _Progress:
    """A line at the start, one every ten seconds, and the rate at the end."""

    def __init__(self, source: str, num_bytes: int, show: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True) if show and num_bytes else None
        self._total, self._done = num_bytes, 0
        self._begun = self._said = time.perf_counter()
        self._print(f"reading {source}: {size_text(num_bytes)} for this process …")

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.perf_counter()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            rate = self._done / (now - self._begun)
            self._print(
                f"  {size_text(self._done)} of {size_text(self._total)}, {size_text(rate)}/s, "
                f"{(self._total - self._done) / rate:.0f} s to go"
            )

    def end(self) -> None:
        seconds = time.perf_counter() - self._begun
        self._print(f"read in {seconds:.1f} s ({size_text(self._total / max(seconds, 1e-9))}/s)")

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False)


def cast_frozen(model: Bagel, file_dtypes: Mapping[str, torch.dtype], setting: str, compute_dtype: torch.dtype) -> None:
    """Give frozen parameters their dtype, on the meta device or not; what trains is float32.

    Args:
        file_dtypes: of the weights file; names it lacks stay as they are.
        setting: ``auto`` (as in the file; others than these two become the compute dtype), ``float32`` or
            ``bfloat16``. Where products are computed in float32, frozen weights are float32 as well.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        if compute_dtype == torch.float32:
            dtype = torch.float32
        elif setting == "auto":
            dtype = file_dtypes.get(public_name(name), parameter.dtype)
            dtype = dtype if dtype in (torch.float32, torch.bfloat16) else compute_dtype
        else:
            dtype = getattr(torch, setting)
        parameter.data = parameter.data.to(dtype)
