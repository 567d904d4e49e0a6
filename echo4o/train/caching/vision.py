"""The vision encoder of a run where it is frozen: what it is, and what it makes of one image."""

from __future__ import annotations

import torch
from torch import Tensor

from echo4o.checkpoint.names import public_name
from echo4o.checkpoint.pieces import whole
from echo4o.checkpoint.slices import LayeredReader
from echo4o.config import ConfigError, LoadPlan, RunConfig
from echo4o.data.latent_cache import Identity
from echo4o.data.positions import patchify_image, position_ids
from echo4o.model import Bagel, BagelConfig
from echo4o.model.attention import plan_attention
from echo4o.packed import AttentionLayout
from echo4o.train.caching.encoders import dtype_name, products_in, tensors_fingerprint
from echo4o.train.initialise import initial_model
from echo4o.train.placing import choose_what_trains
from echo4o.train.reading import cast_frozen, reading

_PREFIX = "vit_model."


def is_frozen(model: Bagel) -> bool:
    """Whether the vision encoder is there and nothing of it trains (after `choose_what_trains`)."""
    return hasattr(model, "vit_model") and not any(p.requires_grad for p in model.vit_model.parameters())


def vit_identity(
    model: Bagel, reader: LayeredReader | None, products: torch.dtype, stored: str = "float32"
) -> Identity:
    """What the outputs of the vision encoder depend on.

    Args:
        model: its frozen weights already have the dtype that they train with (`cast_frozen`); may be on meta.
        reader: of its weights; None where they are in the model.
        products: dtype of matrix products in training.

    Raises:
        ConfigError: if `reader` lacks weights.
    """
    config = model.config
    assert config.vit is not None  # see `is_frozen`
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.startswith(_PREFIX):
            tensors[public_name(name)] = _values(public_name(name), parameter, reader)
    settings = (
        f"{config.num_vit_layers} layers, vit_rope {config.vit_rope}, interpolate_pos {config.interpolate_pos}, "
        f"vit_max_num_patch_per_side {config.vit_max_num_patch_per_side}"
    )
    return Identity(
        "vit_image",
        tensors_fingerprint(tensors),
        dtype_name(products),
        stored,
        patch=config.vit.patch_size,
        channels=config.vit.hidden_size,
        settings=settings,
    )


def _values(name: str, parameter: Tensor, reader: LayeredReader | None) -> Tensor:
    """In the dtype in which it is used: a checkpoint may store it otherwise than the file that a run started from."""
    if reader is None:
        return parameter
    if (found := reader.find(name)) is None:
        raise ConfigError(f"the weights lack {name}")
    return found[0].run(found[1], 0, parameter.numel()).reshape(parameter.shape).to(parameter.dtype)


class VitEncoder:
    """The vision encoder's outputs, before the connector."""

    def __init__(self, model: Bagel, identity: Identity, device: torch.device) -> None:
        self.tower = model.vit_model
        self.config: BagelConfig = model.config
        self.identity = identity
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        config, patch = self.config, self.identity.patch
        height, width = image.shape[1:]
        places = position_ids(height, width, patch, config.vit_max_num_patch_per_side, config.interpolate_pos)
        pixels = patchify_image(image, patch).to(self.device)
        attend = plan_attention("sdpa", AttentionLayout([len(places)], [len(places)], ["full"]), self.device)
        with products_in(self.identity, self.device):
            outputs = self.tower(pixels, places.to(self.device), attend)
        return outputs.to(self.identity.dtype).cpu().contiguous()


def vit_encoder(
    plan: LoadPlan,
    architecture: BagelConfig,
    settings: RunConfig,
    device: torch.device,
    products: torch.dtype,
    stored: str,
) -> VitEncoder:
    """The vision encoder of a run, read without the rest of the model.

    Raises:
        ConfigError: if the run has none, or trains it.
    """
    if not (architecture.visual_und and architecture.vit):
        raise ConfigError("visual_und is False: such a run uses no vision encoder, leave --vit out")
    initial = initial_model(plan, architecture, settings)
    model = initial.model
    choose_what_trains(model, settings)
    if not is_frozen(model):
        raise ConfigError(
            "the vision encoder trains in this run: what it makes of an image changes with every step and cannot be "
            "cached. Leave --vit out, or freeze it: --freeze_vit True, --freeze_und True, or LoRA without vit among "
            "lora_targets."
        )
    dtypes = initial.reader.dtypes() if initial.reader is not None else {}
    cast_frozen(model, dtypes, settings.training.frozen_dtype, products)
    identity = vit_identity(model, initial.reader, products, stored)
    tower = model.vit_model
    if initial.reader is not None:
        tower.to_empty(device=device)
        if tower.vision_model.rope is not None:
            tower.vision_model.rope.reset_parameters()
        pieces = {_PREFIX + name: whole(parameter.detach()) for name, parameter in tower.named_parameters()}
        reading(model, initial.reader, initial.source, show=False)(pieces)
    tower.to(device).eval()
    return VitEncoder(model, identity, device)
