"""The learning proof's measure: a model that ignores its references, or its text, cannot pass it."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
prove_learning = pytest.importorskip("prove_learning")
german_instructions = pytest.importorskip("german_instructions")

from make_example_data import heldout_rows, multi_ref_rows  # noqa: E402

TARGETS = {row.instruction: row.images()[-1] for row in heldout_rows()}


class Fake:
    """Draws what `picture(images, text, size)` says."""

    def __init__(self, picture):
        self.picture = picture

    def prompt_request(self, prompt, images, height, width, **settings):
        return SimpleNamespace(prompt=prompt, images=images, size=(width, height))

    def batch(self, requests):
        drawn = [self.picture(r.images, r.prompt, r.size) for r in requests]
        return SimpleNamespace(images=[Image.fromarray(pixels).resize(r.size) for pixels, r in zip(drawn, requests)])  # noqa: B905


def ratios(monkeypatch, tmp_path, picture):
    monkeypatch.setattr(prove_learning.Echo4oPipeline, "from_pretrained", lambda *a, **k: Fake(picture))
    numbers = prove_learning.measure(Path("model"), tmp_path)
    assert (tmp_path / "heldout.png").is_file() and (tmp_path / "swap_ratios.json").is_file()
    return numbers["reference_swap_ratio"], numbers["text_swap_ratio"]


def test_a_model_that_ignores_its_references(monkeypatch, tmp_path):
    of_references, of_text = ratios(monkeypatch, tmp_path, lambda images, text, size: TARGETS[text] ^ 8)
    assert of_references == 1.0
    assert of_text < prove_learning.LIMIT


def test_a_model_that_ignores_its_text(monkeypatch, tmp_path):
    of_references, of_text = ratios(monkeypatch, tmp_path, lambda images, text, size: np.asarray(images[0]))
    assert of_text == 1.0


def test_a_model_that_uses_both(monkeypatch, tmp_path):
    known = {
        (row.instruction, *(image.tobytes() for image in row.images()[:-1])): row.images()[-1] for row in heldout_rows()
    }

    def picture(images, text, size):
        key = (text, *(image.tobytes() for image in images))
        return known.get(key, np.full((8, 8, 3), 128, dtype=np.uint8))

    assert max(ratios(monkeypatch, tmp_path, picture)) == 0.0


def test_rows_that_training_has_in_other_words_are_left_out():
    unseen = prove_learning.unseen_rows()
    assert 0.8 * len(heldout_rows()) < len(unseen) < len(heldout_rows())
    pictures = {tuple(image.tobytes() for image in row.images()) for row in prove_learning.train_rows()[::20]}
    assert not pictures & {tuple(image.tobytes() for image in row.images()) for row in unseen}


def test_a_copy_of_the_best_reference_is_known():
    rows = heldout_rows()[:6]
    copies = prove_learning.best_copies(rows)
    firsts = [np.asarray(Image.fromarray(r.images()[0]).resize(r.target[1])) for r in rows]
    assert (copies <= prove_learning.errors(firsts, rows)).all() and (copies > 0).all()


def test_every_row_has_partners_that_differ():
    rows = prove_learning.unseen_rows()
    for number, row in enumerate(rows):
        place = prove_learning.partner(
            rows, number, lambda a, b: prove_learning.meaning(a.instruction) != prove_learning.meaning(b.instruction)
        )
        assert len(rows[place].references) == len(row.references)
        assert prove_learning.meaning(rows[place].instruction) != prove_learning.meaning(row.instruction)


def test_wordings_of_the_same_meaning():
    first = "Put the shape of image 1, filled with the texture of image 2, on the background of image 3."
    second = "On the background of image 3, draw the shape of image 1 with the texture of image 2."
    assert prove_learning.meaning(first) == prove_learning.meaning(second)
    assert prove_learning.meaning("Paint the shape of image 1 red.") == {"shape": "1", "name": "red"}


def test_instructions_become_german_and_keep_their_numbers():
    english = re.compile(r"\b(the|of|on|image|with|shape|background|light|colour|and)\b")
    for row in multi_ref_rows("train", 300, seed=1):
        text = german_instructions.german(row).instruction
        assert not english.search(text), text
        assert sorted(re.findall(r"\d", text)) == sorted(re.findall(r"\d", row.instruction))
