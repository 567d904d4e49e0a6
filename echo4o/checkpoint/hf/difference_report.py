"""A difference between two models as a table and a sentence, or as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from echo4o.checkpoint.hf.changes import Difference
from echo4o.checkpoint.hf.findings import counted, some

_SHOWN_PARTS = 3


def difference_text(difference: Difference, limit: int = 20) -> str:
    """The answer in a sentence, a table of parts, and the `limit` tensors that changed most."""
    lines = [f"A  {difference.a}", f"B  {difference.b}", "", answer(difference), ""]
    rows = [["part", "tensors", "differ", "rounded", "relative", "max |A − B|"]]
    for part in difference.parts():
        counts = [f"{part.num_tensors:,}", f"{part.num_different:,}", f"{part.num_rounded:,}"]
        rows.append([part.part, *counts, _number(part.relative), _number(part.max)])
    lines += _table(rows) if difference.tensors else []
    if (different := difference.different) and limit > 0:
        rows = [["tensor", "relative", "max |A − B|", "rms(A − B)", "rms(A)", "changed"]]
        for t in different[:limit]:
            rows.append([t.name, *(_number(v) for v in (t.relative, t.max, t.rms, t.rms_a)), f"{100 * t.share:.3g} %"])
        lines += ["", *_table(rows)]
        if len(different) > limit:
            lines.append(f"… and {len(different) - limit:,} more")
    for letter, names in (("A", difference.only_a), ("B", difference.only_b)):
        if names:
            lines += ["", f"only in {letter}: {counted(len(names), 'tensor')}: {some(names)}"]
    for name, (shape_a, shape_b) in list(difference.shapes.items())[: max(limit, 1)]:
        lines += ["", f"another shape: {name} is {shape_a} in A, {shape_b} in B"]
    return "\n".join(lines).rstrip()


def difference_json(difference: Difference) -> str:
    """``{"a", "b", "answer", "equal", "parts": […], "tensors": […], "only_a", "only_b", "shapes"}``; numbers that are
    not finite are null. Equal tensors are left out of ``tensors``."""
    tensors = [
        {**asdict(tensor), "part": tensor.part, "relative": tensor.relative}
        for tensor in (*difference.different, *difference.rounded)
    ]
    content = {
        "a": difference.a,
        "b": difference.b,
        "answer": answer(difference),
        "equal": difference.is_equal,
        "num_tensors": len(difference.tensors),
        "num_different": len(difference.different),
        "num_rounded": len(difference.rounded),
        "parts": [asdict(part) for part in difference.parts()],
        "tensors": tensors,
        "only_a": list(difference.only_a),
        "only_b": list(difference.only_b),
        "shapes": {name: [list(a), list(b)] for name, (a, b) in difference.shapes.items()},
    }
    return json.dumps(_finite(content), indent=2)


def answer(difference: Difference) -> str:
    """Did anything train? In a sentence."""
    total, different, rounded = len(difference.tensors), difference.different, difference.rounded
    if not total:
        return "A and B have no tensor in common: they are different models."
    if different:
        shares = Counter(tensor.part for tensor in different).most_common()
        if len(shares) == 1:
            where = f"all of them {shares[0][0]}" if len(different) > 1 else f"one of the {shares[0][0]}"
        else:
            where = ", ".join(f"{part} ({count:,})" for part, count in shares[:_SHOWN_PARTS])
            where += f" and {len(shares) - _SHOWN_PARTS} more parts" if len(shares) > _SHOWN_PARTS else ""
        verb = "differs" if len(different) == 1 else "differ"
        text = f"{len(different):,} of {counted(total, 'tensor')} {verb}: {where}"
        text += f"; {len(rounded):,} more are equal up to rounding" if rounded else ""
    elif rounded:
        kinds = " and ".join(sorted({str(tensor.rounded) for tensor in rounded}))
        text = f"equal up to {kinds} rounding ({len(rounded):,} of {counted(total, 'tensor')} were rounded)"
    else:
        text = f"nothing differs: all {counted(total, 'tensor')} are equal"
    apart = len(difference.only_a) + len(difference.only_b) + len(difference.shapes)
    text += f"; {counted(apart, 'tensor')} cannot be compared" if apart else ""
    tables = sum(tensor.is_table and tensor.share > 0 for tensor in difference.tensors)
    text += f" ({counted(tables, 'position table')} in another precision)" if tables else ""
    return text + "."


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def _table(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
