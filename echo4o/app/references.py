"""Reference images in an order that can be changed, each under the name a prompt calls it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

Items = list[tuple[str, str | None]]
"""(path, caption) as Gradio's gallery gives them."""

#: The place of the cursor in the prompt; unknown before the first click into it (then: the end).
_CARET = """(prompt, caret, chosen) => {{
  const field = document.querySelector("#{prompt_id} textarea");
  return [prompt, field ? field.selectionStart : -1, chosen];
}}"""


def labelled(items: Sequence[tuple[str, str | None]] | None) -> Items:
    """The same images, named image 1 … image N."""
    return [(path, f"image {number}") for number, (path, _) in enumerate(items or (), start=1)]


def moved(items: Items | None, place: int | None, by: int) -> tuple[Items, int]:
    """The image at `place` (from 0) swapped with its neighbour; also where it is now. At an end it stays.

    Raises:
        ValueError: if no image is selected.
    """
    items, place = _selected(items, place)
    other = min(max(place + by, 0), len(items) - 1)
    items[place], items[other] = items[other], items[place]
    return labelled(items), other


def removed(items: Items | None, place: int | None) -> Items:
    """Without the image at `place`.

    Raises:
        ValueError: if no image is selected.
    """
    items, place = _selected(items, place)
    return labelled(items[:place] + items[place + 1 :])


def with_placeholder(prompt: str, caret: int, place: int | None) -> str:
    """`prompt` with ``<image N>`` at `caret` (-1: the end), set off by spaces.

    Raises:
        ValueError: if no image is selected.
    """
    if place is None:
        raise ValueError("Click on an image first")
    caret = len(prompt) if not 0 <= caret <= len(prompt) else caret
    before, after = prompt[:caret], prompt[caret:]
    left = "" if not before or before[-1].isspace() else " "
    right = "" if after and (after[0].isspace() or after[0] in ".,;:!?)") else " "
    return f"{before}{left}<image {place + 1}>{right}{after}"


def _selected(items: Items | None, place: int | None) -> tuple[Items, int]:
    items = list(items or ())
    if place is None or place >= len(items):
        raise ValueError("Click on an image first")
    return items, place


class References:
    """The gallery, the buttons under it, and what they do.

    Args:
        name: of the tab: beginning of the elements' ids.
        guard: turns a user's mistake inside it into a message on the page.
    """

    def __init__(self, name: str, guard: Callable[[], Any]) -> None:
        self.name, self.guard = name, guard
        self.gallery = gr.Gallery(
            label="References · click one to select it",
            interactive=True,
            type="filepath",
            file_types=["image"],
            sources=["upload", "clipboard"],
            columns=4,
            fit_columns=False,
            height=190,
            object_fit="contain",
            allow_preview=False,
            buttons=[],
            elem_id=f"{name}_references",
            elem_classes="images",
        )
        self.place = gr.State(None)  # of the selected image, from 0
        self.caret = gr.Number(-1, visible=False)
        with gr.Row(elem_classes="small-buttons"):
            self.left = gr.Button("◀ Move", size="sm", min_width=60, interactive=False, elem_id=f"{name}_left")
            self.right = gr.Button("Move ▶", size="sm", min_width=60, interactive=False, elem_id=f"{name}_right")
            self.remove = gr.Button("Remove", size="sm", min_width=60, interactive=False, elem_id=f"{name}_remove")
            self.insert = gr.Button("Insert in prompt", size="sm", interactive=False, elem_id=f"{name}_insert")

    def connect(self, prompt: gr.Textbox) -> None:
        """Events; placeholders go into `prompt`."""
        buttons = [self.left, self.right, self.remove, self.insert]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

        def states(place: int | None) -> list[Any]:
            chosen = place is not None
            text = f"Insert <image {place + 1}>" if place is not None else "Insert in prompt"
            return [*(gr.Button(interactive=chosen) for _ in range(3)), gr.Button(text, interactive=chosen)]

        def select(event: gr.SelectData) -> list[Any]:
            return [event.index, *states(event.index)]

        def change(items: Items | None, place: int | None) -> list[Any]:
            names = labelled(items)
            # What is labelled already would come back as another change.
            gallery = gr.skip() if names == (items or []) else gr.Gallery(names)
            place = place if place is not None and place < len(names) else None
            return [gallery, place, *states(place)]

        def move(by: int) -> Callable[..., list[Any]]:
            def handler(items: Items | None, place: int | None) -> list[Any]:
                with self.guard():
                    names, now = moved(items, place, by)
                return [gr.Gallery(names, selected_index=now), now, *states(now)]

            return handler

        def remove(items: Items | None, place: int | None) -> list[Any]:
            with self.guard():
                names = removed(items, place)
            return [gr.Gallery(names, selected_index=None), None, *states(None)]

        def insert(text: str, caret: float, place: int | None) -> str:
            with self.guard():
                return with_placeholder(text, int(caret), place)

        chosen, shown = [self.gallery, self.place], [self.gallery, self.place, *buttons]
        self.gallery.select(select, None, [self.place, *buttons], **quick)
        self.gallery.change(change, chosen, shown, **quick)
        self.left.click(move(-1), chosen, shown, **quick)
        self.right.click(move(+1), chosen, shown, **quick)
        self.remove.click(remove, chosen, shown, **quick)
        js = _CARET.format(prompt_id=prompt.elem_id)
        self.insert.click(insert, [prompt, self.caret, self.place], prompt, js=js, **quick)
