"""Origin of a picture inside it: written by every format, and read back from any picture."""

import json

import pytest
import pyvips
from PIL import Image

from engine.exporters import about, export

PROVENANCE = {
    "plan": {"seed": 7, "model_digest": "0123"},
    "licences": ['CC0-1.0: "Größe" (x, 3 bytes)'],
    "request": "ab",
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "ome.tif"])
def test_every_format_names_its_origin(suffix, tmp_path, picture, write_store):
    store = write_store(tmp_path / "a.zarr", [picture(5, 3)], ourgan={"complete": True, **PROVENANCE})
    path = export(store, tmp_path / f"a.{suffix}", allow_incomplete=True).path
    found = about.read_description(pyvips.Image.new_from_file(str(path)))
    assert found.pop("software").startswith("ourgan-engine")
    assert found == {"seed": 7, "model_digest": "0123", "licences": PROVENANCE["licences"], "request": "ab"}


def test_long_licences_fit_a_jpeg(tmp_path, picture, write_store):
    provenance = {"complete": True, **PROVENANCE, "licences": ["x" * 70_000]}
    store = write_store(tmp_path / "a.zarr", [picture(5, 3)], ourgan=provenance)
    path = export(store, tmp_path / "a.jpg", allow_incomplete=True).path
    found = about.read_description(pyvips.Image.new_from_file(str(path)))
    assert (found["licences"], found["request"]) == (["see the model"], "ab")


@pytest.mark.parametrize("text", ["", "a holiday", "[1, 2]", "{", "[" * 100_000, json.dumps({"request": 3})])
def test_other_descriptions_are_no_error(text, tmp_path):
    exif = Image.Exif()
    exif[0x010E] = text[:60_000]
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png", exif=exif)
    found = about.read_description(pyvips.Image.new_from_file(str(tmp_path / "a.png")))
    assert found == ({"request": 3} if "request" in text else {})
