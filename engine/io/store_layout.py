"""Layout of a store: the metadata that a plan gives it, and whether an existing store has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from engine.errors import InputError, ResumeError, option
from engine.io import ome
from engine.io.files import new_identity
from engine.io.objects import Place
from engine.io.provenance import ATTRIBUTE, IDENTITY, stored_plan
from engine.io.shards import WrittenShards
from engine.pixels import PixelFormat
from engine.plan.plan import Plan
from engine.plan.sides import Sides, pyramid_of, sides_of


def write_metadata(group: zarr.Group, name: str, plan: Plan, provenance: dict[str, Any]) -> None:
    """Write the metadata of a new store."""
    for level, size in enumerate(plan.pyramid):
        _create_level(group, level, size, plan)
    group.attrs.update(
        {
            "ome": ome.image_metadata(name, len(plan.pyramid), (plan.roi.y0, plan.roi.x0), plan.pixels),
            ATTRIBUTE: {"complete": False, IDENTITY: new_identity(), "plan": plan.to_json(), **provenance},
        }
    )


def metadata_of(name: str, plan: Plan, provenance: dict[str, Any]) -> dict[str, bytes]:
    """The metadata of a new store, by key."""
    files: dict[str, Any] = {}
    write_metadata(zarr.open_group(MemoryStore(files), mode="w-", zarr_format=3), name, plan, provenance)
    return {key: value.to_bytes() for key, value in files.items()}


def _create_level(group: zarr.Group, level: int, size: tuple[int, int], plan: Plan) -> None:
    pixels, typesize = plan.pixels, plan.pixels.depth // 8
    group.create_array(
        str(level),
        shape=(pixels.channels, *size),
        shards=(pixels.channels, *plan.shard),
        chunks=(pixels.channels, *plan.chunk),
        dtype=pixels.dtype,
        compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=typesize), Crc32cCodec()],
        dimension_names=ome.AXES,
        fill_value=0,
    )


def check_plan(path: Place, plan: Plan) -> None:
    """Raise ResumeError unless ``path`` is a store of this plan."""
    stored, overwrite = stored_plan(path), option("overwrite", True)
    if stored is None:
        is_empty = isinstance(path, Path) and path.is_dir() and not any(path.iterdir())
        advice = f", or {overwrite} to replace it" if is_empty else ", or remove it"
        raise ResumeError(f"{path}: not a store of this engine; give another {option('out')}{advice}")
    if differences := plan.differences(stored):
        raise ResumeError(
            f"{path}: made with another plan ({'; '.join(differences)}); give the same options, or {overwrite}"
        )


def check_array(where: str, array: Any, size: Sides, shard: Sides, chunk: Sides, pixels: PixelFormat) -> None:  # noqa: ANN401
    """Raise InputError unless an array's metadata is as ``create`` writes it; earlier stores have no checksums.

    Args:
        where: name of the array for the message.
        array: array of Zarr.
        size: (height, width) of the level.
        shard, chunk: (height, width) in pixels.
    """
    codec = array.metadata.codecs[0].to_dict()
    settings = codec.get("configuration", {})
    inner = [c["name"] for c in settings.get("codecs", ())]
    index = [c["name"] for c in settings.get("index_codecs", ())]
    is_ours = (
        array.shape == (pixels.channels, *size)
        and array.shards == (pixels.channels, *shard)
        and array.chunks == (pixels.channels, *chunk)
        and array.dtype == pixels.dtype
        and len(array.metadata.codecs) == 1
        and inner in (["bytes", "blosc"], ["bytes", "blosc", "crc32c"])
        and index == ["bytes", "crc32c"]
        and str(settings.get("index_location")) == "end"
    )
    if not is_ours:
        raise InputError(f"{where}: its zarr.json does not fit the plan of the store; give {option('overwrite', True)}")


def stored_sizes(plan: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Sizes of the levels of a stored plan. Raises KeyError, TypeError or ValueError where it is damaged."""
    roi = plan["roi"]
    return pyramid_of((roi["y1"] - roi["y0"], roi["x1"] - roi["x0"]), sides_of(plan["chunk"]))


def written_shards(path: Place, plan: Plan) -> WrittenShards:
    """Which shards of a store of this plan are there."""
    return WrittenShards(path, [plan.grid(level) for level in range(len(plan.pyramid))])
