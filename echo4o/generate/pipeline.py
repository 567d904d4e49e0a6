"""Prompt and references in, images and text out; any number of requests in one packed run.

pipe = Echo4oPipeline.from_pretrained("hf/BAGEL-7B-MoT", dtype="bfloat16", device="auto")
out = pipe("The cat of image 1 on the sofa of image 2.", images=["cat.jpg", "sofa.png"], seed=0)
out.images[0].save("out.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from echo4o.checkpoint.adapters import assets_of, load_bagel
from echo4o.checkpoint.hub import local_folder
from echo4o.data.errors import RowError
from echo4o.data.images import ImageTransform
from echo4o.data.sources.references import split_inline
from echo4o.data.tokenizer import Tokenizer, add_special_tokens, load_tokenizer
from echo4o.generate import loading
from echo4o.generate.context import Addition, Context, Markers, Piece, Reader, Text
from echo4o.generate.drawing import OnStep, draw
from echo4o.generate.encoding import ImageEncoder, decode
from echo4o.generate.presets import preset
from echo4o.generate.request import ImageLike, Output, Request, sized_as_read
from echo4o.generate.state import State
from echo4o.generate.writing import write
from echo4o.model import Bagel
from echo4o.model.vae import AutoEncoder

# Weights were trained with these exact words (BAGEL, Apache-2.0): compatibility constants.
THINK_BEFORE_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, "
    "i.e. <think> reasoning process here </think> answer here"
)
THINK_BEFORE_IMAGE = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here"
)
DEFAULT_SIZE = (1024, 1024)
TEXT_PART = 2048  # tokens


class Echo4oPipeline:
    """See the module's docstring.

    Args:
        special_tokens: ids of the four markers (an object or a mapping with the names of `Markers`).
        vae_transform, vit_transform: (max, min, stride) or an `ImageTransform`. As upstream, the ViT's is applied to
            the image already resized for the VAE.
    """

    def __init__(
        self,
        model: Bagel,
        vae: AutoEncoder | None,
        tokenizer: Tokenizer,
        special_tokens: Any,
        vae_transform: ImageTransform | Sequence[int] = (1024, 512, 16),
        vit_transform: ImageTransform | Sequence[int] = (980, 224, 14),
    ) -> None:
        self.model, self.vae, self.tokenizer = model.eval(), vae, tokenizer
        get = (
            special_tokens.__getitem__
            if isinstance(special_tokens, dict)
            else lambda name: getattr(special_tokens, name)
        )
        self.markers = Markers(*(get(name) for name in Markers.__annotations__))
        self.vae_transform, self.vit_transform = _transform(vae_transform), _transform(vit_transform)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | str = "bfloat16",
        device: str = "auto",
        weights: str | None = None,
        base: str | Path | None = None,
        quantize: str | None = None,
        offload: str | None = None,
        max_memory: dict | None = None,
        offload_folder: str | Path | None = None,
        compile: bool = False,
    ) -> Echo4oPipeline:
        """Load an upstream folder or a training checkpoint; LoRA adapters are merged into their base's weights.

        Args:
            folder: or a repository of the hub, ``owner/name``.
            device: ``auto`` takes a GPU where there is one.
            weights: ``ema``, ``model`` or None (``ema`` where there is one).
            base: of a LoRA checkpoint: where its base is now, if not where its ``adapter_config.json`` says.
            quantize: ``int8`` or ``nf4``: weights of the layers in fewer bits (needs the ``quantize`` extra).
            offload: ``cpu``, ``disk`` or ``auto``: where layers lie that are not being computed (``offload`` extra).
            max_memory: for ``auto``: bytes, or text such as "20GiB", by device (0, 1, … and "cpu").
            offload_folder: for LoRA adapters on the ``disk``: a folder for the merged weights; a temporary one by
                default. Other weights are read from the checkpoint itself.
            compile: torch.compile the layers: the first calls take minutes, those after them are faster.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = local_folder(folder)
        assets = assets_of(folder, base)
        tokenizer = load_tokenizer(assets)
        if compile and offload:
            raise ValueError("compile and offload exclude each other: leave one out")
        if quantize or offload:
            model = loading.load(folder, dtype, device, weights, base, quantize, offload, max_memory, offload_folder)
        else:
            model = load_bagel(folder, dtype=dtype, device=device, weights=weights, base=base)
        if compile:
            for layer in model.language_model.model.layers:
                layer.compile(dynamic=True)
        model.set_attention_kernel("auto")
        return cls.around(model, assets, device, tokenizer)

    @classmethod
    def around(
        cls,
        model: Bagel,
        assets: str | Path,
        device: torch.device | str | None = None,
        tokenizer: Tokenizer | None = None,
        vae: AutoEncoder | None = None,
    ) -> Echo4oPipeline:
        """Around a model in memory.

        Args:
            assets: folder with the tokenizer and the autoencoder.
            device: of the autoencoder; the model's by default.
            tokenizer, vae: used instead of the folder's.
        """
        config = model.config
        tokenizer = load_tokenizer(assets) if tokenizer is None else tokenizer
        if vae is None and config.visual_gen:
            vae = AutoEncoder.from_pretrained(assets, device=device or model.device)
        side = config.max_latent_size * (config.latent_downsample or 16)
        vit = config.vit_max_num_patch_per_side * (config.vit.patch_size if config.vit else 14)
        # BAGEL's published transforms, within what the position tables of a smaller model hold.
        vae_transform = (min(1024, side), min(512, side // 2), config.latent_downsample or 16)
        vit_transform = (min(980, vit), min(224, vit // 2), config.vit.patch_size if config.vit else 14)
        return cls(model, vae, tokenizer, add_special_tokens(tokenizer), vae_transform, vit_transform)

    # ------------------------------------------------------------ what users call

    def __call__(
        self,
        prompt: str,
        images: Sequence[ImageLike] = (),
        *,
        height: int | None = None,
        width: int | None = None,
        preset: str | None = None,
        seed: int = 0,
        num_images: int = 1,
        think: bool = False,
        inline: bool = True,
        on_step: OnStep | None = None,
        **overrides: Any,
    ) -> Output:
        """Draw from a prompt and references.

        Args:
            prompt: references come in front of it, in order; ``<image N>`` in it puts the N-th there instead.
            height, width: of the picture in pixels; by default those of the last reference (`size_from`), fitted to the
                model's limits, and 1024 × 1024 without references.
            preset: ``t2i``, ``edit`` or ``multi_ref``; by default the one for so many references.
            seed: picture i of `num_images` uses seed + i.
            inline: False leaves ``<image N>`` in the text.
            on_step: called with the steps done and their number; an exception from it ends the run.
            overrides: fields of `Settings` and `Guidance`.

        Raises:
            ValueError: for an empty prompt, an impossible size, an unknown preset or a placeholder without image.
            TypeError: for an unknown setting.
        """
        if num_images > 1 and overrides.get("noise") is not None:
            raise ValueError("with noise of your own all pictures would be the same: ask for one at a time")
        shared = {"height": height, "width": width, "think": think, "inline": inline, **overrides}
        requests = [self.prompt_request(prompt, images, preset, seed=seed + i, **shared) for i in range(num_images)]
        return self.batch(requests, on_step)

    def understand(self, question: str, images: Sequence[ImageLike] = (), think: bool = False, **overrides: Any) -> str:
        """Answer a question about images, which come in front of it or where ``<image N>`` puts them."""
        overrides = {"max_think_tokens": 512, **overrides}
        request = self.prompt_request(question, images, "understand", think=think, understand=True, **overrides)
        return self.batch([request]).info[0]["text"]

    def interleave(
        self,
        elements: Sequence[str | ImageLike],
        think: bool = False,
        understand: bool = False,
        preset: str | None = None,
        **keywords: Any,
    ) -> Output:
        """Texts and images in any order, upstream's semantics: without-text is everything before the last text.

        Args:
            elements: a string is a text; images are PIL images, `Path`s or file bytes.
        """
        name = preset or ("multi_ref" if any(not isinstance(e, str) for e in elements) else "t2i")
        return self.batch([self.request(elements, name, think=think, understand=understand, **keywords)])

    def prompt_request(
        self,
        prompt: str,
        images: Sequence[ImageLike] = (),
        preset: str | None = None,
        inline: bool = True,
        **keywords: Any,
    ) -> Request:
        """What a call with this prompt and these references asks for; keywords as for `request`."""
        if isinstance(images, (str, bytes, Path, Image.Image)):
            raise TypeError("images must be a list, also of a single image: images=[...]")
        name = preset or {0: "t2i", 1: "edit"}.get(len(images), "multi_ref")
        # Among the elements of a request a string is a text.
        images = [Path(image) if isinstance(image, str) else image for image in images]
        if not inline or not prompt.strip():
            return self.request([*images, prompt], name, **keywords)
        try:
            parts = split_inline(prompt, len(images))
        except RowError as error:
            raise ValueError(
                f"{error}. Give as many images as the prompt names, or pass inline=False to read it literally."
            ) from error
        # A prompt that names no place is kept to the letter, spaces included: upstream's tokens.
        if all(isinstance(part, int) for part in parts[:-1]) and "<image" not in prompt.lower():
            parts = [*range(len(images)), prompt]
        request = self.request([part if isinstance(part, str) else images[part] for part in parts], name, **keywords)
        order = [part for part in parts if isinstance(part, int)]
        return replace(request, settings=sized_as_read(request.settings, order))

    def request(self, elements: Sequence[str | ImageLike], name: str, **keywords: Any) -> Request:
        """A request with a preset's settings; keywords are fields of `Request` or settings."""
        if not any(isinstance(element, str) and element.strip() for element in elements):
            raise ValueError("a request needs a text: pass a prompt")
        own = {key: keywords.pop(key) for key in list(keywords) if key in Request.__annotations__}
        if name == "understand" and not own.get("understand"):
            raise ValueError("the preset understand draws nothing: call understand(), or pass understand=True")
        return Request(tuple(elements), settings=preset(name).changed(**keywords), **own)

    # ------------------------------------------------------------ the run

    @torch.no_grad()
    def batch(self, requests: Sequence[Request], on_step: OnStep | None = None) -> Output:
        """All requests in one packed run: the same results as one by one."""
        for request in requests:
            self._check(request)
        reader = Reader(self.model, self.markers)
        states = [State(request, torch.Generator().manual_seed(request.seed)) for request in requests]
        additions: list[Addition] = []
        encoder = ImageEncoder(self.vae, self.model.config.latent_patch_size, self.vae_transform, self.vit_transform)
        places = [self._plan(reader, encoder, state, additions) for state in states]
        del encoder  # its moments
        drawing = [state for state in states if not state.request.understand]
        for state in drawing:
            state.grid = self._grid(state)
        reader.pool.reserve(sum(addition.piece.num_tokens for addition in additions) + _rows_to_draw(reader, drawing))
        self._read(reader, states, additions, places)
        write(reader, self.tokenizer, [state for state in states if state.request.think or state.request.understand])
        self._think(reader, [state for state in drawing if state.request.think])
        draw(reader, drawing, on_step)
        images = [self._decoded(state) for state in drawing]
        numbers = iter(range(len(images)))
        info = [self._info(state, None if state.request.understand else next(numbers)) for state in states]
        return Output(images, [state.text for state in states if state.text], info)

    def _check(self, request: Request) -> None:
        """Raises ValueError for what this model cannot do."""
        config = self.model.config
        if not request.understand and (not config.visual_gen or self.vae is None):
            raise ValueError("this model has no generation branch (visual_gen is False): it can only answer in text")
        has_images = any(not isinstance(element, str) for element in request.elements)
        if request.understand and has_images and not config.visual_und:
            raise ValueError("this model has no vision encoder (visual_und is False): it cannot be asked about images")

    def _text(self, text: str) -> Text:
        return Text((self.markers.bos_token_id, *self.tokenizer.encode(text), self.markers.eos_token_id))

    def _read(
        self,
        reader: Reader,
        states: Sequence[State],
        additions: Sequence[Addition],
        places: Sequence[tuple[Context | int, ...]],
    ) -> None:
        """All elements of all requests, in as few forward passes as they fit into."""
        contexts, _ = reader.extend(additions)
        for state, branches in zip(states, places, strict=True):
            state.full, state.no_text, state.no_image = (
                contexts[place] if isinstance(place, int) else place for place in branches
            )

    def _plan(
        self, reader: Reader, encoder: ImageEncoder, state: State, additions: list[Addition]
    ) -> tuple[Context | int, ...]:
        """Append a request's elements to `additions`; where its full, text-less and image-less contexts end."""
        request = state.request

        def add(after: Context | int, piece: Piece) -> Context | int:
            # A long text is read in parts: a causal pass over all of it takes memory of its length squared.
            parts: list[Piece] = [piece]
            if isinstance(piece, Text) and piece.num_tokens > TEXT_PART:
                parts = [Text(piece.ids[start : start + TEXT_PART]) for start in range(0, piece.num_tokens, TEXT_PART)]
            for part in parts:
                additions.append(Addition(after, part))
                after = len(additions) - 1
            return after

        full: Context | int = Context()
        no_text, no_image = full, full
        if request.think:
            words = THINK_BEFORE_ANSWER if request.understand else THINK_BEFORE_IMAGE
            full = no_image = add(full, self._text(words))
        for element in request.elements:
            if isinstance(element, str):
                text, shared, no_text = self._text(element), full == no_image, full
                full = add(full, text)
                # Until the first image both contexts are the same rows.
                no_image = full if shared else add(no_image, text)
                continue
            if not request.understand:
                noises = request.reference_noise
                noise = None if noises is None else noises[len(state.sizes)]
                full = add(full, encoder.latents(element, noise, state.generator))
            if self.model.config.visual_und:
                full = add(full, reader.vit_image(encoder.pixels(element)))
            image = encoder.resized(element)
            state.sizes.append((image.height, image.width))
            no_text = full
        return full, no_text, no_image

    def _think(self, reader: Reader, states: Sequence[State]) -> None:
        """The thought becomes part of the full context only (upstream)."""
        contexts, _ = reader.extend([Addition(state.full, self._text(state.text)) for state in states])
        for state, context in zip(states, contexts, strict=True):
            state.full = context

    def _grid(self, state: State) -> tuple[int, int]:
        """(rows, columns) of latent tokens of the output."""
        request, stride = state.request, self.model.config.latent_downsample
        if (request.height is None) != (request.width is None):
            raise ValueError("pass height and width together, or neither")
        if request.height is not None and request.width is not None:
            size = (request.height, request.width)
        elif state.sizes:
            size = state.sizes[_place(request.settings.size_from, len(state.sizes))]
        else:
            side = self.model.config.max_latent_size * stride
            size = (min(DEFAULT_SIZE[0], side), min(DEFAULT_SIZE[1], side))
        limit = self.model.config.max_latent_size
        if any(side % stride or not stride <= side <= limit * stride for side in size):
            raise ValueError(
                f"output size {size[0]} × {size[1]} (height × width): both must be multiples of {stride} "
                f"up to {limit * stride}, the model's position table"
            )
        return size[0] // stride, size[1] // stride

    def _decoded(self, state: State) -> Image.Image:
        assert self.vae is not None
        return decode(self.vae, state.x, state.grid, self.model.config.latent_patch_size)

    def _info(self, state: State, image: int | None) -> dict[str, Any]:
        stride = self.model.config.latent_downsample
        return {
            "seed": state.request.seed,
            "height": None if image is None else state.grid[0] * stride,
            "width": None if image is None else state.grid[1] * stride,
            "image": image,
            "text": state.text,
            "settings": state.request.settings,
            "context_tokens": {name: getattr(state, name).kv_len for name in ("full", "no_text", "no_image")},
            "latents": state.x,
        }


def _rows_to_draw(reader: Reader, states: Sequence[State]) -> int:
    """Rows of the pool that the pictures being drawn take up in a forward pass."""
    rows = [
        state.grid[0] * state.grid[1] + 2
        for state in states
        for _ in range(state.request.settings.guidance.num_branches)
    ]
    return max(min(sum(rows), reader.max_tokens), max(rows, default=0))


def _transform(transform: ImageTransform | Sequence[int]) -> ImageTransform:
    if isinstance(transform, ImageTransform):
        return transform
    max_image_size, min_image_size, image_stride = transform
    return ImageTransform(max_image_size, min_image_size, image_stride)


def _place(size_from: str | int, num_references: int) -> int:
    if isinstance(size_from, int):
        if not 1 <= size_from <= num_references:
            raise ValueError(f"size_from is {size_from}, but there are {num_references} references")
        return size_from - 1
    if size_from not in ("first", "last"):
        raise ValueError(f"size_from is {size_from!r}; use first, last or the number of a reference")
    return 0 if size_from == "first" else num_references - 1
