"""Pictures of a benchmark: drawn once, under the benchmark's names, never mixed; or taken from elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from echo4o.evaluate.benchmark import Benchmark, Item, ItemScore, Judgement
from echo4o.evaluate.benchmarks import BENCHMARKS
from echo4o.evaluate.generation import adopt, draw, merged_settings, requests_of
from echo4o.evaluate.run_folder import RunFolder, RunFolderError
from echo4o.generate.files import read_metadata
from echo4o.generate.item import RequestError
from echo4o.generate.options import ModelOptions
from tests.evaluate.small_run import write_images

TINY = Path(__file__).resolve().parents[2] / "data_examples" / "tiny_bagel"
SMALL = {"height": 32, "width": 32, "num_timesteps": 3, "cfg_text_scale": 2.0}


@dataclass(frozen=True)
class Kites(Benchmark):
    """Two pictures an item, in folders of their own, with a file beside them."""

    name = "kites"
    title = "Kites"

    @property
    def settings(self):
        return {"preset": "t2i", "height": 1024, "width": 1024, "cfg_interval": (0.0, 1.0)}

    def load(self, path: Path | None) -> list[Item]:
        return [Item(f"kite-{n}", f"A photo of {n} kites.", tag="kite", num_images=2) for n in range(3)]

    def image_name(self, item: Item, number: int = 0) -> str:
        return f"{item.id}/samples/{number:05d}.png"

    def sidecars(self, item: Item) -> Mapping[str, str | Path]:
        return {f"{item.id}/metadata.jsonl": json.dumps({"prompt": item.prompt})}

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        return ItemScore(item.id, item.tag, 1.0, 1.0)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return dict.fromkeys(counts, 1.0)


KITES = Kites()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("run") / "kites")
    done = draw(KITES, KITES.load(None), run, ModelOptions(TINY), merged_settings(KITES, SMALL))
    assert done is not None and (done.num_done, done.failed) == (6, {})
    return run


def test_pictures_lie_where_the_benchmark_wants_them(drawn):
    items = KITES.load(None)
    pictures = [picture for item in items for picture in drawn.pictures(KITES, item)]
    assert all(picture and Image.open(picture).size == (32, 32) for picture in pictures)
    assert json.loads((drawn.images / "kite-1" / "metadata.jsonl").read_text()) == {"prompt": "A photo of 1 kites."}
    seeds = {read_metadata(picture)["seed"] for picture in pictures if picture}
    assert len(seeds) == 6, "every picture has noise of its own"
    settings = read_metadata(pictures[0])["settings"]  # type: ignore[arg-type]
    assert settings["num_timesteps"] == 3 and settings["cfg_interval"] == [0.0, 1.0]


def test_a_second_run_draws_nothing_and_a_missing_picture_alone(drawn):
    load = merged_settings(KITES, SMALL)
    before = (drawn.images / "kite-2/samples/00001.png").read_bytes()
    (drawn.images / "kite-2/samples/00001.png").unlink()
    done = draw(KITES, KITES.load(None), drawn, ModelOptions(TINY), load)
    assert done is not None and (done.num_done, done.num_skipped) == (1, 5)
    assert (drawn.images / "kite-2/samples/00001.png").read_bytes() == before


def test_ranks_share_the_work_and_draw_the_same(drawn, tmp_path, monkeypatch):
    run, items = RunFolder(tmp_path / "kites"), KITES.load(None)
    for name, value in {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    outcomes = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        outcomes.append(draw(KITES, items, run, ModelOptions(TINY), merged_settings(KITES, SMALL)))
    assert outcomes[0] is None and outcomes[1] is not None and outcomes[1].num_done == 6
    for item in items:
        for number in range(2):
            name = KITES.image_name(item, number)
            assert (run.images / name).read_bytes() == (drawn.images / name).read_bytes()


@pytest.mark.parametrize(
    "changed, words",
    [({"seed": 1}, "seed: 0 → 1"), ({"settings": {**SMALL, "num_timesteps": 4}}, "num_timesteps 3 → 4"),
     ({"model": ModelOptions(TINY, "bfloat16", "cpu")}, "dtype: float32 → bfloat16")],
)  # fmt: skip
def test_pictures_made_otherwise_are_refused(drawn, changed, words):
    settings = merged_settings(KITES, changed.get("settings", SMALL))
    with pytest.raises(RunFolderError, match=words) as error:
        draw(
            KITES,
            KITES.load(None),
            drawn,
            changed.get("model", ModelOptions(TINY)),
            settings,
            seed=changed.get("seed", 0),
        )
    assert "Choose another --out" in str(error.value)


def test_pictures_from_elsewhere_do_not_join_drawn_ones(drawn, tmp_path):
    with pytest.raises(RunFolderError, match="images_from: None → "):
        adopt(KITES, KITES.load(None), drawn, write_images(tmp_path / "made", 2))


def test_seeds_do_not_depend_on_other_items(tmp_path):
    items, settings = KITES.load(None), merged_settings(KITES, SMALL)
    all_of_them = requests_of(KITES, items, RunFolder(tmp_path / "a"), settings, 5)
    one = requests_of(KITES, items[2:], RunFolder(tmp_path / "b"), settings, 5)
    assert [request.seed for request in all_of_them[4:]] == [request.seed for request in one]
    other = requests_of(KITES, items[2:], RunFolder(tmp_path / "c"), settings, 6)
    assert other[0].seed != one[0].seed and one[0].name == "kite-2/samples/00000.png"


def test_what_cannot_be_drawn_is_named_before_a_model_is_loaded(tmp_path):
    with pytest.raises(RequestError, match="6 pictures cannot be drawn"):
        draw(
            KITES,
            KITES.load(None),
            RunFolder(tmp_path),
            ModelOptions(TINY),
            merged_settings(KITES, {"height": 33, "width": 33}),
        )
    missing = [Item("1", "The cat of image 1.", (tmp_path / "cat.png",))]
    with pytest.raises(RequestError, match=r"line 1: image .*cat.png cannot be read"):
        requests_of(KITES, missing, RunFolder(tmp_path), merged_settings(KITES, SMALL), 0)
    assert not (tmp_path / "images").exists()


def test_settings_of_one_request_cannot_be_set_for_all():
    with pytest.raises(RequestError, match="prompt is the benchmark's own"):
        merged_settings(KITES, {"prompt": "x"})
    assert merged_settings(KITES, {"size_from": "first"}) == {
        "preset": "t2i", "cfg_interval": [0.0, 1.0], "size_from": "first",
    }  # fmt: skip


# ---------------------------------------------------------------- made elsewhere


@pytest.fixture
def items() -> list[Item]:
    return [Item(str(number + 1), f"kite {number}", tag="counting") for number in range(4)]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_pictures_of_any_suffix_under_upstreams_names(tmp_path, items, suffix):
    run, benchmark = RunFolder(tmp_path / "run"), BENCHMARKS["geneval++"]
    found = adopt(benchmark, items, run, write_images(tmp_path / "made", 3, suffix))
    assert (found.num_found, found.missing) == (3, ("4.png",))
    assert [run.pictures(benchmark, item)[0] is not None for item in items] == [True, True, True, False]
    assert run.facts()["images_from"] == str((tmp_path / "made").resolve()) and run.facts()["model"] is None


def test_links_follow_the_folder(tmp_path, items):
    run, benchmark = RunFolder(tmp_path / "run"), BENCHMARKS["geneval++"]
    made = write_images(tmp_path / "made", 4)
    adopt(benchmark, items, run, made)
    (made / "1.png").unlink()
    Image.open(made / "2.png").save(made / "2.jpg")
    (made / "2.png").unlink()
    found = adopt(benchmark, items, run, made)
    assert found.num_found == 3 and not (run.images / "1.png").is_symlink()
    assert run.pictures(benchmark, items[1])[0] == run.images / "2.jpg"


def test_the_ids_name_serves_where_the_protocols_does_not(tmp_path):
    run = RunFolder(tmp_path / "run")
    folder = tmp_path / "made"
    folder.mkdir()
    for item in KITES.load(None):
        for number in range(2):
            Image.new("RGB", (8, 8)).save(folder / f"{item.id}_{number}.jpg")
    assert adopt(KITES, KITES.load(None), run, folder).num_found == 6
    assert (run.images / "kite-0" / "samples" / "00001.jpg").is_symlink()


def test_a_folder_that_is_the_wrong_one(tmp_path, items):
    run, benchmark = RunFolder(tmp_path / "run"), BENCHMARKS["geneval++"]
    with pytest.raises(RunFolderError, match="which is no folder"):
        adopt(benchmark, items, run, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match="none of the 4 pictures, such as 1.png"):
        adopt(benchmark, items, run, tmp_path / "empty")
    adopt(benchmark, items, run, write_images(tmp_path / "made", 4))
    with pytest.raises(RunFolderError, match="images_from"):
        adopt(benchmark, items, run, write_images(tmp_path / "others", 4))


def test_pictures_put_into_the_run_folder_itself(tmp_path, items):
    run, benchmark = RunFolder(tmp_path / "run"), BENCHMARKS["geneval++"]
    write_images(run.images, 4, ".jpg")
    assert adopt(benchmark, items, run, run.images).num_found == 4
