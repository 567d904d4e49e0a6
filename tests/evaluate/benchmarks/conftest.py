"""Official prompts, where a machine has them; they are no part of the project."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def official(shared: Path) -> Path:
    folder = shared / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder
