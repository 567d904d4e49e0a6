"""The notebooks run on a tiny model, show pictures, and are kept with outputs that say nothing of the machine."""

from __future__ import annotations

import base64
import importlib
import io
import re
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from tests.train.tiny_run import write_bagel

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {"inference": 4, "inference_multiref": 5}  # pictures that each shows
NAMES = list(NOTEBOOKS)
#: Home folders, temporary folders and environments, wherever the notebook was run.
MACHINE_PATH = re.compile(r"/(home|Users|root|tmp|work|mnt|opt|usr)/|[A-Z]:\\\\|site-packages|\.venv")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("run_notebooks")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_bagel(tmp_path_factory.mktemp("bagel"))


@pytest.fixture
def no_process_left():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    for process in alive:
        process.kill()
    assert not alive, "a kernel was left behind"


def read(name: str):
    return nbformat.read(ROOT / "scripts" / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook) -> list[Image.Image]:
    found = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in found]


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_shows_pictures(script, model, monkeypatch, no_process_left, name):
    notebook = read(name)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
            # Fewer steps than the published 50, which take most of the time.
            cell.source = cell.source.replace("seed=", "num_timesteps=6, seed=")
    monkeypatch.setenv("ECHO4O_MODEL", str(model))
    script.run(notebook, timeout=120)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    shown = pictures(notebook)
    assert len(shown) == NOTEBOOKS[name]
    assert all(len(image.convert("RGB").getcolors(1 << 20) or []) > 20 for image in shown), "a blank picture"


@pytest.mark.parametrize("name", NAMES)
def test_kept_with_outputs(script, name):
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run scripts/run_notebooks.py"
    assert len(pictures(notebook)) == NOTEBOOKS[name]
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not any(cell.metadata for cell in notebook.cells), "times of execution make needless differences"
    text = nbformat.writes(notebook)
    assert len(text.encode()) < script.MAX_BYTES
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not MACHINE_PATH.search(words), MACHINE_PATH.search(words)


@pytest.mark.parametrize(
    ("source", "timeout", "error"),
    [("1 / 0", 60, CellExecutionError), ("import time; time.sleep(60)", 2, CellTimeoutError)],
)
def test_failing_cell_ends_run_and_kernel(script, no_process_left, source, timeout, error):
    with pytest.raises(error):
        script.run(new_notebook(cells=[new_code_cell(source)]), timeout)


def test_nothing_of_the_machine_is_written(script, tmp_path):
    path = tmp_path / "a.ipynb"
    with pytest.raises(ValueError, match="print names"):
        script.write(new_notebook(cells=[new_code_cell(f"open('{script.ROOT}/x')")]), path)
    with pytest.raises(ValueError, match="show less"):
        script.write(new_notebook(cells=[new_code_cell("#" * script.MAX_BYTES)]), path)
    assert not list(tmp_path.iterdir())


def test_running_again_changes_nothing(script, tmp_path):
    path = tmp_path / "a.ipynb"
    written = []
    for _ in range(2):
        notebook = new_notebook(
            cells=[new_code_cell("import sys\nprint('now', file=sys.stderr)\nprint('out')", id="a")]
        )
        script.run(notebook, timeout=60)
        script.write(notebook, path)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert b"out" in written[0] and b'"stderr"' not in written[0]
