"""What distinguishes two models: tensor by tensor, part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from echo4o.model.parts import part_of


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor of B differs from A's.

    Attributes:
        max: largest |a − b|.
        rms: root mean square of a − b.
        rms_a: root mean square of a.
        share: of the elements that differ.
        rounded: ``bfloat16`` or ``float16`` where one is the other, rounded to it; else None.
        is_table: a fixed position table that differs by its precision alone, which does not count.
    """

    name: str
    num_elements: int
    dtype_a: str
    dtype_b: str
    max: float = 0.0
    rms: float = 0.0
    rms_a: float = 0.0
    share: float = 0.0
    rounded: str | None = None
    is_table: bool = False

    @property
    def part(self) -> str:
        return part_of(self.name)

    @property
    def relative(self) -> float:
        """rms(a − b) / rms(a); infinite where a is all zero."""
        return _ratio(self.rms, self.rms_a)

    @property
    def differs(self) -> bool:
        return self.share > 0 and not self.is_table


@dataclass(frozen=True)
class PartDifference:
    """The tensors of a part of the model, together (see `TensorDifference`)."""

    part: str
    num_tensors: int
    num_different: int
    num_rounded: int
    max: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """What distinguishes B from A.

    Attributes:
        a, b: what was compared.
        tensors: those that both have in the same shape, in A's order.
        only_a, only_b: names; fixed tables, which may be left out of a file, are not among them.
        shapes: name → shape in A, in B, where they are not the same.
    """

    a: str
    b: str
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def different(self) -> list[TensorDifference]:
        """Those that differ by more than rounding, largest relative change first."""
        return sorted((t for t in self.tensors if t.differs and not t.rounded), key=_order, reverse=True)

    @property
    def rounded(self) -> list[TensorDifference]:
        return [tensor for tensor in self.tensors if tensor.differs and tensor.rounded]

    @property
    def is_equal(self) -> bool:
        """Nothing differs, not even by rounding, and neither has a tensor that the other lacks."""
        return not (self.different or self.rounded or self.only_a or self.only_b or self.shapes)

    def parts(self) -> list[PartDifference]:
        """By part of the model, largest relative change first."""
        groups: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.part, []).append(tensor)
        return sorted((_together(part, group) for part, group in groups.items()), key=_order, reverse=True)


def larger_or_nan(a: float, b: float) -> float:
    """The larger one; NaN if either is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _together(part: str, tensors: list[TensorDifference]) -> PartDifference:
    counted = [tensor for tensor in tensors if tensor.differs]
    squares = sum(t.rms**2 * t.num_elements for t in counted)
    squares_a = sum(t.rms_a**2 * t.num_elements for t in tensors)
    largest = 0.0
    for tensor in counted:
        largest = larger_or_nan(largest, tensor.max)
    num_rounded = sum(tensor.rounded is not None for tensor in counted)
    relative = _ratio(math.sqrt(squares), math.sqrt(squares_a))
    return PartDifference(part, len(tensors), len(counted) - num_rounded, num_rounded, largest, relative)


def _ratio(change: float, size: float) -> float:
    return change / size if size else (math.inf if change else 0.0)


def _order(item: TensorDifference | PartDifference) -> float:
    return math.inf if math.isnan(item.relative) else item.relative
