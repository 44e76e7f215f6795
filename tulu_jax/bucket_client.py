"""The client of Cloud Storage behind every `gs://` path: that of gcsfs, through `epath` and fsspec.

What it adds:

- No network is said within `SOON` seconds, before gcsfs looks for credentials, which takes longer.
- An answer that does not come is given up after `STALLED` seconds. That, a connection that breaks,
  and the statuses 408, 429 and 5xx are tried again, six times in half a minute, as gcsfs does.
- What fails in the end is an `OSError` that names the object, or a `PermissionError`. Whether
  something exists is never answered with no because of it: a run would begin anew.
- A whole object that was damaged on its way, by its checksum, is read again. A part of one has no
  checksum: `interop/weight_files.py` reads these twice.
- Listings are not remembered, as other processes write there too.

`tulu_jax/__init__.py` registers it. TensorStore, which reads and writes the arrays of checkpoints,
has a client of its own; the same file sets its times.
"""

import asyncio
import base64
import contextlib
import io
import queue
import re
import socket
import threading
import time
import urllib.parse
import urllib.request

import aiohttp
import gcsfs.core
import google.auth.exceptions
import google_crc32c
import requests.exceptions

from tulu_jax import validation

SOON = 8.0  # seconds for the first connection
WAITS = (0.0, 1.0, 2.0)  # seconds before its tries
STALLED = 60.0  # seconds without a byte
READS = 3  # of an object whose content is damaged
SAID = 200  # characters of what the service says
HEAD = 4096  # bytes of an upload that tell what it is of
MEND = (
    "Check its name, the network and the credentials (gcloud auth application-default login), then "
    "start again"
)
FAILURES = (
    gcsfs.retry.HttpError,
    gcsfs.retry.ChecksumError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    requests.exceptions.RequestException,
    google.auth.exceptions.GoogleAuthError,
)

_reached: set[str] = set()  # addresses to which there was a connection
_missed: dict[str, tuple[float, str]] = {}  # those to which there was none: when, and why
_probing = threading.Lock()


class Client(gcsfs.core.GCSFileSystem):
    """See the module."""

    def __init__(self, *args, **kwargs):
        require_network(gcsfs.core._location())
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SOON, sock_read=STALLED)
        kwargs = {"requests_timeout": timeout, "use_listings_cache": False} | kwargs
        super().__init__(*args, **kwargs)

    async def _request(self, method, path, *args, **kwargs):
        try:
            for _ in range(READS):
                answer = await super()._request(method, path, *args, **kwargs)
                if not _is_damaged(*answer[1::2]):
                    return answer
            raise gcsfs.retry.ChecksumError(f"read {READS} times, and is not what was written")
        except (*FAILURES, OSError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:SAID]
            about = f"{_named(path, args, kwargs.get('data') or kwargs.get('json'))}: {method}"
            if str(error).startswith("Forbidden"):
                raise PermissionError(
                    f"{about} is not permitted ({said}); grant this account a role there, such as "
                    "Storage Object User, or name another bucket"
                ) from error
            if isinstance(error, FAILURES):
                raise OSError(f"{about} failed ({said}). {MEND}") from error
            raise  # there is no such object, or there is one

    async def _rm_file(self, path, **kwargs):
        """A removal whose answer was lost is asked for again, and finds nothing: it is done."""
        with contextlib.suppress(FileNotFoundError):
            await super()._rm_file(path, **kwargs)

    async def _rm(self, path, *args, **kwargs):
        with contextlib.suppress(FileNotFoundError):  # the same, of many
            return await super()._rm(path, *args, **kwargs)
        return []

    async def _isdir(self, path):
        return await self._type(path) == "directory"

    async def _isfile(self, path):
        return await self._type(path) == "file"

    async def _type(self, path) -> str | None:
        try:
            return (await self._info(path))["type"]
        except FileNotFoundError:
            return None


def _is_damaged(headers, content: bytes) -> bool:
    """Whether `content` is a whole object and has another checksum than the service tells."""
    told = re.search(r"crc32c=([^,\s]+)", ",".join(headers.getall("x-goog-hash", [])))
    packed = headers.get("x-goog-stored-content-encoding", "identity") != "identity"
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("content-range", ""))
    part = span is not None and int(span[2]) - int(span[1]) + 1 != int(span[3])
    if told is None or packed or part:
        return False
    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode() != told[1]


def _named(path: str, args: tuple, content) -> str:
    """The object or bucket that a request is about, such as 'gs://bucket/folder/object'; of an
    upload, its `content` tells."""
    url = path.format(*(urllib.parse.quote(str(part), safe="") for part in args))
    found = re.search(r"(?:^|/)b/([^/?]+)(?:/o/([^/?]+))?", url)
    if found is None:
        return "gs://"
    name = urllib.parse.unquote(found[2] or "")
    head = content.getvalue()[:HEAD] if isinstance(content, io.BytesIO) else content
    if not name and isinstance(head, bytes) and (told := re.search(rb'"name": "([^"]+)"', head)):
        name = told[1].decode()
    elif not name and isinstance(content, dict):
        name = content.get("name", "")
    return "/".join(["gs:/", urllib.parse.unquote(found[1]), name]).rstrip("/")


def require_network(address: str) -> None:
    """Raises `validation.UnreachableError`, within `SOON` seconds, if there is no connection to
    `address`, a URL, or to the proxy before it. One that there was is not asked for again."""
    with _probing:
        if address in _reached:
            return
        when, reason = _missed.get(address, (-SOON, ""))
        if time.monotonic() > when + SOON:
            reason = _problem(*_first_hop(address))
        if reason is None:
            _reached.add(address)
            return
        _missed[address] = time.monotonic(), reason
    raise validation.UnreachableError(
        f"{address} cannot be reached ({reason}); gs:// paths need it. Check the network, or give "
        "local folders"
    )


def _first_hop(address: str) -> tuple[str, int]:
    """(host, port) of an address, or of the proxy that the environment names for it."""
    found = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(found.scheme)
    if proxy and not urllib.request.proxy_bypass(found.hostname):
        found = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return found.hostname, found.port or (443 if found.scheme == "https" else 80)


def _problem(host: str, port: int) -> str | None:
    """Why nothing answers there, or None. Names that are not resolved block, so a thread asks."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        for wait in WAITS:
            time.sleep(wait)
            try:
                socket.create_connection((host, port), timeout=SOON).close()
                answers.put(None)
                return
            except OSError as error:
                problem = error.strerror or str(error) or type(error).__name__
        answers.put(problem)

    threading.Thread(target=ask, daemon=True, name="first connection").start()
    try:
        return answers.get(timeout=SOON)
    except queue.Empty:
        return f"no answer in {SOON:.0f} s"
