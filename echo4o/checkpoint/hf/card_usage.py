"""What a card says of the ways to use a model, and its fixed texts."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from echo4o.checkpoint.adapters import read_adapter_config
from echo4o.checkpoint.hf.provenance import Provenance
from echo4o.model.vae import WEIGHTS_FILE

_PROMPT = "The cat of image 1 on the sofa of image 2."
CITATION = """\
## Citation

```bibtex
@article{deng2025bagel,
  title   = {Emerging Properties in Unified Multimodal Pretraining},
  author  = {Deng, Chaorui and Zhu, Deyao and Li, Kunchang and Gou, Chenhui and Li, Feng and Wang, Zeyu and Zhong, Shu
             and Yu, Weihao and Nie, Xiaonan and Song, Ziang and Shi, Guang and Fan, Haoqi},
  journal = {arXiv preprint arXiv:2505.14683},
  year    = {2025}
}

@article{ye2025echo4o,
  title   = {Echo-4o: Harnessing the Power of GPT-4o Synthetic Images for Improved Image Generation},
  author  = {Ye, Junyan and Jiang, Dongzhi and Wang, Zihao and Zhu, Leqi and Hu, Zhenghao and Huang, Zilong and He, Jun
             and Yan, Zhiyuan and Yu, Jinghua and Li, Hongsheng and He, Conghui and Li, Weijia},
  journal = {arXiv preprint arXiv:2508.09987},
  year    = {2025}
}
```"""
_PURPOSES = (
    (WEIGHTS_FILE, "image autoencoder"),
    ("ema.safetensors", "weights"),
    ("model.trained.safetensors", "parameters that were trained beside the adapters"),
    ("model*.safetensors", "weights"),
    ("adapter_model.safetensors", "adapters"),
    ("adapter_config.json", "settings of the adapters, in peft's format"),
    ("*.safetensors.index.json", "which tensor lies in which file"),
    ("config.json", "architecture"),
    ("llm_config.json", "architecture of the language model"),
    ("vit_config.json", "architecture of the vision encoder"),
    ("generation_config.json", "how text is generated"),
    ("preprocessor_config.json", "how pictures are prepared"),
    ("*.py", "code for transformers"),
    ("*token*", "tokenizer"),
    ("vocab.json", "tokenizer"),
    ("merges.txt", "tokenizer"),
    ("*.jinja", "chat template"),
)


def purpose(name: str) -> str:
    """What a file is for, in words; empty if its name does not tell."""
    return next((text for pattern, text in _PURPOSES if fnmatch(name, pattern)), "")


def how_to_use(folder: Path, layout: str, base: str | None, repository: str) -> str:
    """Commands for everything that reads the folder."""
    if layout == "adapter":
        return _use_of_adapters(folder, base, repository)
    parts = ["## Use", _with_echo4o(repository)]
    if layout in ("hf", "both"):
        parts.append(_with_transformers(repository))
    if layout in ("bagel", "both"):
        parts.append(_with_upstream(repository))
    return "\n\n".join(parts)


def _with_echo4o(repository: str) -> str:
    return f"""\
### echo4o

With echo4o installed (`pip install -e .` in a checkout of it):

```bash
echo4o generate {repository} --image cat.jpg --image sofa.png \\
    --prompt "{_PROMPT}" --out out.png
echo4o app {repository}                                # the web page
echo4o train CONFIG.yaml --init_from {repository}      # fine-tune it further
```

```python
from echo4o.generate.pipeline import Echo4oPipeline

pipe = Echo4oPipeline.from_pretrained("{repository}", dtype="bfloat16")
out = pipe("Put <image 1> beside <image 2>.", images=["cat.jpg", "sofa.png"], seed=0)
out.images[0].save("out.png")
```"""


def _with_transformers(repository: str) -> str:
    return f"""\
### transformers

The code in this repository builds the model; drawing with `pipeline()` needs echo4o installed as well.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{repository}", trust_remote_code=True, dtype="bfloat16")
model.pipeline()("A cat on a sofa.", seed=0).images[0].save("out.png")
```"""


def _with_upstream(repository: str) -> str:
    return f"""\
### BAGEL's own code

```bash
hf download {repository} --local-dir MODEL
python app.py --model_path MODEL       # in a checkout of github.com/bytedance-seed/BAGEL
```"""


def _use_of_adapters(folder: Path, base: str | None, repository: str) -> str:
    start = base or "BASE"
    hint = "" if base else "\n\n`BASE` is the folder of the model that the adapters were trained on."
    more = ""
    if (Path(folder) / "model.trained.safetensors").is_file():
        more = (
            "\n\nBeside the adapters other parameters were trained (`model.trained.safetensors`). echo4o takes them "
            "too; peft does not know of them: merge first."
        )
    return f"""\
## Use

### echo4o

```bash
hf download {repository} --local-dir ADAPTER
hf download {start} --local-dir BASE_FOLDER
echo4o generate ADAPTER --base BASE_FOLDER --image cat.jpg --image sofa.png \\
    --prompt "{_PROMPT}" --out out.png
echo4o merge ADAPTER --base BASE_FOLDER --out MERGED       # a complete model of both
```

### peft

With a base whose repository has transformers code (`echo4o export` writes it):

```python
from peft import PeftModel
from transformers import AutoModel

model = AutoModel.from_pretrained("BASE_FOLDER", trust_remote_code=True, dtype="bfloat16")
model = PeftModel.from_pretrained(model, "{repository}")
```{hint}{more}"""


def base_text(folder: Path, provenance: Provenance, base: str | None, commit: str | None) -> str:
    """The base, its commit and its fingerprint, as far as they are known."""
    text = f"[{base}](https://huggingface.co/{base})" if base else f"`{provenance.base}`" if provenance.base else ""
    if commit:
        text += f", commit `{commit}`"
    if provenance.layout == "adapter":
        config = read_adapter_config(folder)
        if config.base_weights:
            text += f", {config.base_weights} weights"
        if config.base_fingerprint:
            text += f", fingerprint `{config.base_fingerprint[:16]}`"
    return text
