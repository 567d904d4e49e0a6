"""What is committed: runnable scripts, no machine's paths, no package host, no large file."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", ["scripts/quickstart.sh", "scripts/test.sh", ".ci/run"])
def test_scripts_are_executable_and_strict(name):
    path = ROOT / name
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_no_machine_paths_and_no_package_hosts(tracked):
    pattern = re.compile(
        r"/(?:home|root|Users)/(?!alice/|somebody/|me/|x\b)\w|/work/(?:main|shared)|/tmp/venv|https?://[\w.-]*(?:pypi|pytorch\.org/whl)"
    )
    texts = [
        path
        for path in tracked
        if path.suffix in (".py", ".sh", ".md", ".toml", ".yaml", ".json", "") and path != Path(__file__)
    ]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in texts
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if pattern.search(line)
    ]
    assert texts
    assert not found


def test_no_large_file(tracked):
    assert not [path for path in tracked if path.stat().st_size > 5 * 1024 * 1024]
