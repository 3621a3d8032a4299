"""The HTTP interface over a retriever: an ASGI application that knows nothing of the server that runs it.

    GET  /v1/similar?key=&k=                                POST /v1/similar    {"key"} or {"keys"}
                                                            POST /v1/search     {"vector"} or {"vectors"} or Arrow
    GET  /v1/recommend?items=&items=&user=&exclude_seen=    POST /v1/recommend  {"session"} or {"sessions"}
                                                            POST /v1/embed      {"keys"} or {"sessions"}
    GET  /v1/version, /v1/health, /openapi.json, /docs

A single query is answered with {"version", "items": [{"key", "score"}]}, a batch with {"version", "results": []}: one
such answer per query, and an Arrow stream with an Arrow stream (`http_arrow`). The client's mistakes are answered with
4xx and {"error": {"code", "message", "request_id"}}. POST bodies may also wish for a "filter", "diversity" and, of
`recommend`, to "explain" (`selective`). Where shards of the index are lost (`scatter`), what the others have is
answered with "partial": {"lost_shards", "num_shards"} and a header X-Partial, or it is a 503, `shard_lost`.

At thousands of requests per second routing and JSON are the cost: a route is one dictionary look-up, and a single
query is answered right on the event loop, together with those that wait beside it (`http_turns`). What takes longer
than a moment runs in threads (FAISS releases the GIL), so that a batch of ten thousand queries does not hold up the
others or the health check.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from cluster.errors import DataError, KeyNotFound, SettingError, ShardLost
from embedding_service.hashed_keys import KeyMap
from embedding_service.http_messages import (
    ClientGone,
    Headers,
    Receive,
    Response,
    Scope,
    Send,
    body_too_large,
    content_type,
    error_response,
    parameters,
    path_of,
    read_body,
)
from embedding_service.http_openapi import openapi
from embedding_service.http_queries import Body, Queries, Retrieval, Single, Work
from embedding_service.http_schema import ARROW_TYPE, Catalogue, Limits, Problem, overloaded
from embedding_service.http_turns import Turns
from embedding_service.instruments import Instruments
from embedding_service.keys import Vocabulary
from embedding_service.scatter import Scatter, noting_lost_shards
from embedding_service.selective import SelectiveRetriever

if TYPE_CHECKING:
    from embedding_service.http_page import Page

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
PARTIAL = b"x-partial"
_WHOLE: Mapping[str, Any] = {}
_INLINE_SECONDS = 0.002  # requests expected to take longer run in a thread
_INLINE_BODY_BYTES = 64 * 1024
_WARM_UP_ROUNDS = 20
_WARM_UP_BATCH = 16
_DOCS = Path(__file__).with_name("docs.html")
_DOCS_POLICY = b"default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


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
        selective: SelectiveRetriever | None = None,
        page: Page | None = None,
        instruments: Instruments | None = None,
        scatter: Scatter | None = None,
    ) -> None:
        """`items`, `users`: the key maps of the catalogue; `threads`: how many large requests are worked on at once;
        `page`: what is served for people to look at; `instruments` are told how long things take. `scatter`: the
        processes that the retriever asks, if it does: then every question waits for them in a thread, and answers
        without some of them are marked.
        """
        self._instruments = instruments = instruments or Instruments()
        self._queries = queries = Queries(
            retriever, catalogue, items, users, limits=limits, selective=selective, instruments=instruments
        )
        self.selective = selective
        self._retriever, self._items, self._limits = retriever, items, limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="retrieval")
        self.num_waiting = 0  # requests in threads, or on their way there
        self._call_seconds = self._query_seconds = 0.0  # what a call takes, and each query in it
        self._version, self._catalogue, self._scatter = catalogue.version, catalogue, scatter
        self._turns = Turns(queries.answers if scatter is None else self._gathered, self._is_quick, self._pool)
        self.document = openapi(catalogue, queries.models, limits, has_page=page is not None)
        self._pages = _pages(catalogue, self.document, limits)
        self._views = page.routes if page is not None else {}
        self._start = "/docs" if page is None else "/page"
        self._pages |= page.files if page is not None else {}
        self._gets = {"/v1/similar": queries.get_similar, "/v1/recommend": queries.get_recommend}
        self._posts: dict[str, Callable[[Body], Work | Single]] = {
            "/v1/similar": queries.post_similar,
            "/v1/search": queries.post_search,
            "/v1/recommend": queries.post_recommend,
        }
        if selective is not None:
            self._posts["/v1/embed"] = queries.post_embed
        self._arrow_posts = {"/v1/search": queries.arrow_search}

    def warm_up(self) -> None:
        """Answer queries a few times, so that files are mapped and code is compiled, and note what they take."""
        keys = self._items.keys[:_WARM_UP_BATCH].to_pylist()
        sessions = [[key] for key in keys] * (_WARM_UP_BATCH // len(keys))
        seconds: dict[int, list[float]] = {1: [], len(sessions): []}
        if self._scatter is not None:  # nothing is answered on the event loop: there is nothing to know
            try:
                self._retriever.recommend(sessions, 10)
            except ShardLost as error:  # it comes back; whoever asks meanwhile is told
                logger.warning("not warmed up: %s", error)
            return
        for _ in range(_WARM_UP_ROUNDS):
            for size, taken in seconds.items():
                start = time.perf_counter()
                self._retriever.recommend(sessions[:size], 10)
                taken.append(time.perf_counter() - start)
            self._retriever.similar(keys, 10)
        one, batch = (min(taken) for taken in seconds.values())  # whatever else the machine does meanwhile
        self._query_seconds = max(0.0, batch - one) / (len(sessions) - 1)
        self._call_seconds = max(0.0, one - self._query_seconds)

    def close(self) -> None:
        """Give the threads back, after the requests they work on. No request may follow."""
        self._pool.shutdown(wait=False)
        if self._scatter is not None:
            self._scatter.forget(self._version)
        vars(self).pop("_turns", None)  # the one that refers back to this: without it all memory is free at once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Answer one request; returns the status, 499 where the client has left before it was answered."""
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return 0
        try:
            response = await self._respond(scope, receive)
        except ClientGone:
            return 499
        await response.send(send)
        return response.status

    async def _lifespan(self, receive: Receive, send: Send) -> int:
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        self.close()
        await send({"type": "lifespan.shutdown.complete"})
        return 0

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        try:
            return await self._dispatch(scope, receive)
        except ClientGone:
            raise
        except Exception as error:
            return error_response(scope, problem_of(error, scope))

    async def _dispatch(self, scope: Scope, receive: Receive) -> Response:
        method, path = scope["method"], path_of(scope)
        if method == "GET":
            if get := self._gets.get(path):
                start = time.perf_counter()
                asked = get(parameters(scope["query_string"]))
                self._instruments.parse.since(start)
                return await self._run(asked, _ok)
            if page := self._pages.get(path):
                return page
            if view := self._views.get(path):
                return await self._in_thread(partial(view, parameters(scope["query_string"])))
            if path == "/":
                root = scope.get("root_path", "")
                return Response(307, b"", headers=((b"location", f"{root}{self._start}".encode()),))
        elif method == "POST" and (post := self._posts.get(path)):
            body = await read_body(scope, receive, self._limits.max_body_bytes)
            check: Callable[[], Work | Single] = partial(post, body)
            if (arrow := self._arrow_posts.get(path)) and content_type(scope) == ARROW_TYPE:
                check = partial(arrow, body, parameters(scope["query_string"]))
            if len(body) > _INLINE_BODY_BYTES:  # parsing alone takes a while
                return await self._in_thread(lambda: self._answer(self._checked(check), _ok))
            return await self._run(self._checked(check), _ok)
        raise self._no_such(method, path)

    async def ask(
        self,
        route: str,
        num_bytes: int,
        read: Callable[[Catalogue, Limits], dict[str, Any]],
        write: Callable[[Mapping[str, Any]], Answer],
    ) -> Answer:
        """What a POST to `route` is answered with, without HTTP.

        `read`: the document that its JSON body would hold; `write`: the answer's, in the caller's own form; either may
        be called in a thread. `num_bytes` is the size of what is read.
        Raises what `problem_of` knows.
        """
        post = self._posts.get(route)
        if post is None:
            raise self._no_such("POST", route)
        if num_bytes > self._limits.max_body_bytes:
            raise body_too_large(self._limits.max_body_bytes)

        def check() -> Work | Single:
            return post(read(self._catalogue, self._limits))

        def render(answer: dict[str, Any] | bytes, partial: Mapping[str, Any] = _WHOLE) -> Answer:
            assert isinstance(answer, dict)
            return write(_marked(answer, partial))

        if num_bytes > _INLINE_BODY_BYTES:
            return await self._in_thread(lambda: self._answer(self._checked(check), render))
        return await self._run(self._checked(check), render)

    async def _run(self, work: Work | Single, render: Callable[..., Answer]) -> Answer:
        if isinstance(work, Single):
            return render(await self._turns.ask(work.group, work.query))
        if work.is_plain and self._is_quick(work.num_queries):
            return self._answer(work, render)
        return await self._in_thread(lambda: self._answer(work, render))

    def _checked(self, check: Callable[[], Work | Single]) -> Work | Single:
        start = time.perf_counter()
        work = check()
        self._instruments.parse.since(start)
        return work

    def _answer(self, work: Work | Single, render: Callable[..., Answer]) -> Answer:
        if self._scatter is None:
            return self._rendered(work, {}, render)
        with noting_lost_shards() as partial:
            return self._rendered(work, partial, render)

    def _rendered(self, work: Work | Single, partial: dict[str, Any], render: Callable[..., Answer]) -> Answer:
        if isinstance(work, Single):
            return render(self._queries.answers(work.group, [work.query])[0], partial)
        answer = work.answer()
        start = time.perf_counter()
        rendered = render(answer, partial)
        self._instruments.render.since(start)
        return rendered

    def _gathered(self, group: Any, queries: list[Any]) -> list[Any]:
        """`Queries.answers` from shards. Without them all fail alike: halving the batch would ask again and again."""
        with noting_lost_shards() as partial:
            try:
                answers: list[Any] = self._queries.answers(group, queries)
            except ShardLost as error:
                return [error] * len(queries)
        return [_marked(one, partial) for one in answers]

    def _is_quick(self, num_queries: int) -> bool:
        if self._scatter is not None:
            return False
        return self._call_seconds + num_queries * self._query_seconds <= _INLINE_SECONDS

    async def _in_thread(self, task: Callable[[], Answer]) -> Answer:
        """What `task` answers in a thread. Problem 503 where too many wait already, or it takes too long.

        A task that has begun is not interrupted; one that nobody waits for any more does not begin.
        """
        if self.num_waiting >= self._limits.max_waiting:
            raise overloaded(f"{self.num_waiting} large requests wait already; come back in a moment")
        self.num_waiting += 1
        work = asyncio.get_running_loop().run_in_executor(self._pool, task)
        try:
            return await asyncio.wait_for(work, self._limits.timeout_seconds)
        except TimeoutError:
            seconds = self._limits.timeout_seconds
            raise overloaded(f"not answered within {seconds:g} s, the limit: ask for less at a time") from None
        finally:
            self.num_waiting -= 1

    def _no_such(self, method: str, path: str) -> Problem:
        gets = self._gets.keys() | self._views.keys() | self._pages.keys()
        allowed = ["GET"] * (path in gets or path == "/") + ["POST"] * (path in self._posts)
        if not allowed:
            known = ", ".join(sorted(gets | self._posts.keys()))
            return Problem(404, "not_found", f"there is no {path[:100]}; there are {known}")
        message = f"{path} answers {' and '.join(allowed)}, not {method[:20]}"
        return Problem(405, "method_not_allowed", message, ((b"allow", ", ".join(allowed).encode()),))


def problem_of(error: Exception, scope: Scope) -> Problem:
    """What the client is told of an error; of a bug of ours no more than that: the log has it."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, KeyNotFound):
        return Problem(404, "key_not_found", str(error))
    if isinstance(error, (SettingError, DataError)):
        return Problem(400, "invalid_request", str(error))
    if isinstance(error, ShardLost):
        return Problem(503, "shard_lost", str(error), ((b"retry-after", b"1"),))
    logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
    return Problem(500, "internal", "this request failed inside the service; its log says why")


def _ok(answer: dict[str, Any] | bytes, partial: Mapping[str, Any] = _WHOLE) -> Response:
    """An answer that lacks what `partial` says, if anything; of a document that is marked already it is read there."""
    if isinstance(answer, bytes):
        return Response(200, answer, ARROW_TYPE.encode(), _partial_headers(partial))
    answer = _marked(answer, partial)
    return Response(
        200, orjson.dumps(answer), headers=_partial_headers(answer["partial"]) if "partial" in answer else ()
    )


def _marked(answer: dict[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    return {**answer, "partial": dict(partial)} if partial else answer


def _partial_headers(partial: Mapping[str, Any]) -> Headers:
    """X-Partial: lost=1,2; shards=3."""
    if not partial:
        return ()
    lost = ",".join(map(str, partial["lost_shards"]))
    return ((PARTIAL, f"lost={lost}; shards={partial['num_shards']}".encode()),)


def _pages(catalogue: Catalogue, document: Mapping[str, Any], limits: Limits) -> dict[str, Response]:
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
        "/openapi.json": Response(200, orjson.dumps(document)),
        "/docs": docs,
    }
