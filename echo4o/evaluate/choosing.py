"""Which benchmark, with which options, and which of its items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from echo4o.evaluate.benchmark import Benchmark, BenchmarkDataError, Item
from echo4o.evaluate.benchmarks import BENCHMARKS, options_of
from echo4o.evaluate.benchmarks import benchmark as benchmark_called


def list_benchmarks() -> list[str]:
    """One line a benchmark: name, title, items, scale, options, source."""
    lines = []
    for name, one in BENCHMARKS.items():
        facts = [f"{one.num_items} items" if one.num_items else "items as the data has them", f"scale {one.scale}"]
        facts += [f"judged by {one.judge} in publications" if one.judge else "judged by a program of its own"]
        facts += [f"options {', '.join(f'{key}={value}' for key, value in options_of(one).items())}"] * bool(
            options_of(one)
        )
        lines.append(f"{name:<14} {one.title}: {', '.join(facts)}. Data: {one.source}")
    return lines


def parsed_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Texts of a command line with the types of the benchmark's own values."""
    known = options_of(benchmark_called(name))
    parsed = {}
    for key, value in options.items():
        is_number = isinstance(known.get(key), int) and isinstance(value, str)
        if is_number and not value.lstrip("-").isdigit():
            raise ValueError(f"option {key} of {name} is {value!r}; it must be a whole number")
        parsed[key] = int(value) if is_number else value
    return parsed


def selected(benchmark: Benchmark, items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of each tag, in the data's order.

    Raises:
        BenchmarkDataError: if there is none.
    """
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.tag] += 1
        if limit is None or seen[item.tag] <= limit:
            kept.append(item)
    if not kept:
        raise BenchmarkDataError(f"the data of {benchmark.title} holds no item")
    return kept
