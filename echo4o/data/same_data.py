"""Whether a checkpoint's data stream can go on with the data of this run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from echo4o.data.errors import DataError
from echo4o.data.sources.base import SourceGroup

logger = logging.getLogger(__name__)


def data_identity(groups: Sequence[SourceGroup], data_seed: int) -> dict[str, Any]:
    """JSON-able account of what determines a stream's rows and their order."""
    return {"data_seed": data_seed, "groups": {group.name: _identity(group) for group in groups}}


def _identity(group: SourceGroup) -> dict[str, Any]:
    return {
        "rows": len(group.source),
        "weight": group.weight,
        "is_mandatory": group.is_mandatory,
        **({"subset": dict(group.subset)} if group.subset else {}),
        **({} if group.drawn_by_weight_alone else {"share": group.describe_share()}),
    }


def check_same_data(saved: Mapping[str, Any], groups: Sequence[SourceGroup], data_seed: int) -> None:
    """Compare a checkpoint's `data_identity` with this run's. Other weights and shares are logged and allowed: they
    change which group comes next, but no row is read twice or lost. Groups with ``resume_data_status: false`` may have
    other rows.

    Raises:
        DataError: naming everything else that changed.
    """
    before, now = saved["groups"], data_identity(groups, data_seed)["groups"]
    changes = [] if saved["data_seed"] == data_seed else [f"data_seed was {saved['data_seed']} and is {data_seed}"]
    changes += [f"group {name} is gone" for name in before if name not in now]
    changes += [f"group {name} is new" for name in now if name not in before]
    for group in groups:
        if group.name not in before:
            continue
        was, found = before[group.name], now[group.name]
        if group.resume_data_status:
            changes += _other_rows(group.name, was, found)
        if was["is_mandatory"] != found["is_mandatory"]:
            changes.append(
                f"is_mandatory of group {group.name} was {was['is_mandatory']} and is {found['is_mandatory']}"
            )
        if _share(was) != _share(found):
            logger.warning("the weight of group %s was %s and is %s now", group.name, _share(was), _share(found))
    if changes:
        raise DataError(
            "the checkpoint's data stream cannot go on, rows would repeat or get lost: "
            f"{'; '.join(changes)}.\n"
            "  Restore the dataset YAML, its data and --data_seed, or begin the data stream anew with "
            "--resume_data False."
        )


def _share(identity: Mapping[str, Any]) -> str:
    return identity.get("share", f"{identity['weight']:g}")


def _other_rows(name: str, was: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Differences in the rows of a group. Other rows of the same number would go unnoticed but for the subset."""
    changes = []
    if was["rows"] != found["rows"]:
        changes.append(f"group {name} had {was['rows']} rows and has {found['rows']}")
    before, now = was.get("subset", {}), found.get("subset", {})
    changes += [
        f"{key} of group {name} was {_told(before, key)} and is {_told(now, key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    return changes


def _told(subset: Mapping[str, Any], key: str) -> str:
    return str(subset[key]) if key in subset else "not set"
