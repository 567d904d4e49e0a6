"""A cache that is killed, filled by several processes or several runs comes out as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from echo4o.data.latent_cache import LatentStore
from echo4o.data.latent_index import INDEX, SHARDS, read_index
from echo4o.data.latent_keys import content_hash
from tests.train.caching.small_cache import cache, contents, picture, shard_names, write_run
from tests.train.launch import ROOT, launch

NUM_IMAGES = 25  # of 12 rows


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A cache that was made in one go."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    result, said = cache(settings, folder)
    assert (result.num_images, result.num_encoded) == (NUM_IMAGES, NUM_IMAGES) and not result.failures.counts
    assert said[0] == "24 rows" and said[1].startswith("25 distinct images and sizes")
    return contents(folder)


def start(settings: dict[str, Any], out: Path, die: dict[str, Any] | None = None) -> subprocess.Popen:
    argument = json.dumps({"settings": settings, "out": str(out), "die": die})
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.train.caching.small_cache", argument]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen) -> int:
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), output.decode()
    return process.returncode


@pytest.mark.parametrize(
    "die",
    [
        {"event": "save_file", "count": 3},
        pytest.param({"event": "_sync", "count": 1}, marks=pytest.mark.slow),
        pytest.param({"event": "_sync", "count": 5}, marks=pytest.mark.slow),
        pytest.param({"event": "write_index", "count": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda die: f"{die['event']}-{die['count']}",
)
def test_killed_and_started_again_makes_the_same_bytes(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path, die: dict[str, Any]
) -> None:
    assert finished(start(settings, tmp_path, die)) == -signal.SIGKILL
    finished_shards = shard_names(tmp_path)
    result, _ = cache(settings, tmp_path)
    assert contents(tmp_path) == whole
    if die["event"] == "save_file":
        assert sum(name[0] != "." for name in finished_shards) == 2, "two were whole, of the third a part"
        assert result.num_encoded == NUM_IMAGES - 2 * 4, "what was done stays done"
    assert not [name for name in shard_names(tmp_path) if name[0] == "."], "nothing half-written is left"


@pytest.mark.slow
def test_killed_at_random_moments_until_it_is_through(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    rng, kills = random.Random(0), 0
    while True:
        process = start(settings, tmp_path)
        try:
            process.wait(rng.uniform(2.0, 4.0) * (1 + kills / 4))
        except subprocess.TimeoutExpired:
            kills += 1
            process.kill()
        if finished(process) == 0 or kills > 20:
            break
    cache(settings, tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path) -> None:
    processes = [start(settings, tmp_path) for _ in range(2)]
    assert [finished(process) for process in processes] == [0, 0]
    assert contents(tmp_path) == whole


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(
    settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    argument = {"settings": settings, "out": str(tmp_path)}
    encoded = launch(2, "tests.train.caching.small_cache:cache_on_rank", argument)
    assert max(encoded) == NUM_IMAGES
    assert contents(tmp_path) == whole


def test_a_damaged_shard_is_made_anew(settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path) -> None:
    cache(settings, tmp_path)
    shard = tmp_path / "vae" / SHARDS / shard_names(tmp_path)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    result, _ = cache(settings, tmp_path)
    assert result.num_encoded == 4
    assert contents(tmp_path) == whole


def test_more_data_adds_to_a_cache(settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path) -> None:
    cache(settings, tmp_path / "cache")
    more = write_run(tmp_path / "more", num_rows=14, init_from=settings["init_from"])
    result, said = cache(more, tmp_path / "cache")
    assert (result.num_images, result.num_encoded) == (29, 4)
    assert "25 are in" in said[1] and "4 are to be encoded" in said[1]
    before = {name: data for name, data in whole.items() if not name.endswith(INDEX)}
    assert contents(tmp_path / "cache").items() >= before.items()
    assert len(read_index(tmp_path / "cache" / "vae", LatentStore(tmp_path / "cache" / "vae").identity.num_bytes)) == 29


def test_the_index_is_only_a_short_cut(settings: dict[str, Any], tmp_path: Path) -> None:
    cache(settings, tmp_path)
    folder, content = tmp_path / "vae", content_hash(picture(3))
    found = LatentStore(folder).find(content, (32, 48))
    assert found is not None and found.shape == (32, 6, 4) and found.dtype == torch.float32
    for spoil in (Path.unlink, lambda path: path.write_bytes(b"nonsense")):
        spoil(folder / INDEX)
        again = LatentStore(folder).find(content, (32, 48))
        assert again is not None and torch.equal(again, found)
    assert LatentStore(folder).find(content, (48, 64)) is None


def test_sizes_are_told_beforehand(settings: dict[str, Any], tmp_path: Path) -> None:
    result, said = cache(settings, tmp_path / "cache", dry_run=True)
    assert not (tmp_path / "cache").exists() and "25 are to be encoded" in said[1]
    cache(settings, tmp_path / "cache")
    written = sum(path.stat().st_size for path in (tmp_path / "cache" / "vae" / SHARDS).iterdir())
    assert abs(result.num_bytes / written - 1) < 0.02


@pytest.mark.slow
def test_a_claim_ends_with_the_process(settings: dict[str, Any], whole: dict[str, bytes], tmp_path: Path) -> None:
    """Whoever waits for a unit that another holds takes it over when that one dies."""
    holder = start(settings, tmp_path, {"event": "save_file", "count": 1})
    other = start(settings, tmp_path)
    started = time.monotonic()
    assert finished(holder) == -signal.SIGKILL and finished(other) == 0
    assert time.monotonic() - started < 100
    cache(settings, tmp_path)
    assert contents(tmp_path) == whole
