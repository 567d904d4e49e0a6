"""A hub of our own for the tests of downloads and uploads."""

import time

import pytest
from huggingface_hub import constants

from tests.hub_server import HubServer


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in as this process' hub, with an empty cache and nobody logged in."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))  # between attempts
        monkeypatch.setattr("echo4o.checkpoint.hub.PAUSES", (0.0, 0.0))
        monkeypatch.chdir(tmp_path)  # no folder here is taken for a repository's owner
        yield server
