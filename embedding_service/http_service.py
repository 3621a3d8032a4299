"""The whole service as one ASGI application: every request goes to the version that answers it, or to `Management`."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from embedding_service.http_access import Access
from embedding_service.http_api import Answer, problem_of
from embedding_service.http_management import OPERATIONS, Management
from embedding_service.http_messages import (
    MAX_ID,
    REQUEST_ID,
    ClientGone,
    Receive,
    Response,
    Scope,
    Send,
    error_response,
    header,
    path_of,
)
from embedding_service.http_openapi import with_management
from embedding_service.http_schema import Catalogue, Limits
from embedding_service.instruments import Instruments
from embedding_service.live_versions import LiveVersions, Loaded
from embedding_service.service_logs import log_event
from embedding_service.traffic import takes_canary

logger = logging.getLogger(__name__)

CALLER = b"x-caller-id"
_CALLER_FIELD = b"caller="
_CLICKABLE = frozenset(("/v1/recommend", "/v1/similar", "/v1/search"))
TIMED_ROUTES = _CLICKABLE | {"/v1/embed"}
ROUTES = TIMED_ROUTES | {operation.path for operation in OPERATIONS} | {
    "/", "/page", "/docs", "/openapi.json", "/v1/health", "/v1/version", "/v1/figures", "/v1/map", "/v1/keys",
}  # fmt: skip
_OPEN = frozenset(("/v1/health", "/page"))  # asked by what looks after the service, which has no token, and by browsers
_PAGE = "/page/"  # files of the package; what they show is asked for with the token


class HttpService:
    """Any number of requests at once, in one event loop."""

    def __init__(
        self,
        versions: LiveVersions,
        management: Management,
        access: Access,
        instruments: Instruments | None = None,
        *,
        access_log: bool = False,
    ) -> None:
        """Every request is noted in `instruments`, with `access_log` also in the log."""
        self._versions, self._management, self._access = versions, management, access
        self._instruments = instruments or Instruments(TIMED_ROUTES)
        self._access_log = access_log
        self._documents: OrderedDict[str, Response] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._other(scope, receive, send)
        path, start, status = path_of(scope), time.perf_counter(), 499
        loaded: Loaded | None = None
        try:
            response = None
            try:
                if self._management.route_of(path):
                    response = await self._management.respond(scope["method"], path, scope, receive)
                else:
                    if self._access.read is not None and path not in _OPEN and not path.startswith(_PAGE):
                        self._access.check_read(scope)
                    caller = self._caller(scope)
                    if path == "/openapi.json" and scope["method"] == "GET":
                        response = self._document(self._choose(caller))
            except ClientGone:
                return
            except Exception as error:
                response = error_response(scope, problem_of(error, scope))
            if response is not None:
                await response.send(send)
                status = response.status
                return
            loaded = self._enter(caller)
            status = await loaded.api(scope, receive, send)
        finally:
            self._leave(path, status, start, loaded, scope)

    async def ask(
        self,
        scope: Scope,
        num_bytes: int,
        read: Callable[[Catalogue, Limits], dict[str, Any]],
        write: Callable[[Mapping[str, Any]], Answer],
    ) -> Answer:
        """`HttpApi.ask` of the version that answers; `scope` has path, method and headers as of an HTTP request.

        Raises Problem.
        """
        path, start, status = path_of(scope), time.perf_counter(), 499
        loaded: Loaded | None = None
        try:
            self._access.check_read(scope)
            loaded = self._enter(self._caller(scope))
            answer = await loaded.api.ask(path, num_bytes, read, write)
            status = 200
            return answer
        except Exception as error:
            problem = problem_of(error, scope)
            status = problem.status
            raise problem from None
        finally:
            self._leave(path, status, start, loaded, scope)

    def _leave(self, path: str, status: int, start: float, loaded: Loaded | None, scope: Scope) -> None:
        seconds = time.perf_counter() - start
        if loaded is not None:
            loaded.leave()
            if path in TIMED_ROUTES:
                loaded.tally.note(status, seconds, recommends=path in _CLICKABLE)
        self._note(path, status, seconds, loaded, scope)

    def _note(self, path: str, status: int, seconds: float, loaded: Loaded | None, scope: Scope) -> None:
        version = loaded.version if loaded is not None else ""
        route = path if path in ROUTES else self._management.route_of(path)
        route = route or ("/page" if path.startswith(_PAGE) else "other")
        self._instruments.note_request(version, route, status, seconds)
        if self._access_log:
            request_id = header(scope, REQUEST_ID)[:MAX_ID].decode("latin-1") or None
            told: dict[str, Any] = {"request_id": request_id, "method": scope["method"][:20], "route": route}
            ms = round(1e3 * seconds, 3)
            log_event(logger, "request", **told, status=status, ms=ms, version=version or None)

    def _caller(self, scope: Scope) -> bytes:
        caller = _take_caller(scope) if _CALLER_FIELD in scope["query_string"] else b""
        return caller if self._versions.now.canary is None else header(scope, CALLER) or caller

    def _enter(self, caller: bytes) -> Loaded:
        """The version that answers this caller, which is not closed before the request has left it."""
        while True:
            loaded = self._choose(caller)
            loaded.enter()
            if not loaded.retired:
                return loaded
            loaded.leave()  # it was let go of, in another thread, after it was chosen

    def _choose(self, caller: bytes) -> Loaded:
        """The version that answers this caller: the same one as long as share and versions stay."""
        now = self._versions.now
        if now.canary is None:
            return now.live
        return now.canary if caller and takes_canary(caller, now.canary.version, now.share) else now.live

    def _document(self, loaded: Loaded) -> Response:
        if loaded.version not in self._documents:
            self._documents[loaded.version] = Response(
                200, orjson.dumps(with_management(loaded.api.document, OPERATIONS))
            )
            if len(self._documents) > 4:
                self._documents.popitem(last=False)
        return self._documents[loaded.version]

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await send({"type": "websocket.close", "code": 1003})
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        self._management.close()
        self._versions.close()
        await send({"type": "lifespan.shutdown.complete"})


def _take_caller(scope: Scope) -> bytes:
    """The parameter `caller`, which is taken out of the query string; the rest of that stays as it was sent."""
    parts: list[bytes] = scope["query_string"].split(b"&")
    callers = [part for part in parts if part.startswith(_CALLER_FIELD)]
    if not callers:
        return b""
    scope["query_string"] = b"&".join(part for part in parts if not part.startswith(_CALLER_FIELD))
    return unquote_to_bytes(callers[0].removeprefix(_CALLER_FIELD).replace(b"+", b" "))
