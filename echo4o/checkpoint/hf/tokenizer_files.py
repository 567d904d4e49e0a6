"""Tokenizer files of an exported folder, readable by every version of transformers.

Upstream's scripts load ``Qwen2Tokenizer`` of transformers 4, which reads ``vocab.json``, ``merges.txt`` and the added
tokens in ``tokenizer_config.json``, and never ``tokenizer.json``, which is all that transformers 5 writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echo4o.checkpoint.folders import CheckpointError

logger = logging.getLogger(__name__)

TOKENIZER, CONFIG, VOCABULARY, MERGES = "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"
ADDED = "added_tokens.json"
GENERATION = "generation_config.json"
#: Taken as they are where the source has them.
_KEPT = (
    "special_tokens_map.json",
    ADDED,
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)
_VOCABULARIES = (TOKENIZER, VOCABULARY, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
#: Entries of tokenizer_config.json about the machine that wrote it, or how it was called.
_MACHINE = {
    *("backend", "cache_dir", "is_local", "local_files_only", "name_or_path", "token", "trust_remote_code"),
    *("use_auth_token", "_commit_hash", "_from_auto", "_from_pipeline", "_name_or_path"),
}
#: What Qwen2's tokenizer cuts text with before it merges bytes.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
_END_OF_TEXT, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def tokenizer_files(folder: str | Path) -> dict[str, bytes]:
    """File name → content of everything about the tokenizer in a folder, in the forms of old and new versions.

    ``vocab.json`` and ``merges.txt`` are made from ``tokenizer.json`` and the other way round; a tokenizer that is not
    byte-level BPE has no such other form, and is left as it is.

    Raises:
        CheckpointError: if there is no tokenizer, or its files are damaged or contradict each other.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no tokenizer ({TOKENIZER}, or {VOCABULARY} and {MERGES}): copy it from the base model"
        )
    files = {name: (folder / name).read_bytes() for name in _KEPT if (folder / name).is_file()}
    for name in (TOKENIZER, VOCABULARY, MERGES):
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    settings = _settings(_read(folder / CONFIG) if (folder / CONFIG).is_file() else {})
    if TOKENIZER in files:
        content = _read(folder / TOKENIZER)
        files |= _slow_files(content, folder) if VOCABULARY not in files or MERGES not in files else {}
    elif VOCABULARY in files and MERGES in files and settings.get("tokenizer_class") in _QWEN2_CLASSES:
        content = _fast(folder, settings)
        files[TOKENIZER] = _as_json(content)
    else:
        content = {}
    if content:
        _complete(settings, content)
    files[CONFIG] = _as_json(settings)
    return files


def generation_config(folder: str | Path) -> dict[str, Any]:
    """Content of ``generation_config.json``: the folder's own, else ids as in the published BAGEL (Qwen2.5's): texts
    end with ``<|im_end|>`` or ``<|endoftext|>``, and the latter fills up.

    Raises:
        CheckpointError: as `tokenizer_files`.
    """
    folder = Path(folder)
    if (folder / GENERATION).is_file():
        return _read(folder / GENERATION)
    files = tokenizer_files(folder)
    settings = json.loads(files[CONFIG])
    ids = _ids(json.loads(files[TOKENIZER])) if TOKENIZER in files else json.loads(files.get(VOCABULARY, b"{}"))
    stated = {name: ids.get(_text(settings.get(f"{name}_token"))) for name in ("bos", "eos", "pad")}
    end = ids.get(_END_OF_TEXT)
    ends = [number for number in (ids.get(_END, stated["eos"]), end) if number is not None]
    ends = list(dict.fromkeys(ends))
    found = {
        "bos_token_id": next((x for x in (end, stated["bos"], ids.get(_START)) if x is not None), None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": next((x for x in (stated["pad"], end, *ends) if x is not None), None),
    }
    return {name: value for name, value in found.items() if value is not None}


# ---------------------------------------------------------------- tokenizer_config.json


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` without what belongs to one machine, in terms that transformers 4 knows too."""
    settings = {
        name: value for name, value in content.items() if name not in _MACHINE and not name.endswith(("_file", "_path"))
    }
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):  # transformers 4 expects a dictionary under this name
        settings.setdefault("additional_special_tokens", settings["extra_special_tokens"])
        del settings["extra_special_tokens"]
    return settings


def _complete(settings: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Add what ``tokenizer.json`` knows and an old tokenizer looks for in its config."""
    settings["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in content.get("added_tokens") or []
    }
    if _is_qwen2(content):
        settings.setdefault("tokenizer_class", "Qwen2Tokenizer")
    else:
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if _END_OF_TEXT not in _ids(content):
        # Qwen2Tokenizer's defaults, which it would add to the vocabulary.
        for name in ("unk_token", "eos_token", "pad_token"):
            settings.setdefault(name, None)


# ---------------------------------------------------------------- between the two forms


def _slow_files(content: Mapping[str, Any], folder: Path) -> dict[str, bytes]:
    """``vocab.json`` and ``merges.txt`` of a ``tokenizer.json``; nothing for other than byte-level BPE."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or "ByteLevel" not in _steps(content.get("pre_tokenizer")):
        return {}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    if any(len(merge) != 2 or any(piece.split() != [piece] for piece in merge) for merge in merges):
        raise CheckpointError(f"{folder / TOKENIZER} has merges that are not pairs of bytes: copy it again")
    if merges and not _is_qwen2(content):
        logger.warning(
            "%s cuts text otherwise than Qwen2's tokenizer: upstream's scripts, which know no other, may get other ids "
            "for digits and punctuation. Here and with AutoTokenizer they stay the same.",
            folder / TOKENIZER,
        )
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    return {VOCABULARY: text.encode(), MERGES: ("\n".join(lines) + "\n").encode()}


def _fast(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer.json`` of a Qwen2 tokenizer in the old form.

    Raises:
        CheckpointError: if its files contradict each other.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = _read(folder / VOCABULARY)
    lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split()) for line in lines if line.strip()]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{folder / VOCABULARY} and {MERGES} do not belong together ({error}): copy both again"
        ) from error
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    for number, token in _added(folder, settings):
        tokenizer.add_tokens([added := AddedToken(**token)])
        if (found := tokenizer.token_to_id(added.content)) != number:
            raise CheckpointError(
                f"{folder} gives {added.content} the id {number}, where {found} comes next: save the tokenizer anew "
                "with transformers' AutoTokenizer, or copy it from the base model"
            )
    return json.loads(tokenizer.to_str())


def _added(folder: Path, settings: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Added tokens as (id, content and options), in the order of their ids."""
    plain = _read(folder / ADDED) if (folder / ADDED).is_file() else {}
    special = {"special": True, "normalized": False}
    tokens = {int(number): {"content": text, **special} for text, number in plain.items()}
    known = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        tokens[int(number)] = {name: token[name] for name in known if name in token}
    return sorted(tokens.items())


# ---------------------------------------------------------------- tokenizer.json


def _is_qwen2(content: Mapping[str, Any]) -> bool:
    pattern = _steps(content.get("pre_tokenizer")).get("Split", {}).get("pattern") or {}
    return pattern.get("Regex") == QWEN2_PATTERN and "NFC" in _steps(content.get("normalizer"))


def _steps(step: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """Type → settings of a pre-tokenizer or normalizer and of what it is made of."""
    if not step:
        return {}
    inner: Sequence[Mapping[str, Any]] = step.get("pretokenizers") or step.get("normalizers") or []
    found = {str(step.get("type")): step}
    for part in inner:
        found |= _steps(part)
    return found


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Token → id. Vocabularies of other kinds than BPE and WordPiece are lists of (token, score)."""
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if not isinstance(vocabulary, Mapping):
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, Mapping) else str(token)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy it again")
    return content


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
