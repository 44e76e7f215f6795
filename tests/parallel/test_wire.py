"""Strangers at the port of process 0, over real sockets: not obeyed, not fatal, told once."""

import concurrent.futures
import json
import queue
import socket
import time

import pytest

from tulu_jax.parallel import lifeline
from tulu_jax.parallel import wire as wire_lib

TOKEN = b"a token of these tests"
HELLO = b"tulu_jax " + b"0" * 32 + b"\n"
MEMBER = {"process_id": 1, "num_processes": 2, "host": "evil", "facts": {}}


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def member(process_id, count=2):
    facts = {"jax": "1.0", "config": "a = 1"}
    return lifeline.Member(
        process_id=process_id, num_processes=count, host=f"host{process_id}", facts=facts
    )


def join(process_id, address, *, token=TOKEN, timeout=10.0):
    """The host names of the members that this process is told of, or the error."""
    try:
        members, _ = lifeline.join(
            member(process_id), address, token=token, start_timeout=timeout, peer_timeout=60.0
        )
    except ValueError as error:
        return str(error)
    return [m.host for m in members]


@pytest.fixture
def start():
    """Starts `join` in a thread, as its own process would."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield lambda *args, **kwargs: pool.submit(join, *args, **kwargs)


def connected(address):
    host, port = address.split(":")
    for _ in range(100):
        try:
            return socket.create_connection((host, int(port)), timeout=10)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("process 0 does not listen")


def line(message):
    return b"- " + json.dumps(message).encode() + b"\n"


def is_closed(connection):
    """Whether the other end closes, now or after what it has said."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionError:
        pass
    return True


STRANGE = {
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": bytes(range(256)),
    "an endless greeting": b"x" * 1_000_000,
    "a greeting, then bytes": HELLO + bytes(range(256)) + b"\n",
    "an endless line": HELLO + b"- " + b"[" * (wire_lib.MOST + 1),
    "no JSON": HELLO + b"- {\n",
    "deep JSON": HELLO + b"- " + b"[" * 100_000 + b"\n",
    "a number that is none": HELLO + b'- {"failed": "x", "code": NaN}\n',
    "a number": HELLO + line(1),
    "another message": HELLO + line({"jax": 1}),
    "a field too many": HELLO + line(MEMBER | {"more": 1}),
    "a field too few": HELLO + line({"host": "evil"}),
    "another type": HELLO + line(MEMBER | {"process_id": "1"}),
    "a truth value": HELLO + line(MEMBER | {"process_id": True}),
    "facts that are none": HELLO + line(MEMBER | {"facts": {"jax": [1]}}),
}


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_stranger_does_not_end_process_0(start, caplog, token):
    address = free_address()
    first = start(0, address, token=token, timeout=30.0)
    for said in (*STRANGE.values(), b""):
        with connected(address) as stranger:
            try:
                stranger.sendall(said)
                assert not said or is_closed(stranger)
            except ConnectionError:  # it has heard enough
                pass
    assert start(1, address, token=token).result() == ["host0", "host1"]
    assert first.result() == ["host0", "host1"]
    told = [r.getMessage() for r in caplog.records if "Dropped what came from" in r.getMessage()]
    assert len(told) == 1 and "from 127.0.0.1, port " in told[0]
    assert "does not greet as a process of a run does" in told[0]


@pytest.mark.parametrize(
    "message",
    [
        MEMBER,
        MEMBER | {"num_processes": 3},
        {"stop": ["evil", 1]},
        {"failed": "evil", "code": 1},
        {"refused": ["evil"]},
        {"done": True},
    ],
)
def test_a_stranger_with_a_form_of_ours_is_not_obeyed(start, message):
    address = free_address()
    first = start(0, address)
    body = json.dumps(message).encode()
    for signature in (b"-", b"", b"0" * 64, TOKEN):
        with connected(address) as stranger:
            stranger.sendall(HELLO + signature + b" " + body + b"\n")
            assert is_closed(stranger)
    assert start(1, address).result() == first.result() == ["host0", "host1"]


def test_a_process_without_the_token_does_not_join(start):
    address = free_address()
    first, other = start(0, address, timeout=3.0), start(1, address, token=b"x" * 16, timeout=2.0)
    assert "1 of 2 processes came (process 0 (host0)); processes [1] did not" in first.result()
    assert "127.0.0.1 was turned away: its line is not signed with the TULU_JAX_TOKEN" in (
        first.result()
    )
    assert "perhaps for another TULU_JAX_TOKEN" in other.result()


def test_silent_strangers_keep_no_place(start, monkeypatch):
    monkeypatch.setattr(wire_lib, "HELLO", 0.5)
    monkeypatch.setattr(lifeline, "WAITING", 3)
    address = free_address()
    first = start(0, address)
    silent = [connected(address) for _ in range(6)]
    assert start(1, address).result() == first.result() == ["host0", "host1"]
    assert all(map(is_closed, silent))


class Tapped:
    """A wire of ours whose other end is a bare socket."""

    def __init__(self, token=TOKEN):
        ours, self.theirs = socket.socketpair()
        self.shared = wire_lib.Shared(token=token, fits=lifeline.is_message)
        self.wire = wire_lib.Wire(ours, self.shared)
        self.lines = self.theirs.makefile("rb")
        self.word = self.lines.readline()[9:-1].decode()
        self.theirs.sendall(HELLO)
        self.wire.member = member(1)

    def say(self, message, number):
        body = json.dumps(message).encode()
        signed = self.wire._signature("0" * 32, self.word, number, body) + b" " + body + b"\n"
        self.theirs.sendall(signed)
        return signed

    def heard(self, number):
        """The messages that came before one that is signed, and is the next after `number`."""
        found = []
        self.say({"refused": ["end"]}, number)
        while (message := self.shared.events.get(timeout=10)[1]) != {"refused": ["end"]}:
            found.append(message)
        return found


def test_what_is_said_once_counts_once():
    tapped = Tapped()
    said = tapped.say({"pulse": True}, 0)
    tapped.theirs.sendall(said)  # again
    tapped.say({"stop": ["skipped ahead", 1]}, 5)
    tapped.wire.send(stop=["of ours", 1])
    tapped.theirs.sendall(tapped.lines.readline())  # to where it came from
    tapped.theirs.sendall(line({"stop": ["not signed", 1]}))
    tapped.theirs.sendall(b"x" * (2 * wire_lib.MOST) + b"\n")
    tapped.theirs.sendall(said.replace(b"pulse", b"done\\u0020"))
    assert tapped.heard(1) == [{"pulse": True}]
    tapped.theirs.close()
    tapped.lines.close()
    assert tapped.shared.events.get(timeout=10) == (tapped.wire, None)
    assert len(tapped.shared.dropped) == 1
    with pytest.raises(queue.Empty):
        tapped.shared.events.get(timeout=0.1)


def test_another_connection_takes_no_line_of_this_one():
    first, second = Tapped(), Tapped()
    second.theirs.sendall(first.say({"stop": ["recorded", 1]}, 0))
    assert second.heard(0) == []


def test_a_token_is_long_and_is_not_told(caplog):
    assert wire_lib.token_of({wire_lib.TOKEN: f" {'s3cret' * 5}\n"}) == b"s3cret" * 5
    with pytest.raises(ValueError, match="TULU_JAX_TOKEN of 6 characters; expected 16") as error:
        wire_lib.token_of({wire_lib.TOKEN: "s3cret"})
    assert wire_lib.token_of({}) is wire_lib.token_of({wire_lib.TOKEN: " "}) is None
    assert "TULU_JAX_TOKEN is not set, so whoever reaches" in caplog.text
    assert "s3cret" not in caplog.text + str(error.value)
