"""The scripts that kill a run at random moments and that watch its memory, in short: nothing is lost, nothing grows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.train.launch import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("kill_test.py", ["--kills", "3", "--ranks", "1", "2"]),
        ("soak.py", ["--steps", "60"]),
    ],
)
def test_script_finds_nothing_wrong(script: str, arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, timeout=900, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
