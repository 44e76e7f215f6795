"""One connection between two processes of a run: JSON objects, one a line, each signed.

Whoever reaches the port may write to it. Both ends first say a random word. Each line then begins
with the HMAC-SHA256, by the token that the launcher gave all processes, of both words, the line's
number and its text: only who has the token wrote it, for this connection, direction and place.
Without a token only the form is looked at.

What is not signed or formed so is dropped, and logged once for each address.
"""

import contextlib
import dataclasses
import hmac
import json
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from tulu_jax import strict_json

TOKEN = "TULU_JAX_TOKEN"
SHORTEST = 16  # characters of a token
HELLO = 10.0  # seconds for the other end to say who it is
MOST = 1 << 22  # bytes of a line; the members of 10,000 hosts take a quarter
_WORD = rb"tulu_jax ([0-9a-f]{32})\n"


def token_of(environ: Mapping[str, str]) -> bytes | None:
    """The token of the environment; None, and a warning, without one. Raises `ValueError` for one
    that can be guessed."""
    token = environ.get(TOKEN, "").strip()
    if not token:
        logging.warning(
            "%s is not set, so whoever reaches the coordinator's port may join or stop this run; "
            "set it to one random text on all hosts, such as `openssl rand -hex 32` prints",
            TOKEN,
        )
        return None
    if len(token) < SHORTEST:
        raise ValueError(
            f"found a {TOKEN} of {len(token)} characters; expected {SHORTEST} or more; set it to "
            "what `openssl rand -hex 32` prints, the same on all hosts"
        )
    return token.encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What the wires of a process have in common: the token, whether a message has a form that is
    known, the events, and the addresses from which something was dropped, each with the reason."""

    token: bytes | None
    fits: Callable[[Any], bool]
    events: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)


class Wire:
    """One connection. A thread puts what comes into the events as pairs of this wire and a message;
    None once the other end is closed, or is a stranger.

    `member` is who is at the other end, once that is known; until then the first line that is
    dropped closes the connection.
    """

    def __init__(self, connection: socket.socket, shared: Shared):
        self.member: Any = None
        self.done = False  # whether it may close
        self.closed = False
        self.begun = self.heard = time.monotonic()
        self._socket, self._shared, self._lock = connection, shared, threading.Lock()
        self._word, self._their_word = secrets.token_hex(16), ""
        self._greeted, self._sent = threading.Event(), 0
        threading.Thread(target=self._listen, daemon=True, name="wire").start()

    def send(self, **message) -> None:
        """Sends `message`, unless the other end is closed or never greeted."""
        if not self._greeted.wait(HELLO):
            self.close()
            return
        body = json.dumps(message).encode()
        with contextlib.suppress(OSError), self._lock:
            signature = self._signature(self._word, self._their_word, self._sent, body)
            self._sent += 1
            self._socket.sendall(signature + b" " + body + b"\n")

    def close(self) -> None:
        """Ends the connection; the event of that follows."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as lines:
            self._socket.sendall(f"tulu_jax {self._word}\n".encode())
            if found := re.fullmatch(_WORD, first := lines.readline(100)):
                self._their_word = found[1].decode()
                self._greeted.set()
                self._read(lines)
            elif first:
                self._drop("it does not greet as a process of a run does")
        self.closed = True
        self._shared.events.put((self, None))
        self._socket.close()

    def _read(self, lines) -> None:
        number = 0
        while line := lines.readline(MOST):
            try:
                message = self._opened(line, number)
            except ValueError as error:
                self._drop(str(error))
                if self.member is None:
                    return
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MOST)
                continue
            number += 1
            self.heard = time.monotonic()
            self._shared.events.put((self, message))

    def _opened(self, line: bytes, number: int) -> Any:
        """The message of a line. Raises `ValueError` that says why it is dropped."""
        if not line.endswith(b"\n"):
            raise ValueError(f"its line is not whole, or longer than {MOST:,} bytes")
        signature, _, body = line[:-1].partition(b" ")
        expected = self._signature(self._their_word, self._word, number, body)
        if not hmac.compare_digest(signature, expected):
            raise ValueError(f"its line is not signed with the {TOKEN} of this process")
        message = strict_json.loads(body)
        if not self._shared.fits(message):
            raise ValueError("its line is no message that processes of a run send")
        return message

    def _signature(self, sender: str, receiver: str, number: int, body: bytes) -> bytes:
        if self._shared.token is None:
            return b"-"
        signed = f"{sender} {receiver} {number} ".encode() + body
        return hmac.new(self._shared.token, signed, "sha256").hexdigest().encode()

    def _drop(self, reason: str) -> None:
        try:
            host, port = self._socket.getpeername()[:2]
            host = host.removeprefix("::ffff:")  # of IPv4
        except (OSError, ValueError):  # it has gone, or has no address
            host, port = "nowhere", 0
        if host not in self._shared.dropped:
            self._shared.dropped[host] = reason
            logging.warning("Dropped what came from %s, port %s: %s", host, port, reason)
