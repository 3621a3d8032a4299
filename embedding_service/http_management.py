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
    POST /v1/feedback             {"version", "request_id", "key"}

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
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cluster.errors import ArtifactError, LexshardError
from embedding_service.admission import admit_apart, fingerprint
from embedding_service.gates import Figure, Gates, to_document
from embedding_service.http_access import Access
from embedding_service.http_messages import Receive, Response, Scope, json_response, read_body
from embedding_service.http_openapi import Operation
from embedding_service.http_schema import Key, Problem, Strict, parse_body
from embedding_service.live_versions import LiveVersions, Loaded
from embedding_service.manifest import MAX_MANIFEST_BYTES, parse_manifest
from embedding_service.recall_probe import RecallProbe
from embedding_service.selective import SelectiveRetriever
from embedding_service.service_logs import log_event
from embedding_service.traffic import figures
from embedding_service.versions import VersionStore

logger = logging.getLogger(__name__)

Handler = Callable[[bytes], Awaitable[Response]]
MAX_BODY_BYTES = 64 * 1024
FEEDBACK = "/v1/feedback"
MAX_LISTED = 100
MAX_WAIT_SECONDS = 300.0
FLIP_SECONDS = 60.0  # within which all replicas should have loaded what one of them has
_ROLL_BACK_SECONDS = 5.0  # they have it in memory
_LOOK_SECONDS = 0.05


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
    Operation("POST", FEEDBACK, "a click on what was answered", Feedback, status=204, answer="counted",
              errors=_BODY | _VERSION | {"401": "without the token"}),
)  # fmt: skip


class Management:
    """Answers requests for `paths`. Handlers run on the event loop and leave files to threads."""

    def __init__(
        self,
        versions: LiveVersions,
        store: VersionStore | None,
        access: Access,
        gates: Gates,
        *,
        admit_seconds: float,
        probe: RecallProbe | None = None,
    ) -> None:
        self._versions, self._store, self._access, self._gates = versions, store, access, gates
        self._admit_seconds, self._probe = admit_seconds, probe
        self._facts: OrderedDict[str, tuple[tuple[int, int, int], dict[str, Any]]] = OrderedDict()  # of manifests
        handlers: list[Handler] = [
            self._list, self._publish, self._activate, self._canary, self._roll_back, self._remove,
            self._items, self._add_item, self._delete_items, self._feedback,
        ]  # fmt: skip
        self._routes: dict[str, dict[str, tuple[Operation, Handler]]] = {}
        for operation, handler in zip(OPERATIONS, handlers, strict=True):
            self._routes.setdefault(operation.path, {})[operation.method] = operation, handler
        self.paths = self._routes.keys()

    async def respond(self, method: str, path: str, scope: Scope, receive: Receive) -> Response:
        """The answer to one of `paths`. Raises Problem."""
        if method not in self._routes[path]:
            allowed = ", ".join(sorted(self._routes[path]))
            message = f"{path} answers {allowed}, not {method[:20]}"
            raise Problem(405, "method_not_allowed", message, ((b"allow", allowed.encode()),))
        operation, handler = self._routes[path][method]
        if operation.token:
            self._access.check_change(scope)
        elif path == FEEDBACK:
            self._access.check_feedback(scope)
        else:
            self._access.check_read(scope)
        return await handler(await read_body(scope, receive, MAX_BODY_BYTES))

    async def _list(self, _: bytes) -> Response:
        return json_response(await asyncio.to_thread(self._listing))

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
        flips = await asyncio.to_thread(self._await_flips, state.sequence, _ROLL_BACK_SECONDS)
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
        changes = _selective(loaded).overlay.now
        added = [{"key": one.key, "attributes": dict(one.attributes)} for one in changes.added]
        deleted = sorted(changes.deleted, key=str)
        told = {"added": added, "num_deleted": len(deleted), "deleted": deleted[:1000]}
        return json_response({"version": loaded.version, **told})

    async def _add_item(self, body: bytes) -> Response:
        asked, loaded = parse_body(NewItem, body), self._versions.now.live
        selective = _selective(loaded)
        vector = None if asked.vector is None else _query_vector(asked.vector)
        new = await asyncio.to_thread(
            selective.place, asked.key, like=asked.like, vector=vector, attributes=asked.attributes
        )
        changes = await _file_work(selective.overlay.add, [new])
        return json_response({"version": loaded.version, "num_added": len(changes.added)}, 201)

    async def _delete_items(self, body: bytes) -> Response:
        asked, loaded = parse_body(Keys, body), self._versions.now.live
        selective = _selective(loaded)
        known = [key for key in asked.keys if selective.has(key)]
        unknown = [key for key in asked.keys if not selective.has(key)]
        changes = await _file_work(selective.delete, known)
        told = {"num_deleted": len(changes.deleted), "num_added": len(changes.added), "unknown": unknown}
        return json_response({"version": loaded.version, **told})

    async def _feedback(self, body: bytes) -> Response:
        asked = parse_body(Feedback, body)
        tally = self._versions.tallies.get(asked.version)
        if tally is None:
            raise Problem(404, "unknown_version", f"no answer came from a version {asked.version!r}")
        tally.note_click(asked.request_id, asked.key)
        return Response(204, b"")

    async def _start(self, asked: Activate, share: float | None) -> Response:
        """Begin an admission in a thread of its own; answer when it is decided or `wait_seconds` are over."""
        store = self._required_store()
        await _file_work(store.folder, asked.version)  # 404 at once
        loop, decided = asyncio.get_running_loop(), asyncio.Event()
        begun: asyncio.Future[None] = loop.create_future()

        def begin(problem: Problem | None = None) -> None:
            if not begun.done():
                begun.set_result(None) if problem is None else begun.set_exception(problem)

        def work() -> None:
            problem = Problem(500, "internal", "this activation failed inside the service; its log says why")
            try:
                with store.admitting():
                    self._note(asked.version, "checking")
                    loop.call_soon_threadsafe(begin)
                    self._admit(asked, share)
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

    def _admit(self, asked: Activate, share: float | None) -> None:
        store = self._required_store()
        try:
            serving = store.serving()
            live = serving.live if serving is not None else self._versions.start
            measured, known = self._measured(asked.version, live)
            failed = [str(figure) for figure in measured if not figure.passed]
            if failed and not asked.force:
                raise ArtifactError("; ".join(failed) + "; it can be forced")
            former = _selective(self._versions.now.live).overlay.now
            loaded = self._versions.preload(asked.version, verify=known)
            lost = _selective(loaded).lost(former) if share is None else {}
            if share is None:
                state = store.activate(asked.version, start=self._versions.start)
            else:
                state = store.set_canary(asked.version, share, start=self._versions.start)
            ends = "live" if share is None else "canary"
            told = {
                "forced": failed,
                "figures": to_document(measured),
                "ends": ends,
                "sequence": state.sequence,
                **lost,
            }
            self._note(asked.version, "flipping", **told)
            self._versions.refresh()
            flips = self._await_flips(state.sequence, FLIP_SECONDS)
            self._note(asked.version, "flipping" if "reason" in flips else ends, **told, **flips)
            event = "activated" if share is None else "canary_started"
            log_event(logger, event, version=asked.version, share=share, against=live, forced=failed or None, **flips)
        except (LexshardError, OSError, MemoryError) as error:
            self._refuse(asked.version, str(error) or type(error).__name__)
        except Exception as error:  # a bug of ours must not leave it "checking" for ever
            logger.exception("activating %s failed", asked.version)
            self._refuse(asked.version, f"failed inside the service ({type(error).__name__})")

    def _refuse(self, version: str, reason: str) -> None:
        self._note(version, "refused", reason=reason)
        log_event(logger, "refused", level=logging.WARNING, asked="activate", version=version, reason=reason)

    def _await_flips(self, sequence: int, seconds: float) -> dict[str, Any]:
        """How many replicas have flipped to the state of `sequence`: all of them, or there is a "reason"."""
        store, give_up = self._required_store(), time.monotonic() + seconds
        while (found := store.flipped(sequence))["flipped"] < found["replicas"]:
            if time.monotonic() > give_up:
                problems = {str(place["problem"]) for place in store.places() if place["sequence"] < sequence} - {""}
                return {**found, "reason": "; ".join(sorted(problems)) or f"not loaded within {seconds:g} s"}
            time.sleep(_LOOK_SECONDS)
        return dict(found)

    def _measured(self, version: str, live: str) -> tuple[list[Figure], bool]:
        """The gates' figures of a version against the live one, and whether they were known from an earlier time."""
        store = self._required_store()
        candidate, against = store.folder(version), store.folder(live) if live != version else None
        asked = fingerprint(candidate, against, self._gates)
        kept = store.verdict(version)
        if kept is not None and kept.get("asked") == asked:
            return [Figure(**figure) for figure in kept["figures"]], True
        measured = admit_apart(candidate, against, self._gates, timeout_seconds=self._admit_seconds)
        store.keep_verdict(version, {"asked": asked, "against": live, "figures": to_document(measured)})
        return measured, False

    def _note(self, version: str, state: str, **more: Any) -> None:
        self._required_store().note_admission({"version": version, "state": state, **more})

    def _listing(self) -> dict[str, Any]:
        now, store = self._versions.now, self._store
        state = store.serving() if store is not None else None
        names = store.names() if store is not None else [now.live.version]
        traffic = self._versions.all_counts()
        return {
            "live": state.live if state is not None else now.live.version,
            "previous": list(state.previous) if state is not None else [],
            "canary": (state.canary or None) if state is not None else None,
            "share": state.share if state is not None else 0.0,
            "sequence": state.sequence if state is not None else 0,
            "here": {
                "live": now.live.version,
                "canary": now.canary.version if now.canary is not None else None,
                "problem": self._versions.problem or None,
                "recall": [
                    {"version": version, "index": index, **probed.to_document()}
                    for (version, index), probed in (self._probe.found if self._probe is not None else {}).items()
                ],
            },
            "admission": store.admission() if store is not None else None,
            "num_versions": len(names),
            "versions": [self._about(name, traffic.get(name, [])) for name in names[-MAX_LISTED:]],
        }

    def _about(self, version: str, counts: list[dict[str, Any]]) -> dict[str, Any]:
        told: dict[str, Any] = {"version": version, "traffic": figures(counts)}
        if self._store is None:
            return told
        try:
            fixed = self._manifest_facts(self._store.folder(version) / "manifest.json", version)
            verdict = self._store.verdict(version) or {}
        except (ArtifactError, OSError) as error:
            return {**told, "problem": str(error)}
        return {**told, **fixed, "gates": verdict.get("figures"), "against": verdict.get("against")}

    def _manifest_facts(self, file: Path, version: str) -> dict[str, Any]:
        """What the manifest says; read again only when the file is another one. Raises ArtifactError, OSError."""
        found = file.stat()
        stamp = found.st_ino, found.st_mtime_ns, found.st_size
        known = self._facts.get(version)
        if known is not None and known[0] == stamp:
            return known[1]
        with open(file, "rb") as handle:
            manifest = parse_manifest(handle.read(MAX_MANIFEST_BYTES + 1), version)
        recommend = manifest.indexes.get("recommend")
        facts = {
            "created": manifest.created,
            "num_items": recommend.rows if recommend is not None else None,
            "dim": recommend.dim if recommend is not None else None,
            "figures": manifest.figures,
        }
        self._facts[version] = stamp, facts
        if len(self._facts) > 2 * MAX_LISTED:
            self._facts.popitem(last=False)
        return facts

    def _required_store(self) -> VersionStore:
        if self._store is None:
            message = "this service was started on the folder of one version; start it on the folder above it"
            raise Problem(409, "fixed_version", message)
        return self._store


@contextlib.contextmanager
def _refusal(asked: str, **fields: Any) -> Iterator[None]:
    """Write a Problem that is the outcome down, too."""
    try:
        yield
    except Problem as problem:
        log_event(logger, "refused", level=logging.WARNING, asked=asked, **fields, reason=str(problem))
        raise


def _selective(loaded: Loaded) -> SelectiveRetriever:
    assert loaded.api.selective is not None
    return loaded.api.selective


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
