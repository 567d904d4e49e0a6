"""Benchmarks of understanding (MME, MMMU, MMBench, …) through lmms-eval, with this project's pipeline as its model.

Import this module before lmms-eval looks for the model ``echo4o``:

    python -c "import echo4o.evaluate.lmms_eval; from lmms_eval.__main__ import cli_evaluate; cli_evaluate()" \\
        --model echo4o --model_args pretrained=hf/BAGEL-7B-MoT --tasks mme,mmmu_val --batch_size 4

Written against lmms-eval's interface and tested with a stand-in of it; not run against lmms-eval itself.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from echo4o.data.images import ImageTransform
from echo4o.generate.context import Addition, Context, Reader, Text
from echo4o.generate.encoding import ImageEncoder
from echo4o.generate.pipeline import Echo4oPipeline
from echo4o.generate.request import Request

#: Upstream's evaluation: longest and shortest side, stride, and most pixels of an image for the vision encoder.
TRANSFORM = {"max_image_size": 980, "min_image_size": 378, "max_pixels": 2007040}


def _interface() -> tuple[type, Callable[[type], type]]:
    """lmms-eval's base class, and its decorator for a model; stand-ins without lmms-eval."""
    try:
        base = importlib.import_module("lmms_eval.api.model").lmms
        register = importlib.import_module("lmms_eval.api.registry").register_model
    except ImportError:
        return object, lambda model: model
    return base, register("echo4o")


_Base, _registered = _interface()


@_registered
class Echo4o(_Base):  # type: ignore[misc, valid-type]
    """A model for lmms-eval: images in front of the question, as upstream evaluates; placeholders in it stay text.

    Args:
        pretrained: BAGEL folder, checkpoint of a run, or owner/name on the hub.
        batch_size: questions answered together.
        device: by default the GPU of this process.
        think: let the model reason in words first.
        max_new_tokens: of an answer where the task says nothing.
        max_image_size, min_image_size, max_pixels: of the images' resizing, within what the model holds.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        weights: str | None = None,
        base: str | None = None,
        think: bool = False,
        max_new_tokens: int = 512,
        pipeline: Echo4oPipeline | None = None,
        **transform: int,
    ) -> None:
        super().__init__()
        if unknown := set(transform) - set(TRANSFORM):
            raise ValueError(f"unknown model argument {sorted(unknown)[0]!r}; known of images: {', '.join(TRANSFORM)}")
        self._rank, self._world_size = (int(os.environ.get(name, default)) for name, default in _RANKS)
        if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        if dtype == "auto":
            on_gpu = torch.cuda.is_available() if device == "auto" else not device.startswith("cpu")
            dtype = "bfloat16" if on_gpu else "float32"
        self.pipeline = pipeline or Echo4oPipeline.from_pretrained(pretrained, dtype, device, weights, base)
        self.pretrained, self.think, self.max_new_tokens = pretrained, think, max_new_tokens
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self._set_transform({**TRANSFORM, **transform})
        self.task_dict = getattr(self, "task_dict", {})

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def device(self) -> torch.device:
        return self.pipeline.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, cut at the task's ``until``.

        Args:
            requests: their ``args`` are (question, gen_kwargs, doc_to_visual, doc_id, task, split).
        """
        answers: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            part = requests[start : start + self.batch_size]
            info = self.pipeline.batch([self._request(*one.args) for one in part]).info
            for one, result in zip(part, info, strict=True):
                answers.append(_cut(result["text"], one.args[1].get("until")))
                self._remember("generate_until", one.args[:2], answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        Args:
            requests: their ``args`` are (question, continuation or a function of the row, doc_to_visual, doc_id,
                task, split).
        """
        results = []
        for one in requests:
            question, wanted, doc_to_visual, doc_id, task, split = one.args
            row = self.task_dict[task][split][doc_id]
            continuation = wanted if isinstance(wanted, str) else str(wanted(row))
            results.append(self._likelihood(question, self._images(doc_to_visual, row), continuation))
            self._remember("loglikelihood", (question, continuation), results[-1])
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported: choose tasks of one question and answer")

    def _set_transform(self, values: dict[str, int]) -> None:
        """Resize originals for the vision encoder alone: answers need no size that the autoencoder likes."""
        config = self.pipeline.model.config
        patch = config.vit.patch_size if config.vit else 14
        side = config.vit_max_num_patch_per_side * patch
        transform = ImageTransform(
            min(values["max_image_size"], side), min(values["min_image_size"], side // 2), patch, values["max_pixels"]
        )
        self.pipeline.vae_transform = self.pipeline.vit_transform = transform

    def _request(
        self,
        question: str,
        how: dict[str, Any],
        doc_to_visual: Callable[[Any], Any],
        doc_id: Any,
        task: str,
        split: str,
    ) -> Request:
        images = self._images(doc_to_visual, self.task_dict[task][split][doc_id])
        temperature = float(how.get("temperature") or 0.0)
        do_sample = bool(how.get("do_sample", False)) and temperature > 0
        drawn = {"temperature": temperature, "top_p": float(how.get("top_p") or 1.0)} if do_sample else {}
        return self.pipeline.prompt_request(
            question, images, "understand", inline=False, think=self.think, understand=True, do_sample=do_sample,
            max_think_tokens=int(how.get("max_new_tokens", self.max_new_tokens)) + 1, **drawn,
        )  # fmt: skip

    def _images(self, doc_to_visual: Callable[[Any], Any], row: Any) -> list[Image.Image | Path | bytes]:
        return list(_flat(doc_to_visual(row) if doc_to_visual is not None else ()))

    @torch.no_grad()
    def _likelihood(self, question: str, images: Sequence[Any], continuation: str) -> tuple[float, bool]:
        """As the model would write it: images, the question, then the continuation behind a begin marker."""
        pipe = self.pipeline
        reader, markers = Reader(pipe.model, pipe.markers), pipe.markers
        encoder = ImageEncoder(None, pipe.model.config.latent_patch_size, pipe.vae_transform, pipe.vit_transform)
        ids = pipe.tokenizer.encode(continuation)
        if not ids:
            return 0.0, True
        pieces: list[Any] = [reader.vit_image(encoder.pixels(image)) for image in images]
        if question:
            pieces.append(Text((markers.bos_token_id, *pipe.tokenizer.encode(question), markers.eos_token_id)))
        pieces.append(Text((markers.bos_token_id, *ids)))
        additions = [Addition(Context() if not number else number - 1, piece) for number, piece in enumerate(pieces)]
        logits = reader.logits(reader.extend(additions)[1][-1][:-1])
        wanted = torch.tensor(ids, device=logits.device)
        chosen = logits.log_softmax(-1).gather(1, wanted[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())

    def _remember(self, kind: str, asked: Sequence[Any], answer: Any) -> None:
        if (hook := getattr(self, "cache_hook", None)) is not None:
            hook.add_partial(kind, tuple(asked), answer)


_RANKS = (("RANK", "0"), ("WORLD_SIZE", "1"))


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first of the task's stops."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def _flat(visuals: Any) -> Iterable[Any]:
    """Images of a row, however they are nested."""
    if isinstance(visuals, list | tuple):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield Path(visuals) if isinstance(visuals, str) else visuals
