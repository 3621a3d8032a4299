"""The service without a server: similar(keys), search(vectors), recommend(sessions), single or in batches alike."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from cluster.errors import ArtifactError, DataError, KeyNotFound
from cluster.rank import num_cores
from embedding_service import rank_kernels as kernels
from embedding_service.artifact import Artifact
from embedding_service.candidates import first_unseen, num_fetched
from embedding_service.exact import Float32, Int64, unit_length
from embedding_service.index_shards import AnyCandidates, local
from embedding_service.instruments import Instruments
from embedding_service.keys import Key, Vocabulary
from embedding_service.mapped_vectors import MappedVectors
from embedding_service.ragged import Ragged, offsets_of, take_values
from embedding_service.reservoir import Reservoir
from embedding_service.towers import LISTS, Given, InputRows, Sequences, Tower, input_rows, missing, says, weighted
from embedding_service.vectors import VectorSet

RECOMMEND, SIMILAR = "recommend", "similar"  # the names of the two indexes
ASKED_QUERIES = 64  # of each index, kept for who wants to know what is asked (`recall_probe`)
_FROM_SESSION = ("history", "last_item")


@dataclass(frozen=True)
class Results:
    """Answers to n queries, best first; places that could not be filled have row -1 and score -inf, at the end.

    rows int64 and scores float32 [n, min(k, candidates)]; lengths int64 [n]: how many were found; flat_keys: the keys
    of all queries, one query after the other; keys: the same, a list per query;
    cold_start: whether the query said nothing that the model knows, so that the most frequent items are the answer and
    their counts the scores.
    """

    rows: Int64
    scores: Float32
    lengths: Int64
    flat_keys: pa.Array
    cold_start: list[bool]

    @functools.cached_property
    def keys(self) -> list[list[Key]]:
        if pa.types.is_int64(self.flat_keys.type) and not self.flat_keys.null_count:
            flat = self.flat_keys.to_numpy().tolist()  # a third of the time of `to_pylist`
        else:
            flat = self.flat_keys.to_pylist()
        ends = list(itertools.accumulate(self.lengths.tolist(), initial=0))
        return [flat[start:end] for start, end in itertools.pairwise(ends)]


class Retriever:
    """Answers queries from one artifact. Safe to use from many threads.

    `exact=True` scores every candidate in place of asking the index. `threads`, by default one per core, share the work
    of a batch. `elsewhere` gives the candidates of an index that other processes hold (see `scatter`). `asked` has a
    sample of what each index was searched for.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        exact: bool = False,
        threads: int | None = None,
        elsewhere: Callable[[Artifact, str], AnyCandidates] | None = None,
    ) -> None:
        self.artifact = artifact
        self._instruments = Instruments()
        self.asked = {name: Reservoir(ASKED_QUERIES) for name in artifact.manifest["indexes"]}
        self.version = artifact.version
        self._candidates: dict[str, AnyCandidates] = {}
        self._catalogue: dict[str, Vocabulary] = {}
        threads = threads or num_cores()
        pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="search") if threads > 1 else None
        for name, entry in artifact.manifest["indexes"].items():
            keys = artifact.keys(artifact.manifest["vectors"][entry["vectors"]]["keys"])
            self._candidates[name] = (
                local(artifact, name, exact=exact, pool=pool, threads=threads)
                if elsewhere is None
                else elsewhere(artifact, name)
            )
            self._catalogue[name] = keys
        self._encoder = None if artifact.manifest["query_tower"] is None else QueryEncoder(artifact)
        if self._encoder is not None and RECOMMEND in self._candidates:
            self._check_fit(self._encoder)

    def tell(self, instruments: Instruments) -> None:
        """From now on tell `instruments` how long things take. What was asked until now is forgotten."""
        self._instruments = instruments
        for asked in self.asked.values():
            asked.take()

    def similar(self, keys: Sequence[Key], k: int = 10) -> Results:
        """The items nearest to each item of `keys`, itself left out. Raises KeyNotFound for the first unknown key."""
        candidates, catalogue = self._part(SIMILAR)
        _check_batch(len(keys), k)
        rows = catalogue.rows(keys)
        if rows.min() < 0 or rows.max() >= candidates.rows:
            unknown = np.flatnonzero((rows < 0) | (rows >= candidates.rows))
            raise KeyNotFound(keys[unknown[0]], self._key_map_name(SIMILAR))
        own = Ragged(rows, np.arange(len(rows) + 1, dtype=np.int64))
        return self._results(catalogue, *self._search(SIMILAR, candidates.vectors.take(rows), k, own, rows))

    def search(self, vectors: npt.NDArray[np.floating], k: int = 10) -> Results:
        """The items that score highest with query vectors, float [n, dim] (or one, [dim]), under the recommend index.

        Raises DataError for another shape, nan or infinite values.
        """
        candidates, catalogue = self._part(RECOMMEND)
        queries = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        _check_batch(len(queries), k)
        if queries.ndim != 2 or queries.shape[1] != candidates.dim:
            raise DataError(f"query vectors must be [n, {candidates.dim}]; got {list(np.shape(vectors))}")
        finite = np.isfinite(queries).all(axis=1)
        if not finite.all():
            raise DataError(f"query vector {int(np.argmin(finite))} holds nan or an infinity")
        return self._results(catalogue, *self._search(RECOMMEND, queries, k, None))

    def recommend(
        self,
        sessions: Sequence[Sequence[Key]],
        k: int = 10,
        *,
        users: Sequence[Key | None] | None = None,
        features: Mapping[str, Sequence[Any]] | None = None,
        exclude_seen: bool = True,
    ) -> Results:
        """What comes next in each session (item keys, oldest first; unknown ones are passed over).

        `users` and `features` [n] may be given only where the query tower looks at them: a key, a list of keys, a
        number or a list of `width` numbers for each session; None is unknown. A query of which nothing is known is
        answered with the most frequent items. `exclude_seen` leaves out the session's items.
        """
        _, catalogue = self._part(RECOMMEND)
        _check_batch(len(sessions), k)
        history, single = self._asked(catalogue, sessions, users, features)
        scores, rows, cold = self._recommend(history, single, k, history if exclude_seen else None)
        return self._results(catalogue, scores, rows, cold)

    def encode(
        self,
        sessions: Sequence[Sequence[Key]],
        *,
        users: Sequence[Key | None] | None = None,
        features: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[Ragged, Float32, npt.NDArray[np.bool_]]:
        """The sessions of `recommend` as rows, as query vectors float32 [n, dim], and which say nothing known, [n]."""
        _, catalogue = self._part(RECOMMEND)
        history, single = self._asked(catalogue, sessions, users, features)
        return history, self._encode(history, single), ~self._required_encoder().knows(history, single)

    def _asked(
        self,
        catalogue: Vocabulary,
        sessions: Sequence[Sequence[Key]],
        users: Sequence[Key | None] | None,
        features: Mapping[str, Sequence[Any]] | None,
    ) -> tuple[Ragged, dict[str, Given]]:
        given = {**(features or {}), **({} if users is None else {"user": users})}
        single = self._required_encoder().rows_of_single(given, len(sessions))
        lengths = np.array([len(session) for session in sessions], np.int64)
        flat = [key for session in sessions for key in session]
        return Ragged(catalogue.rows(flat) if flat else np.empty(0, np.int64), offsets_of(lengths)), single

    def candidates(self, index: str) -> AnyCandidates:
        """What the index `index` chooses from. Raises ArtifactError if there is none."""
        return self._part(index)[0]

    def catalogue(self, index: str) -> Vocabulary:
        """The keys of the index's rows. Raises ArtifactError if there is none."""
        return self._part(index)[1]

    def encode_rows(self, history: Ragged, users: Int64 | None, features: Mapping[str, Given]) -> Float32:
        """Query vectors float32 [n, dim] of n histories of item rows (oldest first), users [n] by row and features as
        `towers.Given`. -1 is unknown everywhere. `users` None: all unknown.
        """
        encoder = self._required_encoder()
        return encoder.encode(history, encoder.checked_single({**features, "user": users}, len(history)))

    def recommend_rows(
        self,
        history: Ragged,
        users: Given | None,
        features: Mapping[str, Given],
        k: int,
        exclude: Ragged | None,
    ) -> tuple[Float32, Int64]:
        """`recommend` in rows: scores float32 and rows int64 [n, min(k, candidates)] without `exclude`'s rows."""
        self._part(RECOMMEND)
        _check_batch(len(history), k)
        single = self._required_encoder().checked_single({**features, "user": users}, len(history))
        scores, rows, _ = self._recommend(history, single, k, exclude)
        return scores, rows

    def _recommend(
        self, history: Ragged, single: dict[str, Given], k: int, exclude: Ragged | None
    ) -> tuple[Float32, Int64, npt.NDArray[np.bool_]]:
        candidates, catalogue = self._part(RECOMMEND)
        encoder = self._required_encoder()
        cold = ~encoder.knows(history, single)
        if not cold.any():
            return *self._search(RECOMMEND, self._encode(history, single), k, exclude), cold
        n, k = len(history), min(k, candidates.rows)
        scores, rows = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
        warm, cold_members = np.flatnonzero(~cold), np.flatnonzero(cold)
        if len(warm):
            queries = self._encode(
                history.take(warm), {name: take_values(value, warm) for name, value in single.items()}
            )
            seen = None if exclude is None else exclude.take(warm)
            scores[warm], rows[warm] = self._search(RECOMMEND, queries, k, seen)
        seen = history.take(cold_members).tail(0) if exclude is None else exclude.take(cold_members)
        fetch = min(candidates.rows, int(num_fetched(k, seen.lengths).max()))
        frequent = np.broadcast_to(np.arange(fetch), (len(cold_members), fetch))  # rows are ordered by frequency
        counts = catalogue.counts[frequent].astype(np.float32)
        scores[cold_members], rows[cold_members] = first_unseen(counts, frequent, seen, k)
        return scores, rows, cold

    def _encode(self, history: Ragged, single: Mapping[str, Given]) -> Float32:
        start = time.perf_counter()
        queries = self._required_encoder().encode(history, single)
        self._instruments.encode.since(start)
        return queries

    def _search(
        self, index: str, queries: Float32, k: int, seen: Ragged | None, own: Int64 | None = None
    ) -> tuple[Float32, Int64]:
        """`own`: the rows whose vectors the queries are."""
        start = time.perf_counter()
        found = self._candidates[index].search_unseen(queries, k, seen, own)
        self._instruments.search.since(start)
        self.asked[index].offer(queries, own)
        return found

    def note_search(self, index: str, queries: Float32, start: float, own: Int64 | None = None) -> None:
        """A search of the index `index` for queries [n, dim] (of the rows `own` [n]) that has taken from `start` on."""
        self._instruments.search.since(start)
        self.asked[index].offer(queries, own)

    def _results(
        self, catalogue: Vocabulary, scores: Float32, rows: Int64, cold: npt.NDArray[np.bool_] | None = None
    ) -> Results:
        if rows[:, -1].min() >= 0:  # padding is at the end: here is none
            lengths, flat = np.full(len(rows), rows.shape[1]), rows.ravel()
        else:
            lengths, flat = np.count_nonzero(rows >= 0, axis=1), rows[rows >= 0]
        cold_start = [False] * len(rows) if cold is None else cold.tolist()
        return Results(rows, scores, lengths, catalogue.keys_of(flat), cold_start)

    def _part(self, name: str) -> tuple[AnyCandidates, Vocabulary]:
        if name not in self._candidates:
            raise ArtifactError(f"{self.artifact.path}: has no index {name!r}")
        return self._candidates[name], self._catalogue[name]

    def _key_map_name(self, index: str) -> str:
        manifest = self.artifact.manifest
        return str(manifest["vectors"][manifest["indexes"][index]["vectors"]]["keys"])

    def _required_encoder(self) -> QueryEncoder:
        if self._encoder is None:
            raise ArtifactError(f"{self.artifact.path}: has no query tower: it answers keys and vectors only")
        return self._encoder

    def _check_fit(self, encoder: QueryEncoder) -> None:
        """The query tower must speak of the same items, in vectors of the same width, as the recommend index."""
        items = self._key_map_name(RECOMMEND)
        wrong = [name for source, name in encoder.key_maps.items() if source in _FROM_SESSION and name != items]
        if wrong:
            raise ArtifactError(f"{self.artifact.path}: sessions are keyed by {wrong[0]!r}, candidates by {items!r}")
        if encoder.dim != self._candidates[RECOMMEND].dim:
            raise ArtifactError(
                f"{self.artifact.path}: queries have width {encoder.dim}, candidates {self._candidates[RECOMMEND].dim}"
            )


class QueryEncoder:
    """The query tower over the artifact's vector sets: rows in, query vectors out.

    A tower without weights is computed here in numpy, which spares a short session most of its time; the tests hold it
    against `Tower`. With weights `Tower` itself runs, in float64, so that rounding to float32 gives the same vector in
    any batch.
    """

    def __init__(self, artifact: Artifact) -> None:
        tower = artifact.query_tower()
        self.spec = tower.spec
        self.dim = tower.spec.dim
        looked_up = [block for block in tower.spec.inputs if block.encoder != "project"]
        self.key_maps = {block.source: str(artifact.manifest["vectors"][block.vectors]["keys"]) for block in looked_up}
        self._keys = {source: artifact.key_map(name) for source, name in self.key_maps.items()}
        self._vectors = {block.vectors: artifact.vectors_by_id(block.vectors) for block in looked_up}
        self._tower: Tower | None = tower.double() if any(True for _ in tower.parameters()) else None
        self._single = {block.source: block for block in tower.spec.inputs if block.source not in _FROM_SESSION}
        session = [artifact.keys(name) for source, name in self.key_maps.items() if source in _FROM_SESSION]
        self._sees_session = bool(session)
        self._num_items = min((len(keys.keys) for keys in session), default=0)
        self._num_trained = min((keys.num_seen for keys in session), default=0)
        self._unknown_row = self._num_items if any(keys.unknown == "row" for keys in session) else -1

    def rows_of_single(self, given: Mapping[str, Sequence[Any]], num: int) -> dict[str, Given]:
        """The values [num] of the user and the features that a request gives. Raises DataError for others."""
        for source, values in given.items():
            if source not in self._single:
                raise DataError(f"this model's queries have no {source!r}; they have: {self._known_sources()}")
            if len(values) != num:
                raise DataError(f"{len(values)} values of {source!r} were given for {num} sessions")
        return self.checked_single({source: self._values(source, values) for source, values in given.items()}, num)

    def checked_single(self, given: Mapping[str, Given | None], num: int) -> dict[str, Given]:
        """The values [num] of all sources besides the session; those not given are unknown."""
        found: dict[str, Given] = {}
        for source, block in self._single.items():
            values = given.get(source)
            found[source] = missing(block, num) if values is None else values
        return found

    def knows(self, history: Ragged, single: Mapping[str, Given]) -> npt.NDArray[np.bool_]:
        """bool [n]: whether anything in the query is a number, or has a key of its own that training has seen."""
        known = np.zeros(len(history), np.bool_)
        for source, values in single.items():
            known |= says(values, self._keys[source].num_keys if source in self._keys else None)
        if self._sees_session:
            if history.values.min(initial=0) >= 0 and history.values.max(initial=-1) < self._num_trained:
                known |= history.lengths > 0
            else:
                known |= says(history, self._num_trained)
        return known

    def encode(self, history: Ragged, single: Mapping[str, Given]) -> Float32:
        """Query vectors float32 [n, dim]; -1 rows are passed over, and items that training has not seen are unknown."""
        rows = history.values
        if rows.min(initial=0) < 0 or rows.max(initial=-1) >= self._num_trained:
            unseen = (rows >= self._num_trained) & (rows < self._num_items)
            rows = np.where(unseen, self._unknown_row, rows)
            history = history.with_values(rows).keep(rows >= 0)
        looked_up = input_rows(self.spec, history=history, single=single)
        if self._tower is not None:
            with torch.inference_mode():
                blocks = {name: self._block(found) for name, found in looked_up.items()}
                out: Float32 = self._tower(blocks).float().numpy()
            return out
        pooled = [_pooled(self._vectors[found.vectors], found) for found in looked_up.values()]  # type: ignore[union-attr, arg-type]
        summed = functools.reduce(np.add, pooled)
        return unit_length(summed) if self.spec.normalize else summed

    def _block(self, found: InputRows | np.ndarray) -> torch.Tensor | Sequences:
        """float64, as `Tower` takes it."""
        if isinstance(found, np.ndarray):
            return torch.from_numpy(found).double()
        vectors = self._vectors[found.vectors]
        if found.weights is not None:
            return torch.from_numpy(_pooled(vectors, found)).double()
        rows = torch.from_numpy(vectors.take(found.rows)).double()
        return Sequences(rows, torch.from_numpy(np.ascontiguousarray(found.offsets)))

    def _values(self, source: str, values: Sequence[Any]) -> Given:
        """What a request says of one source, as the tower takes it."""
        block = self._single[source]
        if block.encoder == "project":
            return _numbers(source, values, block.width)
        if block.encoder not in LISTS:
            return self._keys[source].rows(values)
        lists = [one if one is not None else () for one in values]
        if any(isinstance(one, (str, bytes)) or not isinstance(one, Sequence) for one in lists):
            raise DataError(f"{source!r} takes a list of keys, or None, for each session")
        flat = [key for one in lists for key in one]
        weights = None
        if block.encoder.startswith("weighted"):
            flat, weights = _pairs(source, flat)
        rows = self._keys[source].rows(flat) if flat else np.empty(0, np.int64)
        offsets = offsets_of(np.array([len(one) for one in lists], np.int64))
        return Ragged(rows if weights is None else weighted(rows, weights), offsets).keep(rows >= 0)

    def _known_sources(self) -> str:
        return ", ".join(["sessions"] * self._sees_session + list(self._single))


def _pairs(source: str, flat: Sequence[Any]) -> tuple[list[Any], Float32]:
    """The keys and the weights of (key, weight) pairs. Raises DataError."""
    try:
        keys = [key for key, _ in flat]
        weights = np.array([weight for _, weight in flat], np.float32)
    except (TypeError, ValueError):
        weights = np.array([np.nan], np.float32)
    if weights.ndim != 1 or not np.isfinite(weights).all() or any(isinstance(one, str) for one in flat):
        raise DataError(
            f"{source!r} takes a list of [key, weight] pairs with finite weights, or None, for each session"
        )
    return keys, weights


def _numbers(source: str, values: Sequence[Any], width: int) -> npt.NDArray[np.float64]:
    """float64 [n, width]; nan for None. Raises DataError."""
    unknown = [np.nan] * width
    listed = [unknown if one is None else [one] if width == 1 and np.ndim(one) == 0 else one for one in values]
    try:
        found = np.array(listed, np.float64).reshape(len(listed), -1)
    except (TypeError, ValueError):
        found = np.empty((len(listed), 0))
    if found.shape[1] != width or np.isinf(found).any():
        what = "a finite number" if width == 1 else f"{width} finite numbers"
        raise DataError(f"{source!r} takes {what}, or None, for each session")
    return found


def _pooled(vectors: VectorSet | MappedVectors, lookup: InputRows) -> Float32:
    """`towers.pool` in numpy: weighted sums of the looked-up rows, float32 [n, dim]; an empty list gives zeros."""
    assert lookup.weights is not None
    out = np.empty((len(lookup.offsets) - 1, vectors.dim), np.float32)
    kernels.pool(vectors.take(lookup.rows), lookup.offsets, lookup.weights, out)
    return out


def _check_batch(num: int, k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise DataError(f"k must be a whole number of at least 1; got {k!r}")
    if num == 0:
        raise DataError("the batch is empty: ask at least one query")
