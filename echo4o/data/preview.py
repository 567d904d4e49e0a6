"""echo4o data draw data_examples/dataset.yaml --num-refs 3 --out layout.png

From a data set YAML to one row that can be looked at, with or without a model at hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from echo4o.config import ConfigError, load_config
from echo4o.data.drawing import draw_sample
from echo4o.data.errors import DataError, RowError
from echo4o.data.packing import Packer, PackingConfig
from echo4o.data.sample import Sample
from echo4o.data.sources import build_sources
from echo4o.data.sources.base import Limits, SourceContext, SourceGroup
from echo4o.data.tokenizer import SpecialTokens, Tokenizer, add_special_tokens, load_tokenizer

# Grids of BAGEL-7B-MoT; they only decide which images are refused.
BAGEL_LIMITS = Limits(max_latent_size=64, vit_max_num_patch_per_side=70)

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")


class WordTokenizer:
    """Stands in where no model's tokenizer is at hand: a token is a word or a punctuation mark."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [self._ids.setdefault(word, len(self._ids) + 4) for word in re.findall(r"\w+|[^\w\s]", text)]

    def decode(self, token_ids: list[int]) -> str:
        words = {number: word for word, number in self._ids.items()}
        return re.sub(r" (?=[^\w\s])", "", " ".join(words[number] for number in token_ids if number in words))

    def __len__(self) -> int:
        return len(self._ids) + 4


def draw_row(
    config: str | Path,
    out: str | Path,
    *,
    row: int = 0,
    group: str | None = None,
    num_refs: int | None = None,
    tokenizer: str | Path | None = None,
    data_seed: int = 42,
) -> None:
    """Draw one row of a data set.

    Args:
        config: YAML of data set groups, or a run's YAML that names one in ``dataset_config_file``.
        row: position in the order of the first epoch; with `num_refs`, counted among the rows that match.
        group: group of the YAML; ``None`` takes the first.
        num_refs: only rows with this many reference images.
        tokenizer: model folder; ``None`` counts words instead of tokens, unless the run's ``init_from`` is there.

    Raises:
        DataError: if there is no such group or row, or `out` cannot be written.
    """
    dataset_config, info, folder = _dataset_config(Path(config), tokenizer)
    words, special_tokens = _tokenizer(folder)
    base_dir = dataset_config.resolve().parent
    context = SourceContext(words, special_tokens, data_seed, base_dir, BAGEL_LIMITS, dataset_info=info)
    groups = build_sources(yaml.safe_load(dataset_config.read_text(encoding="utf-8")), context)
    sample = _find(_group(groups, group), row, num_refs)
    packing = PackingConfig(
        bos_token_id=special_tokens.bos_token_id,
        eos_token_id=special_tokens.eos_token_id,
        start_of_image=special_tokens.start_of_image,
        end_of_image=special_tokens.end_of_image,
        max_latent_size=BAGEL_LIMITS.max_latent_size,
        vit_max_num_patch_per_side=BAGEL_LIMITS.vit_max_num_patch_per_side,
    )
    texts = [words.decode(list(segment.text_ids)) for segment in sample.segments if segment.kind == "text"]
    if Path(out).suffix.lower() not in PICTURES:
        raise DataError(f"cannot write {out}: a picture ends in one of {', '.join(PICTURES)}. Choose another --out.")
    try:
        draw_sample(sample, Packer(packing).pack([sample]), out, texts=texts)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}. Choose another --out.") from error


def _dataset_config(path: Path, tokenizer: str | Path | None) -> tuple[Path, Path | None, Path | None]:
    """The data set YAML, the run's file of paths, and the folder of a tokenizer, where there are any."""
    folder = Path(tokenizer) if tokenizer else None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds neither data set groups nor settings of a run")
    try:
        run = load_config(path)
    except ConfigError:
        return path, None, folder  # data set groups are no settings
    init_from = Path(run.training.init_from or "")
    if folder is None and run.training.init_from and init_from.is_dir():
        folder = init_from
    info = run.data.dataset_info
    return Path(run.data.dataset_config_file), Path(info).expanduser().resolve() if info else None, folder


def _tokenizer(folder: Path | None) -> tuple[Tokenizer, SpecialTokens]:
    if folder is None:
        return WordTokenizer(), SpecialTokens(0, 1, 2, 3)
    tokenizer = load_tokenizer(folder)
    return tokenizer, add_special_tokens(tokenizer)


def _group(groups: Sequence[SourceGroup], name: str | None) -> SourceGroup:
    for group in groups:
        if name in (None, group.name):
            return group
    raise DataError(f"no group {name!r}; there are {', '.join(group.name for group in groups)}")


def _find(group: SourceGroup, row: int, num_refs: int | None) -> Sample:
    matching = 0
    for position in range(len(group.source)):
        try:
            sample = group.source.plan(0, position).load()
        except RowError:
            continue
        if num_refs is not None and _num_references(sample) != num_refs:
            continue
        if matching == row:
            return sample
        matching += 1
    wanted = "" if num_refs is None else f" with {num_refs} references"
    raise DataError(f"{group.name} has {matching} usable rows{wanted}; there is no row {row} (they count from 0)")


def _num_references(sample: Sample) -> int:
    kinds = [segment.kind for segment in sample.segments if segment.kind != "text" and not segment.loss]
    return max(kinds.count("vae_image"), kinds.count("vit_image"))
