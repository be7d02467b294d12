"""Exports for the web in a real browser, from a plain file server. Skipped without a browser or a built page."""

import base64
import functools
import http.server
import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import engine
from engine.exporters import export

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = Path(engine.__file__).parent / "view" / "static" / "app.js"
MODULES = Path(__file__).parents[2] / "viewer/node_modules"
OPENSEADRAGON = MODULES / "openseadragon/build/openseadragon/openseadragon.min.js"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

PATIENCE = 60_000
"""Milliseconds that a busy machine may take."""

CANVAS = """() => {
    const canvas = document.querySelector(".openseadragon-canvas canvas");
    const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let text = "";
    for (let i = 0; i < data.length; i += 4) text += String.fromCharCode(data[i], data[i + 1], data[i + 2]);
    return [width, height, btoa(text)];
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path):
    """(folder, address) of a server of files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def new_page(browser):
    """Function that opens a page of 500 x 400; nothing is loaded from elsewhere, and the console stays empty."""
    lines, contexts = [], []

    def start(address):
        context = browser.new_context(viewport={"width": 500, "height": 400})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: lines.append(message.text))
        page.on("pageerror", lambda error: lines.append(str(error)))
        page.on("request", lambda request: lines.append(request.url))
        page.goto(address)
        return page

    yield start
    for context in contexts:
        context.close()
    own = ("http://127.0.0.1:", "file:///", "data:", "blob:")
    assert [line for line in lines if not line.startswith(own) and "willReadFrequently" not in line] == []


def wait_until(page, is_shown):
    """Wait until the canvas satisfies a condition."""
    for _ in range(PATIENCE // 200):
        width, height, data = page.evaluate(CANVAS)
        if is_shown(np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 3)):
            return
        page.wait_for_timeout(200)
    raise AssertionError("other pixels")


@pytest.mark.skipif(not PAGE.is_file(), reason="the page is not built: cd viewer && npm ci && npm run build")
def test_the_page_needs_no_server_but_one_of_files(store, levels, server, new_page, tmp_path):
    """Every pixel at 100 %; the title, the licence and the size; the loupe; and a picture without a download."""
    folder, address = server
    title = "Picos & <Europa>"
    export(store, tmp_path / "a #1.html.zip", tiles="png", title=title)
    with zipfile.ZipFile(tmp_path / "a #1.html.zip") as archive:
        archive.extractall(folder)
    page = new_page(f"{address}/{quote('a #1.html')}#x=600&y=250&z=1")
    page.wait_for_selector("body[data-ready]")
    wait_until(page, lambda canvas: np.array_equal(canvas, levels[0][50:450, 350:850]))
    assert (page.title(), page.inner_text("#name")) == (title, title)
    assert page.is_hidden("#save")
    facts = page.text_content("#facts")
    for text in ("1\u202f037 × 531 px", "CC0-1.0", "8-bit RGB"):
        assert text in facts
    page.keyboard.press("l")
    page.mouse.move(250, 200)
    r, g, b = levels[0][250, 600]
    page.wait_for_function(
        "text => document.querySelector('#loupe output').textContent.includes(text)", arg=f"{r} {g} {b}"
    )
    page = new_page((folder / "a #1.html").as_uri())  # without a server: the image, and no loupe
    page.wait_for_selector("body[data-ready]")


@pytest.mark.skipif(not OPENSEADRAGON.is_file(), reason="OpenSeadragon is not there: cd viewer && npm ci")
@pytest.mark.parametrize(
    ("name", "options", "source"),
    [
        ("a.dzi", {"tiles": "png", "tile": 128}, '"a.dzi"'),
        ("a.iiif", {"tiles": "png", "tile": 128, "url": "ADDRESS"}, '"a.iiif/info.json"'),
        ("a.ozx", {}, 'await ozxSource("a.ozx")'),
    ],
    ids=["dzi", "iiif", "ozx"],
)
def test_openseadragon_shows_it(store, levels, server, new_page, name, options, source):
    folder, address = server
    export(store, folder / name, **{key: address if value == "ADDRESS" else value for key, value in options.items()})
    shutil.copy(OPENSEADRAGON, folder / "openseadragon.js")
    bundle = [
        MODULES / ".bin/esbuild",
        Path(__file__).with_name("ozx_source.mjs"),
        "--bundle",
        "--external:worker_threads",
        "--log-level=error",
    ]
    subprocess.run(
        [*bundle, f"--outfile={folder / 'ozx.js'}"], env={**os.environ, "NODE_PATH": str(MODULES)}, check=True
    )
    (folder / "index.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><body style="margin: 0"><div id="v" style="height: 100vh"></div>'
        '<script src="openseadragon.js"></script><script src="ozx.js"></script><script type="module">'
        'window.v = OpenSeadragon({id: "v", drawer: "canvas", showNavigationControl: false, animationTime: 0, '
        f"tileSources: {source}}})</script>"
    )
    page = new_page(address)
    page.wait_for_function("window.v.isOpen && v.isOpen()")
    assert page.evaluate("(({ x, y }) => [x, y])(v.world.getItemAt(0).getContentSize())") == [1037, 531]
    middle = levels[2][62 - 30 : 62 + 30, 150 - 60 : 150 + 60]
    for scale, cut, pixels in (
        (1, np.s_[:, :], levels[0][50:450, 350:850]),
        (0.25, np.s_[170:230, 190:310], middle),
    ):
        page.evaluate(
            """scale => {
                const image = v.world.getItemAt(0);
                v.viewport.zoomTo(image.imageToViewportZoom(scale), undefined, true);
                v.viewport.panTo(image.imageToViewportCoordinates(600, 250), true);
            }""",
            scale,
        )
        # Tiles without overlap are drawn a pixel larger.
        near = functools.partial(
            lambda cut, pixels, canvas: np.abs(canvas[cut].astype(int) - pixels).mean() < 6, cut, pixels
        )
        wait_until(page, near)
