"""Google's XML API before fake-gcs-server, which has the JSON API alone for writing.

obstore speaks the XML API. Every request is translated to one of the JSON API, so that objects, generations and conditions are
those of fake-gcs-server.
"""

import http.client
import json
import threading
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

_META = "x-goog-meta-"


class GoogleFront(ThreadingHTTPServer):
    """The server. Requests run one by one: an answer is of one version of an object."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.lock = port, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def ask(self, method, path, body=None, headers=None, **query):
        """Status, headers and bytes of a request to fake-gcs-server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.target)
        connection.request(method, f"{path}?{urlencode(query)}", body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        with self.server.lock:
            if url.path == "/storage/v1/b":
                status, _, content = self.server.ask("POST", url.path, body, {"content-type": "application/json"})
                self._answer(status, {}, content)
            elif key:
                {"PUT": self._put, "DELETE": self._delete}.get(self.command, self._get)(bucket, key, body)
            else:
                self._list(bucket, query)

    def _put(self, bucket, key, body):
        meta = {name.lower(): value for name, value in self.headers.items() if name.lower().startswith(_META)}
        about = {"name": key, "metadata": {name.removeprefix(_META): value for name, value in meta.items()}}
        parts = (b"application/json", json.dumps(about).encode()), (b"application/octet-stream", body)
        mark = b"an-unlikely-boundary-7c1f"
        text = b"".join(b"--%s\r\ncontent-type: %s\r\n\r\n%s\r\n" % (mark, *part) for part in parts)
        query = {"uploadType": "multipart"}
        if (generation := self.headers.get("x-goog-if-generation-match")) is not None:
            query["ifGenerationMatch"] = generation
        headers = {"content-type": f"multipart/related; boundary={mark.decode()}"}
        path = f"/upload/storage/v1/b/{bucket}/o"
        status, _, content = self.server.ask("POST", path, text + b"--%s--\r\n" % mark, headers, **query)
        self._answer(status, _headers_of(json.loads(content)) if status == 200 else {})

    def _get(self, bucket, key, body):
        path = f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}"
        status, _, content = self.server.ask("GET", path)
        if status != 200:
            self._answer(status, {})
            return
        about = json.loads(content)
        headers = _headers_of(about)
        if self.headers.get("if-match", headers["etag"]) != headers["etag"]:
            self._answer(412, {})
        elif self.command == "HEAD":
            self._answer(200, {**headers, "content-length": about["size"]})
        else:
            asked = {"range": self.headers["range"]} if "range" in self.headers else {}
            status, given, content = self.server.ask("GET", path, None, asked, alt="media")
            headers |= {name.lower(): value for name, value in given.items() if name.lower() == "content-range"}
            self._answer(status, headers, content)

    def _delete(self, bucket, key, body):
        status, _, _ = self.server.ask("DELETE", f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}")
        self._answer(204 if status == 200 else status, {})

    def _list(self, bucket, query):
        asked = {"prefix": query.get("prefix", ""), "maxResults": query.get("max-keys", "1000")}
        if "continuation-token" in query:
            asked["pageToken"] = query["continuation-token"]
        if "start-after" in query:
            asked["startOffset"] = query["start-after"]
        status, _, content = self.server.ask("GET", f"/storage/v1/b/{bucket}/o", **asked)
        if status != 200:
            self._answer(status, {})
            return
        page = json.loads(content)
        entries = "".join(
            f"<Contents><Key>{escape(each['name'])}</Key><Size>{each['size']}</Size><ETag>{escape(_tag(each))}</ETag>"
            f"<LastModified>{each['updated']}</LastModified></Contents>"
            for each in page.get("items", ())
            if each["name"] != query.get("start-after")
        )
        token = page.get("nextPageToken", "")
        following = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
        text = f"<ListBucketResult>{entries}{following}</ListBucketResult>"
        self._answer(200, {"content-type": "application/xml"}, text.encode())

    def _answer(self, status, headers, content=b""):
        self.send_response(status)
        for name, value in ({"content-length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _serve  # noqa: N815

    def log_message(self, format, *args):
        pass


def _tag(about):
    return f'"{about["etag"].strip(chr(34))}"'


def _headers_of(about):
    """Headers of an object by its metadata."""
    changed = format_datetime(datetime.fromisoformat(about["updated"]).astimezone(UTC), usegmt=True)
    meta = {f"{_META}{name}": value for name, value in about.get("metadata", {}).items()}
    return {"etag": _tag(about), "x-goog-generation": about["generation"], "last-modified": changed, **meta}
