"""Loading takes no more memory than its shards: `scripts/bench_loading.py` ends with status 1 beyond its bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gigabytes", "0.5", "--dtype", "float32", "--ranks", "2"),
        pytest.param(("--gigabytes", "1"), marks=pytest.mark.slow),
        pytest.param(("--gigabytes", "4", "--dtype", "float32", "--ranks", "1", "4"), marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_bounds(arguments: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_loading.py"), *arguments, "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
