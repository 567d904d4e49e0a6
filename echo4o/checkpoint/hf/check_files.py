"""Are the files of a folder there and whole: JSON, shards and their index, markers, adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo4o.checkpoint.adapters import CONFIG_FILE, find_adapter
from echo4o.checkpoint.folders import MARKER, CheckpointError, faults
from echo4o.checkpoint.hf.findings import Examination, counted, some
from echo4o.checkpoint.hf.provenance import EXPORT_FILE, Provenance, read_provenance
from echo4o.checkpoint.inventory import ADAPTER, TRAINED, TRAINING
from echo4o.model.config import SCALAR_FILES, with_upstream_entries
from echo4o.model.headers import Header, Stored, read_header
from echo4o.model.pretrained import WEIGHTS, find_weights, upstream_name
from echo4o.model.vae import WEIGHTS_FILE

JSON_FILES = (*SCALAR_FILES, "llm_config.json", "vit_config.json", "generation_config.json", "tokenizer_config.json")
AGAIN = "copy or download the file again"
_COMMA_BEFORE_END = re.compile(r",(?=\s*[}\]])")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_FILE_FAULT = re.compile(r"(.+?) (is missing|is a dangling link|has .*)")
#: What other programs keep beside weights, and what upstream keeps beside them in its training checkpoints.
_FOREIGN = ("pytorch_model*.bin", "*.distcp", "*_optim_states.pt", "*.ckpt")
_IGNORED = ("optimizer.*.pt", "scheduler.pt", "data_status.pt")


@dataclass
class WeightSet:
    """The files that make one set of weights.

    Attributes:
        label: the file, or the index, that findings name.
        headers: file → header, of those that could be read.
        hidden: tensors that lie in files that could not.
        partial: what trained alone, beside adapters.
        mapped: tensor → file, as the index says.
        misplaced: tensor → file that holds it, where the index says otherwise.
        twins: indexes of the same files.
    """

    label: str
    headers: dict[str, Header]
    hidden: set[str] = field(default_factory=set)
    partial: bool = False
    mapped: dict[str, str] = field(default_factory=dict)
    misplaced: dict[str, str] = field(default_factory=dict)
    twins: list[WeightSet] = field(default_factory=list)

    def tensors(self) -> dict[str, Stored]:
        """The model's, by upstream's names."""
        headers = [header for name, header in self.headers.items() if name != WEIGHTS_FILE]
        return {upstream_name(name): stored for header in headers for name, stored in header.tensors.items()}


# ---------------------------------------------------------------- whole or not


def check_complete(examination: Examination) -> Provenance | None:
    """Compare files with what the folder says of them: a training checkpoint's marker, an export's list."""
    folder = examination.folder
    if any((folder / name).exists() for name in (MARKER, TRAINING, "ranks")):
        for fault in faults(folder):
            _marker_fault(examination, fault)
    try:
        provenance = read_provenance(folder)
    except CheckpointError as error:
        examination.error(EXPORT_FILE, f"cannot be used: {error}", "export or download the folder again")
        return None
    for name, entry in (provenance.files if provenance else {}).items():
        path, size = folder / name, entry.get("size")
        if not path.is_file():
            examination.unusable_file(name, f"is missing, {EXPORT_FILE} lists it", AGAIN)
        elif isinstance(size, int) and path.stat().st_size != size:
            examination.doubt(name, f"has {path.stat().st_size:,} bytes, {EXPORT_FILE} says {size:,}", AGAIN)
    return provenance


def _marker_fault(examination: Examination, fault: str) -> None:
    fix = "take an earlier checkpoint; the others of the run are untouched"
    of_file = _FILE_FAULT.fullmatch(fault)
    if fault.startswith(str(examination.folder)):
        examination.error(MARKER, "is missing or unreadable: the save was interrupted", fix)
    elif of_file and of_file[2].startswith("has "):
        examination.doubt(of_file[1], of_file[2], fix)
    elif of_file:
        examination.unusable_file(of_file[1], of_file[2], fix)


def read_json_files(examination: Examination) -> dict[str, dict[str, Any]]:
    """The content of every JSON file that a model folder may have; broken ones are named and left out."""
    found = {}
    for name in JSON_FILES:
        if (examination.folder / name).exists() and name not in examination.unusable:
            content = _read_json(examination, name)
            if content is not None:
                found[name] = with_upstream_entries(content) if name in SCALAR_FILES else content
    return found


def _read_json(examination: Examination, name: str) -> dict[str, Any] | None:
    try:
        text = (examination.folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        examination.unusable_file(name, f"cannot be read ({error})", AGAIN)
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            content = json.loads(_COMMA_BEFORE_END.sub("", text))
        except json.JSONDecodeError:
            examination.unusable_file(name, f"is not valid JSON ({error})", AGAIN)
            return None
        examination.warning(
            name,
            "has a comma too many, as BAGEL-7B-MoT was first published: read here, not by transformers",
            "remove the comma before the closing bracket",
        )
    if not isinstance(content, dict):
        examination.unusable_file(name, f"holds {type(content).__name__} instead of an object with settings", AGAIN)
        return None
    return content


# ---------------------------------------------------------------- weights


def open_header(examination: Examination, headers: dict[str, Header], name: str) -> Header | None:
    """The header of a file, read once; None (and an error, once) if the file is damaged."""
    if name in headers:
        return headers[name]
    if name in examination.unusable:
        return None
    try:
        headers[name] = read_header(examination.folder / name)
    except ValueError as error:
        examination.unusable_file(name, str(error), AGAIN)
    except OSError as error:
        examination.unusable_file(name, f"cannot be read ({error.strerror})", AGAIN)
    return headers.get(name)


def find_sets(examination: Examination, weights: str | None, headers: dict[str, Header]) -> list[WeightSet]:
    """The sets of weights in a folder: EMA, model, or the one asked for; with adapters, what trained beside them."""
    folder = examination.folder
    has_adapter = find_adapter(folder, weights) is not None
    sets: list[WeightSet] = []
    for kind in [weights] if weights else WEIGHTS:
        names = [TRAINED[kind]] if has_adapter and (folder / TRAINED[kind]).is_file() else []
        path = None if has_adapter else find_weights(folder, kind)
        if path is not None:
            names.append(path.name)
        for name in names:
            index = name.endswith(".json")
            found = _indexed(examination, name, headers) if index else _single(examination, name, headers)
            if found is None:
                continue
            found.partial = has_adapter
            files = found.headers.keys() - {WEIGHTS_FILE}
            # One folder for two layouts: the index names the single file.
            twin = next((other for other in sets if other.headers.keys() - {WEIGHTS_FILE} == files), None)
            (twin.twins if twin else sets).append(found)
        if path is not None and path.suffix != ".json":
            _check_other_index(examination, path, headers)
    _check_left_over(examination, sets)
    is_said = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in examination.unusable)
    if not sets and not has_adapter and not is_said and not (folder / CONFIG_FILE).is_file():
        _no_weights(examination, weights)
    return sets


def _single(examination: Examination, name: str, headers: dict[str, Header]) -> WeightSet | None:
    header = open_header(examination, headers, name)
    return WeightSet(name, {name: header}) if header else None


def _indexed(examination: Examination, name: str, headers: dict[str, Header]) -> WeightSet | None:
    weight_map = _weight_map(examination, name)
    if weight_map is None:
        return None
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (examination.folder / file).is_file()]
    if new := [file for file in missing if file not in examination.unusable]:
        examination.error(name, f"names shards that are not there: {some(new)}", "copy or download them as well")
        examination.unusable |= set(new)
    readable = {file: header for file in files if (header := open_header(examination, headers, file))}
    held: dict[str, str] = {}
    doubled: set[str] = set()
    for file, header in readable.items():
        if twice := [tensor for tensor in header.tensors if tensor in held]:
            examination.error(
                file,
                f"holds {counted(len(twice), 'tensor')} that {held[twice[0]]} holds too, e.g. {twice[0]}",
                "remove the shards that belong to another save, and download the index and its shards again",
            )
            doubled |= set(twice)
        held |= dict.fromkeys(header.tensors, file)
    misplaced = {t: file for t, file in held.items() if t not in doubled and weight_map.get(t) != file}
    hidden = {upstream_name(tensor) for tensor, file in weight_map.items() if file not in readable}
    return WeightSet(name, readable, hidden, mapped=weight_map, misplaced=misplaced)


def _weight_map(examination: Examination, name: str) -> dict[str, str] | None:
    content = _read_json(examination, name)
    if content is None:
        return None
    weight_map = content.get("weight_map")
    is_map = isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())
    if not is_map:
        examination.unusable_file(name, "has no weight_map from tensors to files", AGAIN)
        return None
    assert isinstance(weight_map, dict)
    if outside := [file for file in weight_map.values() if Path(file).name != file]:
        examination.unusable_file(name, f"names {outside[0]}, which is not a file of this folder", AGAIN)
        return None
    return weight_map


def _check_other_index(examination: Examination, single: Path, headers: Mapping[str, Header]) -> None:
    """A single file counts before an index of the same name, which may name other files."""
    index = single.with_name(f"{single.name}.index.json")
    if not index.exists():
        return
    weight_map = _weight_map(examination, index.name)
    if weight_map is not None and single.name not in weight_map.values():
        examination.warning(
            index.name,
            f"names other files than {single.name}: two sets of weights under one name, of which {single.name} counts",
            "remove the one that is not meant",
        )


def _check_left_over(examination: Examination, sets: list[WeightSet]) -> None:
    used = {file for found in sets for file in (*found.headers, *found.mapped.values())} | examination.unusable
    shards = sorted(path.name for path in examination.folder.glob("*.safetensors") if _SHARD.fullmatch(path.name))
    left = [name for name in shards if name not in used]
    if left and sets:
        examination.warning(
            left[0],
            f"is in no index ({counted(len(left), 'such shard')}): remains of another save, which nothing reads",
            "remove what the index does not name",
        )
    ignored = sorted({path.name for pattern in _IGNORED for path in examination.folder.glob(pattern)})
    if ignored:
        examination.note(ignored[0], f"upstream's training state ({counted(len(ignored), 'file')}) is not looked at")


def _no_weights(examination: Examination, weights: str | None) -> None:
    folder = examination.folder
    wanted = f"{weights}.safetensors" if weights else "ema.safetensors or model.safetensors"
    fix = "pass the folder that holds them, or copy them into it"
    shards = [path.name for path in sorted(folder.glob("*.safetensors")) if _SHARD.fullmatch(path.name)]
    foreign = sorted({path.name for pattern in _FOREIGN for path in folder.glob(pattern)})
    what = f"has no {wanted}, nor an index of shards"
    if shards:
        what, fix = f"has shards ({shards[0]}) but no index of them", "copy or download model.safetensors.index.json"
    elif foreign:
        what += f", but {foreign[0]}, which is another program's format"
        fix = "save as safetensors with that program first"
    elif inside := sorted(path.parent.name for path in folder.glob("*/*.safetensors")):
        fix = f"pass a folder inside it, such as {folder / inside[-1]}"
    elif weights and find_weights(folder):
        fix = "leave out --weights, or name the other kind"
    examination.error(".", what, fix)


def adapter_files(folder: Path, weights: str | None) -> list[str]:
    """Names of the adapter files in a folder that are asked for."""
    return [ADAPTER[kind] for kind in ([weights] if weights else WEIGHTS) if (folder / ADAPTER[kind]).is_file()]
