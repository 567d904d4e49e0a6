"""Architecture of a BAGEL model, read from an upstream folder or a Hugging Face ``config.json``.

A folder that does not state a field gets upstream's published value, and a weights file overrules both where its tensor
shapes say otherwise (position tables, decoder kind).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from echo4o.model.pretrained import find_weights, read_shapes

logger = logging.getLogger(__name__)

LAYER_MODULES = ("Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer")
SCALAR_FILES = ("config.json", "bagel_config.json")
#: Entries of ``config.json`` under transformers' usual names, and upstream's.
_FOREIGN_ENTRIES = {"text_config": "llm_config", "vision_config": "vit_config"}
_COMMA_BEFORE_END = re.compile(r",(?=\s*[}\]])")


@dataclass
class LLMConfig:
    """Qwen2-style decoder. ``layer_module`` chooses how much of a layer is doubled for generation tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    layer_module: str
    qk_norm: bool
    tie_word_embeddings: bool
    freeze_und: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        if self.layer_module not in LAYER_MODULES:
            raise ValueError(f"unknown layer_module {self.layer_module!r}; known: {', '.join(LAYER_MODULES)}")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads} and "
                f"num_key_value_heads {self.num_key_value_heads} do not divide each other"
            )
        if self.freeze_und and self.layer_module == "Qwen2DecoderLayer":
            raise ValueError(
                "freeze_und needs separate understanding and generation experts, but Qwen2DecoderLayer has none: "
                "upstream silently cuts the gradient of the whole input. Use Qwen2MoTDecoderLayer or freeze_llm."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass
class ViTConfig:
    """SigLIP encoder. ``num_hidden_layers`` counts the layers of the original tower; Bagel builds
    ``num_hidden_layers + 1 + vit_select_layer`` of them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def num_patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass
class VAEConfig:
    """FLUX autoencoder. A latent pixel covers ``downsample`` image pixels a side."""

    resolution: int = 256
    in_channels: int = 3
    downsample: int = 8
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        self.ch_mult = tuple(self.ch_mult)
        if 2 ** (len(self.ch_mult) - 1) != self.downsample:
            raise ValueError(
                f"ch_mult {self.ch_mult} downsamples by {2 ** (len(self.ch_mult) - 1)}, not {self.downsample}"
            )


@dataclass
class BagelConfig:
    """Everything that determines the tensors of a `Bagel`."""

    llm: LLMConfig
    vit: ViTConfig | None
    vae: VAEConfig | None
    visual_gen: bool = True
    visual_und: bool = True
    latent_patch_size: int = 2
    max_latent_size: int = 32
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    vit_select_layer: int = -2
    vit_rope: bool = False

    def __post_init__(self) -> None:
        if self.visual_und and self.vit is None:
            raise ValueError("visual_und needs a vit config (vit_config.json); set visual_und to False to do without")
        if self.visual_gen and self.vae is None:
            self.vae = VAEConfig()
        side = self.vit.num_patches_per_side if self.visual_und and self.vit else None
        if self.vit_rope and side and self.vit_max_num_patch_per_side != side:
            raise ValueError(
                f"vit_rope indexes its tables with row · {self.vit_max_num_patch_per_side} + column, but they have "
                f"{side} columns; set vit_max_num_patch_per_side to {side}"
            )

    @property
    def num_vit_layers(self) -> int:
        return self.vit.num_hidden_layers + 1 + self.vit_select_layer if self.vit else 0

    @property
    def latent_downsample(self) -> int:
        """Image pixels a side of one latent token."""
        return self.vae.downsample * self.latent_patch_size if self.vae else 0

    @property
    def latent_dim(self) -> int:
        """Numbers in one latent token."""
        return self.vae.z_channels * self.latent_patch_size**2 if self.vae else 0

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides) -> BagelConfig:
        """Read ``llm_config.json``, ``vit_config.json`` and ``config.json`` (or ``bagel_config.json``) of a folder.

        Position-table sizes and the decoder kind are read from the weights file where there is one: a published
        ``config.json`` may be stale (a known trap), the tensors are not.

        Args:
            overrides: fields of this class or of `LLMConfig` to set instead.

        Raises:
            FileNotFoundError: if the folder has no language-model config.
            ValueError: for values that contradict each other.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; expected one with llm_config.json and weights")
        stated = next((_read_json(folder / name) for name in SCALAR_FILES if (folder / name).exists()), {})
        values = with_upstream_entries(stated)
        for name in ("llm_config", "vit_config"):
            if (path := folder / f"{name}.json").exists():
                values[name] = _read_json(path)
        if values.get("llm_config") is None:
            raise FileNotFoundError(f"{folder} has neither llm_config.json nor a config.json with an llm_config entry")
        return cls.from_values(values, read_shapes(weights) if (weights := find_weights(folder)) else {}, **overrides)

    @classmethod
    def from_values(
        cls, values: Mapping, shapes: Mapping[str, tuple[int, ...]] | None = None, **overrides
    ) -> BagelConfig:
        """From the content of a ``config.json`` with nested ``llm_config``, ``vit_config`` and ``vae_config``.

        Args:
            shapes: of the weights' tensors by name, where they are known: they overrule what is stated.
            overrides: as in `from_pretrained`.

        Raises:
            ValueError: for values that are missing or contradict each other.
        """
        values = with_upstream_entries(values)
        shapes, vit = shapes or {}, values.get("vit_config")
        llm_overrides = {key: overrides.pop(key) for key in list(overrides) if key in LLMConfig.__annotations__}
        return cls(
            llm=_llm_config(values.get("llm_config", {}), values, shapes, llm_overrides),
            vit=_vit_config(vit) if vit and values.get("visual_und", True) else None,
            vae=VAEConfig(**_known(values.get("vae_config") or {}, VAEConfig))
            if values.get("visual_gen", True)
            else None,
            **_scalars(values, vit, shapes, overrides),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``llm_config.json``, ``vit_config.json`` and ``config.json`` as upstream and this project read them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        llm = {"model_type": "qwen2", "hidden_act": "silu", **asdict(self.llm)}
        _write_json(folder / "llm_config.json", llm)
        if self.vit is not None:
            _write_json(
                folder / "vit_config.json",
                {"model_type": "siglip_vision_model", "rope": self.vit_rope, **asdict(self.vit)},
            )
        scalars = {key: value for key, value in asdict(self).items() if key not in ("llm", "vit", "vae")}
        scalars |= {"model_type": "bagel", "vae_config": asdict(self.vae) if self.vae else None}
        _write_json(folder / "config.json", scalars)

    def with_freeze_und(self, freeze_und: bool) -> BagelConfig:
        return replace(self, llm=replace(self.llm, freeze_und=freeze_und))


def with_upstream_entries(values: Mapping) -> dict:
    """A ``config.json``'s content, parts of the model under upstream's names."""
    foreign = {own: values[name] for name, own in _FOREIGN_ENTRIES.items() if name in values}
    return {**foreign, **{name: value for name, value in values.items() if name not in _FOREIGN_ENTRIES}}


def _llm_config(llm: Mapping, scalars: Mapping, shapes: Mapping, overrides: Mapping) -> LLMConfig:
    stated = {key: scalars[key] for key in ("layer_module", "qk_norm", "tie_word_embeddings") if key in scalars}
    seen = _decoder_kind(shapes)
    # Published llm_config.json files describe the original Qwen2, not BAGEL: upstream's code overrules these three.
    values = {"layer_module": LAYER_MODULES[0], "qk_norm": True} | _known(llm, LLMConfig) | stated | seen
    if "layer_module" not in llm and "tie_word_embeddings" not in stated:
        values["tie_word_embeddings"] = False
    # transformers 5 moved rope_theta into rope_parameters.
    values.setdefault("rope_theta", (llm.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    values.setdefault("tie_word_embeddings", False)
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    values.setdefault("rms_norm_eps", 1e-6)
    values["freeze_und"] = bool(scalars.get("freeze_und", values.get("freeze_und", False)))
    return _build(LLMConfig, {**values, **overrides}, "llm_config.json")


def _decoder_kind(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """What the tensor names of a BAGEL weights file say about the decoder (nothing for other files)."""
    prefix = "language_model.model.layers.0."
    if f"{prefix}self_attn.q_proj.weight" not in shapes:
        return {}
    if f"{prefix}self_attn.q_proj_moe_gen.weight" in shapes:
        kind = LAYER_MODULES[0]
    elif f"{prefix}mlp_moe_gen.up_proj.weight" in shapes:
        kind = LAYER_MODULES[1]
    else:
        kind = LAYER_MODULES[2]
    return {"layer_module": kind, "qk_norm": f"{prefix}self_attn.q_norm.weight" in shapes}


def _vit_config(vit: Mapping) -> ViTConfig:
    return _build(ViTConfig, _known(vit, ViTConfig), "vit_config.json")


def _scalars(scalars: Mapping, vit: Mapping | None, shapes: Mapping, overrides: Mapping) -> dict:
    names = [name for name in BagelConfig.__annotations__ if name not in ("llm", "vit", "vae")]
    if unknown := set(overrides) - set(names):
        raise TypeError(f"unknown BagelConfig fields {sorted(unknown)}; known: {', '.join(names)}")
    values = {name: scalars[name] for name in names if name in scalars}
    values.setdefault("vit_rope", bool((vit or {}).get("rope", False)))
    values.setdefault("visual_und", vit is not None)
    tables = {"max_latent_size": "latent_pos_embed.pos_embed", "vit_max_num_patch_per_side": "vit_pos_embed.pos_embed"}
    for name, tensor in tables.items():
        if not shapes.get(tensor):
            continue
        side = math.isqrt(shapes[tensor][0])
        if values.get(name, side) != side:
            logger.warning(
                "%s is %s in config.json, but %s holds %d × %d entries: using %d",
                name,
                values[name],
                tensor,
                side,
                side,
                side,
            )
        values[name] = side
    return {**values, **overrides}


def _known(values: Mapping, kind: type) -> dict:
    """The entries that `kind` has a field for, checked against the field's type.

    Raises:
        ValueError: naming an entry of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected a JSON object with the fields of {kind.__name__}, not {type(values).__name__}")
    types = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "tuple[int, ...]": (list, tuple)}
    known = {key: value for key, value in values.items() if key in kind.__annotations__ and value is not None}
    for key, value in known.items():
        expected = types.get(kind.__annotations__[key], (object,))
        if not isinstance(value, expected) or (
            isinstance(value, bool) and bool not in expected and object not in expected
        ):
            raise ValueError(f"{key} of {kind.__name__} must be {kind.__annotations__[key]}, not {value!r}")
    return known


def _build(kind: type, values: Mapping, source: str):
    """`kind` from a file's values.

    Raises:
        ValueError: naming the entries that `source` lacks.
    """
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    return kind(**values)


def _read_json(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            # BAGEL-7B-MoT's config.json was published with a comma too many, and local copies of it live on.
            return json.loads(_COMMA_BEFORE_END.sub("", text))
        except json.JSONDecodeError:
            raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error


def _write_json(path: Path, values: Mapping) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
