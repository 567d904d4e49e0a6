"""What `echo4o eval` does once its options are parsed: draw, judge, score, report; each alone if wanted.

Every stage goes on where it was stopped. Under torchrun all processes draw, and the one that ends last judges.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import Benchmark, Item
from echo4o.evaluate.benchmarks import benchmark as benchmark_called
from echo4o.evaluate.benchmarks import options_of
from echo4o.evaluate.choosing import list_benchmarks, parsed_options, selected
from echo4o.evaluate.client import JudgeClient, JudgeError, JudgeOptions
from echo4o.evaluate.cost import Estimate, Prices, estimate, measured_reply, used
from echo4o.evaluate.journal import Journal, read_judgements
from echo4o.evaluate.judging import Outcome, judge_all, open_tasks, tasks_of
from echo4o.evaluate.progress import JudgeProgress
from echo4o.evaluate.questions import Hashes, Task
from echo4o.evaluate.run_folder import RunFolder, RunFolderError
from echo4o.evaluate.scoring import score_items, summary, valid_judgements, write_scores
from echo4o.generate.options import ModelOptions, Rank

__all__ = ["Evaluation", "Prices", "JudgeOptions", "evaluate", "list_benchmarks"]

logger = logging.getLogger(__name__)

STAGES = ("generate", "judge", "score")
INTERRUPTED = 130


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how.

    Attributes:
        benchmark: its name; options: of the benchmark, as text or values.
        out: folder of the run; one folder a benchmark in it.
        model: what draws; None if the pictures are there, or in `images`.
        prompts: the benchmark's data; None fetches it from the hub where it is published there.
        images: pictures made elsewhere.
        judge: who judges; None if only drawing or scoring is wanted.
        only: one of `STAGES`.
        limit: the first so many items of each tag.
        settings: of drawing, in place of the benchmark's.
        results: what the benchmark's own scorer wrote, for benchmarks that have one.
        retry_failed: ask again where a reply held no answer.
    """

    benchmark: str
    out: Path
    model: ModelOptions | None = None
    prompts: Path | None = None
    images: Path | None = None
    judge: JudgeOptions | None = None
    only: str | None = None
    limit: int | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    results: Path | None = None
    retry_failed: bool = False
    dry_run: bool = False
    prices: Prices = field(default_factory=Prices)
    report: bool = True

    def __post_init__(self) -> None:
        if self.only is not None and self.only not in STAGES:
            raise RunFolderError(f"--only is {self.only!r}; choose one of {', '.join(STAGES)}")
        if self.limit is not None and self.limit < 1:
            raise RunFolderError(f"--limit is {self.limit}; it must be at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise RunFolderError(f"--batch-size is {self.batch_size}; it must be at least 1")
        if self.model is not None and self.images is not None:
            raise RunFolderError("--model draws pictures, --images takes those of a folder: give one of them")
        if self.only == "generate" and self.model is None and self.images is None:
            raise RunFolderError("--only generate needs --model to draw with, or --images to take pictures from")
        if self.only == "judge" and self.judge is None and not self.dry_run:
            raise JudgeError("--only judge needs a judge: name it with --judge-model")


def evaluate(wanted: Evaluation, say: Callable[[str], object] = print) -> int:
    """Run the stages.

    Returns:
        The exit status: 1 if a picture or a judgement is missing, 130 after Ctrl-C while judging.

    Raises:
        BenchmarkDataError, RequestError, RunFolderError, JournalError, JudgeError, ReportError: with the remedy.
        ImportError: without the package that a stage needs; OSError: if the folder cannot be written.
    """
    benchmark = benchmark_called(wanted.benchmark, **parsed_options(wanted.benchmark, wanted.options))
    items = selected(benchmark, benchmark.load(wanted.prompts), wanted.limit)
    run = RunFolder(wanted.out / benchmark.name)
    is_first = Rank.from_environment().rank == 0
    say_first = say if is_first else _silent
    if wanted.limit is not None:
        say_first(f"only the first {wanted.limit} items of each tag: {len(items)} items, no score to publish")
    if wanted.dry_run:
        return _dry_run(wanted, benchmark, items, run, say_first)
    _check_judge(wanted, benchmark)
    if is_first:
        _note_run(wanted, benchmark, items, run)
    failed = False
    if wanted.only in (None, "generate"):
        drawn = _generate(wanted, benchmark, items, run, say_first, say)
        if drawn is None:
            return 0  # another process is still drawing, and will judge
        failed = bool(drawn)
    elif not is_first:
        return 0
    if wanted.only == "generate":
        return int(failed)
    if benchmark.questions(items[0]) and wanted.only != "score":
        if wanted.judge is None:
            say("no judge was named (--judge-model): nothing is judged now")
        elif _judge(wanted, wanted.judge, benchmark, items, run, say).interrupted:
            say("interrupted; what has arrived is kept, and the same command goes on")
            return INTERRUPTED
    if wanted.only == "judge":
        return int(failed)
    return int(_score(wanted, benchmark, items, run, say) or failed)


# ---------------------------------------------------------------- stages


def _generate(
    wanted: Evaluation, benchmark: Benchmark, items: Sequence[Item], run: RunFolder,
    say_first: Callable[[str], object], say: Callable[[str], object],
) -> list[str] | None:  # fmt: skip
    """Names of pictures that are missing after it; None on ranks that are not the last to draw."""
    from echo4o.evaluate.generation import adopt, draw, merged_settings  # torch: seconds

    if wanted.images is not None:
        if Rank.from_environment().rank:
            return None
        adopted = adopt(benchmark, items, run, wanted.images)
        say(f"{adopted.num_found} pictures of {wanted.images}" + _listed(adopted.missing, "missing"))
        return list(adopted.missing)
    if wanted.model is None:
        if Rank.from_environment().rank:
            return None
        missing = [item.id for item in items if None in run.pictures(benchmark, item)]
        if len(missing) == len(items):
            raise RunFolderError(f"{run.images} holds no picture yet: give --model to draw, or --images FOLDER")
        if missing:
            say("no --model: pictures are taken as they are" + _listed(missing, "without"))
        return missing
    settings = merged_settings(benchmark, wanted.settings)
    num_pictures = sum(item.num_images for item in items)
    say_first(f"{benchmark.title}: {len(items)} items, {num_pictures} pictures, {_setting_words(settings)}")
    done = draw(benchmark, items, run, wanted.model, settings, seed=wanted.seed, batch_size=wanted.batch_size)
    if done is None:
        return None
    say(f"{done.num_done} drawn, {done.num_skipped} were there before" + _listed(list(done.failed), "failed"))
    for name, message in list(done.failed.items())[:5]:
        say(f"  {name}: {message}")
    return list(done.failed)


def _judge(
    wanted: Evaluation, options: JudgeOptions, benchmark: Benchmark, items: Sequence[Item], run: RunFolder,
    say: Callable[[str], object],
) -> Outcome:  # fmt: skip
    client = JudgeClient(options)
    with Journal(run.judgements) as journal:
        tasks = _tasks(benchmark, items, run, options.model)
        waiting = open_tasks(tasks, journal.known, options.model, wanted.retry_failed)
        missing = sum(task.missing is not None for task in tasks)
        before = len(tasks) - len(waiting) - missing
        say(
            f"judging {len(waiting)} questions by {options.model} at {options.host}"
            + (f", {before} were judged before" if before else "")
            + (f", {missing} lack a picture" if missing else "")
        )
        run.note(judge=options.model, judge_server=options.host)
        with JudgeProgress(len(waiting), wanted.prices) as progress:
            try:
                outcome = judge_all(benchmark, tasks, client, journal, progress, retry_failed=wanted.retry_failed)
            finally:
                if served := sorted({*run.facts().get("judge_served_as", [])} | set(client.served_by)):
                    run.note(judge_served_as=served)
    for note in client.dialect.notes if outcome.asked else ():
        say(f"  note: {note}")
    say(_spent(outcome, wanted.prices))
    if any(judgement.status == "parse_error" for judgement in outcome.asked):
        say("  replies without an answer are asked for again with --retry-failed")
    return outcome


def _score(
    wanted: Evaluation, benchmark: Benchmark, items: Sequence[Item], run: RunFolder, say: Callable[[str], object]
) -> bool:
    """Write scores and report; whether an item is without a whole result."""
    judge: str | None = None
    paid = []
    if not benchmark.questions(items[0]):
        if wanted.results is None:
            say(f"{benchmark.title} is judged by a program of its own. {next(iter(benchmark.caveats), '')}")
            say(f"Its pictures lie in {run.images}; after it run this command with --only score --results FILE")
            return False
        scores = benchmark.read_results(wanted.results, items)
    else:
        judge = wanted.judge.model if wanted.judge else run.facts().get("judge")
        if judge is None:
            raise RunFolderError(f"nothing is judged in {run.path} yet: name a judge with --judge-model")
        known = read_judgements(run.judgements)
        paid = [one for made in known.values() for number, one in enumerate(made) if one not in made[:number]]
        tasks = _tasks(benchmark, items, run, judge)
        scores = score_items(benchmark, items, valid_judgements(tasks, known, judge))
    totals = write_scores(run, benchmark, scores, judge, paid, wanted.prices)
    run.note(finished=_now())
    for line in summary(benchmark, totals):
        say(line)
    if wanted.report:
        from echo4o.evaluate.report import write_report

        say(f"report: {write_report([wanted.out], wanted.out)[0]}")
    return any(score.status != "ok" for score in scores)


def _dry_run(
    wanted: Evaluation, benchmark: Benchmark, items: Sequence[Item], run: RunFolder, say: Callable[[str], object]
) -> int:
    """What the command would do; nothing is written, nothing asked, no key needed."""
    from echo4o.evaluate.generation import merged_settings  # torch: seconds

    settings = merged_settings(benchmark, wanted.settings)
    there = sum(picture is not None for item in items for picture in run.pictures(benchmark, item))
    pictures = sum(item.num_images for item in items)
    say(
        f"{benchmark.title}: {len(items)} items, {pictures} pictures, {there} of them there, {_setting_words(settings)}"
    )
    if not benchmark.questions(items[0]):
        say("judged by a program of its own: no calls")
        return 0
    model = wanted.judge.model if wanted.judge else benchmark.judge or "an unknown judge"
    size = (settings.get("width", 1024), settings.get("height", 1024))
    known = read_judgements(run.judgements)
    waiting = [
        task
        for task in _tasks(benchmark, items, run, model)
        if task.missing is not None or open_tasks([task], known, model, wanted.retry_failed)
    ]
    of_this_judge = [one for judgements in known.values() for one in judgements if one.judge == model]
    found: Estimate = estimate(waiting, model, size, measured_reply(of_this_judge))
    say(f"judge: {model}" + ("" if wanted.judge else " (as published; --judge-model names another)"))
    for line in found.lines(wanted.prices):
        say(f"  {line}")
    return 0


# ---------------------------------------------------------------- words and checks


def _tasks(benchmark: Benchmark, items: Sequence[Item], run: RunFolder, judge: str) -> list[Task]:
    return tasks_of(benchmark, items, lambda item: run.pictures(benchmark, item), judge, Hashes())


def _check_judge(wanted: Evaluation, benchmark: Benchmark) -> None:
    """What would end judging at once is said before anything is drawn."""
    judge = wanted.judge
    if judge is None or wanted.only in ("generate", "score"):
        return
    judge.key()
    if Rank.from_environment().rank:
        return
    if judge.is_openai and not any(part.isdigit() and len(part) >= 2 for part in judge.model.split("-")):
        logger.warning(
            "%s is a name that moves from model to model; for scores that can be compared name a dated one, such as "
            "gpt-4.1-2025-04-14", judge.model,
        )  # fmt: skip
    if benchmark.judge is not None and judge.model != benchmark.judge:
        logger.info("published scores of %s were judged by %s", benchmark.title, benchmark.judge)


def _note_run(wanted: Evaluation, benchmark: Benchmark, items: Sequence[Item], run: RunFolder) -> None:
    facts = run.facts()
    if facts.get("benchmark", benchmark.name) != benchmark.name:
        raise RunFolderError(f"{run.path} holds {facts['benchmark']}, not {benchmark.name}; choose another --out")
    run.note(
        benchmark=benchmark.name, options=options_of(benchmark), limit=wanted.limit, num_items=len(items),
        prompts=wanted.prompts.name if wanted.prompts else benchmark.source, started=facts.get("started", _now()),
    )  # fmt: skip
    run.write_items(items)


def _spent(outcome: Outcome, prices: Prices) -> str:
    usage = used(outcome.asked)
    statuses = Counter(judgement.status for judgement in outcome.asked)
    words = [f"{count} {status.replace('_', ' ')}" for status, count in statuses.items()]
    cost = prices.cost(usage)
    tokens = f"{usage['prompt_tokens']:,} prompt and {usage['completion_tokens']:,} completion tokens"
    return f"judged: {', '.join(words) or 'nothing new'}; {tokens}" + ("" if cost is None else f", cost {cost:.2f}")


def _setting_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _listed(names: Sequence[str], word: str) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f", {len(names)} {word}: {shown}"


def _silent(text: str) -> None:
    """Of ranks that do not speak."""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
