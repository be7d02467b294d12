"""The viewer: tiles of a store a second, and the times of a model that is explored, from its command to a sharp screen.

    python benchmarks/bench_viewer.py store STORE
    python benchmarks/bench_viewer.py model MODEL [WIDTHxHEIGHT]

``store``: 200 tiles of the full size of any store are asked for, by 8 clients at the same time. ``model``: needs Playwright and
Chromium, measurements of the model in the user's cache, and a built page (make viewer).
"""

import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

from harness import add_row

from engine.view.serve import serve
from engine.view.source import tiles_of
from engine.view.store import StoreSource

TILES = 200
CLIENTS = 8

SCREEN = {"width": 1600, "height": 900}
SAMPLES = 12
MEMORY = "2GiB"
EPOCH = "fetch('api/view.json').then((answer) => answer.json()).then((view) => view.sources[0].state.epoch)"


def main():
    if sys.argv[1] == "store":
        store(Path(sys.argv[2]))
    else:
        model(Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "16384x12288")


def record(subject, case, value, unit, cpu=""):
    """Add a row; ``cpu``: seconds of processor time of the server. The load is that of the whole machine, before."""
    row = {"subject": subject, "case": case, "value": f"{value:.3g}", "unit": unit, "cpu_seconds": cpu and f"{cpu:.3g}"}
    add_row("viewer", {**row, "load": f"{os.getloadavg()[0]:.1f}"})
    print(", ".join(str(value) for value in row.values() if value != ""), flush=True)


def store(path):
    """Tiles a second: decoded, encoded and sent, and once more from the cache."""
    source = StoreSource(path)
    columns, rows = tiles_of(source.sizes[0])
    paths = [f"/api/tile/0/0/{i % columns}_{i // columns}.png" for i in range(min(TILES, columns * rows))]
    address, started = [], threading.Event()

    def on_start(url):
        address.append(urlsplit(url))
        started.set()

    def measure():
        started.wait()
        for name in ("computed", "cached"):
            before = time.process_time()
            seconds, _ = ask(address[0], paths)
            cpu = time.process_time() - before  # of the clients, too
            record(f"{len(paths)} tiles", f"tiles {name}", len(paths) / seconds, "tiles a second", cpu)

    serve([source], port=0, on_start=on_start, until=measure)


def ask(address, paths):
    """Seconds and bytes of all answers."""
    queue, sizes = SimpleQueue(), []
    for path in paths:
        queue.put(path)

    def client():
        connection = http.client.HTTPConnection(address.hostname, address.port)
        while True:
            try:
                connection.request("GET", queue.get_nowait())
            except Empty:
                break
            answer = connection.getresponse()
            assert answer.status == 200
            sizes.append(len(answer.read()))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, sum(sizes)


def model(path, size):
    """Seconds from the command to the samples, from the choice of one to a picture, and from 100 % to a sharp screen."""
    from playwright.sync_api import sync_playwright

    subject = f"{path.stem} {size}"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=SCREEN)
        page.set_default_timeout(3_600_000)
        words = [
            "view",
            str(path),
            "--size",
            size,
            "--memory",
            MEMORY,
            "--out",
            f"{folder}/views",
            "--no-browser",
            "--port",
            "0",
        ]
        clock = Clock()
        process = subprocess.Popen([sys.executable, "-m", "engine", *words], stdout=subprocess.PIPE, text=True)
        clock.process = process.pid
        try:
            page.goto(process.stdout.readline().split()[-1])
            wait(page, f"document.querySelectorAll('#samples img[src]').length >= {SAMPLES}")
            record(subject, f"command to {SAMPLES} samples", *clock.lap())
            page.click("[data-seed='7']")
            page.wait_for_selector("body[data-complete]")  # also while the page loads again
            record(subject, "choice to the first picture", *clock.lap())
            while not page.evaluate(EPOCH):
                page.wait_for_timeout(100)
            record(subject, "first picture to the first enlargement", *clock.lap())
            width, height = (int(side) for side in size.split("x"))
            page.evaluate(f"location.hash = '#x={width // 2}&y={height // 2}&z=1'")
            wait(page, "document.querySelector('#progress').textContent.includes('what you see')")
            wait(page, "!document.querySelector('#progress').textContent.includes('what you see')")
            record(subject, "100 % to a sharp screen", *clock.lap())
            store = next(Path(folder, "views").iterdir())
            record(subject, "shards of that screen", len(list(store.glob("0/c/*/*/*[0-9]"))), "shards")
            status = Path(f"/proc/{process.pid}/status").read_text()
            record(subject, f"peak memory of {MEMORY}", int(status.partition("VmHWM:")[2].split()[0]) / 1024, "MiB")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            browser.close()


class Clock:
    """Seconds of the clock and of the server's processor time, since the last lap."""

    def __init__(self):
        self.process, self._last, self._cpu = None, time.perf_counter(), 0.0

    def lap(self):
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        now, cpu = time.perf_counter(), sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        seconds, spent = now - self._last, cpu - self._cpu
        self._last, self._cpu = now, cpu
        return seconds, "s", spent


def wait(page, condition):
    """Wait until an expression is true. The page's policy forbids what ``wait_for_function`` does."""
    while not page.evaluate(f"Boolean({condition})"):
        page.wait_for_timeout(20)


if __name__ == "__main__":
    main()
