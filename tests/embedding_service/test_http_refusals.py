"""Refusals before ASGI: which bytes are answered so, and that for all others the connection is plain uvicorn's."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.protocols.http import auto, httptools_impl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from embedding_service.haproxy_refusals import REFUSED_HEADER, SAMPLED
from embedding_service.http_refusals import install, refusing_protocol
from embedding_service.instruments import Instruments

HOST = b"host: 127.0.0.1\r\naccept: */*\r\n"
WHOLE = b"GET /v1/similar?key=a&k=3 HTTP/1.1\r\n" + HOST + b"\r\n"
OTHER = b"GET /v1/recommend?items=a HTTP/1.1\r\n" + HOST + b"X-Request-Id: mine-7\r\n\r\n"
PREFIXED = b"GET /second/v1/similar?key=%C3%A9 HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /v1/recommend HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(WHOLE), WHOLE)  # a body like a query


class Wire(asyncio.Transport):
    """What the server writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Server:
    """An application that answers with what it was asked, after `held` was let go; `limit` 1, and one asks already."""

    def __init__(self, protocol: type[HttpToolsProtocol] | None = None, *, busy: bool = True) -> None:
        self.noted = Instruments()
        self.held = asyncio.Event()
        self.asked: list[str] = []
        self._protocol = protocol or refusing_protocol(self.noted, limit=1)
        self._config = uvicorn.Config(cast(Any, self._app), log_config=None, interface="asgi3")
        self._config.load()
        self._state = ServerState()
        if busy:
            self.connect()[0].data_received(WHOLE)
        else:
            self.held.set()

    def connect(self) -> tuple[HttpToolsProtocol, Wire]:
        connection, wire = self._protocol(self._config, self._state, {}), Wire()
        connection.connection_made(wire)
        return connection, wire

    async def finish(self) -> None:
        self.held.set()
        while self._state.tasks:
            await asyncio.gather(*self._state.tasks)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        self.asked.append(f"{scope['method']} {scope['path']} {body.decode()}")
        await self.held.wait()
        text = self.asked[-1].encode()
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})


class Received:
    """Answers in the order in which they came."""

    def __init__(self, written: bytes) -> None:
        self._stream = io.BytesIO(written)

    def makefile(self, *_: Any) -> io.BytesIO:
        return self._stream

    def __iter__(self) -> Iterator[tuple[http.client.HTTPResponse, bytes]]:
        while self._stream.tell() < len(self._stream.getbuffer()):
            answer = http.client.HTTPResponse(cast(Any, self))
            answer.begin()
            body = self._stream.read(int(answer.headers["content-length"]))
            yield answer, body


def test_queries_that_came_whole_are_refused_and_the_connection_goes_on() -> None:
    async def run() -> None:
        server = Server()
        connection, wire = server.connect()
        for request in (WHOLE, OTHER, PREFIXED):
            connection.data_received(request)
        answers = list(Received(wire.written))
        assert len(answers) == 3
        for answer, body in answers:
            assert (answer.status, answer.version, answer.will_close) == (503, 11, False)
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/json"
            error = json.loads(body)["error"]
            assert error.keys() == {"code", "message", "request_id"}
            assert error["code"] == "overloaded"
            assert error["request_id"] == answer.headers["x-request-id"]
        ids = [answer.headers["x-request-id"] for answer, _ in answers]
        assert ids[1] == "mine-7"
        assert len({*ids}) == 3
        assert server.noted.requests == {("", "/v1/similar", 503): 2, ("", "/v1/recommend", 503): 1}
        assert server.noted.num_refused == 3
        assert connection.timeout_keep_alive_task is not None  # else an idle connection would stay for ever

        await server.finish()
        assert server.asked == ["GET /v1/similar "]
        wire.written = b""
        connection.data_received(WHOLE)
        await server.finish()
        ((answer, body),) = Received(wire.written)
        assert (answer.status, body) == (200, b"GET /v1/similar ")
        assert server.noted.num_refused == 3

    asyncio.run(run())


def test_a_query_that_stands_for_those_that_haproxy_has_refused() -> None:
    async def run() -> None:
        server = Server(busy=False)
        connection, wire = server.connect()
        connection.data_received(WHOLE.replace(b"\r\n\r\n", b"\r\n%s: %d\r\n\r\n" % (REFUSED_HEADER.encode(), SAMPLED)))
        connection.data_received(WHOLE)
        await server.finish()
        answers = list(Received(wire.written))
        assert [answer.status for answer, _ in answers] == [503, 200]
        assert server.noted.num_refused == SAMPLED
        assert server.noted.requests == {("", "/v1/similar", 503): SAMPLED}

    asyncio.run(run())


def outcome(pieces: list[bytes], *, plain: bool, busy: bool, after: bytes) -> tuple[list[str], bytes, bool, int]:
    """What the application was asked, what came back, whether it was closed, and the refusals.

    `after`: asked and answered on the connection before another one makes the server busy.
    """

    async def run() -> tuple[list[str], bytes, bool, int]:
        server = Server(HttpToolsProtocol if plain else None, busy=False)
        connection, wire = server.connect()
        if after:
            connection.data_received(after)
            await server.finish()
        if busy:
            server.held.clear()
            server.connect()[0].data_received(WHOLE)
        for piece in pieces:
            if not wire.closed:
                connection.data_received(piece)
                await asyncio.sleep(0)
        await server.finish()
        return server.asked, wire.written, wire.closed, server.noted.num_refused

    return asyncio.run(run())


UNTOUCHED = {
    "health": [b"GET /v1/health HTTP/1.1\r\n" + HOST + b"\r\n"],
    "Serve's health check": [b"GET /-/healthz HTTP/1.1\r\n" + HOST + b"\r\n"],
    "version": [b"GET /v1/version?k=1 HTTP/1.1\r\n" + HOST + b"\r\n"],
    "a longer path": [b"GET /v1/similars?k=1 HTTP/1.1\r\n" + HOST + b"\r\n"],
    "management": [b"GET /v1/versions HTTP/1.1\r\n" + HOST + b"\r\n"],
    "another method": [WHOLE.replace(b"GET", b"HEAD")],
    "no method": [WHOLE.replace(b"GET", b"get")],
    "a body": [POST],
    "pieces of a body": [POST[: POST.index(b"GET")], WHOLE],
    "a GET with a body": [WHOLE.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\nxy")],
    "a body to come": [WHOLE.replace(b"accept", b"content-length: %d\r\naccept" % len(WHOLE)), WHOLE],
    "a body in chunks": [WHOLE.replace(b"accept: */*", b"Transfer-Encoding: chunked"), b"2\r\nxy\r\n0\r\n\r\n"],
    "the end of the connection": [WHOLE.replace(b"accept: */*", b"Connection: close")],
    "another protocol": [WHOLE.replace(b"accept: */*", b"Connection: upgrade\r\nUpgrade: h2c")],
    "another version": [WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0")],
    "two at once": [WHOLE + WHOLE],
    "one and a half": [WHOLE + WHOLE[:20], WHOLE[20:]],
    "one after one that is being answered": [b"GET /v1/health HTTP/1.1\r\n\r\n", WHOLE],
    "lines that end otherwise": [WHOLE.replace(b"\r\n", b"\n")],
    "an end amid headers": [WHOLE.replace(b"accept", b"\r\naccept")],
    "a header on two lines": [WHOLE.replace(b"*/*", b"*/*\r\n content-length: 3")],
    "a header without a name": [WHOLE.replace(b"accept", b"")],
    "a blank in a header's name": [WHOLE.replace(b"accept:", b"content-length :")],
    "an id that JSON escapes": [WHOLE.replace(b"accept: */*", b'x-request-id: a"b')],
    "nothing of HTTP": [b"\x16\x03\x01\x02\r\n\r\n"],
}
HALVES = {f"cut at {at}": [WHOLE[:at], WHOLE[at:]] for at in range(1, len(WHOLE))}


@pytest.mark.parametrize("after", [b"", WHOLE, POST], ids=["first", "after a GET", "after a POST"])
def test_all_else_is_as_without_refusals(after: bytes) -> None:
    for name, pieces in (UNTOUCHED | HALVES).items():
        plain = outcome(pieces, plain=True, busy=True, after=after)
        assert outcome(pieces, plain=False, busy=True, after=after) == plain, name
        assert plain[3] == 0
    assert outcome([WHOLE], plain=False, busy=True, after=after)[3] == 1  # or nothing above could have failed


def test_nothing_is_refused_below_the_limit() -> None:
    for pieces in ([WHOLE], [OTHER], [WHOLE, b"", OTHER]):  # the first is answered by the time that the second comes
        plain = outcome(pieces, plain=True, busy=False, after=b"")
        assert outcome(pieces, plain=False, busy=False, after=b"") == plain
        assert len(plain[0]) == len(pieces) - pieces.count(b"")


def test_a_request_whose_client_has_left_is_not_answered_any_more() -> None:
    async def run() -> None:
        server = Server(busy=False)
        server.held.clear()
        first, _ = server.connect()
        first.data_received(WHOLE)
        await asyncio.sleep(0)
        connection, wire = server.connect()
        connection.data_received(WHOLE)
        assert server.noted.num_refused == 1
        first.connection_lost(ConnectionResetError())
        connection.data_received(WHOLE)
        assert server.noted.num_refused == 1
        await server.finish()
        answers = list(Received(wire.written))
        assert [answer.status for answer, _ in answers] == [503, 200]

    asyncio.run(run())


def test_a_client_that_does_not_read_is_not_written_to() -> None:
    async def run() -> None:
        server = Server()
        connection, wire = server.connect()
        connection.pause_writing()
        connection.data_received(WHOLE)
        assert (wire.written, server.noted.num_refused) == (b"", 0)
        connection.resume_writing()
        await server.finish()
        assert server.asked == ["GET /v1/similar "] * 2

    asyncio.run(run())


class TestInstall:
    @pytest.fixture(autouse=True)
    def uvicorn_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(auto, "AutoHTTPProtocol", HttpToolsProtocol)

    def protocol(self) -> type[asyncio.Protocol]:
        """Of a server that is made now with the options of Serve's."""
        config = uvicorn.Config(lambda: cast(Any, None), factory=True, lifespan="off", log_level=None, log_config=None)
        config.load()
        return config.http_protocol_class

    def test_servers_have_it(self) -> None:
        assert self.protocol() is HttpToolsProtocol
        assert install(Instruments(), 8)
        assert self.protocol() is auto.AutoHTTPProtocol
        assert issubclass(self.protocol(), HttpToolsProtocol)
        assert self.protocol() is not HttpToolsProtocol

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            (lambda patch: patch.delattr(httptools_impl, "RequestResponseCycle"), "RequestResponseCycle.scope"),
            (
                lambda patch: patch.setattr(httptools_impl, "FlowControl", object),
                "Ray Serve alone (FlowControl.write_paused not found)",
            ),
            (
                lambda patch: patch.delattr(HttpToolsProtocol, "on_response_complete"),
                "(HttpToolsProtocol.on_response_complete not found)",
            ),
            (lambda patch: patch.setattr(auto, "AutoHTTPProtocol", asyncio.Protocol), "(it reads HTTP by Protocol)"),
            (lambda patch: patch.setitem(sys.modules, httptools_impl.__name__, None), "httptools_impl"),
        ],
    )
    def test_another_uvicorn_is_left_as_it_is(
        self,
        change: Callable[[pytest.MonkeyPatch], None],
        told: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        change(monkeypatch)
        before = auto.AutoHTTPProtocol
        with caplog.at_level(logging.WARNING):
            assert not install(Instruments(), 8)
        assert auto.AutoHTTPProtocol is before
        assert told in caplog.text
        assert "overload costs more than it should: with uvicorn " in caplog.text
