"""python scripts/kill_test.py --kills 100

Random kills lose no row, repeat none, and always leave a usable checkpoint: a tiny BAGEL trains on this machine as 1, 2
or 4 processes that are killed by SIGKILL, all of them or one, at random moments (start-up, steps, saves in the
background, publication of a checkpoint), and start again with other numbers of ranks and of data workers. After every
kill the newest checkpoint and ``latest`` must be usable; at the end the run must have the curve and the rows of one
that was never interrupted, and every row of the data, which has rows to skip, must be accounted for in every epoch.

With ``--changes-of-packs`` every start also takes another number of packs a step: the rows alone are checked then.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from echo4o.checkpoint import folders, train_state  # noqa: E402
from echo4o.train.metrics import METRICS_FILE, read_metrics  # noqa: E402
from echo4o.train.row_log import read_rows  # noqa: E402

PACKS_PER_STEP = 4
SAVE_EVERY = 2
KEEP_LAST_N = 2
MAX_NUM_TOKENS_PER_SAMPLE = 330  # some multi-reference rows are longer
MIN_STEPS = 24  # more than an epoch of the mandatory questions about images
ENDLESS = 1_000_000
#: Seconds of training after start-up in which a kill comes.
WINDOW = 6.0
#: Share of kills during start-up, at some moment of a save, and at the moment of its publication; the others: anywhere.
MOMENTS = {"start-up": 0.15, "save": 0.2, "publication": 0.15, "any": 0.5}
#: Seconds that the other ranks have to end after one was killed, and data workers after their rank.
SURVIVORS_PATIENCE, WORKERS_PATIENCE = 90.0, 20.0
SAME_CURVE = ("loss", "mse", "ce", "grad_norm", "lr", "num_mse_tokens", "data/samples", "data/rows")
TOLERANCE = 1e-5
BANNER = "memory, estimated"


class Violation(RuntimeError):
    """Something was promised and did not hold."""


# ---------------------------------------------------------------- the run


def write_dataset(folder: Path) -> Path:
    """The mixed example data with rows to be skipped: without answer, without image, with a broken one, too long."""
    import yaml

    from tests.train.tiny_run import DATA

    vlm = folder / "vlm"
    shutil.copytree(DATA / "vlm", vlm)
    whole = (vlm / "images" / "000_1.jpg").read_bytes()
    (vlm / "images" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    turns = [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "a square"}]
    rows = [
        {"image": "images/000_1.jpg", "conversations": []},
        {"image": "images/absent.jpg", "conversations": turns},
        {"image": "images/broken.jpg", "conversations": turns},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x" * MAX_NUM_TOKENS_PER_SAMPLE}]},
    ]
    with open(vlm / "train.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    content = yaml.safe_load((DATA / "dataset_mixed.yaml").read_text())
    for data_sets in content["dataset_info"].values():
        for paths in data_sets.values():
            paths.update({key: str(DATA / path) for key, path in paths.items()})
    content["dataset_info"]["vlm_sft"]["example_vlm"] = {"data_dir": str(vlm), "jsonl_path": str(vlm / "train.jsonl")}
    content["vlm_sft"]["num_used_data"] = [len((vlm / "train.jsonl").read_text().splitlines())]
    target = folder / "dataset.yaml"
    target.write_text(yaml.safe_dump(content, sort_keys=False))
    return target


def settings_of(folder: Path, out: Path, **changes: object) -> dict[str, object]:
    from tests.train.tiny_run import run_settings

    return run_settings(folder / "bagel", out, **{
        "dataset_config_file": str(folder / "data" / "dataset.yaml"),
        "max_num_tokens_per_sample": MAX_NUM_TOKENS_PER_SAMPLE,
        "gradient_accumulation_steps": PACKS_PER_STEP,
        "lr": 1e-4,
        "save_every": SAVE_EVERY,
        "keep_last_n": KEEP_LAST_N,
        "async_save": True,
        "log_rows": True,
        "auto_resume": True,
        "dist_timeout": 60.0,
        "dead_rank_timeout": 20.0,
        **changes,
    })  # fmt: skip


@dataclass
class Life:
    """The processes of a run from one start to their end."""

    settings: dict[str, object]
    num_ranks: int
    logs: list[Path]
    processes: list[BaseProcess]
    began: float

    @classmethod
    def start(cls, settings: dict[str, object], num_ranks: int, folder: Path, name: str) -> Life:
        from tests.train.launch import environment, free_port

        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(settings))
        logs = [folder / f"{name}_rank_{rank}.log" for rank in range(num_ranks)]
        port, began, processes = free_port(), time.time(), []
        for rank, log in enumerate(logs):
            log.touch()
            arguments = (settings, log, environment(rank, num_ranks, port))
            processes.append(multiprocessing.get_context("forkserver").Process(target=train_one_rank, args=arguments))
            processes[-1].start()
        return cls(settings, num_ranks, logs, processes, began)

    def started(self) -> bool:
        """The first step is near."""
        return BANNER in self.logs[0].read_text(encoding="utf-8", errors="replace")

    def ended(self) -> bool:
        return any(process.exitcode is not None for process in self.processes)

    def wait(self, timeout: float) -> None:
        """Raises Violation if a process is still there then."""
        deadline = time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise Violation(f"rank {rank} has not ended after {timeout:.0f} s\n{self.tail(rank)}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def tail(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")[-3000:]


def processes_of(sessions: set[int]) -> list[int]:
    """Processes that live in these sessions: ranks and their data workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and int(session) in sessions:
                found.append(int(path.parent.name))
    return found


# ---------------------------------------------------------------- killing


@dataclass
class KillTest:
    """A run that is killed again and again."""

    folder: Path
    ranks: list[int]
    rng: random.Random
    changes_of_packs: bool = False
    newest: int = 0
    linked: int = 0
    steps_lost: int = 0
    startup_seconds: dict[int, float] = field(default_factory=dict)
    longest_end: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    ended_sessions: dict[int, float] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def start(self, name: str, total_steps: int = ENDLESS) -> Life:
        num_ranks = self.rng.choice(self.ranks)
        packs = self.rng.choice([1, 2, 3]) if self.changes_of_packs else max(1, PACKS_PER_STEP // num_ranks)
        changes = {
            "num_workers": self.rng.choice([0, 1, 2]),
            "gradient_accumulation_steps": packs,
            "keep_packs_per_step": not self.changes_of_packs,
            "total_steps": total_steps,
        }
        return Life.start(settings_of(self.folder, self.out, **changes), num_ranks, self.folder / "lives", name)

    def kill(self, number: int) -> str:
        """One life and its end; returns what happened."""
        life = self.start(f"{number:04d}")
        with contextlib.ExitStack() as stack:
            stack.callback(life.end)
            before = self.newest
            kind = self.rng.choices(list(MOMENTS), MOMENTS.values())[0]
            after = self._wait_for(kind, life)
            if life.ended():
                raise Violation(f"kill {number}: the run ended before it was killed\n{life.tail()}")
            where = self._where(kind, life)
            whom = "all" if self.rng.random() < 0.5 else self.rng.randrange(life.num_ranks)
            for rank, process in enumerate(life.processes):
                if whom in ("all", rank):
                    process.kill()
            killed = time.monotonic()
            life.wait(SURVIVORS_PATIENCE)
            self.longest_end = max(self.longest_end, time.monotonic() - killed)
            stack.callback(self._remember, life)
        reached = self._check_checkpoints()
        self.counts[f"in {where}"] += 1
        self.counts["of all ranks" if whom == "all" else "of one rank"] += 1
        return (
            f"{life.num_ranks} rank{'s' * (life.num_ranks > 1)}, {life.settings['num_workers']} workers, "
            f"{'all ranks' if whom == 'all' else f'rank {whom}'} killed in {where} {after:.2f} s after "
            f"{'the start' if kind == 'start-up' else 'start-up'}; "
            f"step {before} → {reached}, newest checkpoint {self.newest}, latest {self.linked or 'none'}"
        )

    def _wait_for(self, kind: str, life: Life) -> float:
        """Until the moment of the kill; seconds since the start, or since start-up was over."""
        started = time.monotonic()
        if kind == "start-up":
            usual = self.startup_seconds.get(life.num_ranks, 4.0 + 2.0 * life.num_ranks)
            _wait_until(life.ended, self.rng.uniform(0, usual))
            return time.monotonic() - started
        if not _wait_until(lambda: life.started() or life.ended(), 240):
            raise Violation(f"no first step after 240 s\n{life.tail()}")
        self.startup_seconds[life.num_ranks] = time.monotonic() - started
        started = time.monotonic()
        _wait_until(life.ended, self.rng.uniform(0, WINDOW))
        if kind in ("save", "publication"):
            name = "" if kind == "save" else "training.json"
            _wait_until(lambda: self._being_written(life, name) or life.ended(), 20, interval=0.0005)
            time.sleep(self.rng.uniform(0, 0.1 if kind == "save" else 0.03))
        return time.monotonic() - started

    def _where(self, kind: str, life: Life) -> str:
        """In the middle of what the run is."""
        if kind == "start-up":
            return "start-up"
        if self._being_written(life, "training.json"):
            return "a publication"
        if self._being_written(life):
            return "a save"
        newest = max(self.checkpoints.glob("[0-9]*"), key=lambda path: path.name, default=None)
        if newest is not None and newest.name > f"{self.newest:07d}" and time.time() - newest.stat().st_ctime < 0.05:
            return "tidying up after a save"
        return "training"

    def _being_written(self, life: Life, name: str = "") -> bool:
        """This life, not an earlier one that was killed, writes a checkpoint that holds file `name` already."""
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_ctime > life.began for path in self.checkpoints.glob(f"*.partial/{name}"))
        return False

    def _remember(self, life: Life) -> None:
        self.ended_sessions |= {process.pid: time.monotonic() for process in life.processes}
        self.check_processes(WORKERS_PATIENCE)

    def check_processes(self, patience: float) -> None:
        """No process may be left of lives that ended that long ago."""
        old = {session for session, ended in self.ended_sessions.items() if time.monotonic() - ended > patience}
        if left := processes_of(old):
            raise Violation(f"{len(left)} processes left {patience:.0f} s after their run's end: {left}")
        self.ended_sessions = {s: ended for s, ended in self.ended_sessions.items() if s not in old}

    def _check_checkpoints(self) -> int:
        """The newest checkpoint and the link must be usable, and not older than before; returns the last step taken."""
        steps, link = folders.steps(self.checkpoints), self.checkpoints / folders.LATEST
        newest = steps[-1] if steps else 0
        if newest < self.newest:
            raise Violation(f"the newest complete checkpoint was {self.newest} and is {newest}")
        if len(steps) > KEEP_LAST_N + 1:
            raise Violation(f"{len(steps)} checkpoints are kept instead of {KEEP_LAST_N}: {steps}")
        linked = 0
        if link.is_symlink():
            linked = int(link.resolve().name)
            if wrong := folders.faults(link):
                raise Violation(f"{link} cannot be used: {'; '.join(wrong)}")
        # A kill between a checkpoint's new name and the link's change leaves the link one checkpoint behind.
        if linked < self.linked or (len(steps) > 1 and linked not in steps[-2:]):
            raise Violation(f"latest was {self.linked} and is {linked or 'none'}, with checkpoints {steps}")
        used = folders.latest(self.checkpoints)
        if (int(used.name) if used else 0) != newest:
            raise Violation(f"a run would go on from {used}, not from step {newest}")
        metrics = self.out / METRICS_FILE
        reached = max((record["step"] for record in read_metrics(metrics)), default=0) if metrics.exists() else 0
        if reached - newest > 2 * SAVE_EVERY:
            raise Violation(f"step {reached} was trained, and the newest checkpoint is {newest}")
        self.newest, self.linked = newest, linked
        self.steps_lost += max(0, reached - newest)
        return reached

    def finish(self) -> int:
        """Let the run end by itself; returns its steps."""
        total = max(MIN_STEPS, self.newest + 3 * SAVE_EVERY)
        run_to_end(self.start("last", total), "the last life")
        self._check_checkpoints()
        if (self.newest, self.linked) != (total, total):
            raise Violation(f"the run ends at step {total}, its newest checkpoint is {self.newest}")
        return total


def _wait_until(true: Callable[[], bool], seconds: float, interval: float = 0.01) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(interval, max(0.0, deadline - time.monotonic())))
    return True


def run_to_end(life: Life, what: str) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(life.end)
        life.wait(3600)
    for rank, process in enumerate(life.processes):
        if process.exitcode:
            raise Violation(f"{what}: rank {rank} ended with {process.exitcode}\n{life.tail(rank)}")


# ---------------------------------------------------------------- what must hold at the end


def check_curve(found: Path, expected: Path, total: int) -> float:
    """Every step once, with the numbers of the uninterrupted run; returns the largest relative difference."""
    one, other = (read_metrics(out / METRICS_FILE) for out in (found, expected))
    for records, what in ((one, "the killed run"), (other, "the uninterrupted run")):
        if [record["step"] for record in records] != list(range(1, total + 1)):
            raise Violation(f"the metrics of {what} are not those of steps 1 to {total}, each once")
    largest = 0.0
    for mine, theirs in zip(one, other, strict=True):
        for name in SAME_CURVE:
            if (mine[name] is None) != (theirs[name] is None):
                raise Violation(f"step {mine['step']}: {name} is {mine[name]} instead of {theirs[name]}")
            difference = abs((mine[name] or 0.0) - (theirs[name] or 0.0)) / (abs(theirs[name] or 0.0) or 1.0)
            if not difference <= TOLERANCE:
                raise Violation(f"step {mine['step']}: {name} is {mine[name]!r} instead of {theirs[name]!r}")
            largest = max(largest, difference)
    return largest


def check_same_rows(found: Path, expected: Path) -> None:
    one, other = read_rows(found), read_rows(expected)
    for step in sorted(one.keys() | other.keys()):
        if sorted(one.get(step, [])) != sorted(other.get(step, [])):
            raise Violation(f"step {step} has other rows: {one.get(step)} instead of {other.get(step)}")


@dataclass
class GroupAccount:
    """What became of a group's rows."""

    name: str
    trained: int
    skipped: int
    epochs: int
    whole_epochs: int

    def __str__(self) -> str:
        return f"{self.name} {self.trained:,} in {self.epochs} epochs, {self.whole_epochs} of them whole"


def account(folder: Path, out: Path) -> list[GroupAccount]:
    """Of every epoch that began, each usable row was trained once, or is left in the last checkpoint's data state."""
    from echo4o.data.dealing import outstanding_rows

    checkpoint = folders.latest(out / "checkpoints")
    assert checkpoint is not None
    num_ranks = train_state.read_training(checkpoint)["world_size"]
    ranks = [train_state.read_rank(checkpoint, rank)["data"] for rank in range(num_ranks)]
    streams = {int(stream): state for rank in ranks for stream, state in rank["streams"].items()}
    trained: dict[str, Counter[tuple[int, int]]] = {}
    for packs in read_rows(out).values():
        for source, epoch, row in (address for pack in packs for address in pack):
            trained.setdefault(source, Counter())[epoch, row] += 1
    accounts = []
    for group in groups_of(folder, out):
        left = outstanding_rows(group.name, len(group.source), streams, ranks[0]["num_streams"])
        accounts.append(_account_of(group, left, trained.get(group.source.name, Counter())))
    counts = Counter()
    for rank in ranks:
        for counters in rank["counters"].values():
            counts.update(counters)
    if (read := counts["rows"] - counts["buffered"]) != sum(a.trained + a.skipped for a in accounts):
        raise Violation(f"the counters say that {read} rows were used or skipped, not {accounts}")
    return accounts


def _account_of(group: Any, left: Any, trained: Counter[tuple[int, int]]) -> GroupAccount:
    if twice := {row: count for row, count in trained.items() if count > 1}:
        raise Violation(f"{group.name}: rows (epoch, row) were trained more than once: {twice}")
    broken = _undecodable(group.source)
    skipped = whole = 0
    for epoch in range(left.epoch):
        usable = {
            position: row for position, row in _planned(group.source, epoch) if row is not None and row not in broken
        }
        unread = {at for e, start, stop in left.spans if e == epoch for at in range(start, stop)}
        waiting = [row for e, row in left.returned if e == epoch]
        done = sorted(row for e, row in trained if e == epoch)
        rest = [usable[position] for position in unread if position in usable]
        rest += [row for row in waiting if row not in broken]
        if sorted(done + rest) != sorted(usable.values()):
            lost = sorted(set(usable.values()) - set(done) - set(rest))
            raise Violation(
                f"{group.name}, epoch {epoch}: rows {lost} are lost, {sorted(set(done) & set(rest))} would come twice, "
                f"{sorted(set(done) - set(usable.values()))} should have been skipped"
            )
        whole += not unread and not waiting
        skipped += len(group.source) - len(unread) - len(waiting) - len(done)
    if beyond := [row for row in trained if row[0] >= left.epoch]:
        raise Violation(f"{group.name}: rows of an epoch that has not begun were trained: {beyond}")
    return GroupAccount(group.name, len(trained), skipped, left.epoch, whole)


def _planned(source: Any, epoch: int) -> Iterator[tuple[int, int | None]]:
    """Position and row; None where it cannot be planned or is too long."""
    from echo4o.data.errors import RowError

    for position in range(len(source)):
        try:
            plan = source.plan(epoch, position)
        except RowError:
            yield position, None
            continue
        yield position, plan.address.index if plan.num_tokens <= MAX_NUM_TOKENS_PER_SAMPLE else None


def _undecodable(source: Any) -> set[int]:
    from echo4o.data.errors import RowError

    broken = set()
    for position in range(len(source)):
        with contextlib.suppress(RowError):
            plan = source.plan(0, position)
            try:
                plan.load()
            except RowError:
                broken.add(plan.address.index)
    return broken


def groups_of(folder: Path, out: Path) -> list[Any]:
    from echo4o.config import load_config, plan_loading
    from echo4o.train.data import build_groups, build_tokenizer
    from echo4o.train.initialise import architecture_of

    config = load_config((), settings_of(folder, out))
    plan = plan_loading(config, None)
    tokenizer, special_tokens = build_tokenizer(plan)
    return build_groups(config, architecture_of(plan, config), tokenizer, special_tokens)


# ---------------------------------------------------------------- command


def run_test(folder: Path, kills: int, ranks: list[int], seed: int, changes_of_packs: bool) -> None:
    """Raises Violation."""
    from tests.train.tiny_run import write_bagel

    write_bagel(folder / "bagel")
    (folder / "data").mkdir()
    write_dataset(folder / "data")
    started = time.monotonic()
    test = KillTest(folder, ranks, random.Random(seed), changes_of_packs)
    for number in range(1, kills + 1):
        print(f"kill {number:3d}/{kills}  {test.kill(number)}", flush=True)
    total = test.finish()
    accounts = account(folder, test.out)
    if not changes_of_packs:
        whole = folder / "whole"
        settings = settings_of(folder, whole, total_steps=total, save_every=ENDLESS)
        run_to_end(Life.start(settings, 1, folder / "lives", "whole"), "the uninterrupted run")
        largest = check_curve(test.out, whole, total)
        check_same_rows(test.out, whole)
        print(f"curve of {total} steps as uninterrupted, largest relative difference {largest:.1e}; the same rows")
    _wait_until(lambda: not processes_of(set(test.ended_sessions)), WORKERS_PATIENCE, interval=0.2)
    test.check_processes(0)
    print(f"rows trained exactly once: {'; '.join(map(str, accounts))}; {sum(a.skipped for a in accounts)} skipped")
    print(
        f"{kills} kills ({', '.join(f'{count} {what}' for what, count in sorted(test.counts.items()))}), "
        f"{total} steps, {test.steps_lost} taken again, survivors ended within {test.longest_end:.1f} s, "
        f"no process left, {math.ceil((time.monotonic() - started) / 60)} min: no row lost or repeated"
    )


def train_one_rank(settings: dict[str, object], log: Path, environment: dict[str, str]) -> None:
    """What each rank does, in a process forked from one that has imported everything: starts are many."""
    import torch

    from echo4o.config import load_config
    from echo4o.train.trainer import train

    os.setsid()
    with open(log, "wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the platform's own for data workers, not this process'
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    torch.set_num_threads(1)
    try:
        train(load_config((), settings))
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes leave these out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes to choose from")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and numbers")
    parser.add_argument("--folder", type=Path, help="an empty folder for the run; default: a temporary one")
    parser.add_argument("--changes-of-packs", action="store_true", help="other packs a step at every start")
    options = parser.parse_args()
    if any(PACKS_PER_STEP % number for number in options.ranks) and not options.changes_of_packs:
        parser.error(f"--ranks must divide {PACKS_PER_STEP}, the packs a step")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kill_test_"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["echo4o.train.trainer", "tests.train.tiny_run"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes are ended
    try:
        run_test(folder.resolve(), options.kills, options.ranks, options.seed, options.changes_of_packs)
    except Violation as error:
        print(f"VIOLATION (run in {folder}): {error}")
        sys.exit(1)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
