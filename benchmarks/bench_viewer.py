"""Tiles a second that the viewer serves: decoded, encoded and sent over a local connection, and once more from its cache.

    python benchmarks/bench_viewer.py STORE

The store is any that engine render wrote; 200 tiles of its full size are asked for, by 8 clients at the same time.
"""

import http.client
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

from engine.view.serve import serve
from engine.view.source import tiles_of
from engine.view.store import StoreSource

TILES = 200
CLIENTS = 8


def main():
    source = StoreSource(Path(sys.argv[1]))
    columns, rows = tiles_of(source.sizes[0])
    paths = [f"/api/tile/0/0/{i % columns}_{i // columns}.png" for i in range(min(TILES, columns * rows))]
    address, started = [], threading.Event()

    def on_start(url):
        address.append(urlsplit(url))
        started.set()

    def measure():
        started.wait()
        for name in ("computed", "cached"):
            seconds, size = ask(address[0], paths)
            print(f"{name}: {len(paths) / seconds:.0f} tiles a second, {size / seconds / 2**20:.0f} MiB/s")

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


if __name__ == "__main__":
    main()
