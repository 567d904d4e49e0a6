"""What people's downloads look like when something went wrong: counted, named, never followed out of the folder."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats import FORMATS
from echo4o.data.formats.archives import open_archives
from echo4o.data.formats.finder import ImageFinder, NameIndex, walk
from echo4o.data.formats.json_rows import JsonRows, value_spans
from echo4o.data.formats.members import Members, tar_members
from tests.data.formats import miniatures
from tests.data.formats.miniatures import picture, target, text
from tests.data.rows_on_disk import all_plans, build_group


def one_archive(path, tmp_path):
    (archive,), problems = open_archives([path], path.parent, tmp_path / "cache")
    return archive, problems


def everything(archive):
    return {name: archive.read(member) for member, name in enumerate(archive.names)}


def many(count=40):
    return [(f"{row:03d}.jpg", picture(row, size=(64, 64))) for row in range(count)]


def test_a_half_downloaded_tar_gz_gives_its_first_members(tmp_path):
    members = [(f"{row:03d}.bin", os.urandom(3000)) for row in range(40)]
    path = miniatures.tar(tmp_path / "0.tar.gz", members, "w:gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for _ in range(2):  # unpacked, and found unpacked
        archive, problems = one_archive(path, tmp_path)
        assert 15 <= len(archive.names) < 22
        assert everything(archive) == dict(members[: len(archive.names)])
        assert len(problems) == 1 and f"{len(archive.names)} members are usable" in problems[0]
        assert str(path) in problems[0] and "broken off" in problems[0]
    # Downloaded again, it is unpacked again.
    miniatures.tar(path, members, "w:gz")
    archive, problems = one_archive(path, tmp_path)
    assert everything(archive) == dict(members) and not problems
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("cut", [1, 100, 511, 513, 700, 20_000])
def test_a_broken_off_tar(tmp_path, cut):
    path = miniatures.tar(tmp_path / "0.tar", many())
    size = tarfile.BLOCKSIZE * 4
    path.write_bytes(path.read_bytes()[: -(10_240 + cut)] if cut > size else path.read_bytes()[: 30_000 + cut])
    archive, problems = one_archive(path, tmp_path)
    assert len(problems) == 1 and "members are usable. Download it again" in problems[0]
    assert everything(archive) == dict(many()[: len(archive.names)])


def test_a_broken_off_zip_has_no_members(tmp_path):
    path = miniatures.zip_of(tmp_path / "0.zip", many())
    path.write_bytes(path.read_bytes()[:-200])
    archive, problems = one_archive(path, tmp_path)
    assert not archive.names and "no zip archive" in problems[0]


def test_rows_of_a_missing_shard_are_bad_and_the_others_train(tmp_path):
    root = miniatures.echo4o_image(tmp_path, 8)
    (root / "Multi-Reference-Image" / "images" / "4-8.tar.gz").unlink()
    store = FORMATS["echo4o_image"].open(root, kinds=["multi_ref"])
    assert store.record(3).target.read() == target(3)
    with pytest.raises(RowError, match=r"Multi-Reference-Image.jsonl:4: image missing: /Echo-4o-Image/.*nowhere in"):
        store.record(4)
    entry = {"format": "echo4o_image", "path": str(root)}
    source = build_group(tmp_path, "multi_ref", entry, limits={"max_latent_size": 16}).source
    reasons = []
    for position in range(len(source)):
        try:
            source.plan(0, position)
        except RowError as error:
            reasons.append(error.reason)
    assert reasons == ["image missing"] * 4


def bad_tar(path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "ok.jpg"
    device = tarfile.TarInfo("zero.jpg")
    device.type = tarfile.CHRTYPE
    with tarfile.open(path, "w") as archive:
        for name in ("../up.jpg", "a/../../up.jpg", "/etc/abs.jpg", "C:/win.jpg", "..\\up.jpg", "./ok.jpg", "._ok.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        for info in (link, hard, device):
            archive.addfile(info)
    return path


def test_dangerous_members_are_refused_and_named(tmp_path):
    archive, problems = one_archive(bad_tar(tmp_path / "bad.tar"), tmp_path)
    assert everything(archive) == {"ok.jpg": b"abc"}
    told = " ".join(problems)
    assert "3 members refused: name leads out of the archive (../up.jpg" in told
    assert "2 members refused: absolute name (/etc/abs.jpg, C:/win.jpg)" in told
    assert "3 members refused: link, device or sparse file (link.jpg, hard.jpg, zero.jpg)" in told


def test_dangerous_zip_members_are_refused(tmp_path):
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("../up.jpg", b"abc")
        archive.writestr("bomb.png", b"\0" * (30 << 20))
        archive.writestr("ok.jpg", picture(1))
    archive, problems = one_archive(path, tmp_path)
    assert everything(archive) == {"ok.jpg": picture(1)}
    assert "grows more than 200-fold (bomb.png)" in " ".join(problems)


def test_a_bomb_of_an_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("echo4o.data.formats.archives._FREE_BYTES", 1 << 20)
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(b"\0" * (60 << 20)))
    with pytest.raises(DataError, match="decompression bomb"):
        one_archive(path, tmp_path)
    assert not list((tmp_path / "cache").glob("*.tar")) and not list((tmp_path / "cache").glob("*.partial"))


def test_a_bomb_of_an_image_is_a_bad_row(tmp_path):
    root = miniatures.write("native", tmp_path, 2)
    bomb = root / "images" / "00001.jpg"
    bomb.write_bytes(picture(1, "PNG", (3000, 3000)))
    settings_ = {"image_pixel_limit": 1_000_000}
    group = build_group(tmp_path, "multi_ref", {"format": "native", "path": str(root)}, settings=settings_)
    with pytest.raises(RowError, match=r"train.jsonl:1: image too large: .*3000 × 3000 px; the limit is 1000000"):
        all_plans(group.source)


def test_the_last_of_equal_names_counts(tmp_path):
    path = miniatures.tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")])
    archive, problems = one_archive(path, tmp_path)
    assert everything(archive) == {"b.jpg": b"2", "a.jpg": b"3"}
    assert problems == [f"{path}: 1 members stand in it twice, the last one counts (a.jpg)"]


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"not an archive" * 9]
)
def test_files_that_are_no_archives(tmp_path, content):
    path = tmp_path / "0.tar.gz"
    path.write_bytes(content)
    if content.startswith(b"version"):
        with pytest.raises(DataError, match="git lfs pull"):
            one_archive(path, tmp_path)
    else:
        _, problems = one_archive(path, tmp_path)
        assert "no tar archive" in problems[0] and "0 members are usable" in problems[0]


def test_a_tar_named_tar_gz_and_several_gzip_streams(tmp_path):
    plain = miniatures.tar(tmp_path / "plain.tar.gz", many(3))
    assert everything(one_archive(plain, tmp_path)[0]) == dict(many(3))
    data = plain.read_bytes()
    streams = tmp_path / "streams.tar.gz"
    streams.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]) + b"\0" * 100)
    archive, problems = one_archive(streams, tmp_path)
    assert everything(archive) == dict(many(3)) and not problems


def test_archives_travel_to_workers(tmp_path):
    archive, _ = one_archive(miniatures.tar(tmp_path / "0.tar", many(3)), tmp_path)
    archive.read(0)
    assert everything(pickle.loads(pickle.dumps(archive))) == dict(many(3))


def test_an_archive_damaged_after_indexing_is_a_bad_row(tmp_path):
    path = miniatures.tar(tmp_path / "0.tar", many(3))
    archive, _ = one_archive(path, tmp_path)
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(RowError, match="archive broken: .*0.tar: 000.jpg: 88 of"):
        archive.read(0)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
        st.binary(max_size=2000),
        max_size=8,
    ),
    st.integers(0, 30_000),
)
def test_a_tar_cut_anywhere_gives_whole_members_or_none(tmp_path_factory, members, cut):
    members = {name.strip("/.\\") or "x": data for name, data in members.items()}
    folder = tmp_path_factory.mktemp("cut")
    path = miniatures.tar(folder / "0.tar", members.items())
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    found = tar_members(path)
    assert bool(found.broken) == (
        cut < len(whole) and bool(whole[cut:].strip(b"\0")) or cut < 512 or not _ends(whole, cut)
    )
    for name, offset, size in zip(found.names, found.offsets, found.sizes, strict=True):
        assert whole[offset : offset + size] in members.values() and name
    index = folder / "index.npz"
    found.save(index)
    loaded = Members.load(index)
    assert loaded.names == found.names and loaded.broken == found.broken
    assert loaded.offsets.tolist() == found.offsets.tolist()


def _ends(whole, cut):
    """Whether a block of zeros, the end mark, is left."""
    data = len(whole.rstrip(b"\0"))
    return cut >= -(-data // 512) * 512 + 512


def test_bad_lines_are_counted_by_file_and_line(tmp_path):
    row = json.dumps({"instruction": "x", "input_images": ["a.png"], "output_image": "a.png"}).encode()
    bad = [
        row[:-5],
        b'{"instruction": "a", "instruction": "b", "output_image": "a.png"}',
        b"[1]",
        b'{"instruction": "\xff\xfe"}',
    ]
    (tmp_path / "a.png").write_bytes(picture(1, "PNG"))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([row, *bad, b"", row]) + b"\n")
    store = FORMATS["native"].open(tmp_path / "rows.jsonl")
    told = []
    for number in range(len(store)):
        try:
            store.record(number).target.read()
        except RowError as error:
            told.append(str(error).removeprefix(str(tmp_path)))
    assert [line.split(": ")[:2] for line in told] == [
        ["/rows.jsonl:1", "invalid json"],
        ["/rows.jsonl:2", "duplicate key"],
        ["/rows.jsonl:3", "invalid json"],
        ["/rows.jsonl:4", "text not UTF-8"],
    ]
    # They stay in the source, to be counted by the run's ledger.
    group = build_group(tmp_path, "multi_ref", {"format": "native", "path": "rows.jsonl"})
    assert len(group.source) == 6


def test_a_json_array_that_breaks_off(tmp_path):
    root = miniatures.write("unireason", tmp_path)
    file = root / "editing.json"
    file.write_bytes(file.read_bytes()[:-100])
    store = FORMATS["unireason"].open(root)
    assert any("editing.json: the JSON breaks off" in line and "5 rows before it" in line for line in store.problems)
    assert store.record(4).instructions == text(4)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=9), st.integers()), max_size=3), max_size=6
    ),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_rows_of_json_arrays_are_found_by_byte(tmp_path_factory, rows, ascii_only, indent):
    file = tmp_path_factory.mktemp("json") / "rows.json"
    file.write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass"))
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError:
        return
    found = JsonRows([file])
    assert [found.read(number) for number in range(len(found))] == rows


def test_objects_of_rows_and_single_rows():
    assert [t for t in value_spans('{"a": {"x": 1}, "b": {}}')[0]] == [(6, 14), (21, 23)]
    assert value_spans(' {"a": {"x": 1}, "b": 2} ') == ([(1, 24)], "")
    assert value_spans("[]") == ([], "") and value_spans("7")[1] and value_spans("[1, 2")[1]


def test_paths_of_another_machine(tmp_path):
    root = miniatures.write("native", tmp_path, 2)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["input_images"] = [f"/mnt/their/disk/native/{name}" for name in row["input_images"]]
        row["output_image"] = f"D:\\data\\{row['output_image']}".replace("/", "\\")
    miniatures.lines(root / "train.jsonl", rows)
    store = FORMATS["native"].open(root)
    assert store.record(1).target.read() == target(1)


def test_the_longest_matching_end_counts_and_ties_are_errors(tmp_path):
    miniatures.files(tmp_path, [("x/a/1.png", b"xa"), ("x/b/1.png", b"xb"), ("deep/down/only.png", b"o")])
    find = ImageFinder([tmp_path])
    assert find("/pub/x/b/1.png").read() == b"xb"
    assert find("/pub/y/a/1.png").read() == b"xa"
    assert find("somewhere/only.png").read() == b"o"
    with pytest.raises(RowError, match="image name ambiguous: z/1.png may be .*x/a/1.png or .*x/b/1.png"):
        find("z/1.png")
    with pytest.raises(RowError, match="image missing: none.png is nowhere in"):
        find("none.png")


def test_archives_and_folders_compete_by_matching_end(tmp_path):
    miniatures.files(tmp_path, [("1.png", b"loose")])
    archive = miniatures.tar(tmp_path / "b.tar", [("images/1.png", b"packed")])
    find = ImageFinder([tmp_path], [archive], root=tmp_path)
    find.open_archives()
    assert find("/pub/images/1.png").read() == b"packed"
    assert find("1.png").read() == b"loose"


def test_shards_that_number_anew_are_told_by_their_names(tmp_path):
    shards = [miniatures.tar(tmp_path / f"{n}.tar", [("0.jpg", b"%d" % n)]) for n in (1, 2)]
    find = ImageFinder([tmp_path], shards, root=tmp_path)
    assert find("/pub/images/2/0.jpg").read() == b"2"
    with pytest.raises(RowError, match="ambiguous"):
        find("/pub/images/0.jpg")


def test_names_match_whatever_their_unicode_form(tmp_path):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    assert NameIndex([decomposed]).find(["caf\u00e9.png"]) == (1, [0])
    archive = miniatures.tar(tmp_path / "0.tar", [(decomposed, b"x")])
    assert ImageFinder([], [archive])(f"images/{composed}").read() == b"x"


def test_links_round_in_a_circle_end_in_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match="is a link to a folder above it; remove the link"):
        list(walk(tmp_path))


def test_images_in_rows_may_be_data_urls_and_bytes(tmp_path):
    import base64

    plain = base64.b64encode(picture(1)).decode()
    find = ImageFinder([tmp_path])
    for value in (f"data:image/jpeg;base64,{plain}", plain, picture(1), {"bytes": picture(1), "path": "x.jpg"}):
        assert find(value).read() == picture(1)
    assert find({"bytes": picture(1), "path": "x.jpg"}).name == "x.jpg"
    for value, reason in ((None, "image missing"), ("", "image missing"), (3, "wrong column type")):
        with pytest.raises(RowError, match=reason):
            find(value)


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    root = miniatures.echo4o_image(tmp_path, 2)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(DataError, match="set --data_cache_dir"):
        FORMATS["echo4o_image"].open(root)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"format": "echo4o", "path": "."}, "unknown format 'echo4o'; known"),
        ({"format": "native"}, "needs path: the data set's folder"),
        ({"format": "native", "path": "nothing"}, "does not exist"),
        ({"format": "native", "path": ".", "data_dir": "."}, "data_dir does not go with format"),
        ({"path": "."}, "path belongs to a format: add e.g. format: echo4o_image"),
        ({"format": "native", "path": ".", "columns": ["a"]}, "columns must be a mapping"),
        (
            {"format": "native", "path": ".", "streaming": "yes"},
            "streaming in the dataset config must be true or false",
        ),
        ({"format": "native", "path": ".", "images": "gone"}, "images: .*gone does not exist"),
        ({"format": "native", "path": ".", "pth": "."}, "did you mean 'path'"),
    ],
)
def test_wrong_entries_name_the_fix(tmp_path, entry, message):
    miniatures.lines(tmp_path / "rows.jsonl", [{"instruction": "x", "input_images": [], "output_image": "a.png"}])
    with pytest.raises(DataError, match=message):
        build_group(tmp_path, "multi_ref", entry)


def test_rows_of_another_kind_are_left_out_or_refused(tmp_path):
    root = miniatures.write("unireason", tmp_path)
    entry = {"format": "unireason", "path": str(root)}
    assert len(build_group(tmp_path, "t2i_pretrain", entry).source) == 6
    assert len(build_group(tmp_path, "multi_ref", entry).source) == 6
    both = {"allow_no_references": True}
    assert len(build_group(tmp_path, "multi_ref", entry, settings=both).source) == 12
    used = {"num_used_data": [20]}
    assert len(build_group(tmp_path, "t2i_pretrain", entry, settings=used).source) == 20
    with pytest.raises(DataError, match=r"Found: 4 edit, 2 multi_ref|Found: 2 edit, 4 multi_ref, 6 t2i"):
        build_group(tmp_path, "vlm_sft", entry)
