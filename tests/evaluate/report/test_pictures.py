"""Thumbnails: small, within a budget, and honest where there is nothing to show."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from echo4o.evaluate.report.pictures import Pictures


def noise(path, side=160, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side * 2, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def embedded(html):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))


def test_pictures_are_inside_and_small(tmp_path):
    path = noise(tmp_path / "a b.png")
    html = Pictures({path: 256}, tmp_path).html(path, 'a "cat" <b>')
    assert embedded(html).size == (256, 128)
    assert 'alt="a &quot;cat&quot; &lt;b&gt;"' in html and 'href="a%20b.png"' in html


def test_the_budget_holds(tmp_path):
    paths = [noise(tmp_path / f"{i}.png", seed=i) for i in range(6)]
    generous = Pictures(dict.fromkeys(paths, 256), tmp_path)
    assert not generous.shrunk
    tight = Pictures(dict.fromkeys(paths, 256), tmp_path, budget=generous.num_bytes // 4)
    assert tight.num_bytes <= generous.num_bytes // 4
    assert tight.shrunk
    # Shown as large as before, with fewer pixels.
    assert 'width="256" height="128"' in tight.html(paths[0], "")
    assert max(embedded(tight.html(paths[0], "")).size) < 256


def test_missing_and_broken_pictures_are_boxes(tmp_path):
    broken, absent, empty = tmp_path / "broken.png", tmp_path / "absent.png", tmp_path / "empty.png"
    broken.write_bytes(b"\x89PNG not at all")
    empty.write_bytes(b"")
    whole = noise(tmp_path / "whole.png").read_bytes()
    (cut := tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    pictures = Pictures(dict.fromkeys([broken, absent, empty, cut], 64), tmp_path)
    for path, words in ((broken, "unreadable"), (absent, "missing"), (empty, "empty"), (cut, "truncated")):
        html = pictures.html(path, "a cat")
        assert words in html and "<img" not in html and path.name in html and "a cat" in html
    assert "image missing" in pictures.html(None, "a cat")


def test_links_are_relative(tmp_path):
    (tmp_path / "run" / "images").mkdir(parents=True)
    path = noise(tmp_path / "run" / "images" / "ä.png")
    html = Pictures({path: 256}, tmp_path / "report", embed=False).html(path, "")
    assert 'src="../run/images/%C3%A4.png"' in html and 'width="256" height="128"' in html


@pytest.mark.parametrize("side", [16, 200])
def test_tiny_pictures_keep_their_pixels(tmp_path, side):
    path = noise(tmp_path / "a.png", side // 2)
    html = Pictures({path: 256}, tmp_path).html(path, "")
    assert embedded(html).size == (side, side // 2)
    assert ('class="pixels"' in html) == (side == 16)
