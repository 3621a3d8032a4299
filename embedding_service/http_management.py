"""Endpoints that change what is served, or tell of it: versions, gates, canary, feedback.

    GET  /v1/versions                                    what there is, what is live, what the gates measured, traffic
    POST /v1/versions             {"source"}             check a folder below the root and take it in
    POST /v1/versions/activate    {"version"}            check, judge, load, make live; "force" passes by the gates
    POST /v1/versions/canary      {"version", "share"}   the same for a share of the callers; a share of 0 ends it
    POST /v1/versions/rollback    {}                     the version before is live again
    POST /v1/versions/remove      {"version"}
    GET  /v1/items                                       what was added to, and taken off, the live version
    POST /v1/items                {"key", "like"}        an item without training: near others, or at a "vector"
    POST /v1/items/delete         {"keys"}
    POST /v1/feedback             {"version", "request_id", "key"}     answers {"counted"}: false for a click told twice
    GET, POST /v1/exports, GET /v1/exports/{id}          a run as a version, see `http_exports`

An activation takes seconds to minutes: it is answered with 202, and `GET /v1/versions` tells how it goes on
(`admission`: checking, flipping, then live or canary, or refused); with "wait_seconds" the answer is held back until it
is decided, at most for that long. Live is what all replicas serve: until then it is flipping, and how many have flipped
is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cluster.errors import ArtifactError
from embedding_service.activations import Activations
from embedding_service.exports import Exports
from embedding_service.gates import Gates
from embedding_service.http_access import Access
from embedding_service.http_exports import ONE_EXPORT, ExportEndpoints
from embedding_service.http_exports import OPERATIONS as EXPORT_OPERATIONS
from embedding_service.http_messages import Receive, Response, Scope, json_response, read_body
from embedding_service.http_openapi import Operation
from embedding_service.http_schema import Key, Problem, Strict, parse_body
from embedding_service.live_versions import LiveVersions
from embedding_service.recall_probe import RecallProbe
from embedding_service.scatter import Scatter
from embedding_service.service_logs import log_event
from embedding_service.version_listing import VersionListing
from embedding_service.versions import VersionStore

logger = logging.getLogger(__name__)

Handler = Callable[..., Awaitable[Response]]  # of the body, and of what the path names
MAX_BODY_BYTES = 64 * 1024
FEEDBACK = "/v1/feedback"
MAX_WAIT_SECONDS = 300.0
_ROLL_BACK_SECONDS = 5.0  # they have it in memory


class Publish(Strict):
    source: str = Field(max_length=1000, description="a folder below the root of the versions, like incoming/NAME")


class Activate(Strict):
    version: str = Field(max_length=128)
    force: bool = Field(False, description="go live although gates say no; what is damaged is refused all the same")
    wait_seconds: float = Field(0.0, ge=0.0, le=MAX_WAIT_SECONDS, description="hold the answer back so long")


class Canary(Activate):
    share: float = Field(ge=0.0, le=1.0, description="of the callers, by X-Caller-Id or the parameter `caller`")


class Remove(Strict):
    version: str = Field(max_length=128)


class RollBack(Strict):
    live: str = Field("", max_length=128, description="go back only if this version is live: asking twice is once")


class NewItem(Strict):
    key: Key
    like: list[Key] = Field(default=[], max_length=1000, description="it is placed at the mean of these items")
    vector: list[float] | None = Field(None, max_length=2**16, description="or here, as /v1/embed gives vectors")
    attributes: dict[str, str | int | bool] = Field({}, max_length=100, description="or among those that share these")


class Keys(Strict):
    keys: list[Key] = Field(min_length=1, max_length=10_000)


class Feedback(Strict):
    version: str = Field(max_length=128, description="as the answer had it")
    request_id: str = Field(min_length=1, max_length=200, description="the answer's header X-Request-ID")
    key: Key = Field(description="the item that was clicked on")


_BODY = {"400": "the body is wrong", "413": "the body is too large"}
_TOKEN = {"401": "without the token", "403": "changes are switched off", "409": "refused; the message says why"}
_VERSION = {"404": "there is no such version"}

OPERATIONS = (
    Operation("GET", "/v1/versions", "versions, what is live, gates, traffic", errors={"401": "without the token"}),
    Operation("POST", "/v1/versions", "take in a version", Publish, True, 201, errors=_BODY | _TOKEN),
    Operation("POST", "/v1/versions/activate", "make a version live", Activate, True, later=True,
              errors=_BODY | _TOKEN | _VERSION),
    Operation("POST", "/v1/versions/canary", "let a version answer a share", Canary, True, later=True,
              errors=_BODY | _TOKEN | _VERSION),
    Operation("POST", "/v1/versions/rollback", "go back to the version before", RollBack, True, errors=_BODY | _TOKEN),
    Operation("POST", "/v1/versions/remove", "remove a version", Remove, True, errors=_BODY | _TOKEN | _VERSION),
    Operation("GET", "/v1/items", "items added to and taken off the live version", errors={"401": "without the token"}),
    Operation("POST", "/v1/items", "add an item to the live version", NewItem, True, 201,
              errors=_BODY | _TOKEN | {"404": "an item that it is like is unknown"}),
    Operation("POST", "/v1/items/delete", "take items off the live version", Keys, True, errors=_BODY | _TOKEN),
    Operation("POST", FEEDBACK, "a click on what was answered", Feedback,
              answer="`counted`: false where the same click was told before; request ids are not checked",
              errors=_BODY | _VERSION | {"401": "without the token"}),
    *EXPORT_OPERATIONS,
)  # fmt: skip
_EXPORT = ONE_EXPORT.removesuffix("{id}")


class Management:
    """Answers what has a route here (`route_of`). Handlers run on the event loop and leave files to threads."""

    def __init__(
        self,
        versions: LiveVersions,
        store: VersionStore | None,
        access: Access,
        gates: Gates,
        *,
        admit_seconds: float,
        probe: RecallProbe | None = None,
        scatter: Scatter | None = None,
        runs: str = "",
    ) -> None:
        """scatter: the processes that hold the indexes, if this one does not. runs: the folder whose runs are exported
        on request; "": none.
        """
        self._versions, self._store, self._access = versions, store, access
        self._listing = VersionListing(versions, store, probe, scatter)
        self.activations = self._exports = None
        if store is not None:
            self.activations = Activations(versions, store, gates, admit_seconds=admit_seconds)
            self._exports = Exports(store, Path(runs), self.activations.run) if runs else None
        exports = ExportEndpoints(self._exports)
        handlers: list[Handler] = [
            self._list, self._publish, self._activate, self._canary, self._roll_back, self._remove,
            self._items, self._add_item, self._delete_items, self._feedback,
            exports.all, exports.begin, exports.one,
        ]  # fmt: skip
        self._routes: dict[str, dict[str, tuple[Operation, Handler]]] = {}
        for operation, handler in zip(OPERATIONS, handlers, strict=True):
            self._routes.setdefault(operation.path, {})[operation.method] = operation, handler

    def route_of(self, path: str) -> str:
        """The endpoint that a path asks for, like /v1/exports/{id}; "" where it is none of these."""
        return path if path in self._routes else ONE_EXPORT if path.startswith(_EXPORT) else ""

    def close(self) -> None:
        """End what runs beside the requests, and its processes."""
        if self._exports is not None:
            self._exports.close()

    async def respond(self, method: str, path: str, scope: Scope, receive: Receive) -> Response:
        """The answer to a path that has a route. Raises Problem."""
        methods = self._routes[self.route_of(path)]
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            message = f"{path[:100]} answers {allowed}, not {method[:20]}"
            raise Problem(405, "method_not_allowed", message, ((b"allow", allowed.encode()),))
        operation, handler = methods[method]
        if operation.token:
            self._access.check_change(scope)
        elif path == FEEDBACK:
            self._access.check_feedback(scope)
        else:
            self._access.check_read(scope)
        named = [path.removeprefix(_EXPORT)] if operation.names else []
        return await handler(await read_body(scope, receive, MAX_BODY_BYTES), *named)

    async def _list(self, _: bytes) -> Response:
        return json_response(await asyncio.to_thread(self._listing.document))

    async def _publish(self, body: bytes) -> Response:
        asked, store = parse_body(Publish, body), self._required_store()
        now = self._versions.now
        served = {self._versions.start, now.live.version, *([now.canary.version] if now.canary is not None else [])}
        with _refusal("publish", source=asked.source):
            version = await _file_work(partial(store.publish, asked.source, served=served))
        log_event(logger, "published", version=version, source=asked.source)
        return json_response({"version": version}, 201)

    async def _activate(self, body: bytes) -> Response:
        return await self._start(parse_body(Activate, body), share=None)

    async def _canary(self, body: bytes) -> Response:
        asked = parse_body(Canary, body)
        if asked.share:
            return await self._start(asked, share=asked.share)
        await _file_work(lambda: self._required_store().set_canary("", 0.0, start=self._versions.start))
        log_event(logger, "canary_ended")
        await asyncio.to_thread(self._versions.refresh)
        return json_response({"state": "ended"})

    async def _roll_back(self, body: bytes) -> Response:
        asked = parse_body(RollBack, body or b"{}")
        with _refusal("roll_back", version=asked.live or None):
            state = await _file_work(self._required_store().roll_back, asked.live)
        log_event(logger, "rolled_back", version=state.live, sequence=state.sequence)
        await asyncio.to_thread(self._versions.refresh)
        flips = await asyncio.to_thread(self._required_activations().await_flips, state.sequence, _ROLL_BACK_SECONDS)
        told = {"live": state.live, "sequence": state.sequence, "problem": self._versions.problem}
        return json_response(told | flips)

    async def _remove(self, body: bytes) -> Response:
        asked = parse_body(Remove, body)
        with _refusal("remove", version=asked.version):
            await _file_work(self._required_store().remove, asked.version)
        log_event(logger, "removed", version=asked.version)
        return json_response({"removed": asked.version})

    async def _items(self, _: bytes) -> Response:
        loaded = self._versions.now.live
        changes = loaded.selective.overlay.now
        added = [{"key": one.key, "attributes": dict(one.attributes)} for one in changes.added]
        deleted = sorted(changes.deleted, key=str)
        told = {"added": added, "num_deleted": len(deleted), "deleted": deleted[:1000]}
        return json_response({"version": loaded.version, **told})

    async def _add_item(self, body: bytes) -> Response:
        asked, loaded = parse_body(NewItem, body), self._versions.now.live
        selective = loaded.selective
        vector = None if asked.vector is None else _query_vector(asked.vector)
        new = await asyncio.to_thread(
            selective.place, asked.key, like=asked.like, vector=vector, attributes=asked.attributes
        )
        changes = await _file_work(selective.overlay.add, [new])
        return json_response({"version": loaded.version, "num_added": len(changes.added)}, 201)

    async def _delete_items(self, body: bytes) -> Response:
        asked, loaded = parse_body(Keys, body), self._versions.now.live
        selective = loaded.selective
        known = [key for key in asked.keys if selective.has(key)]
        unknown = [key for key in asked.keys if not selective.has(key)]
        changes = await _file_work(selective.delete, known)
        told = {"num_deleted": len(changes.deleted), "num_added": len(changes.added), "unknown": unknown}
        return json_response({"version": loaded.version, **told})

    async def _feedback(self, body: bytes) -> Response:
        asked = parse_body(Feedback, body)
        tally = self._versions.tallies.get(asked.version)
        tally = tally or await asyncio.to_thread(self._versions.tally_of, asked.version)
        if tally is None:
            raise Problem(404, "unknown_version", f"there is no version {asked.version!r} that could have answered")
        return json_response({"version": asked.version, "counted": tally.note_click(asked.request_id, asked.key)})

    async def _start(self, asked: Activate, share: float | None) -> Response:
        """Begin an admission in a thread of its own; answer when it is decided or `wait_seconds` are over."""
        activations, store = self._required_activations(), self._required_store()
        await _file_work(store.folder, asked.version)  # 404 at once
        loop, decided = asyncio.get_running_loop(), asyncio.Event()
        begun: asyncio.Future[None] = loop.create_future()

        def begin(problem: Problem | None = None) -> None:
            if not begun.done():
                begun.set_result(None) if problem is None else begun.set_exception(problem)

        def work() -> None:
            problem = Problem(500, "internal", "this activation failed inside the service; its log says why")
            try:
                activations.run(
                    asked.version, share=share, force=asked.force, on_begun=lambda: loop.call_soon_threadsafe(begin)
                )
            except BlockingIOError:
                problem = Problem(409, "busy", "another activation runs; GET /v1/versions tells how it goes")
            except OSError as error:
                logger.exception("activating %s cannot be noted", asked.version)
                problem = _read_only(error)
            finally:  # nobody may be left waiting, whatever happened
                with contextlib.suppress(RuntimeError):  # the loop is closed: the service has stopped meanwhile
                    loop.call_soon_threadsafe(begin, problem)
                    loop.call_soon_threadsafe(decided.set)

        threading.Thread(target=work, name="admission", daemon=True).start()
        await begun
        if asked.wait_seconds:
            try:
                await asyncio.wait_for(decided.wait(), asked.wait_seconds)
            except TimeoutError:
                return json_response(store.admission(), 202)
            found = store.admission() or {}
            if found.get("state") == "refused":
                raise Problem(409, "refused", f"version {asked.version} was refused: {found['reason']}")
            return json_response(found, 202 if found.get("state") == "flipping" else 200)
        return json_response(store.admission(), 202)

    def _required_store(self) -> VersionStore:
        if self._store is None:
            message = "this service was started on the folder of one version; start it on the folder above it"
            raise Problem(409, "fixed_version", message)
        return self._store

    def _required_activations(self) -> Activations:
        self._required_store()
        assert self.activations is not None
        return self.activations


@contextlib.contextmanager
def _refusal(asked: str, **fields: Any) -> Iterator[None]:
    """Write a Problem that is the outcome down, too."""
    try:
        yield
    except Problem as problem:
        log_event(logger, "refused", level=logging.WARNING, asked=asked, **fields, reason=str(problem))
        raise


def _query_vector(values: list[float]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        vector = np.array(values, np.float32)
    if not np.isfinite(vector).all():
        raise Problem(400, "invalid_request", "`vector` holds nan, an infinity or what a float32 does not hold")
    return vector


async def _file_work(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, done in a thread. An ArtifactError is the client's: Problem 409; 404 for no such version."""
    try:
        return await asyncio.to_thread(work, *arguments)
    except ArtifactError as error:
        if str(error).startswith("there is no version '"):
            raise Problem(404, "unknown_version", str(error)) from None
        raise Problem(409, "refused", str(error)) from None
    except OSError as error:
        logger.exception("the folder of versions cannot be changed")
        raise _read_only(error) from None


def _read_only(error: OSError) -> Problem:
    return Problem(409, "read_only", f"the folder of versions cannot be changed: {error.strerror or error}")
