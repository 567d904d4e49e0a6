"""Edit rows: which hops are drawn, and how intermediates are laid down."""

from collections import Counter

import pytest

from echo4o.data.errors import RowError
from tests.data.rows_on_disk import all_plans, build_group, count_tokens, encoded, shape_of, write_jsonl, write_parquet


def edits(tmp_path, rows, **changes):
    write_parquet(tmp_path / "rows" / "a.parquet", rows)
    return build_group(tmp_path, "unified_edit", {"data_dir": "rows"}, **changes).source


def chain(num_images):
    images = [encoded(value=10 * (place + 1)) for place in range(num_images)]
    return {"image_list": images, "instruction_list": [[f"to {10 * (j + 2)}"] for j in range(num_images - 1)]}


def condition(value):
    return [("vae_image", value, False, True), ("vit_image", value, False, True)]


def text(content):
    return ("text", content, False, True)


def target(value):
    return ("vae_image", value, True, False)


def drawn(source):
    """How often each plan is drawn; exact token counts are checked along the way."""
    counts = Counter()
    for plan in all_plans(source):
        sample = plan.load()
        assert plan.num_tokens == count_tokens(sample)
        counts[tuple(shape_of(sample))] += 1
    return counts


def test_two_images_make_one_edit(tmp_path):
    counts = drawn(edits(tmp_path, [chain(2)] * 3))
    assert set(counts) == {(*condition(10), text("to 20"), target(20))}


def test_three_images_make_one_hop_or_two(tmp_path):
    counts = drawn(edits(tmp_path, [chain(3)] * 120))
    first_hop = (*condition(10), text("to 20"), target(20))
    second_hop = (*condition(20), text("to 30"), target(30))
    both = (*condition(10), text("to 20"), target(20), *condition(20), text("to 30"), target(30))
    assert set(counts) == {first_hop, second_hop, both}
    # start is 0 half of the time; of those a half is one hop, and of the two-hop half a half loses its last hop.
    shares = [counts[plan] / 120 for plan in (first_hop, second_hop, both)]
    assert shares == pytest.approx([3 / 8, 1 / 2, 1 / 8], abs=0.13)


def test_four_images_can_join_two_instructions(tmp_path):
    counts = drawn(edits(tmp_path, [chain(4)] * 80))
    joined = (*condition(10), text("to 20. to 30"), target(30))
    assert joined in counts
    assert all(sum(segment[2] for segment in plan) <= 2 for plan in counts), "at most two hops"


def test_intermediates_share_one_tensor(tmp_path):
    for plan in all_plans(edits(tmp_path, [chain(3)] * 80)):
        segments = plan.load().segments
        if sum(segment.loss for segment in segments) == 2:
            assert segments[3].loss and segments[3].image is segments[4].image
            return
    pytest.fail("no two-hop row was drawn")


def test_without_understanding_branch(tmp_path):
    sample = edits(tmp_path, [chain(2)], visual_und=False).plan(0, 0).load()
    assert shape_of(sample) == [condition(10)[0], text("to 20"), target(20)]


def test_native_jsonl(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(value=10))
    (tmp_path / "b.png").write_bytes(encoded(value=20))
    write_jsonl(tmp_path / "e.jsonl", [{"instruction": "brighter", "input_image": "a.png", "output_image": "b.png"}])
    source = build_group(tmp_path, "unified_edit", {"jsonl_path": "e.jsonl"}).source
    assert shape_of(source.plan(0, 0).load()) == [*condition(10), text("brighter"), target(20)]


def test_bad_rows(tmp_path):
    for columns, reason in [
        ({"image_list": chain(2)["image_list"][:1], "instruction_list": [["x"]]}, "too few images"),
        ({"image_list": chain(3)["image_list"], "instruction_list": [["x"]]}, "instruction missing"),
        ({"image_list": chain(2)["image_list"], "instruction_list": [[]]}, "instruction missing"),
    ]:
        with pytest.raises(RowError) as caught:
            edits(tmp_path, [columns]).plan(0, 0)
        assert caught.value.reason == reason
