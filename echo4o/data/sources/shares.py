"""Keys of a group that say how often it is drawn and how its conditions drop out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.sample import ConditionDropout
from echo4o.data.sources.settings import check_key, probability, share, whole, wrong
from echo4o.data.weights import WeightEntry, WeightSchedule

DROPOUT_KEYS = tuple(field.name for field in dataclasses.fields(ConditionDropout))
SHARE_KEYS = ("weight", "weight_by", "replay_share")
WEIGHT_BY = ("samples", "tokens")


def read_weight_by(value: Any, place: str) -> str:
    """What weights are shares of. Raises DataError unless it is one of WEIGHT_BY."""
    if not isinstance(value, str):
        raise wrong(value, place, " or ".join(WEIGHT_BY))
    check_key(value, WEIGHT_BY, f"{place} {value!r} in the dataset config")
    return value


def read_share(group: str, settings: Mapping[str, Any], weight_by: str) -> dict[str, Any]:
    """Fields of a SourceGroup: weight, schedule, replay_share, weight_by.

    Args:
        group: its name.
        settings: of the group.
        weight_by: of groups that do not say it.

    Raises:
        DataError: if one is wrong, or the group has both a weight and a replay_share.
    """
    fields: dict[str, Any] = {"weight_by": read_weight_by(settings.get("weight_by", weight_by), f"{group}.weight_by")}
    if "replay_share" in settings:
        if "weight" in settings:
            raise DataError(
                f"{group} in the dataset config has a weight and a replay_share; keep one of them: a replay_share is "
                "taken whatever the weights are"
            )
        return fields | {"replay_share": probability(settings["replay_share"], f"{group}.replay_share")}
    weight, place = settings.get("weight", 0.0), f"{group}.weight"
    if not isinstance(weight, list):
        return fields | {"weight": share(weight, place)}
    try:
        schedule = WeightSchedule(tuple(_entry(entry, f"{place}[{n}]") for n, entry in enumerate(weight)))
    except ValueError as error:
        raise DataError(f"{place} in the dataset config: {error}, e.g. [{{step: 0, weight: 1}}, …]") from error
    return fields | {"weight": schedule.at(0), "schedule": schedule}


def _entry(values: Any, place: str) -> WeightEntry:
    if not isinstance(values, Mapping):
        raise wrong(values, place, "an entry such as {step: 1000, weight: 2}")
    for key in values:
        check_key(key, ("step", "weight", "interpolate"), f"{place}.{key} in the dataset config")
    if missing := [key for key in ("step", "weight") if key not in values]:
        raise DataError(f"{place} in the dataset config lacks {' and '.join(missing)}")
    linear = values.get("interpolate", "none")
    if linear not in ("linear", "none"):
        raise wrong(linear, f"{place}.interpolate", "linear (from the entry before to this one), or left out")
    step = whole(values["step"], f"{place}.step", at_least=0)
    if linear == "linear" and not step:
        raise DataError(f"{place}.interpolate in the dataset config: no entry stands before step 0")
    return WeightEntry(step, share(values["weight"], f"{place}.weight"), linear == "linear")


def read_dropout(group: str, settings: Mapping[str, Any]) -> ConditionDropout | None:
    """Dropout probabilities of a group's own; None where it has none. Raises DataError if one is wrong."""
    own = {key: probability(settings[key], f"{group}.{key}") for key in DROPOUT_KEYS if settings.get(key) is not None}
    return ConditionDropout(**own) if own else None
