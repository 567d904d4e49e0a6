"""Load a tokenizer and make sure that it has the four marker tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, runtime_checkable

from echo4o.data.errors import DataError

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


@runtime_checkable
class Tokenizer(Protocol):
    """What the data side needs of a tokenizer; transformers' tokenizers have it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the markers that frame texts and images, and how many of them had to be added to the vocabulary."""

    bos_token_id: int
    eos_token_id: int
    start_of_image: int
    end_of_image: int
    num_new_tokens: int = 0


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder (Qwen2-style or any other that transformers can load), from disk only.

    Raises:
        DataError: if the folder has no usable tokenizer.
    """
    # Imported here: transformers takes seconds to import, which tests and tools without a tokenizer need not pay.
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; a tokenizer needs tokenizer.json or vocab.json and merges.txt")
    # Rows are tokenised in worker processes; threads of the tokenizer's own would only warn about the fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of config.json's model_type "bagel", which it does not need
    try:
        # Without the last word transformers asks on the terminal whether a folder's code may be run, and waits.
        options = {"local_files_only": True, "trust_remote_code": False}
        if _is_json(folder / "config.json"):
            return AutoTokenizer.from_pretrained(str(folder), **options)
        with _tokenizer_files_alone(folder) as alone:
            return AutoTokenizer.from_pretrained(alone, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = ", ".join(sorted(path.name for path in folder.glob("*token*"))) or "no tokenizer files"
        raise DataError(
            f"no usable tokenizer in {folder} (found {found}): {error}\n"
            "  Copy tokenizer.json and tokenizer_config.json (or vocab.json and merges.txt) of the model into it."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return True


@contextmanager
def _tokenizer_files_alone(folder: Path) -> Iterator[str]:
    """BAGEL-7B-MoT's first config.json was no JSON, and transformers, which does not need it, stops there."""
    with TemporaryDirectory() as alone:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and path.name != "config.json":
                os.symlink(path.resolve(), Path(alone) / path.name)
        yield alone


def add_special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Add the markers the vocabulary lacks, in upstream's order, and return the ids of all four.

    `num_new_tokens` tells by how much the embedding table may have to grow.
    """
    present = _known_tokens(tokenizer)
    missing = [marker for marker in MARKERS if marker not in present]
    num_new_tokens = tokenizer.add_tokens(missing) if missing else 0  # type: ignore[attr-defined]
    ids = [int(tokenizer.convert_tokens_to_ids(marker)) for marker in MARKERS]  # type: ignore[attr-defined]
    return SpecialTokens(*ids, num_new_tokens=num_new_tokens)


def _known_tokens(tokenizer: Tokenizer) -> set[str]:
    """Upstream looks at the special tokens map only; the vocabulary also knows markers that are ordinary entries."""
    return set(tokenizer.get_vocab())  # type: ignore[attr-defined]
