"""The folder of one benchmark of one run: what lies where, and what it was made with.

``{out}/{benchmark}/`` holds ``images/``, ``items.jsonl``, ``judgements.jsonl``, ``scores.json`` and ``run.json``.
Pictures of two models, or of two settings, never meet in one folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from echo4o.evaluate.benchmark import IMAGE_SUFFIXES, Benchmark, Item, find_image

#: What of ``run.json`` decides a picture.
DRAWN_WITH = ("benchmark", "model", "fingerprint", "dtype", "quantize", "settings", "seed", "images_from")


class RunFolderError(ValueError):
    """The folder belongs to another run, or cannot be read; the message names the difference and the remedy."""


@dataclass(frozen=True)
class RunFolder:
    """Places in a run folder."""

    path: Path

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def judgements(self) -> Path:
        return self.path / "judgements.jsonl"

    @property
    def requests(self) -> Path:
        return self.path / "requests.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    @property
    def facts_file(self) -> Path:
        return self.path / "run.json"

    def facts(self) -> dict[str, Any]:
        """``run.json``; {} if there is none.

        Raises:
            RunFolderError: if it is damaged.
        """
        try:
            content = json.loads(self.facts_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunFolderError(
                f"{self.facts_file} is damaged ({error}); remove it, or choose another --out"
            ) from error
        if not isinstance(content, dict):
            raise RunFolderError(f"{self.facts_file} holds no JSON object; remove it, or choose another --out")
        return content

    def claim(self, drawn_with: Mapping[str, Any]) -> None:
        """Check that pictures made like this may go into the folder.

        Args:
            drawn_with: values of `DRAWN_WITH`; None for what does not apply.

        Raises:
            RunFolderError: if it holds pictures made otherwise.
        """
        facts = self.facts()
        if not any(name in facts for name in ("model", "images_from")) or not self._has_pictures():
            return
        wanted = json.loads(json.dumps(dict(drawn_with)))
        changed = [name for name in DRAWN_WITH if facts.get(name) != wanted.get(name)]
        if not changed:
            return
        differences = "\n".join(f"  {name}: {_difference(facts.get(name), wanted.get(name))}" for name in changed)
        raise RunFolderError(
            f"{self.path} holds pictures made otherwise (there → asked for):\n{differences}\n"
            "Choose another --out, or repeat the options of that run; to draw anew, remove the folder."
        )

    def _has_pictures(self) -> bool:
        return any(path.suffix in IMAGE_SUFFIXES for path in self.images.rglob("*"))

    def note(self, **facts: Any) -> None:
        """Put facts into ``run.json``, in place of older ones of these names."""
        self.path.mkdir(parents=True, exist_ok=True)
        content = {**self.facts(), **facts}
        content["versions"] = {**content.get("versions", {}), "echo4o": version("echo4o")}
        write_whole(self.facts_file, json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n")

    def write_items(self, items: Iterable[Item]) -> None:
        """``items.jsonl``: what is drawn and judged, references as absolute paths."""
        rows = (
            {
                "id": item.id, "prompt": item.prompt, "tag": item.tag, "num_images": item.num_images,
                "references": [str(path.resolve()) for path in item.references], "fields": dict(item.fields),
            }
            for item in items
        )  # fmt: skip
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        write_whole(self.path / "items.jsonl", text)

    def pictures(self, benchmark: Benchmark, item: Item) -> tuple[Path | None, ...]:
        """The item's pictures by number; None where one is missing."""
        names = (benchmark.image_name(item, number) for number in range(item.num_images))
        return tuple(find_image(self.images, name) for name in names)


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8; the name appears when the file is whole. Ranks may write the same at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _difference(old: Any, new: Any) -> str:
    """The two values; of two mappings only what differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return ", ".join(f"{name} {old.get(name)} → {new.get(name)}" for name in names)
    return f"{_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 or "/" in text else f"{text[:12]}…"
