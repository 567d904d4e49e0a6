"""The page in a real browser: filters, sorting, narrow windows, no scripts, nothing fetched."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

pytest.importorskip("selenium", reason="the browser test needs selenium: pip install -e '.[dev]'")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from echo4o.evaluate.report import write_report
from tests.evaluate.report.runs import geneval_items, omnicontext_items, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with chromedriver: apt-get install chromium chromium-driver"
)
ROOT = "document.documentElement"


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Pages of one run, of two runs, and of one run with links to its pictures."""
    root = tmp_path_factory.mktemp("runs")
    items = geneval_items(40)
    items[0] = replace(items[0], prompt="<script>document.title = 'hacked'</script><img src=x onerror=alert(1)>")
    failed = {"5": "missing_image", "6": "api_error"}
    references = omnicontext_items(6, root / "refs")
    for number, name in enumerate("ab"):
        write_run(root / name, "geneval++", items, seed=number, status=lambda item: failed.get(item.id, "ok"))
        write_run(root / name, "omnicontext", references, seed=number)
    pages = [
        write_report([root / "a"], root / "one")[0],
        write_report([root / "a", root / "b"], root / "two")[0],
        write_report([root / "a"], root / "linked", embed=False)[0],
    ]
    return [page.as_uri() for page in pages]


def shown(driver) -> list[str]:
    cards = driver.find_elements(By.CSS_SELECTOR, "#gallery-geneval_2B_2B .item")
    script = "return arguments[0].filter(card => card.checkVisibility()).map(card => card.id.split('-').pop())"
    return driver.execute_script(script, cards)


def more(driver) -> None:
    driver.find_element(By.CSS_SELECTOR, "#gallery-geneval_2B_2B .more button").send_keys(Keys.ENTER)


def choose(driver, name: str, value: str) -> None:
    Select(driver.find_element(By.CSS_SELECTOR, f"#gallery-geneval_2B_2B [name={name}]")).select_by_value(value)


def test_filter_search_and_sort(driver, urls):
    driver.get(urls[0])
    assert driver.title == "a on GenEval++, OmniContext"
    assert len(shown(driver)) == 24
    choose(driver, "show", "failed")
    assert shown(driver) == ["5", "6"]
    choose(driver, "show", "")
    choose(driver, "tag", "counting")
    assert shown(driver)[:3] == ["1", "4", "7"]
    search = driver.find_element(By.CSS_SELECTOR, "#gallery-geneval_2B_2B [name=search]")
    search.send_keys("Number 13", Keys.ENTER)
    assert shown(driver) == ["13"]
    assert driver.find_element(By.CSS_SELECTOR, "#gallery-geneval_2B_2B output").text == "1 of 1 shown, 40 in all"
    driver.find_element(By.CSS_SELECTOR, "#gallery-geneval_2B_2B [type=reset]").send_keys(Keys.ENTER)
    more(driver)
    assert len(shown(driver)) == 40
    choose(driver, "sort", "high")
    more(driver)
    assert shown(driver)[-1] == "6"  # without a score
    driver.find_element(By.CSS_SELECTOR, "#summary a[data-kind=missing_image]").send_keys(Keys.ENTER)
    WebDriverWait(driver, 10, poll_frequency=0.05).until(lambda _: shown(driver) == ["5"])


def test_two_runs_and_narrow_windows(driver, urls):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    for url in urls[:2]:
        driver.get(url)
        assert driver.execute_script(f"return {ROOT}.scrollWidth <= {ROOT}.clientWidth")
    changes = driver.execute_script(
        "return [...document.querySelectorAll('#gallery-geneval_2B_2B .item')].map(c => Math.abs(c.dataset.change))"
    )
    known = [change for change in changes if change is not None]
    assert known == sorted(known, reverse=True) and known[0] == 1
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_is_fetched_and_nothing_complains(driver, urls):
    for url in urls[:2]:
        driver.get(url)
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert driver.execute_script("return [...document.images].every(image => image.src.startsWith('data:'))")
    driver.get(urls[2])
    for image in driver.find_elements(By.CSS_SELECTOR, "#gallery-geneval_2B_2B .item img")[:3]:
        driver.execute_async_script("arguments[0].loading = 'eager'; arguments[0].decode().then(arguments[1])", image)
        assert image.get_property("naturalWidth") == 32
    assert not driver.get_log("browser")


def test_all_of_it_is_there_without_scripts(driver, urls):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(urls[0])
        assert len(shown(driver)) == 40
        assert not driver.find_element(By.CSS_SELECTOR, ".filters").is_displayed()
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
