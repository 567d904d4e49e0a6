"""Loading a tokenizer and adding the markers."""

import json

import pytest

from echo4o.data.errors import DataError
from echo4o.data.tokenizer import MARKERS, add_special_tokens, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE()
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a red circle on a blue square", "put image 1 beside image 2"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_text_survives_and_missing_markers_are_added_once(folder):
    tokenizer = load_tokenizer(folder)
    text = "a red circle beside image 2, ünïcode 图1"
    assert tokenizer.decode(tokenizer.encode(text)) == text

    size = len(tokenizer)
    special = add_special_tokens(tokenizer)
    assert special.num_new_tokens == 3 and len(tokenizer) == size + 3
    ids = [special.bos_token_id, special.eos_token_id, special.start_of_image, special.end_of_image]
    assert len(set(ids)) == 4 and all(tokenizer.encode(marker) == [i] for marker, i in zip(MARKERS, ids, strict=True))

    again = add_special_tokens(tokenizer)
    assert again.num_new_tokens == 0 and again.end_of_image == special.end_of_image


def test_a_folder_without_tokenizer_names_the_remedy(tmp_path):
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_tokenizer(tmp_path / "absent")
