"""The end of a render in parts: the parts that are missing, or the rest of the pyramid. Needs no model and no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InputError, ResumeError, counted, option
from engine.io.objects import Place, as_place
from engine.io.part_sink import holder_of, shares_of
from engine.io.provenance import stored_provenance
from engine.io.store_layout import written_shards
from engine.io.zarr_store import ZarrSink
from engine.plan.parts import Part
from engine.plan.plan import Plan
from engine.plan.writes import Writes

_NAMED = 5
"""Missing parts that a message names."""


@dataclass(frozen=True, slots=True)
class MissingPart:
    """A part of a store with missing shards."""

    part: Part | None
    """The part; None for a store that is not divided."""
    shards: int
    """Shards of the full image in the part."""
    missing: int
    """Parts that are not written yet."""
    process: int | None
    """Process of this machine that renders the part, where the system tells."""


class PartsMissing(ResumeError):
    """A store with missing shards."""

    def __init__(self, path: Place, parts: list[MissingPart]) -> None:
        self.parts = parts
        """Its parts with missing shards."""
        shards = counted(sum(part.missing for part in parts), "shard")
        names = [str(part.part) for part in parts if part.part is not None]
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        where = f" of {'part' if len(names) == 1 else 'parts'} {shown}" if names else ""
        one = parts[0].part
        again = f"{option('part', one)}" if len(names) == 1 else f"{option('part')} for each" if names else ""
        super().__init__(
            f"{path}: {shards}{where} missing; render again with {again or option('resume', True)}, then finish"
        )


def missing_parts(store: Place | str) -> list[MissingPart]:
    """Parts of an unfinished store with missing shards, by the presence of their files.

    Raises:
        InputError: it is no store of this engine, or is damaged in its metadata.
    """
    path = as_place(store)
    plan, provenance = _plan_of(path)
    shares = shares_of(path, plan, provenance)
    divided: list[tuple[Part | None, Writes]] = [(None, plan.writes())]
    if shares is not None:
        divided = [(part, shares.writes(plan, part)) for part in shares.parts]
    found, written = [], written_shards(path, plan)
    for part, writes in divided:
        shards = sum(plan.grid().covered(box).area for box in writes.rectangles)
        indices = (index for box in writes for index in plan.grid().indices(box))
        missing = sum(not written.has(0, index) for index in indices)
        if missing:
            process = None if part is None else holder_of(path, provenance, part)
            found.append(MissingPart(part, shards, missing, process))
    return found


def finish(store: Place | str, *, beside_parts: bool = False) -> None:
    """Complete a store whose parts are rendered: look at every shard's file, add the rest of the pyramid, mark it complete.

    A complete store stays as it is. The result equals that of one run.

    Args:
        store: folder or URL that parts were rendered into (``engine.render(..., part="2/4")``).
        beside_parts: also while processes hold parts, which other processes have rendered in their place. Such a process finds
            the store's identity gone and writes no more.

    Raises:
        PartsMissing: shards are missing, or were damaged and are removed now; ``parts`` says where. A ResumeError.
        ResumeError: another process writes the store.
        InputError: it is no store of this engine, or is damaged in its metadata.
    """
    path = as_place(store)
    if parts := missing_parts(path):
        raise PartsMissing(path, parts)
    sink = ZarrSink.resume(path, _plan_of(path)[0], shared=beside_parts)
    try:
        if parts := missing_parts(path):
            raise PartsMissing(path, parts)
        sink.finish()
    finally:
        sink.close()


def _plan_of(path: Place) -> tuple[Plan, dict[str, object]]:
    """Plan and provenance of a store of this engine. Raises InputError."""
    provenance = stored_provenance(path)
    if provenance is None:
        raise InputError(f"{path}: no store of this engine; name the folder that parts were rendered into")
    try:
        return Plan.from_json(provenance["plan"]), provenance
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: its plan is damaged; render again with {option('overwrite', True)}") from error
