"""The page's tests share one pipeline."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio", reason="the web page needs Gradio: pip install 'echo4o[app]'")

from echo4o.generate.pipeline import Echo4oPipeline
from tests.app.pages import tiny_pipe, write_references


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Echo4oPipeline:
    return tiny_pipe(tmp_path_factory.mktemp("bagel"))


@pytest.fixture
def references(tmp_path) -> list[str]:
    return write_references(tmp_path)
