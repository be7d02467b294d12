"""The attribute in which a store keeps its plan and its provenance, and how an existing store is read for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.io.durable import open_root
from engine.io.objects import Place

ATTRIBUTE = "ourgan"
"""Attribute of the group that holds the plan and the provenance."""

COMMAND = "command"
"""Entry of the provenance: words of the command that continues the store; removed at the end, since they name local files."""

PICTURE = "picture"
"""Entry of a working store's provenance: the name of its picture, and whether an existing one may be replaced."""

IDENTITY = "id"
"""Entry of the provenance: random digits of an unfinished store; removed at the end, so that equal renders are equal files."""

PARTS = "parts"
"""Entry of the provenance: how an unfinished store is divided into parts (``Shares``); removed at the end."""


def stored_provenance(path: Place) -> dict[str, Any] | None:
    """Plan and provenance of an existing store, or None where there is no store of this engine."""
    if not (path / "zarr.json").is_file():
        return None
    try:
        attributes: Any = open_root(path).attrs.get(ATTRIBUTE)
        return None if attributes is None else dict(attributes)
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        return None


def stored_plan(path: Place) -> dict[str, Any] | None:
    """The plan of an existing store, or None where there is no store of this engine."""
    plan = (stored_provenance(path) or {}).get("plan")
    return dict(plan) if isinstance(plan, dict) else None


def is_same_store(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether provenance read twice is of one store. It has an id until it is finished; equal plans have equal pixels."""
    is_finished = now.get("complete") is True
    return before.get("plan") == now.get("plan") and (is_finished or before.get(IDENTITY) == now.get(IDENTITY))
