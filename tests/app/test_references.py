"""Order and names of references, and placeholders in the prompt."""

import pytest

from echo4o.app.references import labelled, moved, removed, with_placeholder

ITEMS = [("a.png", None), ("b.png", "image 2"), ("c.png", "image 7")]


def paths(items):
    return [path for path, _ in items]


def test_every_reference_is_named_by_its_place():
    assert labelled(ITEMS) == [("a.png", "image 1"), ("b.png", "image 2"), ("c.png", "image 3")]
    assert labelled(None) == []


def test_moving_renames_and_keeps_the_selection():
    items, place = moved(ITEMS, 0, +1)
    assert items == [("b.png", "image 1"), ("a.png", "image 2"), ("c.png", "image 3")] and place == 1
    items, place = moved(items, place, +1)
    assert paths(items) == ["b.png", "c.png", "a.png"] and place == 2


@pytest.mark.parametrize("place, by", [(0, -1), (2, +1)])
def test_at_an_end_nothing_moves(place, by):
    items, now = moved(ITEMS, place, by)
    assert paths(items) == paths(ITEMS) and now == place


def test_removing_renames():
    assert removed(ITEMS, 1) == [("a.png", "image 1"), ("c.png", "image 2")]


@pytest.mark.parametrize("place", [None, 3])
def test_without_a_selection_the_page_says_what_to_do(place):
    with pytest.raises(ValueError, match="Click on an image"):
        moved(ITEMS, place, 1)
    with pytest.raises(ValueError, match="Click on an image"):
        removed(ITEMS, place)


@pytest.mark.parametrize(
    "prompt, caret, expected",
    [
        ("", -1, "<image 1> "),
        ("the cat of", -1, "the cat of <image 1> "),
        ("the cat of  on a sofa", 11, "the cat of <image 1> on a sofa"),
        ("put on a sofa", 3, "put <image 1> on a sofa"),
        ("the cat of.", 10, "the cat of <image 1>."),
        ("short", 99, "short <image 1> "),
    ],
)
def test_placeholder_at_the_cursor(prompt, caret, expected):
    assert with_placeholder(prompt, caret, 0) == expected
