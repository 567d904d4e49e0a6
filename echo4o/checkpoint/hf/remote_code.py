"""Python files of an ``hf`` folder: the model's rooms side by side, so that transformers loads it without this project.

The rooms `echo4o.model` and `echo4o.packed` import nothing else of ours. Their sources are taken as they are, but for
imports of one another, which become relative, and a heading that names licence and origin.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from importlib.resources import files

from echo4o.checkpoint.hf.provenance import project_version

ARCHITECTURE = "BagelForConditionalGeneration"
#: ``auto_map`` of ``config.json``.
AUTO_MAP: Mapping[str, str] = {
    "AutoConfig": "configuration_bagel.BagelConfig",
    "AutoModel": f"modeling_bagel.{ARCHITECTURE}",
    "AutoModelForCausalLM": f"modeling_bagel.{ARCHITECTURE}",
}
#: Module → its name in the folder.
MODULES: Mapping[str, str] = {
    "echo4o.checkpoint.hf.remote.configuration_bagel": "configuration_bagel",
    "echo4o.checkpoint.hf.remote.modeling_bagel": "modeling_bagel",
    "echo4o.packed": "bagel_packed",
    "echo4o.model.bagel": "bagel_model",
    **{
        f"echo4o.model.{room}": f"bagel_{room}"
        for room in ("attention", "config", "embeddings", "headers", "mot", "parts", "pretrained", "vae", "vit")
    },
}
_HEADING = """\
# Copyright 2026 the echo4o authors. SPDX-License-Identifier: Apache-2.0
# Generated from echo4o {version}, {origin}: changes belong there.
"""
_FOOTING = """

# transformers 4 copies no files of a local folder but those that this one imports itself.
{imports}
"""
_RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+) import ", re.MULTILINE)


def remote_files() -> dict[str, str]:
    """File name → content, for the folder with ``config.json``, whose ``auto_map`` is `AUTO_MAP`."""
    version, texts = project_version(), {}
    for module, name in MODULES.items():
        *packages, stem = module.split(".")
        source = files(".".join(packages)).joinpath(f"{stem}.py").read_text(encoding="utf-8")
        heading = _HEADING.format(version=version, origin=f"{module.replace('.', '/')}.py")
        texts[f"{name}.py"] = heading + with_relative_imports(source, module)
    return {name: text + _footing(name, texts) for name, text in texts.items()}


def _footing(name: str, texts: Mapping[str, str]) -> str:
    """Imports of what a class of `AUTO_MAP` needs by way of other files only."""
    if name.removesuffix(".py") not in {entry.split(".")[0] for entry in AUTO_MAP.values()}:
        return ""
    direct = set(_RELATIVE_IMPORT.findall(texts[name]))
    found = set(direct)
    while more := {far for near in found for far in _RELATIVE_IMPORT.findall(texts[f"{near}.py"])} - found:
        found |= more
    imports = [f"from .{far} import __name__ as _  # noqa: F401" for far in sorted(found - direct)]
    return _FOOTING.format(imports="\n".join(imports)) if imports else ""


def with_relative_imports(source: str, module: str) -> str:
    """`source` with imports of `MODULES` from the same folder.

    Raises:
        ValueError: for an import of another module of ours, or in another form than ``from MODULE import NAME``.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in [name for name in names if name.split(".")[0] in ("", "echo4o")]:
            line, old = lines[node.lineno - 1], f"from {name} import "
            if name not in MODULES or line.count(old) != 1:
                raise ValueError(
                    f"{module}, line {node.lineno}: {line.strip()!r} cannot be exported; write `from MODULE import "
                    f"NAME` with one of {', '.join(MODULES)}"
                )
            # transformers finds the files to copy by this form only: "from . import x" would be lost.
            lines[node.lineno - 1] = line.replace(old, f"from .{MODULES[name]} import ")
    return "".join(lines)
