"""LoRA adapters on disk, in peft's format, and models with adapters merged into their weights.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (its average: ``adapter_ema.safetensors``) holds
adapters of the base that the config names. What else was trained lies beside them, in ``model.trained.safetensors`` and
``ema.trained.safetensors``, under upstream's names.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echo4o.checkpoint.folders import CheckpointError, fingerprint
from echo4o.checkpoint.hub import local_folder
from echo4o.checkpoint.inventory import ADAPTER
from echo4o.checkpoint.names import ADAPTER_PREFIX, is_adapter
from echo4o.checkpoint.pieces import whole
from echo4o.checkpoint.slices import LayeredReader, WeightsReader
from echo4o.checkpoint.train_state import weights_of
from echo4o.checkpoint.weights import write_text
from echo4o.model import Bagel, BagelConfig
from echo4o.model.config import SCALAR_FILES
from echo4o.model.pretrained import WEIGHTS, find_weights, shard_files

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
#: Of a weights file's data, for its fingerprint.
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
#: Any one of them makes a folder's tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
#: Options of peft that change what an adapter computes, and the values under which it is plain LoRA.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    **dict.fromkeys(
        ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save"),
        (None, False, {}, []),
    ),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What ``adapter_config.json`` says.

    Attributes:
        base: folder of the weights that the adapters belong to, or their name on the hub, ``owner/name@commit``.
        rank, alpha: the update of a weight is alpha / rank · B A.
        target_modules: names of the adapted layers.
        base_weights: which of the base's weights, ``ema`` or ``model`` (a key of ours; None: EMA where there is one).
        base_fingerprint: of these weights (`weights_fingerprint`; a key of ours; None: not known).
    """

    base: str
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    base_weights: str | None = None
    base_fingerprint: str | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and its tensors, ``X.lora_A.weight`` (rank, in) and ``X.lora_B.weight`` (out, rank)."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    def layers(self) -> list[str]:
        """Names of the adapted layers."""
        return [name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight")]

    def merged(self, name: str, weight: Tensor, scale: float | None = None) -> Tensor:
        """`weight` of the parameter `name`, with its update added in float32; as it is where there is none."""
        layer = name.removesuffix(".weight")
        if layer == name or f"{layer}.lora_A.weight" not in self.tensors:
            return weight
        a, b = (
            self.tensors[f"{layer}.lora_{x}.weight"].to(weight.device, torch.float32, non_blocking=True) for x in "AB"
        )
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise CheckpointError(
                f"the adapter of {layer} is for a layer of ({b.shape[0]}, {a.shape[1]}), the base's is "
                f"{tuple(weight.shape)}: it belongs to another model. Pass the base it was trained on."
            )
        return torch.addmm(weight.float(), b, a, alpha=self.config.scale if scale is None else scale).to(weight.dtype)


# ---------------------------------------------------------------- files


def write_adapter_config(folder: str | Path, config: AdapterConfig) -> None:
    """Write ``adapter_config.json``."""
    base, _, revision = (config.base, "", "") if Path(config.base).is_absolute() else config.base.partition("@")
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": revision or None,
        "base_weights": config.base_weights,
        "base_fingerprint": config.base_fingerprint,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_text(Path(folder) / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: if it is unreadable, or the adapter is more than plain LoRA.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        targets = content.get("target_modules") or ()
        base, revision = str(content.get("base_model_name_or_path") or ""), content.get("revision")
        config = AdapterConfig(
            base=f"{base}@{revision}" if base and revision else base,
            rank=int(content["r"]),
            alpha=float(content["lora_alpha"]),
            dropout=float(content.get("lora_dropout", 0.0)),
            target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
            base_weights=content.get("base_weights"),
            base_fingerprint=content.get("base_fingerprint"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be read ({reason}); copy it again from where it was written") from error
    for key, plain in _PLAIN.items():
        if content.get(key) not in plain:
            raise CheckpointError(
                f"{path} says {key} {content[key]!r}, which is more than plain LoRA: merge it with peft "
                "(merge_and_unload) and use the resulting weights"
            )
    return config


def is_adapter_folder(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG_FILE).is_file()


def find_adapter(folder: str | Path, weights: str | None = None) -> Path | None:
    """The adapter file of a folder, or None.

    Args:
        weights: ``ema`` or ``model``; None takes the first that exists, ``ema`` before ``model``.

    Raises:
        ValueError: for another name.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)} or None, not {weights!r}")
    for kind in [weights] if weights else WEIGHTS:
        if (path := Path(folder) / ADAPTER[kind]).is_file():
            return path
    return None


def read_adapter(folder: str | Path, weights: str | None = None) -> Adapter:
    """An adapter from its folder.

    Raises:
        CheckpointError: if the folder holds none, or not these weights.
    """
    return _read(Path(folder), _kind_of(Path(folder), weights))


def _kind_of(folder: Path, weights: str | None) -> str:
    path = find_adapter(folder, weights)
    if path is None:
        wanted = ADAPTER[weights] if weights else " or ".join(ADAPTER[kind] for kind in WEIGHTS)
        raise CheckpointError(f"{folder} has no {wanted}; take other weights (model or ema), or another checkpoint")
    return next(kind for kind in WEIGHTS if path.name == ADAPTER[kind])


def _read(folder: Path, kind: str) -> Adapter:
    config = read_adapter_config(folder)
    reader = _reader(folder / ADAPTER[kind], ADAPTER_PREFIX)
    unknown = [name for name in reader.shapes if not is_adapter(name)]
    unpaired = [name for name in reader.shapes if _twin(name) not in reader.shapes]
    if unknown or unpaired:
        raise CheckpointError(
            f"{reader.path} is no adapter of linear layers: it holds {(unknown or unpaired)[0]}. Copy it again, or "
            "merge it with peft (merge_and_unload) and use the resulting weights."
        )
    tensors = {name: reader.run(name, 0, shape[0] * shape[1]).reshape(shape) for name, shape in reader.shapes.items()}
    return Adapter(config, tensors)


def _twin(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")


def _reader(path: Path, prefix: str = "") -> WeightsReader:
    try:
        return WeightsReader(path, prefix)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error


# ---------------------------------------------------------------- merging


@torch.no_grad()
def merge_adapter(model: Bagel, adapter: Adapter | str | Path, scale: float | None = None) -> None:
    """Add an adapter's updates to a model's weights: W + scale · B A in float32, in W's dtype afterwards.

    Args:
        scale: alpha / rank of the adapter by default; its negative takes the updates away again (up to rounding).

    Raises:
        CheckpointError: if the model lacks an adapted layer.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _require_layers(adapter, parameters)
    for layer in adapter.layers():
        weight = parameters[f"{layer}.weight"]
        weight.copy_(adapter.merged(f"{layer}.weight", weight, scale))


def _require_layers(adapter: Adapter, names: Mapping[str, Any]) -> None:
    if missing := [layer for layer in adapter.layers() if f"{layer}.weight" not in names]:
        raise CheckpointError(
            f"the adapter is for {len(missing)} layers that the model lacks, e.g. {missing[0]}: it belongs to another "
            "model. Pass the base it was trained on."
        )


class MergedWeights:
    """The weights of a BAGEL that a folder's adapters belong to, adapters merged in, one tensor at a time.

    Args:
        folder: with adapters, and perhaps further trained parameters.
        weights: ``ema`` or ``model``; None takes ``ema`` where there is one.
        base: where the base is now, if not where the adapter's config says.

    Raises:
        CheckpointError: if there is no such adapter or base.
    """

    def __init__(self, folder: str | Path, weights: str | None = None, base: str | Path | None = None) -> None:
        folder = Path(folder)
        self.kind = _kind_of(folder, weights)
        self.adapter = _read(folder, self.kind)
        self.base = base_folder(folder, self.adapter.config, base)
        self.base_path = _base_weights(self.base, self.adapter.config)
        if not is_same_base(self.base_path, self.adapter.config):
            # The same numbers in another dtype or other shards are fine; nobody but the user can tell.
            logger.warning(
                "%s is not the file that the adapters in %s were trained on: unless it holds the same weights in "
                "another form, the result is wrong",
                self.base_path,
                folder,
            )
        self.config = _model_config(folder, self.base)
        with torch.device("meta"):
            self.model = Bagel(self.config)  # names and shapes; `load_bagel` gives it values
        self._base = _reader(self.base_path)
        head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
        aliases = {head: embedding, embedding: head} if self.config.llm.tie_word_embeddings else {}
        self.layers = LayeredReader([*weights_of(folder, self.kind), self._base], aliases)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        tables = set(self.model.table_names())
        #: Fixed tables that no file holds: their formula fills them.
        self.absent = [name for name in self.shapes if self.layers.find(name) is None]
        if missing := [name for name in self.absent if name not in tables]:
            raise CheckpointError(
                f"{self.base_path} lacks {len(missing)} tensors of the model, e.g. {missing[0]}: it is not the base of "
                f"{folder}. Pass the base it was trained on."
            )
        _require_layers(self.adapter, self.shapes)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor in the base; what the base lacks, in its own file."""
        found = self.layers.find(name)
        assert found is not None
        return self._base.dtypes.get(found[1], found[0].dtypes[found[1]])

    @torch.no_grad()
    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """A CPU tensor. Products and sums are float32, whatever the file's and the wanted dtype.

        Raises:
            CheckpointError: if shapes do not agree.
        """
        found = self.layers.find(name)
        assert found is not None
        reader, known = found
        exact = dtype if f"{name.removesuffix('.weight')}.lora_A.weight" not in self.adapter.tensors else torch.float32
        tensor = torch.empty(self.shapes[name], dtype=exact)
        try:
            reader.fill(known, whole(tensor))
        except ValueError as error:
            raise CheckpointError(f"{error}; pass the base that the adapters were trained on") from error
        return self.adapter.merged(name, tensor).to(dtype)


def base_folder(folder: Path, config: AdapterConfig, base: str | Path | None = None) -> Path:
    """Where an adapter's base lies; one that is named by its repository of the hub is downloaded.

    Raises:
        CheckpointError: if it is not there.
    """
    named = base or config.base
    if named and Path(named).is_dir():
        return Path(named)
    reason = ""
    if named and not Path(named).is_absolute():
        try:
            return local_folder(named)
        except FileNotFoundError as error:
            reason = f" ({error})"
    if base:
        raise CheckpointError(f"base is {base}, which is not a folder{reason}; pass the BAGEL folder of {folder}")
    raise CheckpointError(
        f"{folder} holds LoRA adapters of {config.base or 'an unnamed base'}, which is not there (any more){reason}. "
        "Say where it is now: base= in Python, --base FOLDER on the command line."
    )


def _base_weights(base: Path, config: AdapterConfig) -> Path:
    path = find_weights(base, config.base_weights)
    if path is None:
        wanted = f"{config.base_weights}.safetensors" if config.base_weights else "ema.safetensors or model.safetensors"
        raise CheckpointError(
            f"{base} has no {wanted} (nor a sharded index of it), which the adapters were trained on; pass another base"
        )
    return path


def weights_fingerprint(path: str | Path) -> str:
    """A name for the content of weights that costs next to nothing to find: a hash of all headers and of pieces of the
    data, spread evenly over every file."""
    digest = hashlib.sha256()
    for file in shard_files(Path(path)):
        size = file.stat().st_size
        digest.update(f"{size}".encode() + (fingerprint(file) or "").encode())
        with open(file, "rb") as data:
            for number in range(_NUM_SAMPLES):
                data.seek(number * max(0, size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(data.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def is_same_base(path: Path, config: AdapterConfig) -> bool:
    """Whether `path` is the file that adapters were trained on, as far as is known."""
    return config.base_fingerprint in (None, weights_fingerprint(path))


def _model_config(folder: Path, base: Path) -> BagelConfig:
    stated = any((folder / name).exists() for name in ("llm_config.json", *SCALAR_FILES))
    source = folder if stated else base
    try:
        return BagelConfig.from_pretrained(source, freeze_und=False)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source} is not a usable model folder: {error}") from error


# ---------------------------------------------------------------- loading


def load_bagel(
    folder: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    base: str | Path | None = None,
) -> Bagel:
    """A BAGEL folder or checkpoint as a model; adapters are merged into the weights of their base.

    Args:
        weights: ``ema`` or ``model``; None takes ``ema`` where there is one.
        base: of a folder with adapters: where its base is now, if not where its config says.

    Raises:
        FileNotFoundError, ValueError: as `Bagel.from_pretrained`.
        CheckpointError: if adapters cannot be read, or their base is not there.
    """
    if not is_adapter_folder(folder):
        return Bagel.from_pretrained(folder, dtype=dtype, device=device, weights=weights)
    merged = MergedWeights(folder, weights, base)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = merged.model.to(dtype).to_empty(device=device)
    model.language_model.tie_weights()
    model.reset_tables()
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            if name not in merged.absent:
                target.copy_(merged.tensor(name, target.dtype))
    return model


def assets_of(folder: str | Path, base: str | Path | None = None) -> Path:
    """The folder whose tokenizer and VAE belong to a model: `folder`, or its base if it holds nothing but adapters."""
    folder = Path(folder)
    if not is_adapter_folder(folder) or any((folder / name).is_file() for name in TOKENIZER_FILES):
        return folder
    return base_folder(folder, read_adapter_config(folder), base)
