"""Answers in one piece: what is written when, and that all of it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from embedding_service.http_one_write import OneWrite
from embedding_service.http_refusals import refusing_protocol
from embedding_service.instruments import Instruments

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Pieces(asyncio.Transport):
    """What is written, a piece for each write."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 7)})
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written.append(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


@pytest.mark.parametrize(
    ("writes", "pieces"),
    [
        ([HEAD, b"ok"], [HEAD + b"ok"]),
        ([HEAD, b"ok", HEAD, b"no"], [HEAD + b"ok", HEAD + b"no"]),
        ([HEAD, b"1\r\na\r\n", b"0\r\n\r\n"], [HEAD + b"1\r\na\r\n", b"0\r\n\r\n"]),
        ([HEAD, b""], [HEAD]),
        ([HEAD, bytes(10**6)], [HEAD + bytes(10**6)]),
        ([HEAD + b"ok"], [HEAD + b"ok"]),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", HEAD, b"ok"], [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"ok"]),
        ([HEAD, HEAD], [HEAD + HEAD]),  # a body that looks like a head
        ([HEAD], []),
    ],
)
def test_a_head_waits_for_the_first_of_its_body(writes: list[bytes], pieces: list[bytes]) -> None:
    wire = Pieces()
    transport = OneWrite(wire)
    for data in writes:
        transport.write(data)
    assert wire.written == pieces
    transport.flush()
    assert b"".join(wire.written) == b"".join(writes)


def test_closing_sends_what_is_there() -> None:
    wire = Pieces()
    transport = OneWrite(wire)
    transport.write(HEAD)
    transport.close()
    assert (wire.written, wire.closed, transport.is_closing()) == ([HEAD], True, True)
    assert transport.get_extra_info("peername") == ("127.0.0.1", 7)  # as all else


@pytest.mark.parametrize(("method", "body"), [(b"GET", b"ok"), (b"HEAD", b"")])
def test_uvicorn_answers_in_one_piece(method: bytes, body: bytes) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def run() -> None:
        config = uvicorn.Config(cast(Any, app), log_config=None, interface="asgi3")
        config.load()
        state, wire = ServerState(), Pieces()
        connection = refusing_protocol(Instruments(), limit=8)(config, state, {})
        connection.connection_made(wire)
        for number in (1, 2):
            connection.data_received(method + b" /v1/version HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.gather(*state.tasks)
            assert len(wire.written) == number
            head, _, rest = wire.written[-1].partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert rest == body

    asyncio.run(run())
