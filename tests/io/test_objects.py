"""Names of object stores; no server is asked."""

import sys
from pathlib import Path

import pytest

from engine.errors import UsageError
from engine.io import objects
from engine.io.objects import ObjectPath, as_place, check_local, spelled


@pytest.mark.parametrize("scheme", objects.SCHEMES)
def test_a_url_survives_as_a_path(scheme):
    url = f"{scheme}://bucket/folder/a b.zarr"
    place = as_place(Path(url))  # which makes one slash of two
    assert place == as_place(url) == ObjectPath(url)
    assert str(place) == spelled(Path(url)) == url
    assert (place.name, place.suffix, place.stem) == ("a b.zarr", ".zarr", "a b")
    assert str(place / "0" / "zarr.json") == f"{url}/0/zarr.json"


@pytest.mark.parametrize("name", ["a.zarr", "/s3/a.zarr", "s3", "s3:a.zarr", "https://bucket/a.zarr", "C:/a.zarr"])
def test_other_names_are_paths(name):
    assert as_place(name) == Path(name)


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hushhush@bucket/a",
        "s3://KEY:hush/hush@bucket/a",
        "s3://bucket/a?X-Amz-Signature=hushhush",
        "s3://b/a#hushhush",
        "s3://b",
        "s3://b/../a",
    ],
)
def test_urls_that_name_nothing_or_hold_secrets_are_refused(url):
    with pytest.raises(UsageError, match="give s3://BUCKET/NAME") as caught:
        as_place(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "render --size 96x64 --out s3://bucket/a.png",
        "upscale a.png --out s3://bucket/a.png",
        "upscale a.png b.png --out s3://bucket/folder",
        "export a.zarr s3://bucket/a.tif",
        "render --size 96x64 --out a.zarr --report gs://bucket/a.json",
        "model build --sr realsr --out s3://bucket/m.safetensors",
    ],
)
def test_only_stores_are_written_to_a_url(line, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(line)
    assert code == 2
    assert error.count("\n") == 1
    assert "only stores are written to an object store" in error
    assert not list(tmp_path.iterdir())


def test_an_address_that_is_set_later_has_its_own_client(monkeypatch):
    pytest.importorskip("obstore")
    clients = []
    for address in ("http://127.0.0.1:9", "http://127.0.0.1:10", "http://127.0.0.1:9"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        clients.append(ObjectPath("s3://bucket/a.zarr").client())
    assert clients[0] is clients[2] is not clients[1]


def test_a_missing_extra_is_one_line(call, monkeypatch):
    objects._obstore.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore", None)
    code, _, error = call("check s3://bucket/a.zarr")
    assert (code, error.count("\n")) == (2, 1)
    assert 'pip install "ourgan-engine[cloud]"' in error
    with pytest.raises(UsageError, match="only stores"):
        check_local("out", "s3://bucket/a")
