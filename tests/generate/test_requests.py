"""Request files: what a line may say, what is refused with which remedy, and the seeds of lines without one."""

import hashlib
import json

import pytest

from echo4o.generate.item import RequestError, numbered
from echo4o.generate.options import SizeCheck
from echo4o.generate.requests import read_requests, single_request, summary_of
from tests.generate.request_files import write_pictures, write_requests


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures")
    return tmp_path


def read(folder, *lines, **defaults):
    return read_requests(write_requests(folder / "requests.jsonl", *lines), defaults)


def problem_of(folder, line, **defaults):
    items, problems = read(folder, line, **defaults)
    assert not items
    (problem,) = problems
    return problem


def test_lines_become_requests(folder):
    items, problems = read(
        folder,
        {"prompt": "Ein schöner Würfel, 红色 🟥"},
        "",
        {"id": 7, "prompt": "both", "images": ["pictures/red.png", "pictures/blue.png"], "cfg_interval": [0.4, 1]},
        {"id": "ask", "prompt": "what?", "images": ["pictures/red.png"], "understand": True, "think": None},
        {"elements": [{"image": "pictures/blue.png"}, "becomes", {"image": "pictures/red.png"}], "size_from": 1},
    )
    assert not problems
    plain, both, ask, ordered = items
    assert (plain.id, plain.preset, plain.text) == ("00001", "t2i", "Ein schöner Würfel, 红色 🟥")
    assert (both.id, both.preset, both.parts) == ("7", "multi_ref", (0, 1, "both"))
    assert both.settings.guidance.cfg_interval == (0.4, 1)
    assert both.elements == [folder / "pictures" / "red.png", folder / "pictures" / "blue.png", "both"]
    assert both.images[0].size == (64, 48)
    assert both.images[0].sha256 == hashlib.sha256((folder / "pictures" / "red.png").read_bytes()).hexdigest()
    assert (ask.preset, ask.settings.max_think_tokens, ask.think, ask.file_names) == ("understand", 512, False, ())
    assert (ordered.id, ordered.parts, ordered.text) == ("00005", (0, "becomes", 1), "<image 1> becomes <image 2>")


def test_placeholders_put_references_in_their_place(folder):
    line = {"prompt": "the blue of <image 2>, please", "images": ["pictures/red.png", "pictures/blue.png"]}
    assert read(folder, line)[0][0].parts == (0, "the blue of", 1, ", please")
    literal = read(folder, {**line, "inline": False})[0][0]
    assert literal.parts == (0, 1, "the blue of <image 2>, please")


def test_options_of_the_command_line_hold_where_a_line_is_silent(folder):
    items, _ = read(folder, {"prompt": "a"}, {"prompt": "b", "num_timesteps": 9}, num_timesteps=5, num_images=2)
    assert [item.settings.num_timesteps for item in items] == [5, 9]
    assert items[0].file_names == ("00001_0.png", "00001_1.png")


def test_seed_of_a_line_depends_on_its_id_and_nothing_else(folder):
    path = write_requests(folder / "r.jsonl", {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", "seed": 3})
    first, second = read_requests(path, seed=1)[0]
    assert first.seed == int.from_bytes(hashlib.sha256(b"1:a").digest()[:4], "big")
    assert second.seed == 3
    path = write_requests(folder / "r.jsonl", {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"})
    assert read_requests(path, seed=1)[0][1].seed == first.seed
    assert read_requests(path, seed=2)[0][1].seed != first.seed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 1: not valid JSON"),
        ("[1]", "a request is a JSON object"),
        ({"promt": "x"}, "unknown key 'promt'. Did you mean prompt?"),
        ({"prompt": "x", "num-timestep": 5}, "unknown key 'num-timestep'. Did you mean num_timesteps?"),
        ({"prompt": "x", "num_timesteps": "9"}, 'num_timesteps is "9"; it must be a whole number'),
        ({"prompt": "x", "seed": True}, "seed is true; it must be a whole number"),
        ({"prompt": "x", "cfg_interval": [0.4]}, "cfg_interval is [0.4]; it must be a list of 2 numbers"),
        ({"prompt": "x", "cfg_interval": [0.9, 0.1]}, "must be two times with 0 ≤ low ≤ high ≤ 1"),
        ({"prompt": "x", "cfg_renorm_type": "local"}, "unknown cfg_renorm_type 'local'"),
        ({"prompt": "x", "preset": "art"}, "unknown preset 'art'; choose one of t2i"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "seed": 2**63 - 1, "num_images": 2}, "must lie between 0 and 2^63 - 2"),
        ({"prompt": "x", "size_from": "lats"}, "size_from is 'lats'"),
        ({"prompt": "x", "preset": "understand", "understand": False}, "the preset understand draws nothing"),
        ({"prompt": "x", "preset": "understand", "num_images": 2}, "(and 1 for an answer in text)"),
        ('{"prompt": "\\udce9"}', "characters that are no text"),
        ({"prompt": "x", "height": 64}, "give height and width together"),
        ({"prompt": "x", "num_images": 0}, "num_images is 0"),
        ({"prompt": "  "}, "there is no text"),
        ({}, "give a prompt (with images), or elements"),
        ({"prompt": "x", "elements": ["y"]}, "one of the two"),
        ({"elements": ["y", {"picture": "a.png"}]}, 'it must be a text or {"image": path}'),
        ({"elements": ["y"], "images": ["pictures/red.png"]}, "leave the key images out"),
        ({"prompt": "<image 2>", "images": ["pictures/red.png"]}, "Give as many images as the prompt names"),
        ({"prompt": "x", "images": ["no.png"]}, "no.png cannot be read (No such file or directory); check its path"),
        ({"prompt": "x", "images": [3]}, "an image is 3; it must be a path"),
        ({"prompt": "x", "size_from": 2, "images": ["pictures/red.png"]}, "size_from is 2, but there are 1 images"),
        ({"prompt": "x", "id": "../evil"}, "id is '../evil'; it names files"),
        ({"prompt": "x", "id": ".hidden"}, "first a letter, digit or _"),
        ({"prompt": "x", "id": "é" * 101}, "at most 200 bytes"),
    ],
)
def test_bad_lines_are_refused_with_a_remedy(folder, line, message):
    problem = problem_of(folder, line)
    assert problem.startswith("line 1: ") and message in problem


def test_pictures_that_cannot_be_decoded(folder):
    whole = (folder / "pictures" / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    assert "cut.png; give another picture" in problem_of(folder, {"prompt": "x", "images": ["cut.png"]})
    assert "image unreadable" in problem_of(folder, {"prompt": "x", "images": ["text.png"]})


def test_bytes_that_are_no_text_are_one_bad_line(folder):
    path = folder / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\n{"prompt": "\xff"}\n{"prompt": "y\xe2\x80\xa8z"}\n')
    items, problems = read_requests(path)
    assert [item.prompt for item in items] == ["x", "y\u2028z"]
    assert [problem[:7] for problem in problems] == ["line 2:"]


def test_files_of_two_lines_must_not_be_the_same(folder):
    items, problems = read(
        folder,
        {"id": "a", "prompt": "x", "num_images": 2},
        {"id": "b", "prompt": "x"},
        {"id": "b", "prompt": "y"},
        {"id": "a_1", "prompt": "z"},
    )
    assert [item.prompt for item in items] == ["x", "x"]
    assert problems == [
        "line 3: id 'b' would overwrite the files of line 2; give every line its own id",
        "line 4: id 'a_1' would overwrite the files of line 1; give every line its own id",
    ]


def test_long_lists_of_problems_are_cut():
    text = summary_of([f"line {i}: bad" for i in range(1, 31)], "r.jsonl")
    assert text.startswith(
        "r.jsonl: 30 lines cannot be used; mend them, or leave them out with --skip-bad\n  line 1: bad"
    )
    assert text.endswith("line 20: bad\n  … and 10 more")


def test_what_the_model_cannot_do_is_named_with_its_line(folder):
    lines = [{"prompt": "x"}, {"prompt": "x", "height": 40, "width": 64}, {"prompt": "x", "height": 64, "width": 144}]
    lines += [{"prompt": "x", "height": 128, "width": 16}, {"prompt": "x", "height": 7, "width": 7, "understand": True}]
    path = write_requests(folder / "r.jsonl", *lines)
    items, problems = read_requests(path, check=SizeCheck(16, 128))
    assert [item.id for item in items] == ["00001", "00004", "00005"]
    assert [problem[:7] for problem in problems] == ["line 2:", "line 3:"]
    assert "output size 40 × 64 (height × width): both must be multiples of 16 up to 128" in problems[0]


def test_the_preset_understand_asks_for_an_answer(folder):
    (item,), _ = read(folder, {"prompt": "what?", "preset": "understand"})
    assert item.understand and item.settings.max_think_tokens == 512 and not item.file_names


def test_single_request_takes_paths_from_here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    item = single_request({"prompt": "x", "images": ["pictures/red.png"]})
    assert (item.preset, item.seed, len(item.images[0].sha256)) == ("edit", 0, 64)
    with pytest.raises(RequestError, match="red.png cannot be read"):
        single_request({"prompt": "x", "images": ["red.png"]})


def test_names_of_several_pictures():
    assert numbered("out.png", 1) == ("out.png",)
    assert numbered("a.b.png", 2) == ("a.b_0.png", "a.b_1.png")


def test_every_setting_is_a_key(folder):
    settings = {"taylorseer": True, "branch_cache": 2, "top_p": 0.5, "temperature": 1, "do_sample": True}
    item = read(folder, json.dumps({"prompt": "x", **settings}))[0][0]
    assert {name: getattr(item.settings, name) for name in settings} == settings
