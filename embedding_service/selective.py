"""Answers with wishes: filters, diversity, explanations, and the items that were added or taken off since export.

`Retriever` is the fast path for questions without any of these. This is the general one, slower, and exact about k:
where k items are allowed, k are found.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import DataError, KeyNotFound
from embedding_service.attributes import Attributes, Mask, Value
from embedding_service.diversity import mmr
from embedding_service.exact import Float32, Int64, Metric, pair_scores, unit_length
from embedding_service.keys import Key, Vocabulary
from embedding_service.overlay import Added, Changes, Overlay
from embedding_service.ragged import Ragged
from embedding_service.retrieval import RECOMMEND, SIMILAR, Retriever

POOL = 5  # candidates per shown item that diversity chooses from
MAX_DIVERSE = 100  # shown items of a diverse list: it costs the pool times them
MAX_EXPLAINED = 50  # items of a session that are left out one by one


@dataclass(frozen=True)
class Wishes:
    """allow, None: any; deny; where: attribute -> value, or list of values of which one must be; diversity 0..1."""

    allow: Sequence[Key] | None = None
    deny: Sequence[Key] = ()
    where: Mapping[str, Value | Sequence[Value]] = field(default_factory=dict)
    diversity: float = 0.0

    def __bool__(self) -> bool:
        return self.allow is not None or bool(self.deny or self.where or self.diversity)


def num_scored(k: int, wishes: Wishes) -> int:
    """What a query for k items costs, in items: for a diverse list its pool is looked at for each of them."""
    return _pool(k, wishes) * k if wishes.diversity else k


def _pool(k: int, wishes: Wishes) -> int:
    return max(50, POOL * k) if wishes.diversity else k


@dataclass(frozen=True)
class _Allowed:
    """Rows that may be shown: bool [rows], and the same by number, int64, ascending."""

    mask: Mask
    rows: Int64


@dataclass(frozen=True)
class Chosen:
    """`Results` with keys of the version and of its overlay alike; without padding."""

    keys: list[list[Key]]
    lists: list[Float32]
    cold_start: list[bool]
    key_type: pa.DataType

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(keys) for keys in self.keys], np.int64)

    @property
    def scores(self) -> Float32:
        padded = np.full((len(self.keys), max(map(len, self.keys), default=0)), -np.inf, np.float32)
        for line, scores in zip(padded, self.lists, strict=True):
            line[: len(scores)] = scores
        return padded

    @property
    def flat_keys(self) -> pa.Array:
        return pa.array([key for keys in self.keys for key in keys], self.key_type)


class SelectiveRetriever:
    """`Retriever`'s questions with `wishes`, over a version and its overlay. Safe to use from many threads.

    `changes` is one reading of the overlay, by default that of now: questions that belong together share one.
    """

    def __init__(self, retriever: Retriever, overlay: Overlay, attributes: Attributes | None = None) -> None:
        self.retriever, self.overlay, self.attributes = retriever, overlay, attributes
        self._unchanged: dict[str, tuple[Changes, _Allowed]] = {}  # per index, what the last changes allow

    def similar(
        self, keys: Sequence[Key], k: int = 10, wishes: Wishes = Wishes(), *, changes: Changes | None = None
    ) -> Chosen:
        """Raises KeyNotFound for the first key that neither the version nor the overlay has, or that was deleted."""
        changes = self.overlay.now if changes is None else changes
        catalogue = self.retriever.catalogue(SIMILAR)
        vectors, own = [], []
        stored = self.retriever.candidates(SIMILAR).vectors
        for key in keys:
            added, row = changes.find(key), catalogue.row(key)
            if added is None and (not 0 <= row < len(catalogue.keys) or key in changes.deleted):
                raise KeyNotFound(key, "item")
            vectors.append(added.similar if added is not None else stored.take(np.array([row]))[0])
            own.append([row] if 0 <= row < len(catalogue.keys) else [])
        seen = Ragged.from_lists(own)
        return self._choose(SIMILAR, np.stack(vectors), k, wishes, changes, seen, [{key} for key in keys])

    def search(self, vectors: npt.NDArray[np.floating], k: int = 10, wishes: Wishes = Wishes()) -> Chosen:
        queries = np.atleast_2d(np.asarray(vectors, np.float32))
        return self._choose(RECOMMEND, queries, k, wishes, self.overlay.now, None, [set() for _ in queries])

    def recommend(
        self,
        sessions: Sequence[Sequence[Key]],
        k: int = 10,
        *,
        users: Sequence[Key | None] | None = None,
        features: Mapping[str, Sequence[Any]] | None = None,
        exclude_seen: bool = True,
        wishes: Wishes = Wishes(),
        changes: Changes | None = None,
    ) -> Chosen:
        """Added items of a session say nothing to the query tower: it has not been trained on them."""
        history, queries, cold = self.retriever.encode(sessions, users=users, features=features)
        own = [set(session) if exclude_seen else set() for session in sessions]
        seen = history if exclude_seen else None
        changes = self.overlay.now if changes is None else changes
        return self._choose(RECOMMEND, queries, k, wishes, changes, seen, own, cold)

    def embed_items(self, keys: Sequence[Key], *, changes: Changes | None = None) -> list[list[float] | None]:
        """The vectors that `search` scores, None for unknown keys."""
        changes = self.overlay.now if changes is None else changes
        catalogue = self.retriever.catalogue(RECOMMEND)
        vectors = self.retriever.candidates(RECOMMEND).vectors
        found: list[list[float] | None] = []
        for key in keys:
            added, row = changes.find(key), catalogue.row(key)
            if added is not None:
                found.append(added.recommend.tolist())
            else:
                known = 0 <= row < len(catalogue.keys)
                found.append(vectors.take(np.array([row]))[0].tolist() if known else None)
        return found

    def explain(
        self,
        session: Sequence[Key],
        found: Sequence[Key],
        *,
        user: Key | None = None,
        features: Mapping[str, Any] | None = None,
        changes: Changes | None = None,
    ) -> list[list[tuple[Key, float]]]:
        """For each found item, by how much its score falls if an item of the session was not there, largest first.

        `user` and `features` (name -> value) as they were when the items were found: they stay while the session's go.
        Left out one by one, the last `MAX_EXPLAINED` items; what is unknown pulls nothing and is not named.
        """
        known = [key for key in session if self._is_known(key)][-MAX_EXPLAINED:]
        if not known or not found:
            return [[] for _ in found]
        without = [[*known[:place], *known[place + 1 :]] for place in range(len(known))]
        num = len(known) + 1
        users = None if user is None else [user] * num
        columns = {name: [value] * num for name, value in (features or {}).items()}
        _, queries, cold = self.retriever.encode([known, *without], users=users, features=columns)
        queries[cold] = 0.0  # of a session of nothing
        vectors = np.array(self.embed_items(found, changes=changes), np.float32)
        scores = pair_scores(queries, np.broadcast_to(vectors, (len(queries), *vectors.shape)), self._metric(RECOMMEND))
        pulls = (scores[0] - scores[1:]).T  # [found, known]
        order = np.argsort(-pulls, axis=1, kind="stable")
        return [
            [(known[place], float(line[place])) for place in places] for line, places in zip(pulls, order, strict=True)
        ]

    def place(
        self, key: Key, *, like: Sequence[Key] = (), vector: Float32 | None = None, attributes: Mapping[str, Any]
    ) -> Added:
        """A new item at the mean of items that are `like` it, else at `vector` (under the recommend index), else at the
        mean of the items with the same `attributes`. Raises KeyNotFound, DataError.
        """
        catalogue = self.retriever.catalogue(RECOMMEND)
        if type(key) is not (int if catalogue.key_type == "int64" else str):
            raise DataError(f"key {key!r}: the keys of this version are of type {catalogue.key_type}")
        if vector is not None:
            near = self.retriever.search(vector, 10).keys[0]
            return Added(key, vector, self._mean(SIMILAR, near), attributes)
        if not like:
            like = self._of_kind(attributes)
        for one in like:
            if not self._is_known(one):
                raise KeyNotFound(one, "item")
        return Added(key, self._mean(RECOMMEND, like), self._mean(SIMILAR, like), attributes)

    def has(self, key: Key) -> bool:
        """Whether the version or its overlay has the key, deleted or not."""
        return self._is_known(key) or self.overlay.now.find(key) is not None

    def delete(self, keys: Sequence[Key]) -> Changes:
        """Take items off the answers. Raises DataError, ArtifactError, as the overlay does."""
        return self.overlay.delete(keys, is_own=self._is_known)

    def lost(self, changes: Changes) -> dict[str, Any]:
        """What of another version's overlay this version does not have: added items, and deletions that end."""
        catalogue, deleted = self.retriever.catalogue(RECOMMEND), self.overlay.now.deleted
        added = [one.key for one in changes.added if not self._is_known(one.key) and not self.overlay.now.find(one.key)]
        back = [key for key in changes.deleted if 0 <= catalogue.row(key) < len(catalogue.keys) and key not in deleted]
        return {
            "added_items_lost": len(added),
            "deleted_items_back": len(back),
            "examples": [*map(str, sorted(added, key=str)[:10]), *map(str, sorted(back, key=str)[:10])],
        }

    def _choose(
        self,
        index: str,
        queries: Float32,
        k: int,
        wishes: Wishes,
        changes: Changes,
        seen: Ragged | None,
        own: Sequence[set[Key]],
        cold: npt.NDArray[np.bool_] | None = None,
    ) -> Chosen:
        """`seen` rows and `own` keys are left out of each query's answer; cold queries have the most frequent items."""
        candidates, catalogue, metric = (
            self.retriever.candidates(index),
            self.retriever.catalogue(index),
            self._metric(index),
        )
        allowed = self._allowed(index, wishes, changes)
        extra = self._extra(wishes, changes)
        pool = _pool(k, wishes)
        start = time.perf_counter()
        scores, rows = candidates.search_allowed(queries, pool, allowed.mask, seen, allowed_rows=allowed.rows)
        cold = np.zeros(len(queries), np.bool_) if cold is None else cold
        own_rows = _own_rows(seen, own, changes)[~cold] if index == SIMILAR and seen is not None else None
        self.retriever.note_search(index, queries[~cold], start, own_rows)
        keys, lists = [], []
        for number, query in enumerate(queries):
            best, order, more = scores[number], rows[number], extra
            if cold[number]:
                best, order = _most_frequent(catalogue, allowed.mask, pool, seen, number)
                more = more[:0]
            known = order >= 0
            names: list[Key] = catalogue.keys_of(order[known]).to_pylist()
            values, more = best[known], _without(more, own[number], changes)
            added = (changes.recommend if index == RECOMMEND else changes.similar)[more] if len(more) else None
            if added is not None:
                names += [changes.added[place].key for place in more]
                values = np.append(values, pair_scores(query[None], added[None], metric)[0])
            best_first = np.argsort(-values, kind="stable")[:pool]
            if wishes.diversity:
                vectors = candidates.vectors.take(order[known])
                vectors = vectors if added is None else np.concatenate([vectors, added])
                chosen = best_first[mmr(values[best_first], vectors[best_first], k, wishes.diversity)]
            else:
                chosen = best_first[:k]
            keys.append([names[place] for place in chosen])
            lists.append(values[chosen].astype(np.float32))
        return Chosen(keys, lists, cold.tolist(), catalogue.keys.type)

    def _allowed(self, index: str, wishes: Wishes, changes: Changes) -> _Allowed:
        unchanged, catalogue = self._unchanged_rows(index, changes), self.retriever.catalogue(index)
        if wishes.allow is None and not wishes.deny and not wishes.where:
            return unchanged
        allowed = unchanged.mask.copy()
        if wishes.where:
            if self.attributes is None:
                raise DataError("this version has no attributes to filter by: its export had no export.attributes")
            allowed &= self.attributes.mask(wishes.where)
        if wishes.allow is not None:
            listed = np.zeros(len(allowed), np.bool_)
            listed[_rows_of(catalogue, wishes.allow)] = True
            allowed &= listed
        allowed[_rows_of(catalogue, wishes.deny)] = False
        return _Allowed(allowed, np.flatnonzero(allowed))

    def _unchanged_rows(self, index: str, changes: Changes) -> _Allowed:
        """The rows that are neither deleted nor replaced; worked out once per reading of the overlay."""
        kept = self._unchanged.get(index)
        if kept is not None and kept[0] is changes:
            return kept[1]
        catalogue = self.retriever.catalogue(index)
        mask = np.ones(len(catalogue.keys), np.bool_)
        mask[_rows_of(catalogue, [*changes.deleted, *changes.places])] = False
        mask.flags.writeable = False
        found = _Allowed(mask, np.flatnonzero(mask))
        self._unchanged[index] = changes, found
        return found

    def _extra(self, wishes: Wishes, changes: Changes) -> Int64:
        """The places of the added items that the wishes allow."""
        if wishes.allow is None and not wishes.deny and not wishes.where:
            return np.arange(len(changes.added))

        def fits(one: Added) -> bool:
            if (wishes.allow is not None and one.key not in wishes.allow) or one.key in wishes.deny:
                return False
            for name, values in wishes.where.items():
                wanted = values if isinstance(values, (list, tuple)) else [values]
                had = one.attributes.get(name)
                if not any(type(had) is type(value) and had == value for value in wanted):
                    return False
            return True

        return np.array([place for place, one in enumerate(changes.added) if fits(one)], np.int64)

    def _of_kind(self, attributes: Mapping[str, Value]) -> list[Key]:
        if not attributes or self.attributes is None:
            raise DataError("say where the new item belongs: `like`, `vector`, or `attributes` that this version has")
        rows = np.flatnonzero(self.attributes.mask(attributes))
        if not len(rows):
            raise DataError(f"no item has the attributes {dict(attributes)!r}")
        keys: list[Key] = self.retriever.catalogue(RECOMMEND).keys_of(rows[:1000]).to_pylist()
        return keys

    def _mean(self, index: str, keys: Sequence[Key]) -> Float32:
        """The mean of items' vectors; of their directions, with the mean length, where only directions count."""
        rows = self.retriever.catalogue(index).rows(list(keys))
        vectors = self.retriever.candidates(index).vectors.take(rows[rows >= 0])
        if self._metric(index) == "ip":
            mean: Float32 = vectors.mean(axis=0)
            return mean
        direction: Float32 = unit_length(unit_length(vectors).mean(axis=0, keepdims=True))[0]
        return direction

    def _is_known(self, key: Key) -> bool:
        catalogue = self.retriever.catalogue(RECOMMEND)
        return 0 <= catalogue.row(key) < len(catalogue.keys)

    def _metric(self, index: str) -> Metric:
        metric: Metric = self.retriever.artifact.manifest["indexes"][index]["metric"]
        return metric


def _own_rows(seen: Ragged, own: Sequence[set[Key]], changes: Changes) -> Int64:
    """int64 [n]: the one row of each list; -1 of an empty one, and where the overlay has another vector for the key."""
    rows = np.full(len(seen), -1, np.int64)
    rows[seen.lengths > 0] = seen.values
    replaced = [any(changes.find(key) is not None for key in keys) for keys in own]
    return np.where(replaced, -1, rows)


def _rows_of(catalogue: Vocabulary, keys: Sequence[Key]) -> Int64:
    """The rows of those keys that the catalogue has."""
    found = catalogue.rows(list(keys)) if len(keys) else np.empty(0, np.int64)
    return found[(found >= 0) & (found < len(catalogue.keys))]


def _without(places: Int64, keys: set[Key], changes: Changes) -> Int64:
    """`places` of added items but for those of `keys`."""
    hidden = [place for key in keys if (place := changes.places.get(key)) is not None]
    return places[~np.isin(places, hidden)] if hidden else places


def _most_frequent(
    catalogue: Vocabulary, allowed: Mask, k: int, seen: Ragged | None, number: int
) -> tuple[Float32, Int64]:
    """The first k allowed rows (rows are ordered by frequency) and their counts."""
    keep = allowed
    if seen is not None and (hidden := seen.values[seen.offsets[number] : seen.offsets[number + 1]]).size:
        keep = allowed.copy()
        keep[hidden[(hidden >= 0) & (hidden < len(keep))]] = False
    rows = np.flatnonzero(keep)[:k]
    return catalogue.counts[rows].astype(np.float32), rows
