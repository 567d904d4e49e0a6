"""Pictures on disk: whole or absent, and with everything inside that is needed to draw them again.

A PNG holds two text chunks: ``echo4o``, JSON as `read_metadata` returns it, and ``parameters``, one readable paragraph
that other programs know how to show.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from echo4o.checkpoint.adapters import assets_of, base_folder, is_adapter_folder, read_adapter_config
from echo4o.checkpoint.adapters import weights_fingerprint as file_fingerprint
from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.inventory import ADAPTER, TRAINED
from echo4o.generate.presets import Settings
from echo4o.model.pretrained import WEIGHTS, find_weights

CHUNK = "echo4o"
#: Beside the weights, what changes a picture. The vision encoder is part of the weights.
_CONFIGS = ("config.json", "llm_config.json", "vit_config.json", "tokenizer.json", "vocab.json", "merges.txt")
_VAE = "ae.safetensors"


def write_picture(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a PNG with `metadata` inside; the name appears when the file is whole.

    Raises:
        OSError: if it cannot be written; nothing is left then.
    """
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(metadata, ensure_ascii=False))
    info.add_text("parameters", parameters(metadata))
    partial = partial_name(path)
    try:
        image.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_name(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """How a picture came about.

    Returns:
        ``version``, ``prompt``, ``images`` (name and sha256 of the references, in order), ``elements`` (texts and
        images in the order they were read), ``preset``, ``settings``, ``seed``, ``height``, ``width``, ``think``,
        ``inline``, ``text`` (the thought), ``model`` (name, hash, dtype, quantize).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture of `echo4o generate`.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture") from error
    if text is None:
        raise ValueError(f"{path} says nothing of how it was drawn: only PNGs written by `echo4o generate` do")
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its {CHUNK} chunk is damaged ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: its {CHUNK} chunk is damaged (no JSON object)")
    return found


def settings_dict(settings: Settings) -> dict[str, Any]:
    """Settings as JSON, those of the guidance beside the others; `Settings.changed` takes them back."""
    values = asdict(settings)
    return {**values.pop("guidance"), **values}


def parameters(metadata: Mapping[str, Any]) -> str:
    """The ``parameters`` paragraph: the prompt, then names and values in the customary words."""
    settings, model = metadata["settings"], metadata["model"]
    values = {
        "Steps": settings["num_timesteps"] - 1,
        "Sampler": "Euler",
        "CFG scale": settings["cfg_text_scale"],
        "Image CFG scale": settings["cfg_img_scale"],
        "Shift": settings["timestep_shift"],
        "Seed": metadata["seed"],
        "Size": f"{metadata['width']}x{metadata['height']}",
        "Model hash": model["hash"][:10],
        "Model": model["name"],
        "Version": f"echo4o {metadata['version']}",
    }
    texts = [element for element in metadata["elements"] if isinstance(element, str)]
    prompt = metadata["prompt"] or "\n".join(texts)
    return f"{prompt}\n" + ", ".join(f"{name}: {value}" for name, value in values.items())


def sha256_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def model_fingerprint(folder: str | Path, weights: str | None = None, base: str | Path | None = None) -> str:
    """A name for everything of a model that changes a picture: its weights (sampled, so that it costs next to
    nothing), those of a LoRA checkpoint's base, the VAE, configs and tokenizer. The folder's place has no part in it.

    Args:
        weights: ``ema``, ``model`` or None (``ema`` where there is one).
        base: of a LoRA checkpoint: where its base is now.

    Raises:
        FileNotFoundError: if there are no weights.
        CheckpointError: if a LoRA checkpoint's base is not there.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in _weight_files(folder, weights, base):
        digest.update(file_fingerprint(path).encode())
    assets = assets_of(folder, base)
    for name in _CONFIGS:
        found = next((path for path in (folder / name, assets / name) if path.is_file()), None)
        digest.update(name.encode() + (found.read_bytes() if found else b""))
    if (assets / _VAE).is_file():
        digest.update(file_fingerprint(assets / _VAE).encode())
    return digest.hexdigest()


def _weight_files(folder: Path, weights: str | None, base: str | Path | None) -> list[Path]:
    if not is_adapter_folder(folder):
        path = find_weights(folder, weights)
        if path is None:
            names = " or ".join(f"{name}.safetensors" for name in ([weights] if weights else WEIGHTS))
            raise FileNotFoundError(f"{folder} holds no {names}: pass a BAGEL folder or a checkpoint")
        return [path]
    kind = weights or next((kind for kind in WEIGHTS if (folder / ADAPTER[kind]).is_file()), "model")
    config = read_adapter_config(folder)
    of_base = find_weights(base_folder(folder, config, base), config.base_weights)
    if of_base is None:
        raise CheckpointError(f"the base of {folder} holds no weights; say where it is with --base FOLDER")
    own = (folder / names[kind] for names in (ADAPTER, TRAINED))
    return [*(path for path in own if path.is_file()), of_base]
