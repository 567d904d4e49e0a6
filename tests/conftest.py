"""Fixtures of all tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Facts and golden files beside the project; tests that need them are skipped where they are absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="session")
def parity(shared: Path) -> Path:
    """Golden tensors of the reference model."""
    folder = shared / "parity"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder
