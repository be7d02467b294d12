"""``engine view``: refusals in one line. tests/view/test_page.py runs it in a browser."""

import shutil

import pytest
from support.growing import store_of

pytest.importorskip("uvicorn")

from engine.view import beside


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store_of(tmp_path / "a.zarr", (60, 80))
    monkeypatch.setattr(beside, "STATIC", tmp_path / "static")
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "app.js").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("view no.zarr", 4, "no.zarr: no such store"),
        ("view a.png", 2, "a.png: is no store"),
        ("view a.zarr no.jpg", 4, "no.jpg: no such store"),
        ("view a.zarr --dpi 0", 2, "--dpi 0: must be 1 to 100000"),
        ("view a.zarr --host 192.0.2.1", 4, "192.0.2.1:8765: cannot be listened at"),
        ("view a.zarr --seed 1", 2, "--seed: applies to a model, and a.zarr is a store"),
        ("view no.safetensors", 4, "no.safetensors: no such file"),
        ("view a.zarr --port 99999", 2, "--port 99999: must be 0 to 65535"),
        ("render --size 64x48 --out b.zarr --view --count 2", 2, "--view: shows one render"),
        ("render --size 64x48 --out b.zarr --view --dry-run", 2, "--view: shows one render"),
    ],
)
def test_refusals(store, call, line, code, message):
    (store / "a.png").touch()
    status, out, err = call(line)
    assert (status, out) == (code, "")
    assert err.startswith(f"engine: {message}")
    assert len(err.splitlines()) == 1


def test_missing_page_says_how_to_build_it(store, call):
    shutil.rmtree(store / "static")
    for line in ("view a.zarr", "render --size 64x48 --out b.zarr --view"):
        assert call(line) == (
            2, "", "engine: view: the page is not built; install node, then: cd viewer && npm ci && npm run build\n"
        )  # fmt: skip


def test_missing_extra_is_named(store, call, monkeypatch):
    monkeypatch.setattr(beside, "find_spec", lambda name: None)
    assert call("view a.zarr")[2] == "engine: view: needs starlette and uvicorn; pip install 'ourgan-engine[view]'\n"


def test_info_names_the_viewer(store, call):
    assert "view it: engine view a.zarr" in call("info a.zarr")[1].splitlines()
