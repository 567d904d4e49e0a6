"""DPG-Bench: long prompts, each with questions that depend on each other. (ELLA's `dpg_bench` folder.)"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from echo4o.evaluate.benchmark import (
    Aggregates,
    Benchmark,
    BenchmarkDataError,
    Item,
    ItemScore,
    JudgeImage,
    Judgement,
    Question,
    failure,
)
from echo4o.evaluate.parsing import Answer, Number
from echo4o.evaluate.rows import each_once, field, name_part, prompt_of, read_lines

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")
SYSTEM = (
    "You answer questions about one picture, each by itself and only from what can be seen: 1 for yes, 0 for no. If "
    "you are not sure, the answer is 0. Answer with a JSON object and nothing else, with one key for each question."
)
_RESULT = re.compile(r"(.+?\.(?:png|jpe?g|webp))((?:, [0-9.eE+-]+)+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class DPGBench(Benchmark):
    """1065 long prompts, four pictures each, share of questions answered with yes.

    Attributes:
        num_images: pictures a prompt.
    """

    num_images: int = 4

    name = "dpg"
    title = "DPG-Bench"
    scale = "0-1"
    num_items = 1065
    source = "dpg_bench/ of ELLA's repository (prompts/ and dpg_bench.csv)"
    published_rows = {"Echo-4o": 0.86, "BAGEL": 0.85, "OmniGen2": 0.84, "BLIP3-o": 0.82}
    caveats = (
        "Published scores are of mPLUG-large answering each question: write the grids, run compute_dpg_bench.py with "
        "--pic-num 4, and read its result file. A model that is asked here instead gives another level.",
        "The script skips the first line of its questions and leaves pictures out that it cannot read.",
    )

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}; it must be at least 1")

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"preset": "t2i", "height": 1024, "width": 1024}

    def load(self, path: Path | None) -> list[Item]:
        """From the folder with ``prompts/`` and ``dpg_bench.csv``, either alone, or JSONL of ``item_id, prompt``.

        Only with the csv are there questions for a judge.
        """
        if path is None:
            raise BenchmarkDataError(f"{self.title} is no data set of the hub; pass {self.source}")
        path = Path(path)
        table = path if path.suffix == ".csv" else path / "dpg_bench.csv"
        questions = _questions(table) if table.is_file() else {}
        folder = path / "prompts" if (path / "prompts").is_dir() else path
        if folder.is_dir() and any(folder.glob("*.txt")):
            prompts = {file.stem: file.read_text(encoding="utf-8").strip() for file in sorted(folder.glob("*.txt"))}
        elif path.suffix == ".jsonl":
            prompts = {
                str(field(row, "item_id", (str, int), place)): prompt_of(row, "prompt", place)
                for place, row in read_lines(path)
            }
        elif questions:
            prompts = {name: asked[0]["text"] for name, asked in questions.items()}
        else:
            raise BenchmarkDataError(f"{path} holds neither prompts/*.txt nor dpg_bench.csv; pass {self.source}")
        if lacking := sorted(prompts.keys() - questions.keys()) if questions else []:
            raise BenchmarkDataError(f"{table} has no questions on {lacking[0]} ({len(lacking)} such prompts)")
        items = [
            Item(name_part(name, str(path)), text, (), "", {"questions": questions.get(name, [])}, self.num_images)
            for name, text in prompts.items()
        ]
        for item in items:
            if not item.prompt:
                raise BenchmarkDataError(f"{path}: the prompt {item.id} is empty")
        return each_once(items, path)

    def questions(self, item: Item) -> list[Question]:
        """One call a picture, with all questions on it."""
        asked = item.fields["questions"]
        if not asked:
            return []
        lines = [f"q{one['id']}: {one['question']}" for one in asked]
        answer = Answer(tuple(Number(f"q{one['id']}", 0, 1, integer=True) for one in asked))
        return [
            Question(name, SYSTEM, ("\n".join(lines), JudgeImage(number=number)), answer)
            for number, name in enumerate(self._names(item))
        ]

    def score(self, item: Item, judgements: Mapping[str, Judgement]) -> ItemScore:
        """Mean over the pictures of the share of questions with yes, where a no makes its dependants a no."""
        names = self._names(item) if item.fields["questions"] else []
        status = failure(judgements, names) if names else "not_judged"
        given = [judgements[name].answer or {} for name in names if name in judgements and judgements[name].answer]
        shares = [_share(item.fields["questions"], answer) for answer in given]
        as_published = [_share([q for q in item.fields["questions"] if not q["skipped"]], answer) for answer in given]
        published = sum(as_published) / len(as_published) if as_published else None
        return ItemScore(item.id, item.tag, published, sum(shares) / item.num_images, {}, status)

    def weights(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        return {tag: float(count) for tag, count in counts.items()}

    def read_results(self, path: Path, items: Sequence[Item]) -> list[ItemScore]:
        """From the ``…_results.txt`` of ``compute_dpg_bench.py``: a line for each picture file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise BenchmarkDataError(f"cannot read {path}: {error.strerror}") from error
        found: dict[str, list[float]] = {}
        for line in text.splitlines():
            match = _RESULT.fullmatch(line)
            if match is None:
                continue  # the summary at the end
            name = re.split(r"[/\\]", match[1])[-1].split(".")[0]
            if name in found:
                raise BenchmarkDataError(f"{path} has {name} twice; the file holds several runs")
            found[name] = [float(number) for number in match[2].split(", ")[1:]]
        if not found:
            raise BenchmarkDataError(f"{path} has no line `picture, score, …, mean`; pass the script's results")
        if unknown := sorted(found.keys() - {item.id for item in items}):
            raise BenchmarkDataError(f"{path} has {unknown[0]}, which is no prompt of this data")
        scores = []
        for item in items:
            if item.id in found:
                parts = {f"image_{number}": share for number, share in enumerate(found[item.id][:-1])}
                scores.append(ItemScore(item.id, item.tag, found[item.id][-1], found[item.id][-1], parts))
            else:
                scores.append(ItemScore(item.id, item.tag, None, 0.0, {}, "missing_image"))
        return scores

    def aggregate(self, scores: Sequence[ItemScore]) -> Aggregates:
        totals = super().aggregate(scores)
        notes = list(totals.notes)
        if any(score.status == "ok" and not score.parts for score in scores):
            notes.append("judged by a model that was asked, not by mPLUG: only comparable with itself")
        return replace(totals, notes=notes)

    def _names(self, item: Item) -> list[str]:
        return [f"image_{number}" for number in range(item.num_images)]


def write_grid(pictures: Sequence[Path], path: Path) -> None:
    """The 2 × 2 sheet (row by row) of up to four equal pictures that the script reads.

    Raises:
        BenchmarkDataError: if the pictures differ in size, or there are none or more than four.
    """
    if not 1 <= len(pictures) <= 4:
        raise BenchmarkDataError(f"a grid of {path.stem} takes one to four pictures, not {len(pictures)}")
    images = []
    for picture in pictures:
        with Image.open(picture) as image:
            images.append(image.convert("RGB"))
    if len({image.size for image in images}) > 1:
        raise BenchmarkDataError(f"the pictures of {path.stem} differ in size: {[image.size for image in images]}")
    width, height = images[0].size
    columns = min(2, len(images))
    sheet = Image.new("RGB", (columns * width, (len(images) + 1) // 2 * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % 2 * width, number // 2 * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _share(questions: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]) -> float:
    """Share of yes; going through the questions in order, one with a parent answered no becomes a no."""
    answers = {one["id"]: float(answer[f"q{one['id']}"]) for one in questions}
    for one in questions:
        if any(answers.get(parent, 1.0) == 0 for parent in one["parents"]):
            answers[one["id"]] = 0.0
    return sum(answers.values()) / len(answers) if answers else 0.0


def _questions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """item id → its questions in order.

    Raises:
        BenchmarkDataError: naming the line.
    """
    questions: dict[str, list[dict[str, Any]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
            raise BenchmarkDataError(f"{path} has no column {lacking[0]!r}; it has {reader.fieldnames}")
        for number, row in enumerate(reader):
            place = f"{path}, line {reader.line_num}"
            try:
                proposition = int(float(row["proposition_id"]))
                parents = [int(float(part)) for part in row["dependency"].split(",")]
            except (ValueError, TypeError, AttributeError) as error:
                raise BenchmarkDataError(f"{place}: no number in proposition_id or dependency ({error})") from error
            asked = questions.setdefault(prompt_of(row, "item_id", place), [])
            if any(one["id"] == proposition for one in asked):
                raise BenchmarkDataError(f"{place}: question {proposition} of {row['item_id']} twice")
            asked.append(
                {
                    "id": proposition,
                    "parents": [parent for parent in parents if parent != 0],
                    "question": prompt_of(row, "question_natural_language", place),
                    "category": row["category_broad"],
                    "text": prompt_of(row, "text", place),
                    "skipped": number == 0,  # the script's loop starts behind the first line
                }
            )
    return questions
