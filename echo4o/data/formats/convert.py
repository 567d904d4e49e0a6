"""Convert a data set from any known format to upstream parquet, native JSONL, OmniGen2 JSONL or BLIP3-o tars.

Rows are converted in parts of fixed spans, by worker processes; a part is complete or absent. Everything grows in a
hidden folder beside the destination, which gets its name at the end. Image bytes are never decoded or encoded anew.
A conversion that was killed goes on with the parts that are missing, with any number of workers, and ends with the
same bytes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from echo4o.data.errors import DataError, RowError
from echo4o.data.formats.convert_options import ConvertOptions
from echo4o.data.formats.convert_progress import ConvertProgress
from echo4o.data.formats.convert_report import ConvertReport, counted, report_lines, report_of, summed_up
from echo4o.data.formats.part_workers import convert_parts, disk_error
from echo4o.data.formats.parts import Job, PartResult, part_spans
from echo4o.data.formats.record import RECORD_KINDS
from echo4o.data.formats.registry import FormatStore
from echo4o.data.formats.workspace import SKIPPED, SUMMARY, Workspace, files_hash, plan_hash
from echo4o.data.formats.writers import Finishing, target_named
from echo4o.data.sources.remote import is_url

__all__ = ["ConvertOptions", "ConvertReport", "convert", "report_lines"]

_log = logging.getLogger(__name__)
_MAX_DEFAULT_WORKERS = 8
_NUM_PROBES = 16


def convert(
    options: ConvertOptions,
    destination: str | Path,
    *,
    workers: int | None = None,
    max_bad_share: float = 0.1,
    restart: bool = False,
    progress: ConvertProgress | None = None,
) -> ConvertReport:
    """Convert a data set, or go on with a conversion that was stopped.

    Args:
        options: what is converted to what.
        destination: folder to write; it must not exist unless it is the result of this conversion.
        workers: processes; ``None``: one for each core, at most 8; 0 and 1 convert in this process.
        max_bad_share: more bad rows than this share stop the conversion.
        restart: throw away what an earlier run with other options left unfinished.
        progress: shows how far it has come.

    Raises:
        DataError: if the source cannot be read, nothing or too little of it is usable, the disk is full, or another
            process converts to the same destination. Nothing stands under the destination then.
    """
    started = time.monotonic()
    if is_url(str(destination)):
        raise DataError(f"{destination}: the destination must be a folder of this machine")
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"max_bad_share must be between 0 and 1, not {max_bad_share}")
    progress = progress or ConvertProgress(enabled=False)
    options, final = options.resolved(), Path(destination).expanduser().absolute()
    with Workspace(final) as workspace:
        try:
            progress.say(f"{options.source}: {options.source_format}")
            store = options.open()
            plan = _plan(options, store)
            if workspace.already_finished(plan):
                return report_of(final, summed_up(final), store.problems, started, was_finished=True)
            workspace.begin(plan, restart)
        finally:
            workspace.abandon_if_empty()
        spans = part_spans(store.unit_lengths, options.rows_per_part, options.limit)
        job = Job(store, target_named(options.target), workspace, spans, options.kinds, options.phrasings)
        try:
            result = _convert_all(job, max_bad_share, _num_workers(workers), progress)
            _finish(job, plan, options, result)
        except OSError as error:
            raise disk_error(job, error) from error
        workspace.commit()
        return report_of(final, result, store.problems, started)


def _convert_all(job: Job, max_bad_share: float, num_workers: int, progress: ConvertProgress) -> PartResult:
    """Convert all parts that are not finished, and add all of them up."""
    num_rows = sum(end - start for start, end in job.spans)
    allowed = math.floor(max_bad_share * num_rows)
    result, todo = _finished_before(job, allowed)
    _probe(job)
    with progress:
        progress.begin(num_rows, sum(job.spans[index][1] - job.spans[index][0] for index in todo))
        if len(todo) < len(job.spans):
            progress.say(f"going on: {len(job.spans) - len(todo)} of {len(job.spans)} parts are finished")
        for index in convert_parts(job, todo, num_workers, progress.advance):
            result.add(PartResult.from_json(job.workspace.part(index)))
            if result.num_bad > allowed:
                break
    if result.num_bad > allowed:
        raise _too_many_bad(job, result, max_bad_share, num_rows)
    # Parts end in any order; files and kinds are listed in that of the rows.
    result = PartResult()
    for index in job.workspace.finished_parts():
        result.add(PartResult.from_json(job.workspace.part(index)))
    if not result.num_written:
        job.workspace.discard()
        raise DataError(
            f"no row of {num_rows} can be converted to {job.target.name}"
            + (f": {counted(result.held_not + result.bad)}" if result.held_not or result.bad else "")
            + (f". None is of kind {' or '.join(job.kinds)}" if job.kinds and not result.rows else "")
        )
    return result


def _finished_before(job: Job, allowed: int) -> tuple[PartResult, list[int]]:
    """Sum of the parts that are finished, and those that are not.

    Where too many rows were bad, the parts that have any are done again: whoever starts it once more has mended them.
    """
    results: dict[int, PartResult] = {}
    for index in job.workspace.finished_parts():
        try:
            results[index] = PartResult.from_json(job.workspace.part(index))
        except ValueError:
            job.workspace.forget_part(index)
            continue
        results[index].skipped.clear()
    if sum(result.num_bad for result in results.values()) > allowed:
        for index in [index for index, result in results.items() if result.num_bad]:
            job.workspace.forget_part(index)
            del results[index]
    total = PartResult()
    for result in results.values():
        total.add(result)
    return total, [index for index in range(len(job.spans)) if index not in results]


def _probe(job: Job) -> None:
    """Look at some rows, so that what a store reads on first use is read before workers share it."""
    num_rows = job.spans[-1][1]
    for number in range(_NUM_PROBES):
        try:
            job.store.record(number * num_rows // _NUM_PROBES)
        except (RowError, ValueError, TypeError) as error:
            _log.debug("probe: %s", error)


def _finish(job: Job, plan: Mapping[str, Any], options: ConvertOptions, result: PartResult) -> None:
    """All that stands beside the parts. The same bytes, whenever it is done."""
    workspace = job.workspace
    kinds = {kind: result.kinds[kind] for kind in RECORD_KINDS if kind in result.kinds}
    finishing = Finishing(workspace.build, workspace.state, workspace.temp, workspace.final, kinds, len(job.spans))
    job.target.finish(finishing)
    finishing.write(SKIPPED, _skipped_lines(job))
    summary = {
        "plan": plan_hash(plan),
        "source": options.source,
        "from": options.source_format,
        "to": options.target,
        "rows": result.rows,
        "written": {kind: summary.rows for kind, summary in kinds.items()},
        "bad": dict(sorted(result.bad.items())),
        "not_held": dict(sorted(result.held_not.items())),
        "notes": dict(sorted(result.notes.items())),
        "image_bytes": result.image_bytes,
        "problems": list(job.store.problems),
    }
    finishing.write(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _skipped_lines(job: Job) -> Iterator[bytes]:
    for index in job.workspace.finished_parts():
        for row in job.workspace.part(index)["skipped"]:
            yield (json.dumps(row, ensure_ascii=True) + "\n").encode()


def _too_many_bad(job: Job, result: PartResult, max_bad_share: float, num_rows: int) -> DataError:
    workspace = job.workspace
    path = workspace.partial / "skipped.jsonl"
    with path.open("wb") as file:
        file.writelines(_skipped_lines(job))
    with path.open("rb") as file:
        first = next(row for row in map(json.loads, file) if row["what"] == "bad")
    return DataError(
        f"{result.num_bad} of {num_rows} rows are bad, more than {max_bad_share:.4g} of them (--max-bad-share): "
        f"{counted(result.bad)}.\n"
        f"  First: {first['where']}: {first['reason']}: {first['detail']}\n"
        f"  All are listed in {path}. Mend them and run the same command again (only parts with bad rows are done "
        "again), or accept them with a larger --max-bad-share."
    )


def _plan(options: ConvertOptions, store: FormatStore) -> dict[str, Any]:
    """What must be the same for a conversion to be taken up again."""
    return {
        "source": options.source,
        "from": options.source_format,
        "to": options.target,
        "images": options.images,
        "columns": dict(options.columns),
        "split": options.split,
        "kinds": list(options.kinds),
        "limit": options.limit,
        "phrasings": options.phrasings,
        "rows_per_part": options.rows_per_part,
        "rows": len(store),
        "row files": files_hash([str(file) for file in store.files]),
    }


def _num_workers(workers: int | None) -> int:
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _MAX_DEFAULT_WORKERS)
    if workers < 0:
        raise DataError(f"workers must not be negative: {workers}")
    return workers
