"""Worker processes that hang, started as the trainer starts them: deaf to SIGTERM."""

import multiprocessing
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from echo4o.data.errors import DataError
from echo4o.data.sources.base import SourceGroup
from tests.data.fake_source import FakeSource
from tests.data.test_loader import LIMITS, loader


@dataclass(eq=False)
class HangingSource(FakeSource):
    """Hangs after so many rows."""

    num_planned: int = 0
    hangs_after: int = 0

    def plan(self, epoch, position):
        while self.num_planned >= self.hangs_after:
            time.sleep(1)
        self.num_planned += 1
        return super().plan(epoch, position)


def hanging(hangs_after, **kwargs):
    """A loader whose worker is started, as the trainer does, with SIGTERM blocked."""
    source = SourceGroup("a", HangingSource("a", [30] * 20, hangs_after=hangs_after), 1.0)
    return loader([source], num_workers=1, **kwargs)


@pytest.fixture
def sigterm_blocked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_hanging_worker_that_ignores_sigterm_is_killed(sigterm_blocked):
    started = time.perf_counter()
    with pytest.raises(DataError, match="died or hangs"):
        next(hanging(0, worker_timeout=1))
    assert not multiprocessing.active_children()
    assert time.perf_counter() - started < 5


def test_close_ends_a_hanging_worker_that_ignores_sigterm(sigterm_blocked, monkeypatch):
    monkeypatch.setattr("echo4o.data.loader.GRACE", 0.3)
    stream = hanging(LIMITS["max_buffer_size"])
    next(stream)
    stream.close()
    assert not multiprocessing.active_children()


LEFT_OPEN = """
import signal
import echo4o.data.loader
from tests.data.test_workers import hanging
echo4o.data.loader.GRACE = 0.3
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
stream = hanging(8)
next(stream)
raise SystemExit(7)
"""


def test_a_loader_left_open_does_not_keep_the_program_from_ending():
    ended = subprocess.run([sys.executable, "-c", LEFT_OPEN], cwd=Path(__file__).parents[2], timeout=60)
    assert ended.returncode == 7
