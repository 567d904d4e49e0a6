"""To BLIP3-o's WebDataset tars: ``KEY.jpg`` and ``KEY.txt`` for every text-to-image row.

The loader knows images by the ending jpg and decodes them by their content: other images keep their bytes under it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import IO

from echo4o.data.formats.record import Record
from echo4o.data.formats.writers.base import CannotHold, Finishing, KindSummary, PartPlace, Target
from echo4o.data.formats.writers.dataset_yaml import write_dataset_yaml
from echo4o.data.formats.writers.image_files import suffix_of
from echo4o.data.formats.writers.texts import captions_of, one_text

FOLDER = "tars"
_BUFFER_BYTES = 1 << 20


class TarPart:
    """One tar, written from front to back."""

    def __init__(self, place: PartPlace) -> None:
        self._place = place
        self._summary = KindSummary()
        self._name = f"{FOLDER}/{place.index:05d}.tar"
        self._unfinished = place.temporary("part.tar")
        self._file: IO[bytes] | None = None

    def add(self, record: Record, images: Sequence[bytes], row: int) -> None:
        captions = captions_of(record, self._place)
        if not captions:
            raise CannotHold("no caption", detail="the target needs a text")
        caption, content = one_text(captions, self._place).encode(), images[-1]
        if suffix_of(content) != ".jpg":
            self._place.notes[f"{suffix_of(content)[1:]} images kept as they are, under the ending jpg"] += 1
        for name in record.extra:
            if name != "captions":
                self._place.notes[f"field {name} left out: a tar holds the image and its text"] += 1
        if self._file is None:
            self._file = self._unfinished.open("wb", buffering=_BUFFER_BYTES)
        self._member(f"{row:09d}.jpg", content)
        self._member(f"{row:09d}.txt", caption)
        self._summary.count(record)

    def close(self) -> dict[str, KindSummary]:
        if self._file is None:
            return {}
        self._file.write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.close()
        self._place.start_writing_back(self._unfinished)
        self._summary.files[self._name] = (self._summary.rows, 1)
        return {"t2i": self._summary}

    def settle(self) -> None:
        if self._file is not None:
            self._place.settle(self._unfinished, self._place.build / self._name)

    def _member(self, name: str, content: bytes) -> None:
        assert self._file is not None
        header = tarfile.TarInfo(name)  # time, owner and group are 0: the same rows make the same bytes
        header.size = len(content)
        self._file.write(header.tobuf(tarfile.USTAR_FORMAT))
        self._file.write(content)
        self._file.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def finish(finishing: Finishing) -> None:
    write_dataset_yaml(finishing, {kind: {"format": "blip3o", "path": FOLDER} for kind in finishing.kinds})


TARGET = Target(
    "blip3o",
    "BLIP3-o's WebDataset tars (jpg + txt); text-to-image rows only",
    ("t2i",),
    TarPart,
    finish,
)
