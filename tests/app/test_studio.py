"""Jobs: what they give, how they end, and that there is one at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echo4o.app.studio import Cancelled, Job, Studio
from echo4o.generate.files import read_metadata
from echo4o.generate.runs import ModelName
from tests.app.pages import values_of

FEW_WORDS = {"max_think_tokens": 6}


@pytest.fixture
def studio(pipe):
    return Studio(pipe, ModelName("tiny", "0123456789abcdef", "float32"))


def pixels(image):
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def test_pictures_are_the_pipeline_s(studio, pipe, references):
    job = Job("multi_ref", "image 1 on image 2", tuple(references), values_of("multi_ref", seed=3, num_images=2))
    results = studio.run(job)
    direct = pipe(job.prompt, references, seed=3, num_images=2, num_timesteps=4)
    assert [result.seed for result in results] == [3, 4]
    for result, image in zip(results, direct.images, strict=True):
        assert result.size == image.size
        np.testing.assert_array_equal(pixels(result.picture), pixels(image))
    alone = studio.run(results[1].job)
    assert len(alone) == 1 and alone[0].seed == 4
    difference = pixels(alone[0].picture).astype(int) - pixels(direct.images[1]).astype(int)
    assert abs(difference).max() <= 1, "a job of the history gives its picture again"


def test_pictures_say_how_they_were_drawn(studio, references):
    values = values_of("multi_ref", seed=5, size="1", cfg_img_scale=1.5)
    (result,) = studio.run(Job("multi_ref", "a <image 2> beside", tuple(references), values))
    found = read_metadata(result.picture)
    assert (found["prompt"], found["seed"], found["preset"]) == ("a <image 2> beside", 5, "multi_ref")
    assert found["settings"]["cfg_img_scale"] == 1.5 and (found["width"], found["height"]) == (64, 64)
    assert [image["image"] for image in found["images"]] == ["disc.png", "square.png"]
    assert found["model"]["hash"] == "0123456789abcdef"


@pytest.mark.parametrize("prompt", ["both", "<image 2> beside <image 1>"])
def test_size_of_a_reference_is_that_of_its_number(studio, references, prompt):
    for number, size in (("1", (64, 64)), ("2", (96, 64))):
        (result,) = studio.run(Job("multi_ref", prompt, tuple(references), values_of("multi_ref", size=number)))
        assert result.size == size
    with pytest.raises(ValueError, match="choose another size"):
        studio.run(Job("multi_ref", prompt, tuple(references), values_of("multi_ref", size="3")))


def test_random_seed_is_remembered(studio):
    first, second = (studio.run(Job("t2i", "a cube", (), values_of("t2i", random_seed=True)))[0] for _ in range(2))
    assert first.seed != second.seed
    assert first.job.values["random_seed"] is False and first.job.values["seed"] == first.seed


def test_steps_are_reported(studio):
    heard = []
    studio.run(Job("t2i", "a cube", (), values_of("t2i")), report=lambda *stage: heard.append(stage))
    assert [stage for stage in heard if stage[2] == "steps"] == [(1, 3, "steps"), (2, 3, "steps"), (3, 3, "steps")]
    assert not [stage for stage in heard if stage[2] == "words"], "nothing is written"


def test_answer_and_thought(studio, pipe, references):
    values = values_of("understand", **FEW_WORDS)
    (result,) = studio.run(Job("understand", "What is in image 2?", tuple(references), values))
    assert result.picture is None
    assert result.text == pipe.understand("What is in image 2?", [Path(path) for path in references], **FEW_WORDS)
    (drawn,) = studio.run(Job("edit", "bluer", (references[0],), values_of("edit", think=True, **FEW_WORDS)))
    assert drawn.text and drawn.picture


def test_cancel_ends_drawing_at_the_next_step(studio):
    job, steps = Job("t2i", "a cube", (), values_of("t2i", num_timesteps=50)), []

    def press(done, total, unit):
        if unit == "steps":
            steps.append(done)
            if done == 2:
                studio.cancel("me")

    studio.begin("me")
    with pytest.raises(Cancelled):
        studio.run(job, "me", press)
    assert steps == [1, 2]
    studio.begin("me")
    assert studio.run(Job("t2i", "a cube", (), values_of("t2i")), "me"), "the next job is not cancelled"


def test_cancel_ends_writing(studio, references):
    words = []

    def press(done, total, unit):
        words.append(done)
        if done == 3:
            studio.cancel("me")

    studio.begin("me")
    values = values_of("understand", max_think_tokens=4000)
    with pytest.raises(Cancelled):
        studio.run(Job("understand", "What?", tuple(references), values), "me", press)
    assert words[-1] == 3


def test_cancelled_while_it_waits(studio):
    studio.begin("me")
    studio.cancel("me")
    with pytest.raises(Cancelled):
        studio.run(Job("t2i", "a cube", (), values_of("t2i")), "me")


def test_a_closed_page_ends_its_jobs_only(studio):
    for session in ("a/t2i", "a/edit", "b/t2i"):
        studio.begin(session)
    job = Job("t2i", "a cube", (), values_of("t2i"))

    def leave(done, total, unit):
        studio.leave("a/")

    with pytest.raises(Cancelled):
        studio.run(job, "a/t2i", leave)
    assert studio.run(job, "b/t2i", leave)


def test_nothing_is_left_on_the_model(studio, pipe):
    embedding = pipe.model.language_model.model.embed_tokens
    studio.run(Job("t2i", "a cube", (), values_of("t2i")))
    with pytest.raises(ValueError):
        studio.run(Job("t2i", " ", (), values_of("t2i")))
    assert not embedding._forward_pre_hooks


def test_one_job_at_a_time(studio):
    """Two sessions at once: the steps of one do not lie among those of the other."""
    order, both = [], threading.Barrier(2)

    def work(session):
        both.wait(timeout=20)
        job = Job("t2i", "a cube", (), values_of("t2i", num_timesteps=8))
        studio.run(job, session, lambda done, total, unit: order.append(session))

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert set(order) == {"a", "b"}
    assert sum(left != right for left, right in zip(order, order[1:], strict=False)) == 1


@pytest.mark.parametrize(
    "task, prompt, count, message",
    [
        ("t2i", "  ", 0, "Write a prompt"),
        ("understand", "", 1, "Ask a question"),
        ("edit", "bluer", 0, "Add an image"),
        ("multi_ref", "both", 0, "Add one or more images"),
        ("multi_ref", "<image 3>", 2, "names <image 3>, but there are 2 images"),
        ("t2i", "as <image 1>", 0, "there are no images"),
    ],
)
def test_mistakes_are_explained(studio, references, task, prompt, count, message):
    with pytest.raises(ValueError, match=message):
        studio.run(Job(task, prompt, tuple(references[:count]), values_of(task)))


def test_a_broken_reference_is_explained(studio, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="unreadable"):
        studio.run(Job("edit", "bluer", (str(tmp_path / "broken.png"),), values_of("edit")))
