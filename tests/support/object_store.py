"""An S3 server on this machine, and a proxy before it that injects faults."""

import http.client
import itertools
import logging
import os
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from engine.io import objects
from engine.io.objects import as_place

KEY, SECRET = "AKIAQUITESECRETKEY00", "a/very+secret/key-that-no-output-may-name"
FAULTS = ("500", "503", "slow", "torn", "reset", "lost")
"""Kinds of faults: an error of the server, a slow answer, half of one, a request that is not done, and one without answer."""


@contextmanager
def s3_server():
    """An empty S3 server of moto; yields its port. The environment has the credentials and the address."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("_TIMEOUT", "_CONNECT_TIMEOUT"):  # a busy machine is no fault
            patch.setattr(objects, name, "200s")
        try:
            yield port
        finally:
            server.stop()


def make_bucket(port, name):
    """Make a bucket."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    scope = f"{KEY}/20200101/us-east-1/s3/aws4_request"
    connection.request("PUT", f"/{name}", headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}"})
    assert connection.getresponse().status == 200
    connection.close()


def upload(path, url):
    """Put a file, or every file below a folder, under a URL."""
    import obstore
    from obstore.store import from_url

    store = from_url(url.rpartition("/")[0])
    name = url.rpartition("/")[2]
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        key = name if file == path else f"{name}/{file.relative_to(path).as_posix()}"
        obstore.put(store, key, file.read_bytes())


def stored(url):
    """Bytes of every object below a URL, by name."""
    place = as_place(url)
    return {name: (place / name).read_bytes() for name, _ in place.objects()}


class FaultyProxy(ThreadingHTTPServer):
    """A proxy whose answers fail as ``choose`` says.

    Attributes:
        choose: function of the number of equal requests before this one, and of all, that returns one of FAULTS or None.
        watch: function of a request's method and path that is called before it is sent on.
        injected: number of injected faults, by kind.
        requests: number of requests.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.choose = port, lambda seen, total: None
        self.watch = lambda command, path: None
        self.seen = Counter()
        self.injected, self.requests = dict.fromkeys(FAULTS, 0), 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, what):
        with self.lock:
            fault = self.choose(self.seen[what], self.requests)
            self.seen[what] += 1
            self.requests += 1
            if fault is not None:
                self.injected[fault] += 1
            return fault

    def handle_error(self, request, client_address):
        """Clients end connections whose answers were torn."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _forward(self):
        length = int(self.headers.get("content-length") or 0)
        body, fault = (
            self.rfile.read(length) if length else None,
            self.server.next_fault((self.command, self.path, self.headers.get("range"))),
        )
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.05)
        self.server.watch(self.command, self.path)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        headers, content = dict(answer.getheaders()), answer.read()
        upstream.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, headers, content, torn=fault == "torn")

    def _answer(self, status, headers, content, *, torn=False):
        self.send_response(status)
        skipped = ("connection", "transfer-encoding", "server", "date")
        headers = {name.lower(): value for name, value in headers.items() if name.lower() not in skipped}
        if self.command != "HEAD":
            headers["content-length"] = str(len(content))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if torn:
            content, self.close_connection = content[: len(content) // 2], True
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _forward  # noqa: N815

    def log_message(self, format, *args):
        pass


def every_other(kinds=FAULTS):
    """Every second of equal requests fails, in all ways in turn: whatever runs at the same time, one repetition is enough."""
    kinds = itertools.cycle(kinds)
    return lambda seen, total: None if seen % 2 else next(kinds)
