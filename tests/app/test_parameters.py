"""Sizes, presets and seeds behind the controls."""

import pytest

from echo4o.app.parameters import (
    CUSTOM,
    LAST,
    MAX_SEED,
    RATIOS,
    Limits,
    chosen_seed,
    pipeline_keywords,
    preset_values,
    size_choices,
)
from echo4o.generate.presets import PRESETS
from tests.app.pages import values_of

BAGEL, TINY = Limits(1024, 16), Limits(128, 16)


def test_ratios_of_the_released_model_are_the_published_sizes():
    sizes = {ratio: BAGEL.size(ratio) for ratio in RATIOS}
    assert sizes == {
        "1:1": (1024, 1024),
        "4:3": (1024, 768),
        "3:4": (768, 1024),
        "16:9": (1024, 576),
        "9:16": (576, 1024),
    }


@pytest.mark.parametrize("ratio", RATIOS)
def test_sizes_of_a_small_model_stay_within_its_position_table(ratio):
    assert max(TINY.size(ratio)) == 128
    assert all(side % 16 == 0 and side >= 16 for side in TINY.size(ratio))


def test_size_menu_names_the_references_there_are():
    without = [value for _, value in size_choices(TINY, None)]
    assert without == [*RATIOS, CUSTOM]
    assert [value for _, value in size_choices(TINY, 1)] == [LAST, *without]
    assert [value for _, value in size_choices(TINY, 3)] == [LAST, "1", "2", "3", *without]


@pytest.mark.parametrize("name", ["t2i", "edit", "multi_ref"])
def test_untouched_controls_are_the_preset(name):
    keywords = pipeline_keywords({**values_of(name), **preset_values(name)}, BAGEL)
    own = {key: value for key, value in keywords.items() if key not in ("think", "width", "height")}
    assert PRESETS[name].changed(**own) == PRESETS[name]


def test_size_of_the_controls():
    assert pipeline_keywords(values_of("edit"), TINY)["size_from"] == LAST
    assert pipeline_keywords(values_of("multi_ref", size="2"), TINY)["size_from"] == 2
    ratio = pipeline_keywords(values_of("t2i", size="4:3"), TINY)
    assert (ratio["width"], ratio["height"]) == (128, 96)
    custom = pipeline_keywords(values_of("t2i", size=CUSTOM, width=48.0, height=80.0), TINY)
    assert (custom["width"], custom["height"]) == (48, 80) and "size_from" not in custom


def test_sliders_may_give_floats():
    keywords = pipeline_keywords(values_of("t2i", num_timesteps=7.0, branch_cache=2.0), TINY)
    assert type(keywords["num_timesteps"]) is int and type(keywords["branch_cache"]) is int


@pytest.mark.parametrize(
    "name, label", [("num_timesteps", "Time steps"), ("cfg_text_scale", "Text guidance"), ("width", "Width")]
)
def test_an_empty_field_is_named(name, label):
    with pytest.raises(ValueError, match=f"{label}.* is empty"):
        pipeline_keywords(values_of("t2i", **{"size": CUSTOM, name: None}), TINY)


def test_several_pictures_need_as_many_seeds():
    assert chosen_seed({"seed": MAX_SEED - 3, "num_images": 4.0}) == MAX_SEED - 3
    with pytest.raises(ValueError, match=f"to {MAX_SEED - 3} for 4 pictures"):
        chosen_seed({"seed": MAX_SEED, "num_images": 4})


def test_seed():
    assert chosen_seed({"seed": 5, "random_seed": False}) == 5
    drawn = {chosen_seed({"seed": 5, "random_seed": True}) for _ in range(20)}
    assert len(drawn) > 1 and all(0 <= seed <= MAX_SEED for seed in drawn)
    for wrong in (None, -1, 0.5, MAX_SEED + 1):
        with pytest.raises(ValueError, match="whole number"):
            chosen_seed({"seed": wrong, "random_seed": False})
