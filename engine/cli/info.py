"""``engine info``: a model, a store or a picture, and how an unfinished store is continued."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.causes import raise_if_exhausted
from engine.cli import report
from engine.cli.working import look_command
from engine.errors import InputError, counted
from engine.exporters.about import read_description
from engine.exporters.pyramid import count_shards
from engine.io.durable import open_root
from engine.io.files import folder_bytes
from engine.io.objects import ObjectPath, Place, as_place, local_copy
from engine.io.picture_file import open_picture
from engine.io.provenance import ATTRIBUTE, PARTS
from engine.model.bundle import load
from engine.store import resume_command

if TYPE_CHECKING:
    import pyvips

_BITS = {"uchar": 8, "char": 8, "ushort": 16, "short": 16, "uint": 32, "int": 32, "float": 32, "double": 64}
"""libvips' name of a sample's type -> bits."""


def info(name: Path, as_json: bool) -> None:
    """Check a model completely and print it, or describe a store or a picture.

    Raises:
        InputError: the file or folder is none of them, or is damaged.
    """
    place = as_place(name)
    if place.is_dir() or (place.suffix == ".zarr" and not place.exists()):
        account = _store(place)
        show = _print_store
    elif (image := open_picture(path := local_copy(name))) is not None:
        account = _picture(path, image) | {"path": str(place)}
        show = _print_picture
    else:
        model = load(path)
        if as_json:
            report.print_json(report.model_json(model))
        else:
            report.print_model(model)
        return
    if as_json:
        report.print_json(account)
    else:
        show(account)


def _store(path: Place) -> dict[str, Any]:
    """Facts about a store of this engine or another program's OME-Zarr image, from its metadata and its files."""
    if not path.exists():
        raise InputError(f"{path}: no such store; name a model, a store or a picture")
    try:
        group = open_root(path)
        attributes: dict[str, Any] = group.attrs.asdict()
        image = attributes.get("ome", attributes)["multiscales"][0]
        arrays: list[Any] = [group[dataset["path"]] for dataset in image["datasets"]]
        axes = "".join(axis["name"] for axis in image["axes"])
        shapes = [array.shape for array in arrays]
        *_, height, width = shapes[0]
    except (OSError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise_if_exhausted(error)
        raise InputError(f"{path}: a folder without an OME-Zarr image; name a model, a store or a picture") from error
    account = {
        "kind": "store",
        "path": str(path),
        "width": width,
        "height": height,
        "axes": axes,
        "dtype": str(arrays[0].dtype),
        "levels": [{"width": shape[-1], "height": shape[-2]} for shape in shapes],
        "bytes": _size(path),
    }
    provenance = attributes.get(ATTRIBUTE)
    return account | _render(path, provenance, arrays[0]) if isinstance(provenance, dict) else account


def _size(store: Place) -> int:
    """Bytes of all files of a store."""
    if isinstance(store, ObjectPath):
        return sum(int(about["size"]) for _, about in store.objects())
    return folder_bytes(store)


def _render(path: Place, provenance: dict[str, Any], array: Any) -> dict[str, Any]:  # noqa: ANN401 (zarr's types)
    """Facts about the render of a store of this engine."""
    written, total = count_shards(path, array)
    plan, complete = dict(provenance.get("plan") or {}), provenance.get("complete") is True and written >= total
    return {
        "complete": complete,
        "shards": {"written": written, "total": total},
        "parts": len(parts) - 1 if isinstance(parts := provenance.get(PARTS), list) else None,
        "continue": None if complete else resume_command(path, provenance),
        "engine": provenance.get("engine"),
        "model": provenance.get("model"),
        "seed": plan.get("seed"),
        "noise_gain": plan.get("noise_gain"),
        "canvas": plan.get("canvas"),
        "roi": plan.get("roi"),
        "wrap": plan.get("wrap"),
        "executor": plan.get("executor"),
        "precision": plan.get("precision"),
        "backend": plan.get("backend"),
        "precision_error_levels": provenance.get("precision_error_levels"),
        "seam_error_levels": provenance.get("seam_error_levels"),
        "licences": provenance.get("licences") or [],
    }


def _print_store(account: dict[str, Any]) -> None:
    size, first = f"{account['width']}x{account['height']}", account["levels"][-1]
    is_ours = "complete" in account
    state = ""
    if is_ours:
        shards = account["shards"]
        done = shards["written"] / shards["total"]
        state = (
            ", complete"
            if account["complete"]
            else f", {done:.0%} done ({shards['written']} of {shards['total']} shards)"
        )
    report.prose(f"{account['path']}: {size}{state}, {report.file_size(account['bytes'])}")
    levels = counted(len(account["levels"]), "level")
    smallest = f" down to {first['width']}x{first['height']}" if len(account["levels"]) > 1 else ""
    report.prose(f"OME-Zarr image, {account['dtype']}, axes {account['axes']}, {levels}{smallest}")
    if is_ours:
        _print_render(account)
    report.line(f"view it: {shlex.join(['engine', 'view', account['path']])}")
    if account.get("complete", True):
        report.line(f"look at it: {look_command(as_place(account['path']), account['width'], account['height'])}")


def _print_render(account: dict[str, Any]) -> None:
    roi, canvas = account["roi"], account["canvas"]
    gain, region = report.gain_text(account["noise_gain"]), ""
    if roi and canvas and [roi["y1"] - roi["y0"], roi["x1"] - roi["x0"]] != canvas:
        region = f", the region at {roi['x0']},{roi['y0']} of {canvas[1]}x{canvas[0]}"
    report.prose(f"made by engine {account['engine']} from {account['model']}, seed {account['seed']}{gain}{region}")
    seam = report.seam_text(account["seam_error_levels"])
    wrap = report.wrap_text(account["wrap"])
    report.prose(f"{account['executor']}, {account['precision']}, {wrap}seam error {seam}")
    report.print_licences(account["licences"])
    if account["parts"]:
        command = shlex.join(["engine", "finish", account["path"]])
        report.line(f"in {counted(account['parts'], 'part')}: {command} names those that are missing")
    elif account["continue"]:
        report.line(f"continue: {account['continue']}")
    elif not account["complete"]:
        report.prose("continue: give the options of its render again, with --resume")


def _picture(path: Path, image: pyvips.Image) -> dict[str, Any]:
    """Facts about a picture from its header."""
    fields = set(image.get_fields())
    return {
        "kind": "picture",
        "path": str(path),
        "format": str(image.get("vips-loader")).split("load")[0].upper() if "vips-loader" in fields else None,
        "width": image.width,
        "height": image.height,
        "channels": image.bands,
        "bits": _BITS.get(image.format),
        "bytes": path.stat().st_size,
        "profile": "icc-profile-data" in fields,
        "provenance": read_description(image),
    }


def _print_picture(account: dict[str, Any]) -> None:
    size, bits = f"{account['width']}x{account['height']}", f" of {account['bits']} bits" if account["bits"] else ""
    report.prose(
        f"{account['path']}: {account['format']} picture, {size}, {counted(account['channels'], 'channel')}{bits}, "
        f"{report.file_size(account['bytes'])}"
    )
    made = account["provenance"]
    if "software" in made:
        seed = f", seed {made['seed']}{report.gain_text(made.get('noise_gain'))}" if "seed" in made else ""
        report.prose(f"made by {made['software']}{seed}")
        report.print_licences(made.get("licences") or [])
    path = as_place(account["path"])
    report.line(f"enlarge it: {shlex.join(['engine', 'upscale', str(path), '--out', f'{path.stem}-large.png'])}")
