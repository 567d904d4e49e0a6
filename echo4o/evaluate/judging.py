"""Asks the judge what has not been asked yet, many questions at once, and writes each answer down as it comes.

What counts as asked: a judgement whose hash of the whole request (text, rubric, bytes of the pictures, judge) is that
of the question now. Such a question is asked again only where no reply came, or, on demand, where the reply held no
answer. Nothing is ever guessed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from echo4o.evaluate.benchmark import Benchmark, Item, Judgement
from echo4o.evaluate.client import CallFailed, JudgeClient, JudgeError, Reply
from echo4o.evaluate.cost import prompt_tokens
from echo4o.evaluate.journal import Journal, Key
from echo4o.evaluate.pacing import Stopped
from echo4o.evaluate.parsing import ParseError
from echo4o.evaluate.questions import Hashes, MissingPicture, Task, request_hash

logger = logging.getLogger(__name__)

#: A reply that was cut is asked for once more with so many times the tokens.
LARGER_CAP = 4
#: A judge that fails so many questions one after the other is not asked the rest.
MAX_FAILURES_IN_A_ROW = 12


class Progress(Protocol):
    def advance(self, judgement: Judgement) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """Of one round of judging.

    Attributes:
        asked: judgements made now, in the order in which they arrived.
        interrupted: the user has stopped it.
    """

    asked: tuple[Judgement, ...]
    interrupted: bool = False


def tasks_of(
    benchmark: Benchmark,
    items: Iterable[Item],
    pictures: Callable[[Item], tuple[Path | None, ...]],
    judge: str,
    hashes: Hashes | None = None,
) -> list[Task]:
    """Every question about every item, in order."""
    hashes = hashes or Hashes()
    tasks = []
    for item in items:
        found = pictures(item)
        for question in benchmark.questions(item):
            tasks.append(Task(item, question, found, request_hash(question, found, judge, hashes)))
    return tasks


def still_valid(task: Task, judgements: Sequence[Judgement], judge: str) -> Judgement | None:
    """The latest judgement of exactly this question by this judge."""
    return next((one for one in reversed(judgements) if one.request == task.request and one.judge == judge), None)


def needs_asking(known: Judgement | None, retry_failed: bool) -> bool:
    return known is None or known.status == "api_error" or (known.status == "parse_error" and retry_failed)


def open_tasks(
    tasks: Iterable[Task], judgements: dict[Key, list[Judgement]], judge: str, retry_failed: bool = False
) -> list[Task]:
    """Those that the judge will be asked."""
    return [
        task
        for task in tasks
        if task.missing is None and needs_asking(still_valid(task, judgements.get(task.key, []), judge), retry_failed)
    ]


def judge_all(
    benchmark: Benchmark,
    tasks: Sequence[Task],
    client: JudgeClient,
    journal: Journal,
    progress: Progress,
    *,
    retry_failed: bool = False,
) -> Outcome:
    """Ask what is open. After it, the latest line of every question is the one that counts.

    Ctrl-C waits for the replies that are on their way and writes them down; a second one does not.

    Raises:
        JudgeError: if the judge cannot be asked at all; what has arrived is kept.
    """
    name, judge = benchmark.name, client.options.model
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        known = journal.known.get(task.key, [])
        found = still_valid(task, known, judge)
        if (why := task.missing) is not None:
            if found is None or found.status != "missing_image" or known[-1] is not found:
                journal.add(_blank(name, task, judge, why))
        elif needs_asking(found, retry_failed):
            waiting.put(task)
        elif found is not None and known[-1] is not found:
            journal.add(found)  # judged before another picture or judge came in between: it counts again
    return _Round(name, client, journal, progress, waiting).run()


class _Round:
    """Workers on a queue of questions."""

    def __init__(
        self, benchmark: str, client: JudgeClient, journal: Journal, progress: Progress,
        waiting: queue.SimpleQueue[Task],
    ) -> None:  # fmt: skip
        self.benchmark, self.client, self.journal, self.progress, self.waiting = (
            benchmark, client, journal, progress, waiting,
        )  # fmt: skip
        self.asked: list[Judgement] = []
        self.error: BaseException | None = None
        self._in_a_row = self._running = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> Outcome:
        # Daemons: a second Ctrl-C need not wait for a server that does not answer. Not joined: up to Python 3.12 an
        # interrupt in `Thread.join` lets a running thread pass for an ended one.
        self._running = min(self.client.options.workers, self.waiting.qsize())
        for number in range(self._running):
            threading.Thread(target=self._work, name=f"judge {number}", daemon=True).start()
        interrupted = False
        while True:
            try:
                while self._running:
                    self._ended.wait(0.2)
                break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                self.client.pace.stop.set()
                logger.warning("stopping: replies on their way are waited for; Ctrl-C again drops them")
        if self.error is not None:
            raise self.error
        return Outcome(tuple(self.asked), interrupted)

    def _work(self) -> None:
        try:
            while not self.client.pace.stop.is_set():
                try:
                    task = self.waiting.get_nowait()
                except queue.Empty:
                    return
                self._note(self._judged(task))
        except Stopped:
            return
        except BaseException as error:  # of whatever kind: raised again by `run`
            with self._lock:
                self.error = self.error or error
            self.client.pace.stop.set()
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._ended.set()

    def _note(self, judgement: Judgement) -> None:
        with self._lock:
            self.journal.add(judgement)
            self.asked.append(judgement)
            self.progress.advance(judgement)
            self._in_a_row = self._in_a_row + 1 if judgement.status == "api_error" else 0
            if self._in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise JudgeError(
                    f"judge at {self.client.options.host}: {self._in_a_row} questions in a row got no reply, the last: "
                    f"{judgement.error}. Look after the server and run the same command again; what is judged stays."
                )

    def _judged(self, task: Task) -> Judgement:
        """One question, its picture prepared and its reply read."""
        begun = time.monotonic()
        blank = _blank(self.benchmark, task, self.client.options.model)
        try:
            messages = task.messages()
        except MissingPicture as missing:
            return replace(blank, error=str(missing))
        question, replies = task.question, []
        tokens = prompt_tokens(task, self.client.options.model, (1024, 1024))
        try:
            for cap in (question.max_tokens, question.max_tokens * LARGER_CAP):
                replies.append(self.client.ask(messages, question.answer.schema, cap, tokens + cap / LARGER_CAP))
                if not replies[-1].truncated:
                    break
        except CallFailed as failed:
            attempts = failed.attempts + sum(reply.attempts for reply in replies)
            error = {"status": "api_error", "error": str(failed), "usage": _usage(replies), "attempts": attempts}
            return replace(blank, seconds=_since(begun), **error)
        reply = replies[-1]
        answer, problem = _read(task, reply)
        return replace(
            blank, status="parse_error" if answer is None else "ok", answer=answer, text=reply.text, error=problem,
            usage=_usage(replies), seconds=_since(begun), attempts=sum(reply.attempts for reply in replies),
        )  # fmt: skip


def _read(task: Task, reply: Reply) -> tuple[dict | None, str | None]:
    """The answer, or why there is none."""
    if reply.refusal:
        return None, f"refused: {reply.refusal}"
    if reply.truncated:
        return None, f"cut off at {task.question.max_tokens * LARGER_CAP} tokens"
    try:
        return task.question.answer.parse(reply.text), None
    except ParseError as error:
        return None, str(error)


def _blank(benchmark: str, task: Task, judge: str, why: str | None = None) -> Judgement:
    """Of a question that cannot be asked: a picture is missing."""
    return Judgement(
        benchmark, task.item.id, task.question.name, "missing_image", error=why, judge=judge, request=task.request
    )


def _usage(replies: Sequence[Reply]) -> dict[str, int]:
    usage: dict[str, int] = {}
    for reply in replies:
        for name, count in reply.usage.items():
            usage[name] = usage.get(name, 0) + count
    return usage


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)
