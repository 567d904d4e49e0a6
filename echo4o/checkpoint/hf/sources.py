"""Whatever an export can start from, as one set of named tensors, read a chunk at a time."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from echo4o.checkpoint.adapters import TOKENIZER_FILES, MergedWeights, is_adapter_folder
from echo4o.checkpoint.folders import MARKER, CheckpointError, faults, latest
from echo4o.checkpoint.inventory import ADAPTER, TRAINING
from echo4o.checkpoint.slices import LayeredReader, WeightsReader
from echo4o.model import Bagel, BagelConfig
from echo4o.model.config import SCALAR_FILES
from echo4o.model.embeddings import sincos_2d
from echo4o.model.pretrained import VAE_PREFIXES, find_weights, shard_files
from echo4o.model.vae import WEIGHTS_FILE

logger = logging.getLogger(__name__)

#: Elements read at once.
CHUNK_ELEMENTS = 1 << 23
FORMULA = "formula"
LATENT_TABLE = "latent_pos_embed.pos_embed"
_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
#: Names of what other programs keep beside weights.
_FOREIGN = ("*.distcp", "zero_pp_rank_*", "*_optim_states.pt", "pytorch_model*.bin", "*.ckpt")
_TABLE_TOLERANCE = 1e-2


class Source:
    """The tensors of a complete BAGEL that a folder stands for.

    Args:
        folder: BAGEL folder, training checkpoint (whole, with frozen parts, with adapters), upstream's training
            checkpoint, or a folder with some of a model's tensors.
        weights: ``ema`` or ``model``; None takes ``ema`` where there is one.
        base: BAGEL folder that gives what `folder` lacks: tensors, configs, tokenizer, VAE; for adapters, their base.
        max_latent_size: side of a larger latent position table to compute.

    Attributes:
        config: of the model, ``max_latent_size`` included.
        shapes: of every tensor, in the order of the model's state dict.
        weights: ``ema`` or ``model``.
        step: of a training checkpoint, else None.
        base: the folder that gave something, else None.

    Raises:
        CheckpointError: if it is no model, is incomplete or damaged, or does not fit together, with the remedy.
    """

    def __init__(
        self,
        folder: str | Path,
        weights: str | None = None,
        base: str | Path | None = None,
        max_latent_size: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        _refuse_incomplete(self.folder)
        self.step = step_of(self.folder)
        self._merged = MergedWeights(self.folder, weights, base) if is_adapter_folder(self.folder) else None
        self._given_base = Path(base) if base else None
        if self._merged:
            self.weights, config = self._merged.kind, self._merged.config
            self.layers = self._merged.layers
            self.base: Path | None = self._merged.base
        else:
            self.weights, config = self._open(weights)
        self.config = config
        with torch.device("meta"):
            self.model = Bagel(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        self._tables = set(self.model.table_names())
        self._check()
        if max_latent_size is not None:
            self._extend(max_latent_size)

    def _open(self, weights: str | None) -> tuple[str, BagelConfig]:
        path = find_weights(self.folder, weights)
        if path is None:
            raise CheckpointError(_nothing_there(self.folder, weights))
        kind = path.name.partition(".")[0]
        readers = [_open_reader(file) for file in _shards(path)]
        config = _with_tables_of(readers, _read_config(self.folder, self._given_base))
        self.base = self._given_base
        if self._given_base is not None:
            found = find_weights(self._given_base)
            if found is None:
                raise CheckpointError(_nothing_there(self._given_base, None))
            readers += [_open_reader(file) for file in _shards(found)]
        aliases = {_HEAD: _EMBEDDING, _EMBEDDING: _HEAD} if config.llm.tie_word_embeddings else {}
        self.layers = LayeredReader(readers, aliases)
        return kind, config

    def _check(self) -> None:
        """Every tensor is there and has the model's shape; nothing is left over."""
        missing = [name for name in self.shapes if self.layers.find(name) is None and name not in self._tables]
        if missing:
            of = len(self.shapes)
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} of the {of} tensors of its model, e.g. {', '.join(missing[:3])}. "
                + (
                    f"{self.base} has them neither; pass the BAGEL that was trained from as --base"
                    if self.base
                    else "Pass the BAGEL folder that was trained from as --base: it fills them"
                )
            )
        for name, shape in self.shapes.items():
            found = self.layers.find(name)
            if found is None:
                continue
            held = found[0].shapes[found[1]]
            if held != shape and not (self._merged and _may_grow(name, held, shape)):
                raise CheckpointError(
                    f"{found[0].path} holds {name} as {held}, the configs say {shape}: they belong to different "
                    "models. Use the configs that were written beside these weights."
                )
            if not found[0].dtypes[found[1]].is_floating_point:
                raise CheckpointError(
                    f"{found[0].path} holds {name} as {found[0].dtypes[found[1]]}: quantised weights cannot be "
                    "exported. Export the weights that they were made from."
                )
        own = self.layers.shapes() if not self.base or self._merged else self._own_names()
        ignored = (*VAE_PREFIXES, *self._tables)
        extra = [n for n in own if n not in self.shapes and not _is_adapter_part(n) and not n.startswith(ignored)]
        if extra and not self._merged:
            raise CheckpointError(
                f"{self.folder} holds {len(extra)} tensors that its configs have no place for, e.g. "
                f"{', '.join(extra[:3])}: they describe another model. Correct visual_gen, visual_und, layer_module "
                "or num_hidden_layers there."
            )

    def _own_names(self) -> list[str]:
        return [n for reader in self.layers.readers if reader.path.parent == self.folder for n in reader.shapes]

    def _extend(self, side: int) -> None:
        held = self.config.max_latent_size
        if not self.config.visual_gen:
            raise CheckpointError("this model draws nothing, so it has no latent table; leave out --max-latent-size")
        if side < held:
            raise CheckpointError(
                f"--max-latent-size {side} is less than the {held} × {held} entries there are: a table can only grow"
            )
        if side == held:
            return
        stored = self.layers.find(LATENT_TABLE)
        if stored is not None:
            table = stored[0].run(stored[1], 0, math.prod(self.shapes[LATENT_TABLE])).float()
            exact = sincos_2d(self.config.llm.hidden_size, held).flatten().float()
            if not torch.allclose(table, exact, atol=_TABLE_TOLERANCE):
                raise CheckpointError(
                    f"{LATENT_TABLE} of {self.folder} is not the sin-cos table, so nobody knows how it goes on; "
                    "leave out --max-latent-size"
                )
        downsample = self.config.latent_downsample
        logger.info(
            "the latent position table grows from %d × %d to %d × %d entries (sin-cos formula): pictures of up to %d "
            "pixels a side instead of %d. The model has not been trained beyond %d.",
            held, held, side, side, side * downsample, held * downsample, held * downsample,
        )  # fmt: skip
        self.config = replace(self.config, max_latent_size=side)
        self.shapes[LATENT_TABLE] = (side * side, self.config.llm.hidden_size)
        with torch.device("meta"):
            self.model = Bagel(self.config)
        self._extended = True

    _extended = False

    # ------------------------------------------------------------ tensors

    def origin(self, name: str) -> str:
        """Where a tensor comes from: folder and file, several joined by `` + ``, or ``formula``."""
        found = self._find(name)
        if found is None:
            return FORMULA
        label = self._label(found[0].path)
        if self._merged and self._is_adapted(name):
            return f"{label} + {self.folder.name}/{ADAPTER[self.weights]}"
        return label

    def origins(self) -> dict[str, int]:
        """Origin → number of tensors."""
        return dict(Counter(self.origin(name) for name in self.shapes))

    def dtype(self, name: str) -> torch.dtype:
        """In the file it comes from; of what a formula gives, float32."""
        found = self._find(name)
        return found[0].dtypes[found[1]] if found else torch.float32

    def chunks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor's elements in row-major order, (n,) CPU tensors one after the other.

        Raises:
            CheckpointError: if adapters do not fit.
        """
        found = self._find(name)
        if found is None:
            yield self._computed(name).to(dtype).flatten()
            return
        if self._merged and (self._is_adapted(name) or found[0].shapes[found[1]] != self.shapes[name]):
            yield self._merged.tensor(name, dtype).flatten()
            return
        reader, known = found
        total = math.prod(self.shapes[name])
        for start in range(0, total, CHUNK_ELEMENTS):
            yield reader.run(known, start, min(start + CHUNK_ELEMENTS, total)).to(dtype)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor."""
        return torch.cat(list(self.chunks(name, dtype))).reshape(self.shapes[name])

    def _find(self, name: str) -> tuple[WeightsReader, str] | None:
        return None if self._extended and name == LATENT_TABLE else self.layers.find(name)

    def _is_adapted(self, name: str) -> bool:
        assert self._merged is not None
        return f"{name.removesuffix('.weight')}.lora_A.weight" in self._merged.adapter.tensors

    def _computed(self, name: str) -> Tensor:
        """A fixed table that no file holds."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        if next(owner.parameters()).is_meta:
            for table in self._tables:
                self.model.get_submodule(table.rpartition(".")[0]).to_empty(device="cpu")
            self.model.reset_tables()
        return self.model.state_dict()[name].float()

    def _label(self, path: Path) -> str:
        return f"{path.parent.name}/{path.name}"

    # ------------------------------------------------------------ everything else

    def vae_file(self) -> Path | None:
        """``ae.safetensors`` of the folder, else of its base."""
        return next((p for folder in self.asset_folders() if (p := folder / WEIGHTS_FILE).is_file()), None)

    def tokenizer_folder(self) -> Path | None:
        return next(
            (f for f in self.asset_folders() if any((f / name).is_file() for name in TOKENIZER_FILES)),
            None,
        )

    def asset_folders(self) -> list[Path]:
        return [self.folder] + ([self.base] if self.base else [])


def newest_checkpoint(folder: str | Path) -> Path:
    """The folder itself, or the newest complete checkpoint in the results or checkpoint folder of a run; of a link such
    as ``latest``, the checkpoint beside it that it names."""
    folder = Path(folder)
    for candidate in (folder, folder / "checkpoints"):
        if candidate.is_dir() and find_weights(candidate) is None and not is_adapter_folder(candidate):
            found = latest(candidate)
            if found is not None:
                return found
    target = folder.resolve()
    return folder.parent / target.name if folder.is_symlink() and target.parent == folder.parent.resolve() else folder


def _refuse_incomplete(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass a checkpoint of a run, a BAGEL folder or owner/name")
    is_ours = any((folder / name).exists() for name in (MARKER, TRAINING, "ranks"))
    if is_ours and (wrong := faults(folder)):
        raise CheckpointError(f"{folder} is not a complete checkpoint: {'; '.join(wrong[:3])}. Take another one.")


def step_of(folder: Path) -> int | None:
    """Optimiser steps of a training checkpoint; None for another folder."""
    try:
        return int(json.loads((folder / MARKER).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shards(path: Path) -> list[Path]:
    try:
        return shard_files(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = str(error) if str(path) in str(error) else f"{path} cannot be read ({error}); download it again"
        raise CheckpointError(message) from error


def _open_reader(path: Path) -> WeightsReader:
    try:
        return WeightsReader(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); download or copy it again"
        ) from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _read_config(folder: Path, base: Path | None) -> BagelConfig:
    stated = [f for f in (folder, base) if f and any((f / n).exists() for n in ("llm_config.json", *SCALAR_FILES))]
    if not stated:
        raise CheckpointError(
            f"{folder} has no configs (llm_config.json, vit_config.json), as upstream's training checkpoints: pass the "
            "BAGEL folder that was trained from as --base"
        )
    try:
        config = BagelConfig.from_pretrained(stated[0], freeze_und=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{stated[0]} is not a usable model folder: {error}") from error
    return config


def _with_tables_of(readers: Sequence[WeightsReader], config: BagelConfig) -> BagelConfig:
    """The config with the sizes of the first position tables that there are: configs may come from the base alone."""
    sizes = {"max_latent_size": LATENT_TABLE, "vit_max_num_patch_per_side": "vit_pos_embed.pos_embed"}
    found = LayeredReader(readers).shapes()
    return replace(config, **{key: math.isqrt(found[name][0]) for key, name in sizes.items() if found.get(name)})


def _nothing_there(folder: Path, weights: str | None) -> str:
    wanted = f"{weights}.safetensors" if weights else "ema.safetensors or model.safetensors"
    foreign = sorted({path.name for pattern in _FOREIGN for path in folder.glob(pattern)})
    text = f"{folder} has no {wanted} (nor a sharded index of it, nor adapters)"
    if foreign:
        return (
            f"{text}, but {foreign[0]}: that is another program's format. Turn it into safetensors first (DeepSpeed: "
            "zero_to_fp32.py --safe_serialization; torch: python -m torch.distributed.checkpoint.format_utils)."
        )
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and find_weights(path, weights) is not None)
    if inside:
        return f"{text}, but its folder {inside[0].name} has: pass {inside[0]}"
    return f"{text}; choose other --weights, or another folder"


def _may_grow(name: str, held: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return name in (_HEAD, _EMBEDDING) and held[1:] == shape[1:] and held[0] <= shape[0]


def _is_adapter_part(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
