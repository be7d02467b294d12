"""The page in a real browser, served by the real command: pixels, growth, tools. Skipped without a browser or a built page."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.growing import new_store, pixels_of, store_of, write
from support.stores import pixels, render, shards

from engine.plan.request import Request
from engine.view.beside import STATIC

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(
        not (STATIC / "app.js").is_file(), reason="the page is not built: cd viewer && npm ci && npm run build"
    ),
]

SIZE = (700, 1000)
PATIENCE = 120_000
"""Milliseconds that a busy machine may take."""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """Function that serves stores and returns the address; Ctrl-C ends each server with exit code 0."""
    processes = []

    def start(*words):
        command = [sys.executable, "-m", "engine", "view", *map(str, words), "--no-browser", "--port", "0"]
        # The shell that starts the tests may ignore Ctrl-C, which a child would inherit.
        restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process, for the same bits
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore, env=one_thread
        )
        processes.append(process)
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, process.stderr.read()
        return line.split()[-1]

    yield start
    for process in processes:
        process.send_signal(signal.SIGINT)
        with process:
            assert process.wait(PATIENCE / 1000) == 0
            lines = process.stderr.read().splitlines()
            assert [line for line in lines if not line.endswith(" (once)")] == ["press Ctrl-C to end"]


@pytest.fixture
def open_page(browser):
    """Function that opens a page; the console must stay empty."""
    lines, contexts = [], []

    def start(address, width=1200, height=700, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: lines.append(message.text))
        page.on("pageerror", lambda error: lines.append(str(error)))
        page.on("request", lambda request: lines.append(request.url))
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        return page

    yield start
    for context in contexts:
        context.close()
    own = re.compile(r"(http://127\.0\.0\.1:\d+/|data:|blob:)|.*net::ERR_|.*willReadFrequently")
    # Errors of the net are of a server that a test has ended; the test itself reads the canvas.
    assert [line for line in lines if not own.match(line)] == []


def wait(page, condition):
    """Wait until an expression is true. The page's policy forbids what ``wait_for_function`` does."""
    for _ in range(PATIENCE // 100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not within {PATIENCE} ms: {condition}")


def shown(page):
    """Pixels of the image as the browser has drawn them, [h, w, 3]."""
    return drawn(page, ".openseadragon-canvas canvas")


def drawn(page, selector):
    """Pixels of a canvas or a picture, [h, w, 3]."""
    width, height, data = page.evaluate(
        """async (selector) => {
            let canvas = document.querySelector(selector);
            if (canvas instanceof HTMLImageElement) {
                await canvas.decode();
                const picture = canvas;
                canvas = document.createElement("canvas");
                [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
                canvas.getContext("2d").drawImage(picture, 0, 0);
            }
            const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let text = "";
            for (let i = 0; i < data.length; i += 4) text += String.fromCharCode(data[i], data[i + 1], data[i + 2]);
            return [width, height, btoa(text)];
        }""",
        selector,
    )
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 3)


def settled(page):
    """``shown`` once the view has stopped moving and loading: equal over half a second."""
    before = shown(page)
    for _ in range(PATIENCE // 500):
        page.wait_for_timeout(500)
        now = shown(page)
        if np.array_equal(before, now):
            return now
        before = now
    raise AssertionError("the view does not settle")


def expected(pixels, page, x, y, zoom=1):
    """Pixels of the store [3, h, w] that a view at (x, y) shows."""
    width, height = page.evaluate(
        "() => { const e = document.querySelector('#image'); return [e.clientWidth, e.clientHeight]; }"
    )
    left, top = round(x * zoom - width / 2), round(y * zoom - height / 2)
    large = pixels.transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)
    return large[top : top + height, left : left + width]


def wait_until_shown(page, pixels, *view):
    """Wait until the page shows exactly these pixels of a store."""
    for _ in range(600):
        if np.array_equal(shown(page), expected(pixels, page, *view)):
            return
        page.wait_for_timeout(100)
    difference = shown(page).astype(int) - expected(pixels, page, *view)
    raise AssertionError(
        f"other pixels: {np.abs(difference).max()} levels at most, {np.mean(difference != 0):.2%} of them"
    )


def test_pixels_are_the_stores(tmp_path, serve, open_page):
    """At 100 % and 200 %, each pixel of the screen is one of the store's, also where a link leads within the page."""
    pixels = store_of(tmp_path / "a.zarr", SIZE)
    page = open_page(f"{serve(tmp_path / 'a.zarr')}#x=500&y=350&z=1", 500, 400)
    wait_until_shown(page, pixels, 500, 350)
    page.evaluate("() => { location.hash = '#x=400&y=300&z=2'; }")
    wait_until_shown(page, pixels, 400, 300, 2)


def test_image_grows_in_place(tmp_path, serve, open_page):
    """Shards that finish replace what was coarse: the page is not loaded again, nothing moves, other tiles stay."""
    sink, pixels = new_store(tmp_path / "a.zarr", SIZE)
    page = open_page(f"{serve(tmp_path / 'a.zarr')}#x=500&y=350&z=1", 800, 600)
    wait(page, "document.querySelector('#progress').textContent.startsWith('0 %')")
    page.evaluate("() => { window.same = true; }")
    view = page.url
    coarse = shown(page).astype(int) - expected(pixels, page, 500, 350)
    assert 0 < np.abs(coarse).mean() < 12
    page.on("request", lambda request: requests.append(request.url))
    requests = []
    write(sink, pixels, count=4)
    wait(page, "!document.querySelector('#progress').textContent.startsWith('0 %')")
    for _ in range(600):
        top = shown(page)[: 256 - 50] == expected(pixels, page, 500, 350)[: 256 - 50]
        if top.all():
            break
        page.wait_for_timeout(100)
    assert top.all()
    assert not (shown(page) == expected(pixels, page, 500, 350)).all()
    write(sink, pixels)
    wait_until_shown(page, pixels, 500, 350)
    wait(page, "document.body.dataset.complete === 'true'")
    assert page.evaluate("window.same") is True
    assert page.url == view
    assert page.is_hidden("#progress")
    assert {re.sub(r"\d+", "N", url.partition("/api/")[2]) for url in requests} <= {"tile/N/N/N_N.png"}


def test_model_is_computed_where_it_is_looked_at(tmp_path, models, serve, open_page):
    """A sample is chosen; the view and then the whole image have the pixels of a whole render, and nothing else is computed.

    Then with louder noise: a crop, and the view of the store that it opens.
    """
    model = models["noisy"]
    request = Request(size=(1100, 600), seed=1, precision="fp32", executor="bands", tile=128)
    job = render(model, request, tmp_path / "whole.zarr")
    whole = pixels(job.out)
    out = tmp_path / "views"
    address = serve(model.path, "--size", "1100x600", "--precision", "fp32", "--out", out)
    page = open_page(f"{address}#x=250&y=200&z=1", 500, 400)
    page.click("[data-seed='1']:has(img[src])")
    page.wait_for_selector("body[data-complete]")  # also while the page loads again
    store = out / f"{model.path.stem}-1-1100x600.zarr"
    wait_until_shown(page, whole, 250, 200)
    assert shards(store, 0) == 1
    page.keyboard.press("i")
    page.click("#explore p .action")
    wait(page, "document.body.dataset.complete === 'true'")
    np.testing.assert_array_equal(pixels(store), whole)
    halo = max(stage.halo for stage in job.plan.stages)
    loud = pixels(render(model, replace(request, noise_gain=2, overlap=halo), tmp_path / "loud.zarr").out)
    page.fill(".gain input", "2")
    wait(page, "/ at \\d+, \\d+$/.test(document.querySelector('.gain figcaption span').textContent)")
    x, y = map(int, re.findall(r"\d+", page.text_content(".gain figcaption span")))
    np.testing.assert_array_equal(drawn(page, ".gain img"), loud[:, y : y + 192, x : x + 288].transpose(1, 2, 0))
    page.click(".gain button")
    page.wait_for_selector(f"body[data-ready]:has(#name:text-is('{store.stem}-gain2.zarr'))")
    place = [float(value) for value in re.findall(r"[xy]=([\d.]+)", page.url)]
    wait_until_shown(page, loud, *place)
    assert "× 2" in page.text_content("#facts")
    wait(page, "document.querySelector('#command').textContent.includes('--noise-gain 2 ')")


def test_tools(tmp_path, serve, open_page):
    """Panel, keys, overlay, loupe, slider, download, theme, and the address that keeps the view."""
    store_of(tmp_path / "a.zarr", SIZE)
    Image.fromarray(pixels_of(SIZE, 3).transpose(1, 2, 0)).save(tmp_path / "photo.png")
    address = serve(tmp_path / "a.zarr", tmp_path / "photo.png", "--dpi", "25.4")
    page = open_page(address)
    facts = page.inner_text("#facts")
    for text in (
        "1.00 × 0.70 m at 25.4 dpi",
        "0.7 megapixels",
        "test.safetensors",
        "halo 8",
        "tiles of 64 × 64",
        "exact",
        "vizarr",
    ):
        assert text in facts, text
    page.keyboard.press("1")
    wait(page, "document.querySelector('#zoom').textContent === '100 %'")
    page.keyboard.press("o")
    assert page.inner_text("#legend") == "shards"
    page.keyboard.press("o")
    assert page.inner_text("#legend") == "tiles"
    page.keyboard.press("l")
    page.mouse.move(300, 300)
    wait(page, "/^\\d+, \\d+ .* %$/.test(document.querySelector('#loupe output').textContent)")
    page.keyboard.press("Escape")
    assert page.is_hidden("#loupe")
    before = settled(page)
    page.keyboard.press("c")
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    wait(page, "document.querySelector('#slider').getAttribute('aria-valuenow') === '52'")
    after, middle = settled(page), before.shape[1] * 52 // 100
    assert np.array_equal(before[:, : middle - 2], after[:, : middle - 2])
    assert not np.array_equal(before[:, middle + 2 :], after[:, middle + 2 :])
    wait(page, "location.hash.includes('compare=0.520') && location.hash.includes('overlay=tiles')")
    other = open_page(page.url)
    assert other.inner_text("#zoom") == "100 %"
    assert other.inner_text("#legend") == "tiles"
    assert other.get_attribute("#slider", "aria-valuenow") == "52"
    with page.expect_download() as download:
        page.keyboard.press("d")
    with Image.open(download.value.path()) as picture:
        width, height = picture.size
    assert (width, height) == (page.evaluate("document.querySelector('#image').clientWidth"), SIZE[0])
    theme = page.get_attribute("html", "data-theme")
    page.keyboard.press("t")
    assert page.get_attribute("html", "data-theme") != theme
    page.keyboard.press("i")
    assert page.get_attribute("body", "data-panel") == "closed"


def test_phone_reconnects(tmp_path, open_page):
    """The panel is a sheet; the page finds a server again that was started again, and takes what has changed."""
    sink, pixels = new_store(tmp_path / "a.zarr", SIZE)

    def start(port):
        command = [sys.executable, "-m", "engine", "view", str(tmp_path / "a.zarr"), "--no-browser", "--port", port]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return process, process.stdout.readline().split()[-1]

    process, address = start("0")
    try:
        phone = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
        page = open_page(address, 390, 800, **phone)
        assert page.get_attribute("body", "data-panel") == "closed"
        page.tap("#info")
        wait(page, "document.querySelector('#panel').getBoundingClientRect().top > 300")
        page.tap("#close")
    finally:
        end(process)
    wait(page, "document.querySelector('#message').textContent.startsWith('Connection lost')")
    write(sink, pixels)
    process, _ = start(address.rstrip("/").rpartition(":")[2])
    try:
        wait(page, "document.body.dataset.complete === 'true'")
        assert page.is_hidden("#message")
    finally:
        page.close()
        end(process)


def end(process):
    with process:
        process.kill()
