"""From what a request asks to what it is answered: parameters and bodies in, checked work out, JSON documents back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import KeyNotFound
from embedding_service.hashed_keys import KeyMap
from embedding_service.http_arrow import read_vectors, write_results
from embedding_service.http_schema import Catalogue, Key, KeyType, Limits, Problem, RequestModels
from embedding_service.instruments import Instruments
from embedding_service.overlay import Changes
from embedding_service.scatter import partial_now
from embedding_service.selective import MAX_DIVERSE, SelectiveRetriever, Wishes, num_scored

Parameters = list[tuple[str, str]]
Body = bytes | dict[str, Any]  # JSON, or the document that it holds


class Results(Protocol):
    """What a retriever gives for n queries, each best first and without padding; `retrieval.Results` is one."""

    @property
    def keys(self) -> Sequence[Sequence[Key]]: ...
    @property
    def flat_keys(self) -> pa.Array: ...  # those of all queries, one after the other
    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...  # [n] how many keys each query has
    @property
    def scores(self) -> npt.NDArray[np.float32]: ...  # [n, k]
    @property
    def cold_start(self) -> Sequence[bool]: ...


class Retrieval(Protocol):
    """The part of `retrieval.Retriever` that is served."""

    def similar(self, keys: Sequence[Key], k: int = ...) -> Results: ...
    def search(self, vectors: npt.NDArray[np.float32], k: int = ...) -> Results: ...
    def recommend(
        self,
        sessions: Sequence[Sequence[Key]],
        k: int = ...,
        *,
        users: Sequence[Key | None] | None = ...,
        features: Mapping[str, Sequence[Any]] | None = ...,
        exclude_seen: bool = ...,
    ) -> Results: ...


@dataclass(frozen=True)
class Work:
    """A checked request: `answer` computes the JSON document, or the Arrow stream, that answers its queries.

    `is_plain`: takes what so many plain queries take; with wishes it may take a thousand times as long.
    """

    num_queries: int
    answer: Callable[[], dict[str, Any] | bytes]
    is_plain: bool = True


class Similar(NamedTuple):
    """Single queries for items similar to a key; those that are equal in this may be answered together."""

    k: int


class Recommend(NamedTuple):
    """Single queries of a session and a user, or None; those that are equal in this may be answered together."""

    k: int
    exclude_seen: bool


@dataclass(frozen=True)
class Single:
    """A checked single query; `Queries.answers` has the JSON document that answers it."""

    group: Similar | Recommend
    query: Any


class Queries:
    """Checks requests against the catalogue and the limits. Every method raises Problem for what cannot be answered."""

    def __init__(
        self,
        retriever: Retrieval,
        catalogue: Catalogue,
        items: KeyMap,
        users: KeyMap | None = None,
        *,
        limits: Limits,
        selective: SelectiveRetriever | None = None,
        instruments: Instruments | None = None,
    ) -> None:
        """`items` and `users` are the key maps of the catalogue; `users` only where its query tower sees users.

        `selective` answers questions with wishes, and all questions while its overlay holds something.
        """
        self.models = RequestModels(catalogue, limits, wishes=selective is not None)
        self._selective = selective
        self._instruments = instruments or Instruments()
        self._wished = ("filter", "diversity") if selective is not None else ()  # parameters
        self._retriever, self._items, self._users = retriever, items, users
        self._catalogue, self._limits = catalogue, limits
        self._version = catalogue.version

    def get_similar(self, parameters: Parameters) -> Work | Single:
        key: Key | None = None
        k = 10
        wished: dict[str, str] = {}
        for name, value in parameters:
            if name == "key":
                key = _parse_key(name, value, self._catalogue.key_type)
            elif name == "k":
                k = self._parse_k(value)
            elif name in self._wished:
                wished[name] = value
            else:
                raise _no_such_parameter(name, ("key", "k", *self._wished))
        if key is None:
            raise Problem(400, "invalid_request", "the parameter `key` is missing: /v1/similar?key=...&k=10")
        return self._similar_one(key, k, self._wishes(wished)) if wished else Single(Similar(k), key)

    def get_recommend(self, parameters: Parameters) -> Work | Single:
        session: list[Key] = []
        user: Key | None = None
        k, exclude_seen = 10, True
        wished: dict[str, str] = {}
        user_type = self._catalogue.user_type
        for name, value in parameters:
            if name == "items":
                session.append(_parse_key(name, value, self._catalogue.key_type))
            elif name == "user" and user_type is not None:
                user = _parse_key(name, value, user_type)
            elif name == "k":
                k = self._parse_k(value)
            elif name == "exclude_seen":
                exclude_seen = _parse_bool(name, value)
            elif name in self._wished:
                wished[name] = value
            else:
                known = ("items", "user", "k", "exclude_seen") if user_type else ("items", "k", "exclude_seen")
                raise _no_such_parameter(name, (*known, *self._wished))
        if len(session) > self._limits.max_session:
            raise Problem(413, "session_too_long", f"{len(session)} items; the limit is {self._limits.max_session}")
        wishes = self._wishes(wished) if wished else Wishes()
        if not wishes:
            return Single(Recommend(k, exclude_seen), (session, user))
        self._check_size(1, k, wishes)
        users = None if user is None else [user]

        def answer() -> dict[str, Any]:
            return self._document(self._recommend_batch([session], k, users, {}, exclude_seen, wishes)[0])

        return Work(1, answer, is_plain=False)

    def post_similar(self, body: Body) -> Work | Single:
        asked = self.models.parse(self.models.similar, body)
        wishes = wishes_of(asked)
        if hasattr(asked, "key"):
            return self._similar_one(asked.key, asked.k, wishes)
        return self._batch(len(asked.keys), asked.k, lambda: self._similar_batch(asked.keys, asked.k, wishes), wishes)

    def _similar_one(self, key: Key, k: int, wishes: Wishes) -> Work | Single:
        if not wishes:
            return Single(Similar(k), key)
        self._check_size(1, k, wishes)

        def answer() -> dict[str, Any]:
            try:
                found = self._wishing().similar([key], k, wishes)
            except KeyNotFound:
                self._note_not_found([key])
                raise
            self._instruments.num_keys += 1
            return self._document({"items": self._listed(found)[0]})

        return Work(1, answer, is_plain=False)

    def post_search(self, body: Body) -> Work:
        asked = self.models.parse(self.models.search, body)
        wishes = wishes_of(asked)
        if hasattr(asked, "vector"):
            vector = _float32([asked.vector], "vector")
            self._check_size(1, asked.k, wishes)
            return Work(
                1, lambda: self._document({"items": self._search(vector, asked.k, wishes)[0]}), is_plain=not wishes
            )
        vectors = _float32(asked.vectors, "vectors")

        def answers() -> list[dict[str, Any]]:
            return [{"items": items} for items in self._search(vectors, asked.k, wishes)]

        return self._batch(len(vectors), asked.k, answers, wishes)

    def arrow_search(self, body: bytes, parameters: Parameters) -> Work:
        """`post_search` of an Arrow IPC stream, answered with one (see `http_arrow`)."""
        k = 10
        wished: dict[str, str] = {}
        for name, value in parameters:
            if name == "k":
                k = self._parse_k(value)
            elif name in self._wished:
                wished[name] = value
            else:
                raise _no_such_parameter(name, ("k", *self._wished))
        wishes = self._wishes(wished) if wished else Wishes()
        vectors = read_vectors(body, self._catalogue.dim, self._limits.max_batch)
        self._check_size(len(vectors), k, wishes)

        def answer() -> bytes:
            found = self._wishing().search(vectors, k, wishes) if wishes else self._answering.search(vectors, k)
            start = time.perf_counter()
            scores = found.scores
            if found.lengths.min() < scores.shape[1]:
                scores = scores[np.arange(scores.shape[1]) < found.lengths[:, None]]
            metadata = {"version": self._version}
            if partial := partial_now():
                metadata["partial"] = json.dumps(partial)
            written = write_results(found.flat_keys, scores.ravel(), found.lengths, metadata)
            self._instruments.document.since(start)
            return written

        return Work(len(vectors), answer, is_plain=not wishes)

    def post_recommend(self, body: Body) -> Work | Single:
        asked = self.models.parse(self.models.recommend, body)
        wishes, explain = wishes_of(asked), getattr(asked, "explain", False)
        given = getattr(asked, "features", None)
        features = given.model_dump(exclude_none=True) if given is not None else {}
        if hasattr(asked, "session"):
            user = getattr(asked, "user", None)
            if not features and not wishes and not explain:
                return Single(Recommend(asked.k, asked.exclude_seen), (asked.session, user))
            columns = {name: [value] for name, value in features.items()}
            users = None if user is None else [user]
            one = [asked.session]
            self._check_size(1, asked.k, wishes)

            def answer() -> dict[str, Any]:
                changes = self._changes()
                found = self._recommend_batch(one, asked.k, users, columns, asked.exclude_seen, wishes, changes)[0]
                if explain:
                    found = self._explained(found, asked.session, user, features, changes)
                return self._document(found)

            return Work(1, answer, is_plain=not wishes and not explain)
        num_sessions = len(asked.sessions)
        users = getattr(asked, "users", None)
        columns = {"users": users} if users is not None else {}
        columns |= {f"features.{name}": column for name, column in features.items()}
        for name, column in columns.items():
            if len(column) != num_sessions:
                message = f"`{name}` has {len(column)} entries for {num_sessions} sessions; write null for none"
                raise Problem(400, "invalid_request", message)
        return self._batch(
            num_sessions,
            asked.k,
            lambda: self._recommend_batch(asked.sessions, asked.k, users, features, asked.exclude_seen, wishes),
            wishes,
        )

    def answers(self, group: Similar | Recommend, queries: list[Any]) -> list[dict[str, Any]]:
        """The documents that answer single queries of one group. Raises KeyNotFound for an unknown key of `similar`."""
        if isinstance(group, Similar):
            try:
                found = self._answering.similar(queries, group.k)
            except KeyNotFound:
                self._note_not_found(queries)
                raise
            self._instruments.num_keys += len(queries)
            return [self._document({"items": items}) for items in self._listed(found)]
        sessions = [session for session, _ in queries]
        users = [user for _, user in queries]
        given = None if users.count(None) == len(users) else users
        return [self._document(one) for one in self._recommend_batch(sessions, group.k, given, {}, group.exclude_seen)]

    def _document(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {"version": self._version, **answer}

    def post_embed(self, body: Body) -> Work:
        """Vectors of items, as `search` scores them, or of sessions, as `search` takes them."""
        assert self.models.embed is not None
        asked = self.models.parse(self.models.embed, body)
        sessions = getattr(asked, "sessions", None)
        num = len(asked.keys) if sessions is None else len(sessions)
        if num * self._catalogue.dim > 10 * self._limits.max_results:
            message = f"{num} vectors of {self._catalogue.dim} numbers are too many: send several requests"
            raise Problem(413, "batch_too_large", message)

        def answer() -> dict[str, Any]:
            selective = self._wishing()
            if sessions is None:
                return self._document({"vectors": selective.embed_items(asked.keys)})
            return self._document({"vectors": selective.retriever.encode(sessions)[1].tolist()})

        return Work(num, answer)

    @property
    def _answering(self) -> Retrieval:
        """What answers questions without wishes now."""
        return self._selective if self._selective is not None and self._selective.overlay.now else self._retriever

    def _wishes(self, wished: Mapping[str, str]) -> Wishes:
        """Of parameters; a body has them as fields."""
        return wishes_of(self.models.parse_wished(wished))

    def _wishing(self) -> SelectiveRetriever:
        assert self._selective is not None  # else the models have no such fields
        return self._selective

    def _search(self, vectors: npt.NDArray[np.float32], k: int, wishes: Wishes) -> list[list[dict[str, Any]]]:
        return self._listed(
            self._wishing().search(vectors, k, wishes) if wishes else self._answering.search(vectors, k)
        )

    def _note_not_found(self, keys: Sequence[Key]) -> None:
        """One of `keys` is unknown. Several are asked for again in parts (`http_turns`), and counted then."""
        if len(keys) == 1:
            self._instruments.num_keys += 1
            self._instruments.num_unknown += 1

    def _listed(self, results: Results) -> list[list[dict[str, Any]]]:
        start = time.perf_counter()
        items = [
            [{"key": key, "score": score} for key, score in zip(keys, scores, strict=False)]
            for keys, scores in zip(results.keys, results.scores.tolist(), strict=True)
        ]
        self._instruments.document.since(start)
        return items

    def _changes(self) -> Changes:
        return self._selective.overlay.now if self._selective is not None else Changes()

    def _explained(
        self,
        found: dict[str, Any],
        session: Sequence[Key],
        user: Key | None,
        features: Mapping[str, Any],
        changes: Changes,
    ) -> dict[str, Any]:
        """`found` with what pulled each item; nothing did where the most frequent items are the answer."""
        items = found["items"]
        keys = [item["key"] for item in items]
        pulls: list[list[tuple[Key, float]]] = [[] for _ in keys]
        if not found["cold_start"]:
            pulls = self._wishing().explain(session, keys, user=user, features=features, changes=changes)
        told = [[{"key": key, "contribution": pull} for key, pull in line] for line in pulls]
        return {**found, "items": [{**item, "because": line} for item, line in zip(items, told, strict=True)]}

    def _similar_batch(self, keys: list[Key], k: int, wishes: Wishes) -> list[dict[str, Any]]:
        known = list(_known(self._items, keys))
        if changes := self._changes():
            known = [
                changes.find(key) is not None or (ok and key not in changes.deleted)
                for key, ok in zip(keys, known, strict=True)
            ]
        found = [key for key, ok in zip(keys, known, strict=True) if ok]
        self._instruments.num_keys += len(keys)
        self._instruments.num_unknown += len(keys) - len(found)
        answers: Iterator[list[dict[str, Any]]] = iter(())
        if found:
            if wishes or changes:
                results: Results = self._wishing().similar(found, k, wishes, changes=changes)
            else:
                results = self._retriever.similar(found, k)
            answers = iter(self._listed(results))
        return [
            {"items": next(answers), "unknown": []} if ok else {"items": [], "unknown": [key]}
            for key, ok in zip(keys, known, strict=True)
        ]

    def _recommend_batch(
        self,
        sessions: Sequence[Sequence[Key]],
        k: int,
        users: Sequence[Key | None] | None,
        features: Mapping[str, Sequence[Any]],
        exclude_seen: bool,
        wishes: Wishes = Wishes(),  # noqa: B008 (frozen)
        changes: Changes | None = None,
    ) -> list[dict[str, Any]]:
        given: dict[str, Any] = {"users": users, "features": features or None, "exclude_seen": exclude_seen}
        changes = self._changes() if changes is None else changes
        if wishes or changes:
            results: Results = self._wishing().recommend(sessions, k, wishes=wishes, changes=changes, **given)
        else:
            results = self._retriever.recommend(sessions, k, **given)
        named = [key for session in sessions for key in session]
        known = iter(_known(self._items, named))
        unknown = [[key for key in session if not next(known)] for session in sessions]
        self._instruments.num_keys += len(named)
        if any(unknown):
            self._instruments.num_unknown += sum(map(len, unknown))
        unknown_user = [False] * len(sessions)
        if users is not None and self._users is not None:
            unknown_user = [
                user is not None and not ok for user, ok in zip(users, _known(self._users, users), strict=True)
            ]
        return [
            {"items": items, "cold_start": bool(cold), "unknown": keys, "unknown_user": no_user}
            for items, cold, keys, no_user in zip(
                self._listed(results), results.cold_start, unknown, unknown_user, strict=True
            )
        ]

    def _batch(
        self,
        num_queries: int,
        k: int,
        answers: Callable[[], list[dict[str, Any]]],
        wishes: Wishes = Wishes(),  # noqa: B008 (frozen)
    ) -> Work:
        self._check_size(num_queries, k, wishes)
        return Work(num_queries, lambda: {"version": self._version, "results": answers()}, is_plain=not wishes)

    def _check_size(self, num_queries: int, k: int, wishes: Wishes = Wishes()) -> None:  # noqa: B008 (frozen)
        if wishes.diversity and k > MAX_DIVERSE:
            raise Problem(400, "invalid_request", f"`k` with `diversity` is at most {MAX_DIVERSE}; got {k}")
        scored = num_scored(k, wishes)
        if wishes.diversity and num_queries > 1 and num_queries * scored > self._limits.max_results:
            message = (
                f"{num_queries} diverse lists of k = {k} compare {num_queries * scored} pairs of items; "
                f"the limit is {self._limits.max_results}: send several requests"
            )
            raise Problem(413, "batch_too_large", message)
        if num_queries * k > self._limits.max_results:
            message = (
                f"{num_queries} queries times k = {k} are {num_queries * k} results; "
                f"the limit is {self._limits.max_results}: send several requests"
            )
            raise Problem(413, "batch_too_large", message)

    def _parse_k(self, value: str) -> int:
        k = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else 0
        if not 1 <= k <= self._limits.max_k:
            raise Problem(
                400, "invalid_request", f"`k` must be an integer in [1, {self._limits.max_k}]; got {value[:50]!r}"
            )
        return k


def wishes_of(asked: Any) -> Wishes:
    """The filter and the diversity of a checked body."""
    chosen = getattr(asked, "filter", None)
    diversity = getattr(asked, "diversity", 0.0)
    if chosen is None:
        return Wishes(diversity=diversity)
    return Wishes(chosen.allow, chosen.deny, chosen.where, diversity)


def _known(key_map: KeyMap, keys: Sequence[Any]) -> Iterable[bool]:
    """For each key whether the map has a row of its own for it."""
    num_keys = key_map.num_keys
    if len(keys) <= 16:
        return [0 <= key_map.row(key) < num_keys for key in keys]
    rows = key_map.rows(keys)
    return ((rows >= 0) & (rows < num_keys)).tolist()  # type: ignore[no-any-return]


def _float32(vectors: list[list[float]], name: str) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        out = np.asarray(vectors, dtype=np.float64).astype(np.float32)
    if not np.isfinite(out).all():
        raise Problem(400, "invalid_request", f"`{name}`: a component is too large for a float32")
    return out


def _parse_key(name: str, value: str, key_type: KeyType) -> Key:
    if key_type == "string":
        return value
    digits = value[1:] if value[:1] == "-" else value
    if digits.isascii() and digits.isdigit() and len(digits) < 20 and -(2**63) <= (key := int(value)) < 2**63:
        return key
    raise Problem(400, "invalid_request", f"`{name}` must be an integer, as all keys here are; got {value[:50]!r}")


def _parse_bool(name: str, value: str) -> bool:
    if value in ("true", "1"):
        return True
    if value in ("false", "0"):
        return False
    raise Problem(400, "invalid_request", f"`{name}` must be true or false; got {value[:50]!r}")


def _no_such_parameter(name: str, known: tuple[str, ...]) -> Problem:
    return Problem(400, "unknown_parameter", f"there is no parameter `{name[:50]}`; known here: {', '.join(known)}")
