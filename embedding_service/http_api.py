"""The HTTP interface over a retriever: an ASGI application that knows nothing of the server that runs it.

    GET  /v1/similar?key=&k=                                POST /v1/similar    {"key"} or {"keys"}
                                                            POST /v1/search     {"vector"} or {"vectors"} or Arrow
    GET  /v1/recommend?items=&items=&user=&exclude_seen=    POST /v1/recommend  {"session"} or {"sessions"}
    GET  /v1/version, /v1/health, /openapi.json, /docs

A single query is answered with {"version", "items": [{"key", "score"}]}, a batch with {"version", "results": []}: one
such answer per query, and an Arrow stream with an Arrow stream (`http_arrow`). The client's mistakes are answered with
4xx and {"error": {"code", "message"}}.

At thousands of requests per second routing and JSON are the cost: a route is one dictionary look-up, and a single
query is answered right on the event loop, together with those that wait beside it (`http_turns`). What takes longer
than a moment runs in threads (FAISS releases the GIL), so that a batch of ten thousand queries does not hold up the
others or the health check.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qsl

import orjson

from cluster.errors import DataError, KeyNotFound, SettingError
from embedding_service.hashed_keys import KeyMap
from embedding_service.http_queries import Queries, Retrieval, Single, Work
from embedding_service.http_schema import ARROW_TYPE, Catalogue, Limits, Problem, openapi
from embedding_service.http_turns import Turns
from embedding_service.keys import Vocabulary

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

_INLINE_SECONDS = 0.002  # requests expected to take longer run in a thread
_INLINE_BODY_BYTES = 64 * 1024
_WARM_UP_ROUNDS = 20
_WARM_UP_BATCH = 16
_DOCS = Path(__file__).with_name("docs.html")
_DOCS_POLICY = b"default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Response:
    status: int
    body: bytes
    content_type: bytes = b"application/json"
    headers: Headers = ()


class HttpApi:
    """The ASGI application; it may serve any number of requests at once, in one event loop."""

    def __init__(
        self,
        retriever: Retrieval,
        catalogue: Catalogue,
        items: Vocabulary,
        users: KeyMap | None = None,
        *,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        threads: int = 1,
    ) -> None:
        """`items`, `users`: the key maps of the catalogue; `threads`: how many large requests are worked on at once."""
        self._queries = queries = Queries(retriever, catalogue, items, users, limits=limits)
        self._retriever, self._items, self._limits = retriever, items, limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="retrieval")
        self._call_seconds = self._query_seconds = 0.0  # what a call takes, and each query in it
        self._turns = Turns(queries.answers, self._is_quick, self._pool)
        self._pages = _pages(catalogue, queries, limits)
        self._gets = {"/v1/similar": queries.get_similar, "/v1/recommend": queries.get_recommend}
        self._posts = {
            "/v1/similar": queries.post_similar,
            "/v1/search": queries.post_search,
            "/v1/recommend": queries.post_recommend,
        }
        self._arrow_posts = {"/v1/search": queries.arrow_search}

    def warm_up(self) -> None:
        """Answer queries a few times, so that files are mapped and code is compiled, and note what they take."""
        keys = self._items.keys[:_WARM_UP_BATCH].to_pylist()
        sessions = [[key] for key in keys] * (_WARM_UP_BATCH // len(keys))
        seconds: dict[int, list[float]] = {1: [], len(sessions): []}
        for _ in range(_WARM_UP_ROUNDS):
            for size, taken in seconds.items():
                start = time.perf_counter()
                self._retriever.recommend(sessions[:size], 10)
                taken.append(time.perf_counter() - start)
            self._retriever.similar(keys, 10)
        one, batch = (median(taken) for taken in seconds.values())
        self._query_seconds = max(0.0, batch - one) / (len(sessions) - 1)
        self._call_seconds = max(0.0, one - self._query_seconds)

    def close(self) -> None:
        """Give the threads back, after the requests they work on."""
        self._pool.shutdown()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        try:
            response = await self._respond(scope, receive)
        except _ClientGone:
            return
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", b"%d" % len(response.body)),
            *response.headers,
        ]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        try:
            return await self._dispatch(scope, receive)
        except _ClientGone:
            raise
        except Problem as problem:
            return _error(problem.status, problem.code, str(problem))
        except KeyNotFound as error:
            return _error(404, "key_not_found", str(error))
        except (SettingError, DataError) as error:
            return _error(400, "invalid_request", str(error))
        except Exception:  # a bug of ours: the log has it, and the client is told no more than that
            logger.exception("%s %s failed", scope["method"], scope["path"])
            return _error(500, "internal", "this request failed inside the service; its log says why")

    async def _dispatch(self, scope: Scope, receive: Receive) -> Response:
        method, path = scope["method"], scope["path"]
        root = scope.get("root_path", "")
        if root:
            path = path.removeprefix(root) or "/"
        if method == "GET":
            if get := self._gets.get(path):
                return await self._run(get(_parameters(scope["query_string"])))
            if page := self._pages.get(path):
                return page
            if path == "/":
                return Response(307, b"", headers=((b"location", f"{root}/docs".encode()),))
        elif method == "POST" and (post := self._posts.get(path)):
            body = await _read_body(scope, receive, self._limits.max_body_bytes)
            check: Callable[[], Work | Single] = partial(post, body)
            if (arrow := self._arrow_posts.get(path)) and _content_type(scope) == ARROW_TYPE:
                check = partial(arrow, body, _parameters(scope["query_string"]))
            if len(body) > _INLINE_BODY_BYTES:  # parsing alone takes a while
                return await self._in_thread(lambda: self._answer(check()))
            return await self._run(check())
        return self._no_such(method, path)

    async def _run(self, work: Work | Single) -> Response:
        if isinstance(work, Single):
            return _ok(await self._turns.ask(work.group, work.query))
        if self._is_quick(work.num_queries):
            return self._answer(work)
        return await self._in_thread(lambda: self._answer(work))

    def _answer(self, work: Work | Single) -> Response:
        if isinstance(work, Single):
            return _ok(self._queries.answers(work.group, [work.query])[0])
        return _ok(work.answer())

    def _is_quick(self, num_queries: int) -> bool:
        return self._call_seconds + num_queries * self._query_seconds <= _INLINE_SECONDS

    async def _in_thread(self, task: Callable[[], Response]) -> Response:
        return await asyncio.get_running_loop().run_in_executor(self._pool, task)

    def _no_such(self, method: str, path: str) -> Response:
        gets = self._gets.keys() | self._pages.keys()
        allowed = ["GET"] * (path in gets or path == "/") + ["POST"] * (path in self._posts)
        if not allowed:
            known = ", ".join(sorted(gets | self._posts.keys()))
            return _error(404, "not_found", f"there is no {path[:100]}; there are {known}")
        message = f"{path} answers {' and '.join(allowed)}, not {method[:20]}"
        return _error(405, "method_not_allowed", message, ((b"allow", ", ".join(allowed).encode()),))


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body; Problem 413 as soon as it is announced to be, or turns out, larger than `limit` bytes."""
    too_large = Problem(
        413, "body_too_large", f"the body is larger than the limit of {limit} bytes: send several requests"
    )
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > limit:
            raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _content_type(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"content-type":
            return str(value.decode("latin-1").split(";")[0].strip().lower())
    return ""


def _parameters(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise Problem(400, "invalid_request", "the query string is not UTF-8") from None


def _ok(answer: dict[str, Any] | bytes) -> Response:
    if isinstance(answer, bytes):
        return Response(200, answer, ARROW_TYPE.encode())
    return Response(200, orjson.dumps(answer))


def _error(status: int, code: str, message: str, headers: Headers = ()) -> Response:
    body = orjson.dumps({"error": {"code": code, "message": message.encode(errors="replace").decode()}})
    return Response(status, body, headers=headers)


def _pages(catalogue: Catalogue, queries: Queries, limits: Limits) -> dict[str, Response]:
    """What is the same for every request."""
    about = {
        "version": catalogue.version,
        "num_items": catalogue.num_items,
        "dim": catalogue.dim,
        "key_type": catalogue.key_type,
        "limits": vars(limits),
        "details": catalogue.details,
    }
    no_store = ((b"cache-control", b"no-store"),)
    docs = Response(200, _DOCS.read_bytes(), b"text/html; charset=utf-8", ((b"content-security-policy", _DOCS_POLICY),))
    return {
        "/v1/version": Response(200, orjson.dumps(about)),
        "/v1/health": Response(200, orjson.dumps({"status": "ok", "version": catalogue.version}), headers=no_store),
        "/openapi.json": Response(200, orjson.dumps(openapi(catalogue, queries.models, limits))),
        "/docs": docs,
    }
