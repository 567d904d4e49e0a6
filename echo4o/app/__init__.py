"""echo4o app MODEL    ·    the web page: text to image, several references, editing, questions about images.

serve("runs/tiny_bagel")                                                # loads, shows, waits
page = build(Echo4oPipeline.from_pretrained("runs/tiny_bagel"))         # the page of a pipeline there is

Gradio is imported when a page is built, never before; it comes with ``pip install 'echo4o[app]'``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio

    from echo4o.generate.pipeline import Echo4oPipeline
    from echo4o.generate.runs import ModelName


def build(pipe: Echo4oPipeline, name: str = "", model: ModelName | None = None) -> gradio.Blocks:
    """The page of a loaded model; `echo4o.app.page.launch` shows it.

    Args:
        name: of the model, for the headline.
        model: name and hash for the pictures' metadata; without it they name no hash.

    Raises:
        ImportError: naming the extra to install, where Gradio is absent.
    """
    _require_gradio()
    from echo4o.app.page import build_page
    from echo4o.generate.runs import ModelName

    dtype = str(pipe.model.language_model.lm_head.weight.dtype).removeprefix("torch.")
    return build_page(pipe, model or ModelName(name, "", dtype))


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    weights: str | None = None,
    base: str | Path | None = None,
    quantize: str | None = None,
    offload: str | None = None,
) -> None:
    """Load a model and show its page until interrupted.

    Args:
        host: 127.0.0.1 lets in this machine only, 0.0.0.0 everyone who reaches it.
        share: a public address through Gradio's tunnel.
        dtype: ``auto``: bfloat16 on a GPU, float32 on a CPU.
        device, weights, base, quantize, offload: as for `Echo4oPipeline.from_pretrained`.

    Raises:
        ImportError: naming the extra to install, where Gradio is absent.
        OSError: if there is no such model, or the port is taken; also what loading raises.
    """
    _require_gradio()  # before the model is loaded: minutes
    from echo4o.app.page import check_port, launch
    from echo4o.generate.command import ModelOptions

    check_port(host, port)
    options = ModelOptions(
        Path(model), dtype, device, weights, Path(base) if base is not None else None, quantize, offload
    )
    options.check_device()
    name = options.name()
    launch(build(options.load(), model=name), host=host, port=port, share=share)


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("the web page needs Gradio: pip install 'echo4o[app]'") from error
