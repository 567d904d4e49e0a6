"""python scripts/run_notebooks.py

Runs the notebooks of scripts/notebooks and keeps their outputs in them, but nothing of when and where that was: running
one again changes only what its cells put out. With another model: ECHO4O_MODEL=hf/BAGEL-7B-MoT.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts" / "notebooks"
MAX_BYTES = 300_000
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def run(notebook: NotebookNode, timeout: int) -> None:
    """Run all cells from the notebooks' folder; their outputs replace earlier ones.

    Args:
        timeout: of a cell, in seconds.

    Raises:
        CellExecutionError, CellTimeoutError: of the cell that failed; its kernel is ended.
    """
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False).execute()
    notebook.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":  # warnings of libraries are of the machine, not of the notebook
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop("image/jpeg", None)  # the same picture again
                output.data["image/png"] = _smaller(output.data["image/png"])


def _smaller(png: str) -> str:
    """The same pixels in fewer bytes, base64 as before."""
    smaller = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).save(smaller, format="PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def machine_paths(text: str) -> list[str]:
    """Paths of this machine that a notebook would publish."""
    return [place for place in (str(ROOT.parent), str(Path.home())) if f"{place}/" in text]


def write(notebook: NotebookNode, path: Path) -> int:
    """Put a notebook into its place, whole or not at all; returns its size in bytes.

    Raises:
        ValueError: if it is too large to be kept, or holds a path of this machine.
    """
    text = nbformat.writes(notebook) + "\n"
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ValueError(
            f"{path.name} would take {size / 1e3:.0f} kB of at most {MAX_BYTES / 1e3:.0f}: show less in it"
        )
    if found := machine_paths(text):
        raise ValueError(f"{path.name} would publish {found[0]}: print names, not whole paths")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run notebooks in place.")
    parser.add_argument("notebooks", type=Path, nargs="*", help="by default all of scripts/notebooks")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    options = parser.parse_args(arguments)
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        run(notebook, options.timeout)
        print(f"{path.name}: {write(notebook, path) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
