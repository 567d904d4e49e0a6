"""Which rows show the same picture: by their bytes, or to the eye (Hamming distance of perceptual hashes)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from echo4o.data.inspection.examine import HASH_BITS

#: Bits in which perceptual hashes of the same picture may differ after another compression or size.
NEAR_BITS = 4
#: A hash without structure (one colour) says nothing.
_MIN_SET_BITS = 4


def exact_groups(keys: Iterable[tuple[bytes, str]]) -> list[list[str]]:
    """Places of equal keys, for every key that comes up more than once."""
    places: dict[bytes, list[str]] = defaultdict(list)
    for key, place in keys:
        places[key].append(place)
    return [found for found in places.values() if len(found) > 1]


def near_groups(hashes: Sequence[tuple[int, str]], max_bits: int = NEAR_BITS) -> list[list[str]]:
    """Places whose hashes differ in at most `max_bits` bits, joined into groups.

    Hashes are cut into ``max_bits + 1`` pieces: two that differ in no more bits share a piece, so that only those are
    compared. Hashes of nearly uniform pictures are left out.
    """
    useful = [
        (value, place) for value, place in hashes if _MIN_SET_BITS <= value.bit_count() <= HASH_BITS - _MIN_SET_BITS
    ]
    leader = list(range(len(useful)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    distinct: dict[int, int] = {}
    for index, (value, _) in enumerate(useful):
        leader[index] = distinct.setdefault(value, index)
    for piece in _pieces(max_bits + 1):
        buckets: dict[int, list[int]] = defaultdict(list)
        for value, index in distinct.items():
            buckets[(value >> piece[0]) & ((1 << piece[1]) - 1)].append(index)
        for bucket in buckets.values():
            for place, one in enumerate(bucket):
                for other in bucket[place + 1 :]:
                    if (useful[one][0] ^ useful[other][0]).bit_count() <= max_bits:
                        leader[find(one)] = find(other)
    joined: dict[int, list[str]] = defaultdict(list)
    for index, (_, place) in enumerate(useful):
        joined[find(index)].append(place)
    return [places for places in joined.values() if len(places) > 1]


def _pieces(count: int) -> list[tuple[int, int]]:
    """(first bit, number of bits) of `count` pieces of a hash."""
    bounds = [place * HASH_BITS // count for place in range(count + 1)]
    return [(start, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)]
