"""Folders as an export leaves them, small, for the tests of cards and uploads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from echo4o.checkpoint.adapters import AdapterConfig, write_adapter_config
from echo4o.checkpoint.hf.provenance import Provenance, write_provenance

BASE = "ByteDance-Seed/BAGEL-7B-MoT"


def write_exported(folder: Path, layout: str = "both", **changes: object) -> Provenance:
    """Files of a layout, with little in them."""
    folder.mkdir(parents=True)
    if layout == "adapter":
        save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 8)}, folder / "adapter_model.safetensors")
        adapter = AdapterConfig(BASE, 2, 4.0, 0.0, ("a",), base_weights="ema", base_fingerprint="f" * 64)
        write_adapter_config(folder, adapter)
    else:
        save_file({"a.weight": torch.zeros(600, 1000)}, folder / "ema.safetensors")
        save_file({"encoder.a": torch.zeros(4)}, folder / "ae.safetensors")
        for name in ("config.json", "llm_config.json", "tokenizer.json", "model.safetensors.index.json"):
            (folder / name).write_text(json.dumps({"name": name}))
        (folder / "modeling_bagel.py").write_text("import torch\n")
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    values = {"source": "run/checkpoints/0000100", "weights": "ema", "layout": layout, "dtype": "bfloat16", "step": 100}
    provenance = Provenance(**values | {"base": BASE, "files": files, "version": "0.1.0", "commit": "c0ffee"} | changes)
    write_provenance(folder, provenance)
    return provenance
