"""A proxy before the Cloud Storage emulator: what that lacks of the service, and faults as asked.

Added is what clients rely on: generation and checksum of an object with its content, preconditions.
 A fault is one of `KINDS`, for requests ("METHOD URL") that `where` matches, so many times.
"""

import collections
import contextlib
import dataclasses
import http.client
import http.server
import json
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

KINDS = ("429", "500", "503", "cut", "reset", "lost", "stall", "flip", "403")
_OF_ONE_WAY = ("content-length", "transfer-encoding", "connection", "date", "server")
CONTENT = r"GET .*alt=media"  # requests for the content of an object


@dataclasses.dataclass
class Fault:
    """`lost` is a request that is done, and whose answer never comes; `cut` and `flip` damage the
    body of an answer; a share of what matches is hit, by a seeded draw."""

    kind: str
    where: str = ""
    times: float = 1
    share: float = 1.0


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """The address of a Cloud Storage emulator: a process of its own, on this machine's loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", "--in-memory"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", port], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.1)
        else:
            raise TimeoutError("the emulator did not start in 20 s")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Proxy(http.server.ThreadingHTTPServer):
    """`address` is what stands for the service; `done` counts the faults by kind."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, emulator: str, *, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.emulator = emulator.removeprefix("http://")
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.done: collections.Counter = collections.Counter()
        self.requests: list[str] = []
        self.writing, self.choosing = threading.Lock(), threading.Lock()
        self.draw = random.Random(seed)
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *error) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may go away
            super().handle_error(request, client_address)

    def environment(self) -> dict[str, str]:
        """What sends the clients of a process here: gcsfs, and TensorStore."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        }

    def make_bucket(self, name: str) -> str:
        """`gs://` and the name."""
        content = {"Content-Type": "application/json"}
        self.ask("POST", "/storage/v1/b", content, json.dumps({"name": name}).encode())
        return f"gs://{name}"

    def fault(self, request: str) -> str | None:
        with self.choosing:
            self.requests.append(request)
            for fault in self.faults:
                hit = fault.times > 0 and re.search(fault.where, request)
                if hit and self.draw.random() < fault.share:
                    fault.times -= 1
                    self.done[fault.kind] += 1
                    return fault.kind
        return None

    def ask(self, method: str, path: str, headers: dict, body: bytes | None):
        """(status, headers, body) of the emulator's answer."""
        connection = http.client.HTTPConnection(self.emulator, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def about(self, bucket: str, name: str) -> dict:
        """What the emulator knows of an object as it is now; of none, that its generation is 0."""
        path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        status, _, body = self.ask("GET", path, {}, None)
        return json.loads(body) if status == 200 else {"generation": "0"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *arguments) -> None:
        pass

    def answer(self) -> None:
        body = self.body()
        kind = self.server.fault(f"{self.command} {urllib.parse.unquote(self.path)}")
        if kind and kind.isdigit():
            said = json.dumps({"error": {"code": int(kind), "message": f"fault {kind}"}}).encode()
            return self.send(int(kind), {"Content-Type": "application/json"}, said)
        if kind == "stall":
            self.server.closed.wait(600)
        if kind in ("stall", "reset"):
            return self.drop()
        status, headers, content = self.forwarded(body)
        if kind == "lost":
            return self.drop()
        if kind == "flip" and content:
            place = self.server.draw.randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        self.send(status, headers, content, cut=kind == "cut")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer

    def body(self) -> bytes | None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = self.headers.get("Content-Length")
        return self.rfile.read(int(length)) if length else None

    def forwarded(self, body: bytes | None):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        skipped = ("host", "transfer-encoding", "content-length", "accept-encoding")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        found = re.search(r"/b/([^/]+)/o/?([^/]*)$", url.path)
        bucket, name = (found[1], urllib.parse.unquote(found[2])) if found else ("", "")
        if self.command == "GET":
            status, sent, content = self.server.ask("GET", self.path, headers, None)
            if query.get("alt") == "media" and status < 300:
                about = self.server.about(bucket, name)
                sent["x-goog-generation"] = about["generation"]
                sent["x-goog-hash"] = f"crc32c={about['crc32c']}"
            return status, sent, content
        with self.server.writing:
            if "ifGenerationMatch" in query:
                name = name or query.get("name") or self.named(body)
                if query["ifGenerationMatch"] != self.server.about(bucket, name)["generation"]:
                    said = b'{"error": {"code": 412, "message": "conditionNotMet"}}'
                    return 412, {"Content-Type": "application/json"}, said
            return self.server.ask(self.command, self.path, headers, body)

    def named(self, body: bytes) -> str:
        """The object that a multipart upload is of, from the JSON before its content."""
        return json.loads(re.search(rb"\{.*?\}(?=\s*--)", body, re.DOTALL)[0])["name"]

    def send(self, status: int, headers: dict, content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OF_ONE_WAY:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.drop()

    def drop(self) -> None:
        """Resets the connection."""
        now = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.close_connection = True
