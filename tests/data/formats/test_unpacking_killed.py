"""Unpacking that is killed, or done by several processes at once, leaves either a whole archive or none."""

import multiprocessing
import os
import signal
import time

import pytest

from echo4o.data.formats.archives import open_archives
from tests.data.formats import miniatures


def unpack(path, cache, results):
    (archive,), _ = open_archives([path], path.parent, cache)
    results.put((len(archive.names), archive.read(0)))


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_unpacking_is_killed_and_done_again(tmp_path, delay):
    members = [(f"{row:04d}.bin", os.urandom(200_000)) for row in range(60)]
    path = miniatures.tar(tmp_path / "0.tar.gz", members, "w:gz")
    cache = tmp_path / "cache"
    spawn = multiprocessing.get_context("fork")
    process = spawn.Process(target=unpack, args=(path, cache, spawn.Queue()))
    process.start()
    while not cache.exists() or not list(cache.glob(".*")):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (archive,), problems = open_archives([path], path.parent, cache)
    assert {name: archive.read(n) for n, name in enumerate(archive.names)} == dict(members)
    assert not problems and not list(cache.glob(".*.partial"))


def test_several_processes_unpack_once(tmp_path):
    path = miniatures.tar(tmp_path / "0.tar.gz", [("a", b"1"), ("b", b"2")], "w:gz")
    spawn = multiprocessing.get_context("fork")
    results = spawn.Queue()
    processes = [spawn.Process(target=unpack, args=(path, tmp_path / "cache", results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [(2, b"1")] * 4
    for process in processes:
        process.join()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
