"""python scripts/eval_end_to_end.py --geneval ../shared/benchmarks/geneval_plus_plus.jsonl \\
    --imagine ../shared/benchmarks/imagine_bench.jsonl

The whole of GenEval++ (280 prompts) and Imagine-Bench (270) on a CPU: the tiny model draws, a judge on this machine
judges that is busy, fails, hangs up and talks of the weather now and then, and `echo4o eval` is killed (SIGKILL) while
it draws and again while it judges. Then the totals of ``scores.json`` and of the report must be those of a count of
``judgements.jsonl`` made here, line by line, without the package's own formulas; and nothing that was judged may have
been asked again.

Scores mean nothing: the judge answers by a hash of the question.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.evaluate.judge_server import JudgeServer  # noqa: E402

MODEL = "data_examples/tiny_bagel"
JUDGE = "test-judge-2026-01-01"
WORKERS = 8
#: Share of the pictures, and of the judgements, after which the run is killed.
KILL_AT = (0.4, 0.5)
WEATHER = {
    "busy": 0.03,
    "error": 0.03,
    "drop": 0.02,
    "no_json": 0.01,
    "markdown": 0.1,
    "truncate": 0.02,
    "garbage": 0.02,
}
IMAGINE_TYPES = {
    "COLOR": "attribute", "SHAPE": "attribute", "SIZE": "attribute", "MATERIAL": "hybrid", "COMBINATION": "hybrid",
    "TIME": "spacetime", "ENVIRONMENT": "spacetime", "Multi-Object": "several",
}  # fmt: skip
IMAGINE_WEIGHTS = {"attribute": 3, "hybrid": 2, "spacetime": 2, "several": 2}


class Violation(RuntimeError):
    """Something was promised and did not hold."""


@dataclass
class Times:
    """Seconds by what they were spent on, printed in the end."""

    parts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geneval", type=Path, required=True, help="GenEval++'s prompts")
    parser.add_argument("--imagine", type=Path, required=True, help="Imagine-Bench's prompts")
    parser.add_argument("--out", type=Path, help="kept afterwards; by default a temporary folder")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--num-timesteps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds a judgement takes")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="echo4o-eval-"))
    begun, times = time.monotonic(), Times()
    try:
        for name, prompts in (("geneval++", options.geneval), ("imagine-bench", options.imagine)):
            with JudgeServer(weather=dict(WEATHER), delay=options.delay) as server:  # type: ignore[arg-type]
                run_and_check(name, prompts.resolve(), out.resolve(), options, server, times)
        for part, seconds in times.parts.items():
            print(f"  {part}: {seconds:.0f} s")
        print(f"all in {time.monotonic() - begun:.0f} s; load of the machine at the end: {os.getloadavg()[0]:.1f}")
    finally:
        if options.out is None:
            shutil.rmtree(out, ignore_errors=True)


def run_and_check(
    name: str, prompts: Path, out: Path, options: argparse.Namespace, server: JudgeServer, times: Times
) -> None:
    """One benchmark, killed while it draws and while it judges, then counted again."""
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    folder = out / name
    judgements = folder / "judgements.jsonl"
    command = [
        sys.executable, "-m", "echo4o.cli", "eval", name, "--data", str(prompts), "--model", MODEL, "--out", str(out),
        "--judge-url", server.url, "--judge-model", JUDGE, "--judge-workers", str(WORKERS),
        "--batch-size", str(options.batch_size), "--set", f"height={options.size}", "--set", f"width={options.size}",
        "--set", f"num_timesteps={options.num_timesteps}", "--set", "cfg_text_scale=2", "--set", "cfg_img_scale=1.5",
    ]  # fmt: skip
    goals: Sequence[tuple[str, Callable[[], bool]]] = [
        ("drawing", lambda: num_pictures(folder) >= KILL_AT[0] * len(rows)),
        ("judging", lambda: num_lines(judgements) >= KILL_AT[1] * len(rows)),
    ]
    judged_before: set[str] = set()
    for number, (stage, is_reached) in enumerate(goals):
        begun = time.monotonic()
        killed_at = run(command, is_reached)
        times.add(f"{name}, until killed while {stage}", time.monotonic() - begun)
        print(f"{name}: killed while {stage}, {num_pictures(folder)} pictures, {num_lines(judgements)} judgements")
        if not killed_at:
            raise Violation(f"{name} ended before it could be killed while {stage}")
        if number == 1:
            judged_before = {row["item"] for row in whole_lines(judgements)}
    asked_before = len(server.asked)
    begun = time.monotonic()
    run(command, lambda: False)
    times.add(f"{name}, to its end", time.monotonic() - begun)
    check_nothing_twice(name, rows, whole_lines(judgements), judged_before, server, asked_before)
    check_totals(name, rows, out)
    statuses = Counter(row["status"] for row in whole_lines(judgements))
    print(
        f"{name}: {len(rows)} items, {len(server.asked)} requests, {dict(statuses)}; "
        f"key in {server.authorization['present']} requests"
    )


def run(command: Sequence[str], is_reached: Callable[[], bool]) -> bool:
    """Run the command until it ends (False) or `is_reached`, when it is killed with all it has started (True)."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    environment.pop("OPENAI_API_KEY", None)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None:
            if process.poll() is None and is_reached():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.05)
        log.seek(0)
        said = log.read().decode(errors="replace")
    if process.returncode not in (0, 1):  # 1: a reply held no answer
        raise Violation(f"exit status {process.returncode}:\n{said[-3000:]}")
    print("\n".join(f"  | {line}" for line in said.splitlines() if not line.startswith("INFO")))
    return False


def check_nothing_twice(
    name: str, rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], judged_before: set[str],
    server: JudgeServer, asked_before: int,
) -> None:  # fmt: skip
    """One line an item; of what was judged before the last start nothing was asked after it."""
    if Counter(line["item"] for line in lines) != Counter(str(number) for number in range(1, len(rows) + 1)):
        raise Violation(f"{name}: not one judgement an item")
    prompts = {row.get("prompt") or row["instruction"]: str(number) for number, row in enumerate(rows, start=1)}
    for asked in server.asked[asked_before:]:
        shown = re.search(r"(?:Instruction:\n|PROMPT \(what was asked for\):\n)(.*)\n", asked.text)
        if shown is None or shown.group(1).strip() not in prompts:
            raise Violation(f"{name}: a question without a prompt of the file")
        if (item := prompts[shown.group(1).strip()]) in judged_before:
            raise Violation(f"{name}: item {item} was judged, and asked again")


def check_totals(name: str, rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """`scores.json` and the report against a count of the lines."""
    answers = {row["item"]: row["answer"] for row in whole_lines(out / name / "judgements.jsonl")}
    count = recount_geneval if name == "geneval++" else recount_imagine
    published, strict = count(rows, answers)
    scores = json.loads((out / name / "scores.json").read_text(encoding="utf-8"))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (of_report,) = (run["benchmarks"][name] for run in report["runs"])
    for where, found in (("scores.json", scores), ("report.json", of_report)):
        for variant, wanted in (("published", published), ("strict", strict)):
            if abs(found[variant] - wanted) > 1e-9:
                raise Violation(f"{name}: {variant} is {found[variant]} in {where}, counted {wanted}")
    print(f"{name}: published {published:.4f}, strict {strict:.4f}: counted the same from {len(answers)} lines")


def recount_geneval(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Any]) -> tuple[float, float]:
    """Mean of the tags' accuracies; published: each rounded to four digits, and their mean too."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        answer = answers[str(number)]
        total[row["tag"]] += 1
        right[row["tag"]] += answer is not None and answer["correct"] == 1
    shares = [right[tag] / total[tag] for tag in total]
    return round(sum(round(share, 4) for share in shares) / len(shares), 4), sum(shares) / len(shares)


def recount_imagine(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Any]) -> tuple[float, float]:
    """0.8 · min(fantasy, identity) + 0.2 · aesthetic; types weighted 3, 2, 2, 2. An unread reply: −1 published, 0
    strict."""
    totals = []
    for unread in (-1.0, 0.0):
        of_type: dict[str, list[float]] = {}
        for row in rows:
            answer, value = answers[str(row["id"])], unread
            if answer is not None:
                least = min(answer["fantasy_fulfillment"], answer["identity_preservation"])
                value = round(0.8 * least + 0.2 * answer["aesthetic_quality"], 3)
            of_type.setdefault(IMAGINE_TYPES[row["type"]], []).append(value)
        weighted = sum(IMAGINE_WEIGHTS[kind] * sum(values) / len(values) for kind, values in of_type.items())
        totals.append(weighted / sum(IMAGINE_WEIGHTS[kind] for kind in of_type))
    return totals[0], totals[1]


def num_pictures(folder: Path) -> int:
    return sum(1 for _ in (folder / "images").glob("*.png"))


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines; a torn last one, of a run that was killed, is none."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


if __name__ == "__main__":
    main()
