"""The contact sheet: every picture is on it, whole, and long texts do not run out of it."""

import pytest
from PIL import Image

from echo4o.generate.contact_sheet import MAX_ROWS, Row, contact_sheet, write_contact_sheet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def area(sheet, colour):
    return sum(count for count, found in sheet.getcolors(1 << 24) if found == colour)


def test_pictures_are_whole(tmp_path):
    plain(GREEN, (128, 64)).save(tmp_path / "b.png")
    row = Row("Prompt", [plain(RED), tmp_path / "b.png"], [plain(BLUE)], labels=["seed 3"])
    sheet = contact_sheet([row], cell=64)
    assert (area(sheet, RED), area(sheet, GREEN), area(sheet, BLUE)) == (64 * 64, 64 * 32, 64 * 64)


def test_small_pictures_grow_by_whole_factors():
    assert area(contact_sheet([Row("", [plain(RED, (30, 10))])], cell=64), RED) == 60 * 20


def test_more_pictures_than_fit_beside_each_other_go_below():
    sheet = contact_sheet([Row("many", [plain(RED)] * 20, [plain(BLUE)])], cell=64)
    assert (area(sheet, RED), area(sheet, BLUE)) == (20 * 64 * 64, 64 * 64)
    assert sheet.height > 3 * 64


def test_texts_of_any_length_and_script_stay_inside():
    short = contact_sheet([Row("short", [plain(RED)])], cell=64)
    long = contact_sheet([Row("word " * 500 + "红" * 500, [plain(RED)], text="x" * 5000)], cell=64)
    assert long.width == short.width
    assert short.height < long.height < short.height + 400
    edge = long.crop((long.width - 18, 0, long.width, long.height))
    assert edge.getcolors() == [(18 * long.height, (255, 255, 255))]


def test_number_of_rows_is_limited():
    row = Row("x", [plain(RED, (8, 8))])
    assert contact_sheet([row] * (MAX_ROWS + 5), cell=8).size == contact_sheet([row] * MAX_ROWS, cell=8).size


def test_format_follows_the_name(tmp_path):
    assert Image.open(write_contact_sheet([Row("x", [plain(RED)])], tmp_path / "a.jpg")).format == "JPEG"
    with pytest.raises(ValueError, match="ends in .png, .jpg or .webp"):
        write_contact_sheet([], tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]
