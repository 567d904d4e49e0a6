"""The page in a real browser, on a tiny model: what people do with it, and what they then see."""

from __future__ import annotations

import io
import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("selenium", reason="the browser test needs selenium: pip install -e '.[dev]'")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from echo4o.app import build
from echo4o.app.page import launch
from echo4o.generate.files import read_metadata

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
TIMEOUT = 40  # seconds, for anything the page does

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver: apt-get install chromium chromium-driver"
)


class Page:
    """The page as its reader sees it."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> Any:
        self.until(lambda: self.all(css), f"no {css}")
        return self.all(css)[0]

    def until(self, condition: Any, message: str) -> Any:
        return WebDriverWait(self.driver, TIMEOUT, poll_frequency=0.1).until(lambda _: condition(), message)

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.all("#t2i_generate"), "the page does not open")

    def tab(self, title: str) -> None:
        self.driver.find_element(By.XPATH, f"//button[@role='tab' and normalize-space()='{title}']").click()
        self.until(lambda: self.selected_tab() == title, f"{title} does not open")

    def selected_tab(self) -> str:
        return self.driver.execute_script("return document.querySelector('[role=tab][aria-selected=true]').innerText")

    def click(self, css: str) -> None:
        self.until(lambda: self.one(css).is_displayed() and self.one(css).is_enabled(), f"{css} cannot be clicked")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(css))
        self.one(css).click()

    def type(self, css: str, text: str) -> None:
        self.one(css).send_keys(Keys.CONTROL, "a")
        self.one(css).send_keys(text, Keys.TAB)
        self.until(lambda: self.value(css) == text, f"{css} holds {self.value(css)!r}")

    def value(self, css: str) -> str:
        return self.one(css).get_property("value")

    def upload(self, css: str, paths: list[str]) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"{css} input[type=file]").send_keys("\n".join(paths))

    def named(self, css: str) -> list[list[str]]:
        """[name as shown, file] of every image of a gallery."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0] + ' .gallery-item')].map(item =>"
            " [item.querySelector('.caption-label')?.innerText, item.querySelector('img').src.split('/').pop()])",
            css,
        )

    def parameters(self, task: str) -> None:
        self.click(f"#{task}_parameters > button")
        self.until(lambda: self.one(f"#{task}_seed input").is_displayed(), "the parameters do not open")

    def shown_picture(self, task: str) -> tuple[Image.Image, bytes]:
        source = self.one(f"#{task}_pictures img").get_attribute("src")
        with urllib.request.urlopen(source, timeout=TIMEOUT) as answer:
            content = answer.read()
        return Image.open(io.BytesIO(content)), content

    def num_results(self) -> int:
        return len(self.all("#history .gallery-item"))

    def idle(self, task: str) -> bool:
        return self.one(f"#{task}_generate").is_enabled() and not self.one(f"#{task}_cancel").is_enabled()

    def outside(self) -> set[str]:
        """Addresses of other machines that were asked for something."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        return {url for url in asked if not url.startswith((self.url, "data:", "blob:", "chrome:"))}


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1100")
    for flag in (*flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(TIMEOUT)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def server(pipe, tmp_path_factory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = build(pipe, "tiny")
        _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
        yield url
        page.close(verbose=False)


@pytest.fixture
def page(driver, server) -> Page:
    opened = Page(driver, server)
    opened.open()
    return opened


def test_two_references_become_a_picture(page, pipe, references, tmp_path):
    """Upload two references, change their order, draw, read the picture, use the history."""
    page.tab("Multi-reference")
    page.upload("#multi_ref_references", references)
    named = [["image 1", "disc.png"], ["image 2", "square.png"]]
    page.until(lambda: page.named("#multi_ref_references") == named, "references are not named by their place")

    page.click("#multi_ref_references .gallery-item:nth-child(1) .thumbnail-item")
    page.click("#multi_ref_right")
    named = [["image 1", "square.png"], ["image 2", "disc.png"]]
    page.until(lambda: page.named("#multi_ref_references") == named, "moving does not change order and names")

    page.type("#multi_ref_prompt textarea", "the disc of image 2 beside ")
    page.click("#multi_ref_references .gallery-item:nth-child(1) .thumbnail-item")
    page.until(lambda: page.one("#multi_ref_insert").text == "Insert <image 1>", "the selection is not followed")
    page.click("#multi_ref_insert")
    prompt = "the disc of image 2 beside <image 1> "
    page.until(lambda: page.value("#multi_ref_prompt textarea") == prompt, "no placeholder at the cursor")

    page.parameters("multi_ref")
    page.type("#multi_ref_num_timesteps input[type=number]", "4")
    page.type("#multi_ref_seed input", "11")
    page.click("#multi_ref_generate")
    page.until(lambda: page.num_results() == 1 and page.idle("multi_ref"), "no picture")

    picture, content = page.shown_picture("multi_ref")
    disc, square = references
    expected = pipe(prompt, [square, disc], seed=11, num_timesteps=4).images[0]
    shown = np.asarray(picture.convert("RGB"))
    assert picture.format == "PNG" and picture.size == expected.size == (96, 64), "as large as the last reference read"
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100, "a uniform picture"
    np.testing.assert_array_equal(shown, np.asarray(expected))
    other = pipe(prompt, [disc, square], seed=11, num_timesteps=4, width=96, height=64).images[0]
    assert (shown != np.asarray(other)).any(), "the order of the references does not matter"
    (tmp_path / "shown.png").write_bytes(content)
    assert read_metadata(tmp_path / "shown.png")["seed"] == 11

    page.type("#multi_ref_prompt textarea", "something else")
    page.type("#multi_ref_seed input", "99")
    page.click("#multi_ref_references .gallery-item:nth-child(1) .thumbnail-item")
    page.click("#multi_ref_remove")
    page.until(lambda: page.named("#multi_ref_references") == [["image 1", "disc.png"]], "nothing is removed")
    page.tab("Edit")
    page.click("#history .thumbnail-item")
    page.until(lambda: page.value("#multi_ref_prompt textarea") == prompt, "the history does not restore the prompt")
    assert page.selected_tab() == "Multi-reference"
    page.until(lambda: page.named("#multi_ref_references") == named, "nor the references")
    assert page.value("#multi_ref_seed input") == "11"
    assert page.value("#multi_ref_num_timesteps input[type=number]") == "4"
    assert page.outside() == set(), "the page needs the net"


def test_mistakes_are_shown_and_work_goes_on(page):
    page.click("#t2i_generate")
    page.until(lambda: any("Write a prompt" in toast.text for toast in page.all(".toast-body")), "no message")
    page.until(lambda: page.idle("t2i"), "the buttons stay as in a run")
    assert page.num_results() == 0
    page.tab("Multi-reference")
    page.type("#multi_ref_prompt textarea", "as <image 3>")
    page.click("#multi_ref_generate")
    page.until(lambda: any("one or more images" in toast.text for toast in page.all(".toast-body")), "no message")
    assert "Traceback" not in page.one("body").text


def test_a_bug_is_not_silent(page, pipe, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipe, "batch", fails)
    page.type("#t2i_prompt textarea", "a cube")
    page.click("#t2i_generate")
    page.until(lambda: any("shapes do not match" in toast.text for toast in page.all(".toast-body")), "no message")
    page.until(lambda: page.idle("t2i"), "the buttons stay as in a run")


def test_progress_and_cancel(page, pipe):
    slow = pipe.model.language_model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        page.type("#t2i_prompt textarea", "a cube")
        page.click("#t2i_generate")  # fifty time points: 49 steps
        page.until(lambda: "/49 steps" in page.one("#t2i_pictures").text, "no progress by steps")
        page.click("#t2i_cancel")
        start = time.perf_counter()
        page.until(lambda: page.idle("t2i"), "cancelling does not end the run")
        assert time.perf_counter() - start < 5
    finally:
        slow.remove()
    assert page.num_results() == 0
    page.parameters("t2i")
    page.type("#t2i_num_timesteps input[type=number]", "3")
    page.click("#t2i_generate")
    page.until(lambda: page.num_results() == 1, "no picture after a cancelled run")
    assert page.shown_picture("t2i")[0].size == (128, 128)


def test_edit_and_understand(page, references):
    page.tab("Edit")
    page.upload("#edit_image", references[1:])
    page.until(lambda: page.all("#edit_image img"), "no image")
    page.type("#edit_prompt textarea", "make it blue")
    page.parameters("edit")
    page.type("#edit_num_timesteps input[type=number]", "3")
    page.click("#edit_generate")
    page.until(lambda: page.num_results() == 1, "no picture")
    assert page.shown_picture("edit")[0].size == (96, 64)

    page.tab("Understand")
    page.upload("#understand_references", references)
    page.until(lambda: len(page.named("#understand_references")) == 2, "no images")
    page.type("#understand_prompt textarea", "What is in image 2?")
    page.parameters("understand")
    page.type("#understand_max_think_tokens input[type=number]", "16")
    page.click("#understand_generate")
    page.until(lambda: page.num_results() == 2, "no answer")
    assert page.value("#understand_text textarea")


def test_narrow_windows_need_no_scrolling_sideways(page, driver):
    size = driver.get_window_size()
    try:
        driver.set_window_size(500, 900)
        for title in ("Multi-reference", "Edit"):
            page.tab(title)
            root = "document.documentElement"
            assert driver.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth"), title
    finally:
        driver.set_window_size(size["width"], size["height"])
