"""The benchmarks by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from echo4o.evaluate.benchmark import Benchmark
from echo4o.evaluate.benchmarks.dpg import DPGBench
from echo4o.evaluate.benchmarks.gedit import GEdit
from echo4o.evaluate.benchmarks.geneval import GenEval
from echo4o.evaluate.benchmarks.geneval_pp import GenEvalPlusPlus
from echo4o.evaluate.benchmarks.imagine_bench import ImagineBench
from echo4o.evaluate.benchmarks.imgedit import ImgEdit
from echo4o.evaluate.benchmarks.kris import Kris
from echo4o.evaluate.benchmarks.omnicontext import OmniContext
from echo4o.evaluate.benchmarks.rise import Rise
from echo4o.evaluate.benchmarks.wise import Wise

#: Each with its default options.
BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        GenEvalPlusPlus(),
        ImagineBench(),
        OmniContext(),
        GenEval(),
        DPGBench(),
        Wise(),
        GEdit(),
        ImgEdit(),
        Kris(),
        Rise(),
    )
}


def benchmark(name: str, **options: Any) -> Benchmark:
    """The benchmark called `name` with some of its options changed.

    Raises:
        ValueError: for an unknown benchmark, option or value, naming the known ones.
    """
    found = BENCHMARKS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(BENCHMARKS)}"
        raise ValueError(f"unknown benchmark {name!r}; {hint}")
    known = options_of(found)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return dataclasses.replace(found, **options)  # type: ignore[type-var]


def options_of(benchmark: Benchmark) -> dict[str, Any]:
    """Option → its value."""
    return {field.name: getattr(benchmark, field.name) for field in dataclasses.fields(benchmark)}  # type: ignore[arg-type]
