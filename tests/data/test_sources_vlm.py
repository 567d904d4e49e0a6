"""Understanding rows: conversations, images, videos."""

import random

import pytest

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.video import FrameSampler, video_frames
from tests.data.rows_on_disk import build_group, count_tokens, encoded, random_picture, shape_of, write_jsonl


def vlm(tmp_path, rows, settings=None, **changes):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    entry = {"data_dir": "images", "jsonl_path": "rows.jsonl"}
    return build_group(tmp_path, "vlm_sft", entry, settings=settings, **changes).source


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, value in [("a.png", 10), ("b.png", 20)]:
        (folder / name).write_bytes(encoded(120, 120, value=value))
    return folder


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def test_a_conversation_about_two_images(tmp_path, images):
    turns = [human("<image>\nCompare with <image> please."), gpt("The second."), human("Sure?"), gpt("Yes.")]
    plan = vlm(tmp_path, [{"image": ["a.png", "b.png"], "conversations": turns}]).plan(0, 0)
    sample = plan.load()
    assert shape_of(sample) == [
        ("vit_image", 10, False, False),
        ("text", "Compare with", False, False),
        ("vit_image", 20, False, False),
        ("text", "please.", False, False),
        ("text", "The second.", True, False),
        ("text", "Sure?", False, False),
        ("text", "Yes.", True, False),
    ]
    assert plan.num_tokens == count_tokens(sample)


def test_pixels_are_divided_by_the_number_of_images(tmp_path, images):
    def side(num_images):
        turns = [human("<image>" * num_images), gpt("x")]
        settings = {"image_transform_args": {"image_stride": 14, "max_image_size": 84, "min_image_size": 28,
                                             "max_pixels": 7056}}  # fmt: skip
        row = {"image": ["a.png"] * num_images, "conversations": turns}
        return vlm(tmp_path, [row], settings).plan(0, 0).load().segments[0].image.shape[1]

    assert (side(1), side(2)) == (84, 42), "the linear rule: half the area allowed, half the side"


def test_placeholders_and_images_that_do_not_match(tmp_path, images):
    rows = [
        {"conversations": [human("Hi <image> there"), gpt("x")]},
        {"image": "a.png", "conversations": [human("<image><image> twice"), gpt("x")]},
        {"image": "a.png", "conversations": [human("none"), gpt("x")]},
    ]
    source = vlm(tmp_path, rows)
    shapes = [shape_of(source.plan(0, position).load()) for position in range(3)]
    contents = sorted([[content for _, content, *_ in shape] for shape in shapes], key=str)
    assert contents == sorted([["Hi", "there", "x"], [10, "twice", "x"], ["none", "x"]], key=str)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"conversations": [human("only a question")]}, "no loss"),
        ({"conversations": [human("q"), gpt("")]}, "no loss"),
        ({"conversations": []}, "conversation missing"),
        ({"conversations": "text"}, "wrong column type"),
        ({"conversations": [{"role": "user"}]}, "wrong column type"),
        ({"image": "absent.png", "conversations": [human("<image>"), gpt("x")]}, "image missing"),
        ({"video": "absent.mp4", "conversations": [human("<video>"), gpt("x")]}, "video missing"),
        ({"video": 3, "conversations": [human("<video>"), gpt("x")]}, "wrong column type"),
    ],
)
def test_bad_rows(tmp_path, images, row, reason):
    with pytest.raises(RowError) as caught:
        vlm(tmp_path, [row]).plan(0, 0)
    assert (caught.value.reason, caught.value.where) == (reason, f"{tmp_path}/rows.jsonl:0")


def test_without_understanding_branch_the_group_is_refused(tmp_path, images):
    with pytest.raises(DataError, match="visual_und"):
        vlm(tmp_path, [{"conversations": [human("q"), gpt("a")]}], visual_und=False)


# --- video --------------------------------------------------------------------------------------------------------


def test_a_folder_of_frames(tmp_path, images):
    clip = images / "clip"
    clip.mkdir()
    for number in range(12):
        (clip / f"frame{number}.png").write_bytes(encoded(value=number * 20))
    row = {"video": "clip/", "conversations": [human("<video>What moves?"), gpt("Light.")]}
    settings = {"frame_sampler_args": {"max_num_frames": 6, "min_num_frames": 4}}
    source = vlm(tmp_path, [row] * 20, settings)
    counts = set()
    for position in range(20):
        plan = source.plan(0, position)
        shape = shape_of(plan.load())
        frames = [content for kind, content, *_ in shape if kind == "vit_image"]
        assert frames == sorted(set(frames)) and [kind for kind, *_ in shape[-2:]] == ["text", "text"]
        counts.add(len(frames))
    assert counts == {4, 5, 6}


def test_a_video_row_needs_its_placeholder(tmp_path, images):
    clip = images / "clip"
    clip.mkdir()
    (clip / "0.png").write_bytes(encoded())
    with pytest.raises(RowError) as caught:
        vlm(tmp_path, [{"video": "clip", "conversations": [human("What?"), gpt("x")]}]).plan(0, 0)
    assert caught.value.reason == "placeholder without image"


def test_frames_are_spread_over_short_and_long_videos():
    sampler = FrameSampler(max_num_frames=8, min_num_frames=8)
    assert sampler(3, random.Random(0)) == [0, 1, 2]
    frames = sampler(80, random.Random(0))
    assert [frame // 10 for frame in frames] == list(range(8))
    with pytest.raises(DataError, match="min_num_frames"):
        FrameSampler(max_num_frames=2, min_num_frames=3)


def test_a_video_file_without_a_library_names_the_remedy(tmp_path, images, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (images / "clip.mp4").write_bytes(b"video")
    with pytest.raises(RowError, match="pip install av") as caught:
        vlm(tmp_path, [{"video": "clip.mp4", "conversations": [human("<video>"), gpt("x")]}]).plan(0, 0)
    assert caught.value.reason == "no video library"


def test_a_video_file(tmp_path, images):
    av = pytest.importorskip("av")
    path = images / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            picture = random_picture(0, 64, 48).point(lambda _, level=number * 12: level)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    frames = video_frames(path, FrameSampler(5, 5), None, random.Random(1))
    brightness = [frame.decode().convert("L").getpixel((5, 5)) for frame in frames]
    assert [frame.size for frame in frames] == [(64, 48)] * 5
    assert [round(level / 12) // 4 for level in brightness] == [0, 1, 2, 3, 4]
    path.write_bytes(b"broken")
    with pytest.raises(RowError) as caught:
        video_frames(path, FrameSampler(5, 5), None, random.Random(1))
    assert caught.value.reason == "video unreadable"
