"""What the documents say exists: files, commands, flags, keys of the data set YAML."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from echo4o.cli import app
from echo4o.config import ConfigError, RunConfig, load_config
from echo4o.data.images import ImageTransform
from echo4o.data.sources.multi_ref import MultiRefOptions
from echo4o.generate.item import KEYS as REQUEST_KEYS
from echo4o.generate.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "TRAIN.md", "EVAL.md")]
FLAGS = {name for name, _ in RunConfig().items()}


def shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`(echo4o [^`]+)`", text)
    return [line.partition("#")[0].strip() for block in [*blocks, *inline] for line in block.splitlines()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    files = re.findall(r"(?<![\w/])((?:scripts|configs|data_examples|docs|tests)/[\w./-]*\w)", text)
    assert links or files
    # A data set name after a slash, as in tests/model, is a folder.
    missing = [name for name in {*links, *files} if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document):
    verbs = get_command(app).commands
    for line in shell_lines(document.read_text(encoding="utf-8")):
        if not line.startswith("echo4o "):
            continue
        words = [word for word in shlex.split(line.replace("[", "").replace("]", "")) if word != "…"][1:]
        assert words[0] in verbs, line
        if words[0] == "train":
            assert "--help" in words or load_settings(words[1:]), line
        else:
            command = getattr(verbs[words[0]], "commands", {}).get("".join(words[1:2]), verbs[words[0]])
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_settings_of_torchrun_commands_exist(document):
    found = re.findall(r"scripts/train\.py ([^`\n#<]+)", document.read_text(encoding="utf-8"))
    for line in found:
        words = [word for word in shlex.split(line) if word != "…"]
        assert load_config([str(ROOT / word) if word.startswith("configs/") else word for word in words]), line


def load_settings(argv: list[str]) -> bool:
    load_config([str(ROOT / argv[0]), *argv[1:]])
    return True


def test_flags_in_the_documents_exist():
    pattern = re.compile(r"`(?:--)?([a-z]+(?:_[a-z0-9]+)+)(?: (?:True|False|[a-z0-9.]+))?`")
    keys = {field.name for kind in (MultiRefOptions, ImageTransform) for field in fields(kind)}
    known = FLAGS | keys | set(REQUEST_KEYS) | set(PRESETS) | set(DATA_NAMES.split())
    for document in DOCUMENTS:
        for name in pattern.findall(document.read_text(encoding="utf-8")):
            assert name in known, f"{document.name}: {name}"


# Group keys, columns, kinds of data and metric names: everything with an underscore that is no flag.
DATA_NAMES = """
multi_ref unified_edit t2i_pretrain vlm_sft dataset_names num_used_data is_mandatory image_transform_args
vit_image_transform_args image_pixel_limit frame_sampler_args max_num_frames min_num_frames shuffle_lines
shuffle_seed resume_data_status data_dir input_images input_image image_list target_image instruction_list
output_image no_flag num_worker too_long skipped_steps grad_norm tokens_per_sec data_wait_share
load_bagel adamw_8bit nproc_per_node text_channel
echo4o_image nano_consistent hf_dataset bagel_parquet train_only
missing_image api_error parse_error latents_encoded copy_reference weight_by replay_share max_rows subset_seed use_split
"""


def test_every_option_of_multi_reference_data_is_explained():
    text = (ROOT / "TRAIN.md").read_text(encoding="utf-8")
    for kind in (MultiRefOptions, ImageTransform):
        for field in fields(kind):
            assert f"`{field.name}" in text or f"{field.name}: " in text, field.name


def test_every_setting_of_a_request_is_explained():
    text = (ROOT / "EVAL.md").read_text(encoding="utf-8")
    assert not [key for key in REQUEST_KEYS if f"`{key}`" not in text]


def test_a_wrong_flag_would_be_found():
    with pytest.raises(ConfigError):
        load_settings(["configs/tiny_cpu.yaml", "--no_such_flag", "1"])
