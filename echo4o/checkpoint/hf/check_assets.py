"""What a folder has besides weights: tokenizer, generation settings, remote code."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo4o.checkpoint.adapters import TOKENIZER_FILES
from echo4o.checkpoint.hf.findings import Examination, some
from echo4o.data.errors import DataError
from echo4o.data.tokenizer import MARKERS, load_tokenizer

_COPY = "copy tokenizer.json, tokenizer_config.json, vocab.json and merges.txt of the model into it"
#: Of upstream's Qwen2Tokenizer.
_UPSTREAM_FILES = ("vocab.json", "merges.txt")


def check_tokenizer(examination: Examination, vocab_size: int | None, *, for_upstream: bool) -> None:
    """The tokenizer loads, knows the markers, and has no more entries than the word embeddings have rows.

    Args:
        for_upstream: also look for the files that upstream's own tokenizer class reads.
    """
    folder = examination.folder
    # transformers looks into config.json too.
    if examination.unusable & {"config.json", "tokenizer.json", "tokenizer_config.json", *_UPSTREAM_FILES}:
        return
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        examination.error("tokenizer.json", "is missing, and so are vocab.json and merges.txt: no tokenizer", _COPY)
        return
    try:
        tokenizer = load_tokenizer(folder)
        entries: Mapping[str, int] = tokenizer.get_vocab()  # type: ignore[attr-defined]
    except Exception as error:  # the tokenizers library raises Exception itself
        cause = error.__cause__ if isinstance(error, DataError) and error.__cause__ else error
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        examination.unusable_file("tokenizer.json", f"gives no usable tokenizer: {first}", _COPY)
        return
    missing = [marker for marker in MARKERS if marker not in entries]
    if missing:
        examination.error("tokenizer.json", f"lacks the special tokens {some(missing, len(MARKERS))}", _COPY)
    if vocab_size is not None and len(tokenizer) > vocab_size:
        beyond = sorted((token for token, number in entries.items() if number >= vocab_size), key=entries.__getitem__)
        examples = ", ".join(f"{token} is {entries[token]:,}" for token in beyond[:2])
        examination.error(
            "tokenizer.json",
            f"has {len(tokenizer):,} entries, the word embeddings {vocab_size:,} rows ({examples})",
            "take the tokenizer of these weights, or weights whose embeddings were grown for it",
        )
    absent = [name for name in _UPSTREAM_FILES if not (folder / name).is_file()]
    if absent and for_upstream:
        examination.warning(
            absent[0],
            "is missing" + (f", and so is {absent[1]}" if len(absent) > 1 else "") + ": upstream's scripts load "
            "Qwen2Tokenizer from vocab.json and merges.txt (transformers and this project read tokenizer.json)",
            "copy them from the base, or echo4o export the folder",
        )


def check_generation(examination: Examination, settings: Mapping[str, Any] | None, vocab_size: int | None) -> None:
    """``generation_config.json``: its token ids are in the vocabulary."""
    name = "generation_config.json"
    if settings is None or vocab_size is None:
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size]
        if wrong:
            examination.error(
                name,
                f"says {key} is {wrong[0]!r}, the vocabulary has {vocab_size:,} entries",
                "take the generation_config.json of these weights",
            )
            return


def check_remote_code(examination: Examination, where: str, auto_map: Any) -> None:
    """``auto_map``: the files are there, are Python, and define the classes."""
    if auto_map is None:
        return
    fix = "export again with --layout hf or both, or take auto_map out of config.json"
    if not isinstance(auto_map, Mapping):
        examination.error(where, f"auto_map must be an object, not {auto_map!r}", fix)
        return
    targets = [t for value in auto_map.values() for t in (value if isinstance(value, list) else [value]) if t]
    for target in dict.fromkeys(targets):
        fault = _fault_of(examination.folder, target)
        if fault:
            examination.error(where, fault, fix)
            return


def _fault_of(folder: Path, target: Any) -> str | None:
    if not isinstance(target, str) or target.count(".") != 1:
        return f"auto_map names {target!r}, which is not of the form module.Class"
    if "--" in target:
        return None  # code of another repository, which the hub gives
    module, kind = target.split(".")
    path = folder / f"{module}.py"
    if not path.is_file():
        return f"auto_map names {target}, but there is no {path.name}"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError) as error:
        return f"auto_map names {target}, but {path.name} is not Python ({error})"
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    return None if kind in names | imported else f"auto_map names {target}, but {path.name} defines no {kind}"
