"""What a card says of a run: its settings, its data sets and its losses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from echo4o.checkpoint.hf.provenance import shown_path

#: Settings of one machine or of the log, which say nothing of the model.
_UNTOLD = {
    *("results_dir", "checkpoint_dir", "tensorboard", "num_workers", "prefetch_factor", "data_cache_dir", "device"),
    *("latent_cache", "latent_cache_strict"),
    *("eval_every", "eval_weights", "validation_config_file", "validation_rows", "eval_requests"),
    *("auto_resume", "resume_from", "log_every", "save_every", "keep_last_n", "keep_every", "async_save", "log_rows"),
    *("peak_device_tflops", "dataset_config_file", "dataset_info", "dist_timeout", "hang_timeout", "stop_grace"),
    *("dead_rank_timeout", "llm_path", "vit_path", "vae_path", "max_bad_row_share", "attention_kernel", "use_flex"),
    *("activation_checkpointing", "compile", "cpu_offload", "ema_offload", "engine", "num_shard", "num_replicate"),
    *("sharding_strategy", "zero_stage", "deepspeed_config", "reduce_dtype"),
}
#: Of a run's end, for its mean losses.
_LAST_SHARE = 0.1
# An absolute path in a text: a slash that no word, dot or colon precedes.
_PATH = re.compile(r"(?<![\w.:/~)])/(?=[^\s/])[^\s'\"`,;\]}|]+")
_HOME = re.compile(r"^/?(?:(?:home|Users)/[^/]+|root|tmp)(?=/|$)")


@dataclass(frozen=True)
class DataSet:
    """A data set of a group. Attributes: rows: in its files, None if they are not at hand."""

    group: str
    weight: str
    name: str
    rows: int | None


@dataclass(frozen=True)
class TrainingFacts:
    """Attributes:
    started_from: ``init_from`` or what stood for it.
    changed: (setting, value, meaning) of those that differ from their defaults.
    text: all settings, without the places of a machine.
    losses: name → mean over the last tenth of the steps.
    last_step: of the checkpoint.
    end: last step of the run.
    """

    started_from: str | None = None
    changed: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""
    data_file: str = ""
    data: list[DataSet] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    last_step: int = 0
    end: int = 0
    is_lora: bool = False


def read_training(config: str | None, run: Path | None, step: int | None = None) -> TrainingFacts:
    """All that is known of a run; what cannot be read is left out.

    Args:
        step: of the checkpoint; None takes the run's last.
    """
    losses, last_step, end = _losses(run, step) if run is not None else ({}, 0, 0)
    if not config:
        return TrainingFacts(losses=losses, last_step=last_step, end=end)
    stated: dict[str, Any] = dict(_flat(yaml.safe_load(config) or {}))
    settings, meanings = _defaults()
    changed = [
        (name, _shown(value), meanings[name].replace("|", "\\|"))
        for name, value in stated.items()
        if name in settings and value != settings[name] and not _is_untold(name)
    ]
    data_file = str(stated.get("dataset_config_file") or "")
    start = stated.get("init_from") or (stated.get("model_path") if stated.get("finetune_from_hf") else None)
    return TrainingFacts(
        started_from=str(start) if start else None,
        changed=changed,
        text=without_places(config),
        data_file=without_places(data_file),
        data=_data_sets(data_file, stated.get("dataset_info")),
        losses=losses,
        last_step=last_step,
        end=end,
        is_lora=bool(stated.get("lora_rank")),
    )


def without_places(text: str) -> str:
    """`text` with absolute paths cut to their last parts, and without the names of home folders."""

    def cut(match: re.Match[str]) -> str:
        return shown_path(_HOME.sub("", match[0]) or "/")

    lines = [_PATH.sub(cut, line) for line in text.splitlines()]
    return "\n".join(_HOME.sub("", line).lstrip("/") if _HOME.match(line) else line for line in lines)


def _is_untold(name: str) -> bool:
    return name in _UNTOLD or name.startswith("wandb")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return without_places(value).replace("|", "\\|")
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _flat(content: Mapping[str, Any]):
    for name, value in content.items():
        if isinstance(value, Mapping) and name in ("model", "data", "training"):
            yield from _flat(value)
        else:
            yield name, value


def _defaults() -> tuple[dict[str, Any], dict[str, str]]:
    """(name → default, name → meaning) of every setting."""
    from echo4o.config import RunConfig
    from echo4o.config.arguments import fields_by_group

    meanings = {
        setting.name: setting.metadata.get("help", "") for _, group in fields_by_group() for _, setting in group
    }
    return dict(RunConfig().items()), meanings


# ---------------------------------------------------------------- losses


def _losses(run: Path, step: int | None) -> tuple[dict[str, float], int, int]:
    from echo4o.train.metrics import METRICS_FILE, read_metrics

    path = Path(run) / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    if not records:
        return {}, 0, 0
    end = records[-1]["step"]
    last = end if step is None else step
    tail = [record for record in records if last * (1 - _LAST_SHARE) < record["step"] <= last]
    losses = {}
    for name in ("mse", "ce"):
        values = [record[name] for record in tail if isinstance(record.get(name), int | float)]
        if values:
            losses[name] = sum(values) / len(values)
    return losses, last, end


def loss_sentence(facts: TrainingFacts) -> str:
    """Steps and losses in words."""
    names = {"mse": "flow matching", "ce": "next token"}
    means = ", ".join(f"{value:.4g} ({names[name]}, `{name}`)" for name, value in facts.losses.items())
    later = f" The run went on to step {facts.end:,}, which the plot shows too." if facts.end > facts.last_step else ""
    return f"{facts.last_step:,} optimiser steps. Mean training loss over the last tenth of them: {means}.{later}"


# ---------------------------------------------------------------- data sets


def dataset_table(data: list[DataSet]) -> str:
    rows = [
        f"| {entry.group} | {entry.weight} | {entry.name} | {'—' if entry.rows is None else f'{entry.rows:,}'} |"
        for entry in data
    ]
    return "\n".join(["| group | weight | data set | rows |", "|---|---|---|---|", *rows])


def _data_sets(data_file: str, info_file: Any) -> list[DataSet]:
    """Of the data set YAML, if it is still there."""
    path = Path(data_file)
    if not data_file or not path.is_file():
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        info, place = content.pop("dataset_info", None), path.parent
        if isinstance(info_file, str) and Path(info_file).is_file():
            info, place = yaml.safe_load(Path(info_file).read_text(encoding="utf-8")), Path(info_file).parent
        known = {name: entry for family in (info or {}).values() for name, entry in family.items()}
        found = []
        for group, settings in content.items():
            weight = f"{settings.get('weight', 1):g}{', mandatory' * bool(settings.get('is_mandatory'))}"
            for name in settings["dataset_names"]:
                found.append(DataSet(group, weight, name, _num_rows(known.get(name, {}), place)))
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return []  # another format: the card names the file instead


def _num_rows(entry: Mapping[str, Any], place: Path) -> int | None:
    if listed := entry.get("parquet_info_path"):
        path = place / listed
        if path.is_file():
            parts = json.loads(path.read_text(encoding="utf-8"))
            return sum(part["num_rows"] for part in parts.values())
    if (lines := entry.get("jsonl_path")) and (path := place / lines).is_file():
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    return None
