"""Tokenizer files for old and new versions of transformers: one set of ids."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import pytest
import regex
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from echo4o.checkpoint.folders import CheckpointError
from echo4o.checkpoint.hf.tokenizer_files import QWEN2_PATTERN, generation_config, tokenizer_files
from tests.train.tiny_run import DATA, write_tokenizer

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
TEXTS = [
    "<|im_start|>Put image 1 beside image 23.<|im_end|>",
    "naïve cafe\u0301, Ärger über Öl",
    "你好，世界 图12 和 图3<|vision_start|><|vision_end|>",
    "  two\n\n  lines\t1234567 don't DON'T\r\n\u00a0end ",
    "<|endoftext|><|im_start|> <|im_end|>x",
    "",
]


def train(folder: Path, pattern: str = QWEN2_PATTERN, markers_first: bool = False) -> Tokenizer:
    """A tokenizer of a few hundred merges in `folder`, as transformers 5 writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=MARKERS if markers_first else [],
    )
    tokenizer.train_from_iterator([*TEXTS, "你好世界 " * 3, "version:1 12 12 123 image don't " * 5], trainer)
    if not markers_first:
        tokenizer.add_special_tokens(MARKERS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "extra_special_tokens": MARKERS[3:]}
    machine = {"is_local": True, "local_files_only": True, "name_or_path": str(folder), "tokenizer_file": str(folder)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | machine))
    return tokenizer


def letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def slow_ids(folder: Path, text: str) -> list[int]:
    """What Qwen2Tokenizer of transformers 4 does, from the files that it reads."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version")
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines[1:])}
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {token["content"]: int(number) for number, token in settings["added_tokens_decoder"].items()}
    alphabet, ids = letters(), []
    for part in regex.split("(" + "|".join(map(regex.escape, added)) + ")", text):
        if part in added:
            ids.append(added[part])
            continue
        for word in regex.findall(QWEN2_PATTERN, unicodedata.normalize("NFC", part)):
            pieces = [alphabet[byte] for byte in word.encode()]
            while len(pieces) > 1:
                rank, at = min(
                    (ranks.get(pair, len(ranks)), at) for at, pair in enumerate(zip(pieces, pieces[1:], strict=False))
                )
                if rank == len(ranks):
                    break
                pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
            ids += [vocabulary[piece] for piece in pieces]
    return ids


def write(folder: Path, files: dict[str, bytes], *left_out: str) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        if name not in left_out:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("markers_first", [False, True])
def test_old_and_new_tokenizers_give_the_same_ids(tmp_path: Path, markers_first: bool) -> None:
    tokenizer = train(tmp_path, markers_first=markers_first)
    files = tokenizer_files(tmp_path)
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    old = write(tmp_path / "old", files, "tokenizer.json")
    wanted = [tokenizer.encode(text).ids for text in TEXTS]
    assert [slow_ids(old, text) for text in TEXTS] == wanted
    assert len(wanted[1]) < len(TEXTS[1].encode())  # merges are at work
    # And back: a folder that holds the old form only.
    again = tokenizer_files(old)
    rebuilt = Tokenizer.from_str(again["tokenizer.json"].decode())
    assert [rebuilt.encode(text).ids for text in TEXTS] == wanted
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
    assert {name: again[name] for name in ("vocab.json", "merges.txt", "tokenizer_config.json")} == {
        name: files[name] for name in ("vocab.json", "merges.txt", "tokenizer_config.json")
    }


def test_the_learned_example_model(tmp_path: Path) -> None:
    source = DATA / "tiny_bagel"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    old = write(tmp_path / "old", tokenizer_files(source), "tokenizer.json")
    assert [slow_ids(old, text) for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    source.mkdir()
    wanted = [train(source).encode(text).ids for text in TEXTS]
    files = tokenizer_files(source)
    for name, left_out in (("new", ()), ("only json", ("vocab.json", "merges.txt")), ("old", ("tokenizer.json",))):
        tokenizer = AutoTokenizer.from_pretrained(write(tmp_path / name, files, *left_out))
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == wanted
        assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", len(json.loads(files["vocab.json"])) + 5)
        assert not set(MARKERS[3:]) - set(tokenizer.all_special_tokens)


def test_settings_name_no_machine_and_no_new_terms(tmp_path: Path) -> None:
    train(tmp_path)
    settings = json.loads(tokenizer_files(tmp_path)["tokenizer_config.json"])
    assert set(settings) == {"tokenizer_class", "eos_token", "additional_special_tokens", "added_tokens_decoder"}
    assert str(tmp_path) not in json.dumps(settings)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    settings = json.loads(tokenizer_files(tmp_path)["tokenizer_config.json"])
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").unlink()
    assert json.loads(tokenizer_files(tmp_path)["tokenizer_config.json"])["tokenizer_class"] == "Qwen2Tokenizer"


def test_defaults_that_would_grow_the_vocabulary_are_switched_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)  # knows no <|endoftext|>
    settings = json.loads(tokenizer_files(tmp_path)["tokenizer_config.json"])
    assert (settings["unk_token"], settings["pad_token"], settings["eos_token"]) == (None, None, "<|im_end|>")


def test_files_beside_are_kept(tmp_path: Path) -> None:
    train(tmp_path)
    kept = {"special_tokens_map.json": b'{"eos_token": "<|im_end|>"}', "chat_template.jinja": b"{{ messages }}"}
    for name, content in {**kept, "model.safetensors": b"", "notes.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    files = tokenizer_files(tmp_path)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", *kept}
    assert {name: files[name] for name in kept} == kept


def test_added_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    tokenizer = train(tmp_path)
    old = write(tmp_path / "old", tokenizer_files(tmp_path), "tokenizer.json", "tokenizer_config.json")
    first = tokenizer.token_to_id(MARKERS[0])
    added = {marker: first + place for place, marker in enumerate(MARKERS)}
    (old / "added_tokens.json").write_text(json.dumps(added))
    rebuilt = Tokenizer.from_str(tokenizer_files(old)["tokenizer.json"].decode())
    assert [rebuilt.encode(text).ids for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
    (old / "added_tokens.json").write_text(json.dumps({MARKERS[0]: first + 7}))
    with pytest.raises(CheckpointError, match=f"the id {first + 7}, where {first} comes next"):
        tokenizer_files(old)


def test_other_kinds_are_left_as_they_are(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "a": 1, "cat": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(MARKERS[1:3])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files = tokenizer_files(tmp_path)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert generation_config(tmp_path) == {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 4}
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(b"sentencepiece")
    assert set(tokenizer_files(other)) == {"tokenizer.model", "tokenizer_config.json"}
    assert generation_config(other) == {}


def test_another_way_of_cutting_text_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, pattern=r"\p{N}+|\P{N}+")
    with caplog.at_level(logging.WARNING):
        tokenizer_files(tmp_path)
    assert "may get other ids" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "holds no JSON object"),
    ],
)
def test_damaged_folders_are_named(tmp_path: Path, change, message: str) -> None:
    train(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_files(tmp_path)


def test_merges_of_another_vocabulary(tmp_path: Path) -> None:
    train(tmp_path)
    old = write(tmp_path / "old", tokenizer_files(tmp_path), "tokenizer.json")
    (old / "merges.txt").write_text("#version: 0.2\nqq qq\n")
    with pytest.raises(CheckpointError, match="do not belong together"):
        tokenizer_files(old)


def test_generation_config(tmp_path: Path) -> None:
    first = train(tmp_path).token_to_id(MARKERS[0])
    assert generation_config(tmp_path) == {
        "bos_token_id": first,
        "eos_token_id": [first + 2, first],
        "pad_token_id": first,
    }
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 1, "temperature": 0.7}')
    assert generation_config(tmp_path) == {"bos_token_id": 1, "temperature": 0.7}
    small = tmp_path / "small"
    write_tokenizer(small)
    assert generation_config(small) == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
