"""Requests beyond what a replica takes on, refused where their bytes arrive: in uvicorn, before ASGI and Serve.

HAProxy refuses most (`haproxy_refusals`): here are those of several HAProxies that pass on too many together, and one
for many that a HAProxy has refused, which is counted as so many. A refusal by Serve takes half as long as an answer
(115 us against 220). Here it takes 10 us, reading and writing included: the bytes of a query that came whole, on a
connection that waits for nothing else, are answered with a 503 without a parser or a task.

All else takes the usual way, where Serve still refuses: other routes (health, versions), POST, what came in pieces or
pipelined, what asks for the connection to be closed. These refusals are not in the access log; `instruments` counts
them.
"""

from __future__ import annotations

import logging
import random
import re
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from embedding_service.haproxy_refusals import REFUSED_HEADER, SAMPLED
from embedding_service.http_one_write import OneWrite
from embedding_service.instruments import Instruments

if TYPE_CHECKING:
    import asyncio

    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger(__name__)

# A GET of a query from its first byte to its last: with these headers it would be another matter where it ends, or what
# becomes of the connection; an id that JSON has to escape is left to the usual way
_WHOLE = re.compile(
    rb"GET (?:/[^\s/?]+)?(/v1/(?:similar|recommend))\?[!-~]* HTTP/1\.1\r\n"
    rb"(?:(?i:x-request-id):[ \t]*([!#-\[\]-~]{1,200})\r\n"
    rb"|(?!(?i:connection|content-length|expect|transfer-encoding|upgrade|x-request-id):)"
    rb"[!-9;-~]+:[\t -~\x80-\xff]*\r\n)*\r\n"
)
_BODY = (
    b'{"error":{"code":"overloaded","message":"more requests than this replica takes on: come back in a second",'
    b'"request_id":"%s"}}'
)
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"content-length: %d\r\nx-request-id: %s\r\n\r\n" + _BODY
)
_BODY_BYTES = len(_BODY % b"")
_MARK = b"\r\n%s: %d\r\n" % (REFUSED_HEADER.encode(), SAMPLED)  # as HAProxy sets it, having removed a client's

# What is relied on of uvicorn.protocols.http.httptools_impl, which promises none of it
_NEEDED = {
    "HttpToolsProtocol": (
        "connection_made", "data_received", "_start_asgi_task", "on_response_complete", "connection_lost",
        "transport", "flow", "pipeline", "scope", "cycle",
    ),
    "RequestResponseCycle": ("scope", "more_body", "response_complete"),
    "FlowControl": ("write_paused",),
}  # fmt: skip


def install(instruments: Instruments, limit: int) -> bool:
    """Have the HTTP servers that this process starts from now on refuse queries while they answer `limit` requests.

    False, and a warning, if this uvicorn is not made as expected: then all takes the usual way.
    """
    try:
        import uvicorn.protocols.http.auto as auto
        import uvicorn.protocols.http.httptools_impl as httptools_impl
    except ImportError as error:
        _warn(str(error))
        return False
    if missing := _missing(httptools_impl):
        _warn(f"{', '.join(missing)} not found")
        return False
    if not issubclass(auto.AutoHTTPProtocol, httptools_impl.HttpToolsProtocol):
        _warn(f"it reads HTTP by {auto.AutoHTTPProtocol.__name__}")
        return False
    auto.AutoHTTPProtocol = refusing_protocol(instruments, limit)
    return True


def refusing_protocol(instruments: Instruments, limit: int) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, one object of which is a connection, with refusals that are noted in `instruments`.

    What it answers goes out in one piece each (`http_one_write`).
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    answering: set[HttpToolsProtocol] = set()  # uvicorn's `tasks` hold those too that have just answered

    class RefusingProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._one_write = OneWrite(transport)
            super().connection_made(cast(Any, self._one_write))

        def data_received(self, data: bytes) -> None:
            if (len(answering) >= limit or _MARK in data) and self._is_idle() and (whole := _WHOLE.fullmatch(data)):
                route, request_id = whole.groups()
                request_id = request_id or b"%032x" % random.getrandbits(128)  # as Serve makes them, no secret
                self.transport.write(_ANSWER % (_BODY_BYTES + len(request_id), request_id, request_id))
                self.on_response_complete()  # keeps the connection alive for as long as after an answer
                instruments.note_refusal(route.decode(), SAMPLED if _MARK in data else 1)
            else:
                super().data_received(data)

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
            answering.add(self)
            super()._start_asgi_task(cycle, app)

        def on_response_complete(self) -> None:
            answering.discard(self)
            self._one_write.flush()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            answering.discard(self)
            super().connection_lost(exc)

        def _is_idle(self) -> bool:
            """All that came so far was answered, and the next byte begins a request."""
            cycle = self.cycle
            if cycle is None:
                whole = self.scope is None  # else a first request has begun
            else:
                whole = cycle.response_complete and not cycle.more_body and cycle.scope is self.scope
            return whole and not self.pipeline and not self.flow.write_paused and not self.transport.is_closing()

    return RefusingProtocol


def _missing(module: ModuleType) -> list[str]:
    missing: list[str] = []
    for name, attributes in _NEEDED.items():
        kind = getattr(module, name, None)
        made = getattr(getattr(kind, "__init__", None), "__code__", None)
        known = {*dir(kind), *(made.co_names if made is not None else ())}
        missing += [f"{name}.{attribute}" for attribute in attributes if attribute not in known]
    return missing


def _warn(reason: str) -> None:
    logger.warning(
        "overload costs more than it should: with uvicorn %s requests are refused by Ray Serve alone (%s); deploy/ has "
        "the versions that work together",
        version("uvicorn"),
        reason,
    )
