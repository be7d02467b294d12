"""The viewer's application: what it serves, and what it refuses. Requests go to the application itself, without a socket."""

import asyncio
import io
import json
import random
import struct
import time
import urllib.parse
from contextlib import asynccontextmanager

import numpy as np
import pytest
import zarr
from PIL import Image
from support.damage import flip
from support.growing import new_store, pixels_of, store_of, write

pytest.importorskip("starlette")

from engine.errors import UsageError
from engine.geometry import Box
from engine.growing import TILE
from engine.view import app as viewer_app
from engine.view.app import Viewer
from engine.view.picture import PictureSource
from engine.view.pool import QUEUE
from engine.view.store import Report, StoreSource

SMALL = (300, 700)


class Answer:
    def __init__(self):
        self.status, self.headers, self.body = 0, {}, b""

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def pixels(self):
        return np.asarray(Image.open(io.BytesIO(self.body)))


async def ask(app, path, query="", method="GET", headers=(), until=None):
    """Send a request; ``until``: stop reading when the body holds this text."""
    answer, gone = Answer(), asyncio.Event()
    fields = {"host": "127.0.0.1:8765", **dict(headers)}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": urllib.parse.unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in fields.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8765),
    }  # fmt: skip
    started = False

    async def receive():
        nonlocal started
        if not started:
            started = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            answer.body += message.get("body", b"")
            if until is not None and until in answer.body:
                gone.set()

    await app(scope, receive, send)
    return answer


@asynccontextmanager
async def running(*sources, model=None, **options):
    """The application with its watcher."""
    viewer = Viewer(sources, model=model)
    inbox, outbox = asyncio.Queue(), asyncio.Queue()
    app = viewer.app(**options)
    life = asyncio.create_task(app({"type": "lifespan", "asgi": {}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    await outbox.get()
    try:
        yield viewer, app
    finally:
        await viewer.close()
        await inbox.put({"type": "lifespan.shutdown"})
        await life


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small finished store, and its pixels [h, w, 3]."""
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    return path, store_of(path, SMALL).transpose(1, 2, 0)


def test_tiles_and_regions_are_the_stores_pixels(store):
    path, pixels = store

    async def run():
        async with running(StoreSource(path)) as (_, app):
            view = (await ask(app, "/api/view.json")).json
            (source,) = view["sources"]
            assert source["sizes"] == [[700, 300], [350, 150], [175, 75], [88, 38]]
            assert source["details"]["seed"] == "1"
            for x in range(2):
                answer = await ask(app, f"/api/tile/0/0/{x}_0.png")
                assert answer.headers["x-tile"] == "finished"
                assert np.array_equal(answer.pixels, pixels[:TILE, x * TILE : (x + 1) * TILE])
            again = await ask(app, "/api/tile/0/0/1_0.png", headers=[("if-none-match", answer.headers["etag"])])
            assert (again.status, again.body) == (304, b"")
            region = await ask(app, "/api/region/0.png", "x=100&y=20&width=555&height=270")
            assert np.array_equal(region.pixels, pixels[20:290, 100:655])
            first = await ask(app, "/api/region/0.png", "x=100&y=20&width=555&height=270", method="HEAD")
            assert (first.status, first.body) == (200, b"")
            assert "a-100-20-555x270.png" in region.headers["content-disposition"]

    asyncio.run(run())


def test_region_is_streamed_in_bands(store, monkeypatch):
    monkeypatch.setattr("engine.view.png._BAND_BYTES", 50_000)
    path, pixels = store

    async def run():
        async with running(StoreSource(path)) as (_, app):
            region = await ask(app, "/api/region/0.png", "x=0&y=0&width=700&height=300")
            assert np.array_equal(region.pixels, pixels)

    asyncio.run(run())


def test_growth_is_told_and_served_without_being_asked_for(tmp_path, monkeypatch):
    """One connection sees the render begin, grow and end; a tile changes with its tag; a region waits until it is finished."""
    monkeypatch.setattr(viewer_app, "_LOOK_GROWING", 0.01)
    sink, pixels = new_store(tmp_path / "a.zarr", SMALL)

    async def run():
        source = StoreSource(tmp_path / "a.zarr")
        async with running(source) as (_, app):
            events = asyncio.create_task(ask(app, "/api/events", until=b'"complete": true'))
            coarse = await ask(app, "/api/tile/0/0/0_0.png")
            assert coarse.headers["x-tile"] == "coarse"
            refused = await ask(app, "/api/region/0.png", "x=0&y=0&width=256&height=256")
            assert refused.status == 409
            await asyncio.to_thread(write, sink, pixels, 4)
            await until(lambda: source.state.finished.sum() == 4)
            tile = await ask(app, "/api/tile/0/0/0_0.png", headers=[("if-none-match", coarse.headers["etag"])])
            assert tile.status == 200
            assert np.array_equal(tile.pixels[:256], pixels.transpose(1, 2, 0)[:256, :512])
            source.report = Report(0.95, 12.0, time.monotonic())
            await until(lambda: source.state.share == 0.95)
            assert 0 < source.state.seconds_left <= 12
            await asyncio.to_thread(write, sink, pixels)
            messages = (await asyncio.wait_for(events, 60)).body.decode().split("\n\n")
        states = [json.loads(text[6:])["sources"][0] for text in messages if text.startswith("data: ")]
        assert states[0]["running"] is True
        assert states[0]["share"] == 0
        assert states[-1]["complete"] is True
        shares = [state["share"] for state in states]
        assert shares == sorted(shares)

    asyncio.run(run())


async def until(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("not within a minute")


def test_stopped_render_says_how_to_go_on(tmp_path):
    sink, pixels = new_store(tmp_path / "a.zarr", SMALL)
    write(sink, pixels, count=2)
    sink.close()
    source = StoreSource(tmp_path / "a.zarr")
    source._history = []
    state = source.state
    assert state.running is False
    assert 0 < state.share < 1
    assert state.resume == f"engine render --size 700x300 --out {tmp_path / 'a.zarr'} --resume"


def test_damage_is_shown_and_told(tmp_path):
    store_of(tmp_path / "a.zarr", SMALL)
    flip(tmp_path / "a.zarr/0/c/0/0/0", 100)

    async def run():
        source = StoreSource(tmp_path / "a.zarr")
        async with running(source) as (_, app):
            assert (await ask(app, "/api/tile/0/0/0_0.png")).headers["x-tile"] == "damaged"
            assert "wrong checksum" in source.state.problems[0]

    asyncio.run(run())


def test_metadata_of_any_kind_are_served(tmp_path):
    """They come from a file: the page gets the types that it expects, or nothing."""
    store_of(tmp_path / "a.zarr", (60, 80))
    root = json.loads((tmp_path / "a.zarr/zarr.json").read_text())
    root["attributes"]["ourgan"] |= {
        "model": {"a": 1}, "licences": [1, None, "x" * 9999], "seam_error_levels": float("nan"), "plan": {"stages": 7, "seed": []},
        "precision_error_levels": {"mean": "0", "max": 1, "p999": None},
    }  # fmt: skip
    (tmp_path / "a.zarr/zarr.json").write_text(json.dumps(root))

    async def run():
        async with running(StoreSource(tmp_path / "a.zarr")) as (_, app):
            return (await ask(app, "/api/view.json")).json["sources"][0]["details"]

    details = asyncio.run(run())
    assert {key for key in ("model", "seamError", "precisionError", "seed") if details[key] is not None} == set()
    assert [len(text) for text in details["licences"]] == [1, 500]


def test_picture_beside_a_store(store, tmp_path):
    pixels = pixels_of((600, 900), 3).transpose(1, 2, 0)
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    async def run():
        async with running(StoreSource(store[0]), PictureSource(tmp_path / "photo.png")) as (_, app):
            view = (await ask(app, "/api/view.json")).json
            assert [s["details"]["kind"] for s in view["sources"]] == ["store", "picture"]
            tile = await ask(app, "/api/tile/1/0/1_1.png")
            assert np.array_equal(tile.pixels, pixels[512:, 512:900])
            assert (await ask(app, "/zarr/photo.png/zarr.json")).status == 404

    asyncio.run(run())


def test_store_is_readable_by_other_programs(store, tmp_path):
    """Every file by its name, whole and by ranges, with CORS; the metadata of an unfinished store names no local file."""
    path, _ = store
    copy = tmp_path / "copy.zarr"

    async def run():
        async with running(StoreSource(path)) as (_, app):
            for file in path.rglob("*"):
                if file.is_file():
                    name = file.relative_to(path).as_posix()
                    answer = await ask(app, f"/zarr/a.zarr/{name}", headers=[("sec-fetch-site", "cross-site")])
                    assert answer.headers["access-control-allow-origin"] == "*"
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    (copy / name).write_bytes(answer.body)
            shard = (path / "0/c/0/0/0").read_bytes()
            index = await ask(app, "/zarr/a.zarr/0/c/0/0/0", headers=[("range", "bytes=-68")])
            assert (index.status, index.body) == (206, shard[-68:])
            part = await ask(app, "/zarr/a.zarr/0/c/0/0/0", headers=[("range", "bytes=10-19")])
            assert (part.status, part.body) == (206, shard[10:20])
            preflight = await ask(app, "/zarr/a.zarr/0/c/0/0/0", method="OPTIONS")
            assert preflight.headers["access-control-allow-private-network"] == "true"

    asyncio.run(run())
    assert np.array_equal(zarr.open_group(copy, mode="r")["0"][:], zarr.open_group(path, mode="r")["0"][:])
    new_store(tmp_path / "new.zarr", SMALL)

    async def unfinished():
        async with running(StoreSource(tmp_path / "new.zarr")) as (_, app):
            return (await ask(app, "/zarr/new.zarr/zarr.json")).json["attributes"]["ourgan"]

    assert not {"command", "id", "first_look"} & set(asyncio.run(unfinished()))


def hostile_requests(seed=0):
    """A thousand requests that no page sends."""
    random.seed(seed)
    ups = ["../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..\\", "%5c..%5c", "....//", "%00", "//", "./", "%c0%ae%c0%ae/"]
    targets = ["etc/passwd", "secret.txt", "zarr.json", "0/zarr.json", "../secret.txt"]
    roots = ["/", "/static/", "/zarr/a.zarr/", "/zarr/", "/zarr/a.zarr/0/", "/api/", "/api/tile/"]
    numbers = [
        "-1",
        "999999999",
        "99999999999999999999",
        "1e9",
        "0x1",
        "NaN",
        "٣",
        "1.5",
        "",
        "%20",
        "0;1",
        "null",
        "-0",
    ]
    for _ in range(400):
        yield {"path": random.choice(roots) + random.choice(ups) * random.randint(1, 8) + random.choice(targets)}
    for _ in range(250):
        source, level, x, y = (random.choice(numbers) for _ in range(4))
        yield {"path": f"/api/tile/{source}/{level}/{x}_{y}.png"}
    for _ in range(150):
        values = [random.choice([*numbers, "2147483648"]) for _ in range(4)]
        query = urllib.parse.urlencode(dict(zip(("x", "y", "width", "height"), values, strict=True)))
        yield {"path": "/api/region/0.png", "query": query}
    for name in ("link", "0/link", "0/c/0/0/link", "0/c", "0", "", "0/c/0/0/0/", "a.zarr", "0/c/0/0/00000000000"):
        yield {"path": f"/zarr/a.zarr/{name}"}
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND"):
        for path in ("/", "/api/view.json", "/zarr/a.zarr/zarr.json", "/zarr/a.zarr/0/c/0/0/0"):
            yield {"path": path, "method": method}
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil:8765",
        "",
        "[::1",
        "0.0.0.0:8765",
        "127.0.0.1@evil",
    ):
        for path in ("/", "/api/view.json", "/api/events", "/zarr/a.zarr/zarr.json"):
            yield {"path": path, "headers": [("host", host)]}
    for path in ("/api/view.json", "/api/events", "/api/tile/0/0/0_0.png", "/api/region/0.png"):
        yield {"path": path, "headers": [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")]}
        yield {"path": path, "headers": [("content-length", "1000000000")]}
        yield {"path": path, "headers": [("transfer-encoding", "chunked")]}
        yield {"path": path, "query": "a" * 5000}
        yield {"path": path + "x" * 5000}
    for length in range(0, 120):
        yield {
            "path": "/"
            + "".join(chr(random.randint(33, 126)) for _ in range(length + 3)).replace("?", "").replace("#", "")
        }


def test_a_thousand_hostile_requests_are_refused(tmp_path):
    store_of(tmp_path / "a.zarr", SMALL)
    (tmp_path / "secret.txt").write_text("secret of this machine")
    for folder in ("", "0", "0/c/0/0"):
        (tmp_path / "a.zarr" / folder / "link").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "a.zarr/0/c/0/1/9").symlink_to(tmp_path / "secret.txt")
    requests = [*hostile_requests(), {"path": "/zarr/a.zarr/0/c/0/1/9"}]
    assert len(requests) >= 1000

    async def run():
        async with running(StoreSource(tmp_path / "a.zarr")) as (_, app):
            answers = [await ask(app, **request) for request in requests]
            assert (await ask(app, "/api/view.json")).status == 200
            return answers

    for request, answer in zip(requests, asyncio.run(run()), strict=True):
        assert 400 <= answer.status < 500, (request, answer.status)
        assert b"secret" not in answer.body
        assert b"root:" not in answer.body
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert len(answer.body) < 200


def test_token_guards_every_path(store):
    async def run():
        async with running(StoreSource(store[0]), token="abc123", names=()) as (_, app):
            for path in (
                "/",
                "/api/view.json",
                "/zarr/a.zarr/zarr.json",
                "/abc12/",
                "/abc1234/",
                "/ABC123/",
                "/static/app.js",
            ):
                assert (await ask(app, path)).status == 404
            assert (await ask(app, "/abc123")).headers["location"] == "/abc123/"
            for path in ("/abc123/api/view.json", "/abc123/zarr/a.zarr/zarr.json", "/abc123/api/tile/0/0/0_0.png"):
                assert (await ask(app, path, headers=[("host", "workstation:8765")])).status == 200

    asyncio.run(run())


class Asked:
    """A model that notes what is asked of it, over a store that is there."""

    look, on_change, sample = None, None, staticmethod(lambda sheet, seed: None)

    def __init__(self, path):
        self.canvas, self.asked = (1, path), []
        self.state = {"seed": str(2**64 - 1)}

    def __getattr__(self, name):
        return lambda *values, **named: self.asked.append((name, *values, *named.values()))

    def open(self, seed, size, gain):
        if size == "huge":
            raise UsageError("too large")
        self.asked.append(("open", seed, size, gain))


def test_only_the_page_itself_asks_something_of_a_model(store):
    """Actions are POST requests of the page's own origin; a viewer without a model takes none."""
    own = {"method": "POST", "headers": [("origin", "http://127.0.0.1:8765")]}

    async def run():
        model = Asked(store[0])
        async with running(model=model) as (viewer, app):
            await until(lambda: viewer.sources)
            assert (await ask(app, "/api/view.json")).json["model"] == {"seed": str(2**64 - 1), "canvas": 1}
            for path, query in (
                ("samples", f"first={2**64 - 1}&count=9"),
                ("view", "x=1&y=2&width=3&height=4"),
                ("view", "x=0&y=0&width=0&height=0"),
                ("render", "on=1"),
                ("open", "seed=7&size=64x48"),
                ("open", "seed=7&gain=150"),
                ("crop", "gain=5&x=6&y=7"),
            ):
                assert (await ask(app, f"/api/do/{path}", query, **own)).status == 204
            assert (await ask(app, "/api/do/open", "size=huge", **own)).body == b"too large"
            asked = list(model.asked)
            for path, query in (
                ("view", "x=1&y=2&width=3"),
                ("render", "on=-1"),
                ("close", ""),
                ("", ""),
                ("samples", ""),
                ("crop", "gain=1.5&x=6&y=7"),
                ("open", "seed=7&gain=-1"),
            ):
                assert (await ask(app, f"/api/do/{path}", query, **own)).status == 404
            for headers in (
                [],
                [("origin", "null")],
                [("origin", "http://evil.example")],
                [("origin", "https://127.0.0.1:8765")],
            ):
                assert (await ask(app, "/api/do/render", "on=1", method="POST", headers=headers)).status == 403
            assert (await ask(app, "/api/do/render", "on=1", headers=own["headers"])).status == 405
            assert (await ask(app, "/api/view.json", **own)).status == 405
            assert (
                await ask(app, "/api/do/render", "on=1", "POST", [*own["headers"], ("content-length", "1")])
            ).status == 413
            assert model.asked == asked
        async with running(StoreSource(store[0])) as (_, app):
            assert (await ask(app, "/api/do/render", "on=1", **own)).status == 405
        return asked

    assert asyncio.run(run()) == [
        ("want_samples", 2**64 - 1, 9), ("view", Box(2, 1, 6, 4)), ("view", None), ("render", True), ("open", 7, "64x48", None),
        ("open", 7, None, 1.5), ("want_crop", 0.05, 6, 7),
    ]  # fmt: skip


def test_a_browser_takes_no_tile_of_another_store_for_its_own(store):
    """Two servers at one address: the tag of a tile of the first one is none of the second one's."""

    async def tag():
        async with running(StoreSource(store[0])) as (_, app):
            return (await ask(app, "/api/tile/0/0/0_0.png")).headers["etag"]

    assert asyncio.run(tag()) != asyncio.run(tag())


def test_floods_are_bounded(store, monkeypatch):
    """More tiles, listeners, downloads or pixels than fit are refused at once, and the rest is served."""
    monkeypatch.setattr(viewer_app, "MAX_REGION", 100_000)
    monkeypatch.setattr(viewer_app, "MAX_LISTENERS", 2)

    async def run():
        async with running(StoreSource(store[0])) as (viewer, app):
            viewer.pool._running = QUEUE - 1
            tiles = await asyncio.gather(*[ask(app, f"/api/tile/0/{k}/{x}_0.png") for k, x in ((0, 0), (0, 1), (1, 0))])
            assert sorted(answer.status for answer in tiles) == [200, 503, 503]
            assert {a.headers["retry-after"] for a in tiles if a.status == 503} == {"1"}
            viewer.pool._running = 0
            assert (await ask(app, "/api/region/0.png", "x=0&y=0&width=700&height=300")).status == 413
            listeners = [asyncio.create_task(ask(app, "/api/events")) for _ in range(2)]
            await until(lambda: viewer._listeners == 2)
            assert (await ask(app, "/api/events")).status == 503
            await viewer.close()
            assert [answer.status for answer in await asyncio.gather(*listeners)] == [200, 200]
            viewer._downloads = viewer_app.MAX_DOWNLOADS
            assert (await ask(app, "/api/region/0.png", "x=0&y=0&width=70&height=30")).status == 503

    asyncio.run(run())


def test_the_cache_is_bounded(store, monkeypatch):
    monkeypatch.setattr("engine.view.pool.CACHE_BYTES", 300_000)

    async def run():
        async with running(StoreSource(store[0])) as (viewer, app):
            for x in (0, 1, 0, 1):
                await ask(app, f"/api/tile/0/0/{x}_0.png")
            return viewer.pool._cache.currsize

    assert asyncio.run(run()) <= 300_000


def test_png_states_its_colours(store):
    async def run():
        async with running(StoreSource(store[0])) as (_, app):
            return (await ask(app, "/api/tile/0/3/0_0.png")).body

    body = asyncio.run(run())
    assert struct.unpack(">II", body[16:24]) == (88, 38)
    assert b"sRGB" in body
