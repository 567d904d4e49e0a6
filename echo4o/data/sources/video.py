"""Frames of a video as pictures: from a folder of frame images, or from a video file through decord or PyAV."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from echo4o.data.errors import DataError, RowError
from echo4o.data.sources.drafts import Picture, PictureReader

_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class FrameSampler:
    """Draws how many frames are used, uniformly in [min, max], and one frame of each equal part of the video."""

    max_num_frames: int = 12
    min_num_frames: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.min_num_frames <= self.max_num_frames:
            raise DataError(
                f"frame_sampler_args need 1 ≤ min_num_frames ≤ max_num_frames, not {self.min_num_frames} and "
                f"{self.max_num_frames}"
            )

    def __call__(self, num_available: int, rng: random.Random) -> list[int]:
        """Frame numbers, ascending; all of them if the video is shorter than drawn."""
        num_frames = min(rng.randint(self.min_num_frames, self.max_num_frames), num_available)
        borders = [num_available * part // num_frames for part in range(num_frames + 1)]
        return [rng.randrange(first, end) for first, end in zip(borders, borders[1:], strict=False)]


def video_frames(path: Path, sampler: FrameSampler, pictures: PictureReader, rng: random.Random) -> Sequence[Picture]:
    """Sampled frames of a folder of images (in natural order of their names) or of a video file.

    Raises:
        RowError: if there is no such video, it holds no frames, or no video library is installed.
    """
    if path.is_dir():
        names = (name for name in path.iterdir() if name.suffix.lower() in _FRAME_SUFFIXES)
        files = sorted(names, key=lambda file: _natural(file.name))
        if not files:
            raise RowError("video unreadable", detail=f"{path} holds no frame images")
        return [pictures(str(files[index].resolve())) for index in sampler(len(files), rng)]
    if not path.exists():
        raise RowError("video missing", detail=str(path))
    video = _opened(path)
    clip = Clip(video, tuple(sampler(video.num_frames, rng)))
    return [ClipFrame(clip, place) for place in range(len(clip.indices))]


class VideoFile:
    """A video file by one of the libraries. Both report the number of frames and the size without decoding them all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_frames = 0
        self.size = (0, 0)

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """RGB frames at ascending numbers."""
        raise NotImplementedError


class DecordVideo(VideoFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import decord  # pyright: ignore[reportMissingImports]

        self._reader = decord.VideoReader(str(path), num_threads=1)
        self.num_frames = len(self._reader)
        height, width = self._reader[0].shape[:2]
        self.size = (width, height)

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        return [Image.fromarray(frame) for frame in self._reader.get_batch(list(indices)).asnumpy()]


class PyAvVideo(VideoFile):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import av  # pyright: ignore[reportMissingImports]

        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.size = (stream.codec_context.width, stream.codec_context.height)
            # Some containers do not say how many frames they hold; counting packets does not decode them.
            self.num_frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        import av  # pyright: ignore[reportMissingImports]

        wanted = set(indices)
        found = []
        with av.open(str(self.path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    found.append(frame.to_image())
                if len(found) == len(wanted):
                    break
        return found


@dataclass(frozen=True, eq=False)
class Clip:
    """The chosen frames of a video, decoded together when the first of them is needed."""

    video: VideoFile
    indices: tuple[int, ...]

    @cached_property
    def frames(self) -> list[Image.Image]:
        try:
            frames = self.video.frames(self.indices)
        except Exception as error:  # the video libraries raise classes of their own
            raise RowError("video unreadable", detail=f"{self.video.path}: {error}") from error
        if len(frames) != len(self.indices):
            raise RowError("video truncated", detail=f"{self.video.path}: {len(frames)} of {len(self.indices)} frames")
        return frames


@dataclass(frozen=True, eq=False)
class ClipFrame:
    """One frame of a clip, as a Picture."""

    clip: Clip
    place: int = field(default=0)

    @property
    def size(self) -> tuple[int, int]:
        return self.clip.video.size

    def decode(self) -> Image.Image:
        return self.clip.frames[self.place]


def _opened(path: Path) -> VideoFile:
    readers = {"decord": DecordVideo, "av": PyAvVideo}
    installed = [name for name in readers if importlib.util.find_spec(name) is not None]
    if not installed:
        raise RowError(
            "no video library",
            detail=f"{path} needs decord or PyAV to be read: pip install av; or give a folder of frames instead",
        )
    try:
        video = readers[installed[0]](path)
    except Exception as error:  # the video libraries raise classes of their own
        raise RowError("video unreadable", detail=f"{path}: {error}") from error
    if not video.num_frames:
        raise RowError("video unreadable", detail=f"{path} holds no frames")
    return video


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which frame10 comes after frame9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
