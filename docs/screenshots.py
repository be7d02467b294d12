"""Write the pictures of the viewer in docs/images: a still one and an animated one, both of a model that is explored.

    python docs/screenshots.py [MODEL]

Needs Playwright and Chromium, and a built page (make viewer). What is drawn is what the page shows while it computes; the
animation leaves out the waiting.
"""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"
STILL, MOVING = IMAGES / "viewer.webp", IMAGES / "explore.webp"

SIZE = (4096, 3072)
SEED = "7"
PLACE = (2000, 1150)
"""Middle of the part that becomes sharp, in pixels of the image."""

ZOOM = 0.5

BUSY = "document.querySelector('#progress').textContent.includes('what you see')"
"""Whether shards of the view are computed."""

FRAME = (1200, 750)
WAIT = 3_600_000
"""Milliseconds that a busy machine may take."""


def main() -> None:
    """Explore the model, and write both pictures."""
    model = sys.argv[1:2] or []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        out = Path(folder, "views")
        words = ["view", *model, "--size", "{}x{}".format(*SIZE), "--out", str(out), "--no-browser", "--port", "0"]
        process = subprocess.Popen([sys.executable, "-m", "engine", *words], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[-1]
            page = browser.new_page(viewport={"width": FRAME[0], "height": FRAME[1]}, color_scheme="dark")
            page.set_default_timeout(WAIT)
            film(page, address)
            page.set_viewport_size({"width": 1440, "height": 900})
            page.evaluate("document.body.dataset.panel = 'open'")
            go(page, *PLACE, ZOOM)
            until(page, f"!{BUSY}")
            page.wait_for_timeout(1500)
            shot(page).save(STILL, quality=80, method=6)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            browser.close()
    for path in (STILL, MOVING):
        sys.stdout.write(f"{path.name}: {path.stat().st_size / 1000:.0f} KB\n")


def film(page: Page, address: str) -> None:
    """Write the animation: samples appear, one is opened, and a part of it becomes sharp."""
    frames: list[tuple[Image.Image, int]] = []
    page.goto(address)
    for count in (1, 4, 8, 12):
        until(page, f"document.querySelectorAll('#samples img[src]').length >= {count}")
        page.wait_for_timeout(300)
        frames.append((shot(page), 300))
    frames.append((frames[-1][0], 900))
    page.click(f"[data-seed='{SEED}']")
    page.wait_for_selector("body[data-complete]")  # also while the page loads again
    page.evaluate("document.body.dataset.panel = 'closed'")
    page.wait_for_timeout(1500)
    frames.append((shot(page), 900))
    while not view(page)["epoch"]:  # the first enlargement
        page.wait_for_timeout(500)
    page.wait_for_timeout(2500)
    frames.append((shot(page), 1200))
    go(page, *PLACE, ZOOM)
    until(page, BUSY)
    finished = -1.0
    while page.evaluate(BUSY):
        if (share := view(page)["share"]) != finished:
            finished = share
            page.wait_for_timeout(700)
            frames.append((shot(page), 220))
        page.wait_for_timeout(200)
    page.wait_for_timeout(1500)
    frames.append((shot(page), 2500))
    pictures = [frame.resize((FRAME[0] * 2 // 3, FRAME[1] * 2 // 3), Image.Resampling.LANCZOS) for frame, _ in frames]
    pictures[0].save(
        MOVING,
        save_all=True,
        append_images=pictures[1:],
        duration=[time for _, time in frames],
        loop=0,
        quality=55,
        method=6,
    )


def go(page: Page, x: int, y: int, zoom: float) -> None:
    """Look at a place, as a link to it does."""
    page.evaluate(f"location.hash = '#x={x}&y={y}&z={zoom}'")
    page.wait_for_timeout(1500)


def view(page: Page) -> dict[str, float]:
    """State of the store that is shown."""
    state: dict[str, float] = page.evaluate("fetch('api/view.json').then(r => r.json()).then(v => v.sources[0].state)")
    return state


def until(page: Page, condition: str) -> None:
    """Wait until an expression is true. The page's policy forbids what ``wait_for_function`` does."""
    while not page.evaluate(f"Boolean({condition})"):
        page.wait_for_timeout(100)


def shot(page: Page) -> Image.Image:
    """Picture of the page."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


if __name__ == "__main__":
    main()
