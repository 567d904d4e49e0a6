"""Defaults < YAML < command line, with upstream's spellings."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from echo4o.config.arguments import (
    ARCHITECTURE_FLAGS,
    OWN_FLAGS,
    DataArguments,
    ModelArguments,
    RunConfig,
    TrainingArguments,
    fields_by_group,
)
from echo4o.config.errors import ConfigError
from echo4o.config.lists import in_one_string

PARTS = {"model": ModelArguments, "data": DataArguments, "training": TrainingArguments}
COMMAND_LINE = "command line"
_TRUE, _FALSE = ("true", "yes", "y", "t", "1"), ("false", "no", "n", "f", "0")
_NONE = ("none", "null", "")


def load_config(
    source: str | Path | Sequence[str] = (), overrides: Mapping[str, Any] | Sequence[str] = ()
) -> RunConfig:
    """Read the settings of a run.

    Args:
        source: a YAML file, or a command line: ``[file.yaml] [--flag value ...]``. Flags may be written with dashes or
            underscores and shortened as long as they stay unambiguous among upstream's.
        overrides: settings that overrule `source`: a mapping, or more command line.

    Raises:
        ConfigError: for an unknown setting (with the nearest known one), a wrong type, or a file that cannot be read.
    """
    argv = [str(source)] if isinstance(source, (str, Path)) else [str(word) for word in source]
    if not isinstance(overrides, Mapping):
        argv += [str(word) for word in overrides]
    files = []
    while argv and not argv[0].startswith("-"):
        files.append(argv.pop(0))
    if len(files) > 1:
        raise ConfigError(
            f"expected one YAML file, got {len(files)}: {' '.join(files)}. Settings are passed as --name value."
        )
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for path in files:
        values |= read_yaml(path)
        given.update((name, path) for name in values)
    flags = _parse_flags(argv)
    if isinstance(overrides, Mapping):
        flags |= {_known_name(name, "overrides"): value for name, value in overrides.items()}
    values |= flags
    given.update((name, COMMAND_LINE) for name in flags)
    overruled = _overrule_start(values, given)
    parts = {
        title: kind(
            **{
                f.name: convert(f.name, values[f.name], given[f.name])
                for f in dataclasses.fields(kind)
                if f.name in values
            }
        )
        for title, kind in PARTS.items()
    }
    return _follow_max_num_tokens(RunConfig(**parts, given=given, overruled=overruled))


def _overrule_start(values: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
    """Of a start in the YAML and another on the command line the latter counts; returns what was dropped → its file."""
    starts = [name for name in ("init_from", "resume_from") if _is_set(values.get(name))]
    if len({given[name] for name in starts}) < 2:
        return {}
    (dropped,) = (name for name in starts if given[name] != COMMAND_LINE)
    del values[dropped]
    return {dropped: given.pop(dropped)}


def _is_set(value: Any) -> bool:
    return value is not None and str(value).lower() not in _NONE


def _follow_max_num_tokens(config: RunConfig) -> RunConfig:
    """Defaults that a smaller ``max_num_tokens`` leaves behind follow it; stated values are checked instead."""
    limit = config.data.max_num_tokens
    for part, name in ((config.data, "max_num_tokens_per_sample"), (config.training, "expected_num_tokens")):
        if name not in config.given:
            setattr(part, name, min(getattr(part, name), limit))
    return config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML file, flat or nested under ``model``, ``data``, ``training`` and ``lora``.

    Raises:
        ConfigError: if the file cannot be read, is no mapping, or holds an unknown or repeated setting.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, not a {type(content).__name__}")
    values: dict[str, Any] = {}
    for name, setting in _flat(content, str(path)):
        known = _known_name(name, str(path))
        if known in values:
            raise ConfigError(f"{path} sets {known} twice; keep one of them")
        values[known] = setting
    return values


def _flat(content: Mapping[Any, Any], path: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting, out of ``model``, ``data``, ``training`` and ``lora`` (at the top or nested)."""
    for key, value in content.items():
        if key in PARTS and (value is None or isinstance(value, dict)):
            yield from _flat(value or {}, path)
        elif key == "lora" and isinstance(value, dict):
            for name, setting in value.items():
                yield _lora_setting(str(name), path), setting
        else:
            yield str(key), value


def _lora_setting(name: str, path: str) -> str:
    """``rank`` of a ``lora:`` block → ``lora_rank``.

    Raises:
        ConfigError: naming the nearest known one.
    """
    known = [setting.removeprefix("lora_") for setting in _TYPES if setting.startswith("lora_")]
    name = name.removeprefix("lora_")
    if name in known:
        return f"lora_{name}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
    raise ConfigError(f"unknown setting {name!r} of lora ({path}). {hint}")


def convert(name: str, value: Any, source: str) -> Any:
    """`value` in the type of the setting `name`.

    Raises:
        ConfigError: if it cannot be read as that type.
    """
    kind, optional = _TYPES[name]
    value = in_one_string(name, value, source)
    if value is None and optional:
        return None
    if isinstance(value, str) and optional and value.lower() in _NONE:
        return None
    text = str(value).strip()
    if kind is bool:
        if text.lower() in _TRUE + _FALSE and not isinstance(value, float):
            return text.lower() in _TRUE
    elif kind is str:
        if isinstance(value, (str, int, float, Path)) and not isinstance(value, bool):
            return str(value)
    elif not isinstance(value, bool):
        try:
            # 1e3 and 1_000.0 are fine as integers, 0.5 is not.
            number = float(text)
            if kind is float and math.isfinite(number):
                return number
            if number.is_integer():
                return int(text) if text.lstrip("+-").replace("_", "").isdigit() else int(number)
        except (ValueError, OverflowError):
            pass
    expected = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}[kind]
    raise ConfigError(f"{name} must be {expected}, not {value!r} ({source})")


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Write every setting, grouped, so that loading the file repeats the run.

    Architecture settings that were not stated are left to the model folder and stand as comments.
    """
    values = dict(config.items())
    lines = ["# Every setting of this run, as resolved from defaults, YAML and command line."]
    for title, group in fields_by_group():
        lines += ["", f"# {title}"]
        for _, setting in group:
            name = setting.name
            entry = yaml.safe_dump({name: values[name]}, default_flow_style=False, width=10_000).strip()
            if name in ARCHITECTURE_FLAGS and name not in config.given:
                entry = f"# {name}: read from the model"
            lines.append(entry)
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def flag_help(markdown: bool = False) -> str:
    """All flags with type, default and meaning: for ``--help``, or as Markdown tables for the documentation."""
    lines = []
    for title, group in fields_by_group():
        if markdown:
            lines += [f"**{title}**", "", "| flag | type | default | meaning |", "|---|---|---|---|"]
        else:
            lines += [f"{title}:"]
        for _, setting in group:
            kind = _TYPES[setting.name][0].__name__
            default = "–" if setting.default is None else setting.default
            meaning = setting.metadata["help"] + (" *(ours)*" if setting.name in OWN_FLAGS and markdown else "")
            if markdown:
                lines.append(f"| `{setting.name}` | {kind} | {default} | {meaning} |")
            else:
                lines.append(f"  --{setting.name} {kind.upper()}  [{default}]\n        {meaning}")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def _parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The settings stated on a command line; values as written."""
    if not argv:
        return {}
    from transformers import HfArgumentParser  # takes a second: not needed for YAML alone

    parser = HfArgumentParser(list(PARTS.values()), prog="echo4o train", add_help=False, allow_abbrev=False)
    parser.error = _refuse  # argparse would exit without an exception
    for action in parser._actions:
        # Only stated flags count, and YAML and command line are converted by the same rules.
        action.default = None
        action.choices = None
        if action.type is not None:
            action.type = str
    words = [_canonical(word) for word in argv]
    namespace, rest = parser.parse_known_args(words)
    if rest:
        raise ConfigError(f"cannot make sense of {' '.join(rest)!r}: every setting is passed as --name value")
    stated = {action.dest for word in words if word.startswith("--") for action in _action(parser, word)}
    return {name: value for name, value in vars(namespace).items() if name in stated}


def _action(parser, word: str) -> list:
    action = parser._option_string_actions.get(word.partition("=")[0])
    return [action] if action else []


def _canonical(word: str) -> str:
    """``--num-worker=2`` → ``--num_workers=2``; other words as they are."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and _TYPES.get(name[3:], (None,))[0] is bool:
        return f"--{name[3:]}=False"
    return f"--{_known_name(name, COMMAND_LINE, prefixes=True)}{equals}{value}"


def _known_name(name: str, source: str, prefixes: bool = False) -> str:
    """The setting called `name`, which may be an unambiguous prefix.

    Raises:
        ConfigError: naming the nearest known setting.
    """
    name = name.replace("-", "_")
    if name in _TYPES:
        return name
    # Upstream's shortened flags stay valid whatever we add, so its names are asked first.
    for names in (set(_TYPES) - OWN_FLAGS, set(_TYPES)) if prefixes and name else ():
        candidates = sorted(known for known in names if known.startswith(name))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise ConfigError(f"--{name} is ambiguous: {', '.join(candidates)}")
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, _TYPES, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]}?" if near else " `echo4o train --help` lists all settings."
    raise ConfigError(f"unknown setting {name!r} ({source}).{hint}")


def _refuse(message: str) -> typing.NoReturn:
    raise ConfigError(message)


def _types(kinds: Iterable[type]) -> dict[str, tuple[type, bool]]:
    """Setting → (type, may be None)."""
    result = {}
    for kind in kinds:
        for name, hint in typing.get_type_hints(kind).items():
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            result[name] = (next(option for option in options if option is not type(None)), type(None) in options)
    return result


#: What other trainers call these settings: spelled too differently for a nearest match.
OTHER_NAMES = {
    "learning_rate": "lr",
    "max_steps": "total_steps",
    "num_train_steps": "total_steps",
    "output_dir": "results_dir",
    "batch_size": "expected_num_tokens",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "gradient_clipping": "max_grad_norm",
    "seed": "global_seed",
    "r": "lora_rank",
    "rank": "lora_rank",
    "target_modules": "lora_targets",
    "optim": "optimizer",
}
_TYPES = _types(PARTS.values())
