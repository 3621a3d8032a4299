"""An index in shards: each has a range of the rows and is asked by itself; what they find is merged exactly.

A catalogue whose index is too large for one machine is cut into contiguous ranges of rows, and every range has an index
of its own, built at export (`export.index_shards`): building one takes the memory of one shard, and whoever holds a
shard has only to read it, in seconds. `scatter` asks the processes that hold one range each. A process that opens them
all (`local`: evaluation, gates, a service without shards) maps their files: what fits stays in memory.

Merging is exact because a score depends on query and row alone (`exact`), so that the best k of all are among the best
k of each: sort by (score descending, row ascending), as a search over all rows does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cluster.errors import ArtifactError
from embedding_service.artifact import Artifact
from embedding_service.attributes import Mask
from embedding_service.candidates import Candidates
from embedding_service.exact import Float32, Int64
from embedding_service.ragged import Ragged
from embedding_service.vectors import VectorSet, row_ranges

Found = tuple[Float32, Int64]  # scores and rows [n, k], best first, the end padded with -inf and -1
RowSet = Int64 | npt.NDArray[np.uint8]
_FEW_HIDDEN = 64  # bits of a mask that cost as much as one row by number


class AnyCandidates(Protocol):
    """What `Candidates` and `ShardedCandidates` both are."""

    rows: int
    dim: int
    vectors: VectorSet

    def search(self, queries: Float32, k: int) -> Found: ...
    def search_unseen(self, queries: Float32, k: int, seen: Ragged | None, own: Int64 | None = None) -> Found: ...
    def search_allowed(
        self, queries: Float32, k: int, allowed: Mask, seen: Ragged | None, *, allowed_rows: Int64 | None = None
    ) -> Found: ...


@dataclass(frozen=True)
class Question:
    """What one shard is asked: the best k of its rows for queries float32 [n, dim].

    `part`: the rows of the catalogue that the shard is taken to have; here they are counted from the first of them.
    `seen` lists those to leave out for each query; `allowed`: see `packed`; None: all rows. `own`: see
    `Candidates.search_unseen`.
    """

    part: range
    queries: Float32
    k: int
    seen: Ragged | None = None
    allowed: RowSet | None = None
    own: Int64 | None = None

    def answer(self, candidates: AnyCandidates) -> Found:
        """Scores float32 and rows int64 [n, min(k, rows)]."""
        if not candidates.rows:
            return np.empty((len(self.queries), 0), np.float32), np.empty((len(self.queries), 0), np.int64)
        if self.allowed is None:
            return candidates.search_unseen(self.queries, self.k, self.seen, self.own)
        return candidates.search_allowed(self.queries, self.k, unpacked(self.allowed, candidates.rows), self.seen)


Ask = Callable[[Sequence[Question]], Sequence[Found | None]]


class ShardedCandidates:
    """`Candidates` whose rows are searched by range; row i of `vectors` is row i of all."""

    def __init__(self, vectors: VectorSet, ranges: Sequence[range], ask: Ask) -> None:
        """ask(questions): one question per range in, what its rows have for it out, by their own numbers; None for a
        range that is to be left out of the answer.

        `ranges` cover the rows in order; one may be empty.
        """
        self.rows, self.dim, self.vectors = vectors.rows, vectors.dim, vectors
        self._ranges, self._ask = ranges, ask

    def search(self, queries: Float32, k: int) -> Found:
        """The best min(k, rows) rows of queries [n, dim]: scores float32 and rows int64 [n, min(k, rows)]."""
        return self.search_unseen(queries, k, None)

    def search_unseen(self, queries: Float32, k: int, seen: Ragged | None, own: Int64 | None = None) -> Found:
        """As `search`, without the rows (int64, any) that `seen` lists for each query.

        The end is padded with row -1 and score -inf where there are no more. `own`: see `Candidates.search_unseen`; it
        is of use to the shard that has the row.
        """
        return self._asked(
            [
                Question(part, queries, k, _within(seen, part), own=None if own is None else _own_within(own, part))
                for part in self._ranges
            ],
            k,
        )

    def search_allowed(
        self, queries: Float32, k: int, allowed: Mask, seen: Ragged | None, *, allowed_rows: Int64 | None = None
    ) -> Found:
        """As `search_unseen`, of the rows that `allowed` (bool [rows]) has; each shard is told those of its range."""
        del allowed_rows  # the same by number
        return self._asked(
            [
                Question(part, queries, k, _within(seen, part), packed(allowed[part.start : part.stop]))
                for part in self._ranges
            ],
            k,
        )

    def _asked(self, questions: Sequence[Question], k: int) -> Found:
        parts = [
            (found[0], np.where(found[1] >= 0, found[1] + part.start, -1))
            for part, found in zip(self._ranges, self._ask(questions), strict=True)
            if found is not None
        ]
        return merge(parts, len(questions[0].queries), min(k, self.rows))


def merge(parts: Sequence[Found], num: int, k: int) -> Found:
    """The best k of what each part has found for the same `num` queries: scores float32 and rows int64 [num, k].

    By score descending, then row ascending; row -1 is no row, and pads the end with score -inf.
    """
    empty = np.full((num, k), -np.inf, np.float32), np.full((num, k), -1, np.int64)
    scores = np.concatenate([*(part[0] for part in parts), empty[0]], axis=1)
    rows = np.concatenate([*(part[1] for part in parts), empty[1]], axis=1)
    behind = np.where(rows >= 0, rows, np.iinfo(np.int64).max)
    order = np.lexsort((behind, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _within(seen: Ragged | None, rows: range) -> Ragged | None:
    """The rows that are in a range, counted from its first one."""
    if seen is None:
        return None
    inside = (seen.values >= rows.start) & (seen.values < rows.stop)
    return seen.with_values(seen.values - rows.start).keep(inside)


def _own_within(own: Int64, rows: range) -> Int64:
    """The same of the rows that are in a range, counted from its first one; -1 of others."""
    return np.where((own >= rows.start) & (own < rows.stop), own - rows.start, -1)


def packed(allowed: Mask) -> RowSet | None:
    """bool [rows] in few bytes: None where all rows are, int64 the rows that are not if they are few, else its bits."""
    hidden = np.flatnonzero(~allowed)
    if not len(hidden):
        return None
    return hidden if len(hidden) <= len(allowed) // _FEW_HIDDEN else np.packbits(allowed)


def unpacked(rows: RowSet, num: int) -> Mask:
    """The mask bool [num] that `packed` was given."""
    if rows.dtype == np.uint8:
        return np.unpackbits(rows.astype(np.uint8, copy=False), count=num).view(np.bool_)
    allowed = np.ones(num, np.bool_)
    allowed[rows] = False
    return allowed


def local(
    artifact: Artifact,
    name: str,
    *,
    exact: bool = False,
    pool: Executor | None = None,
    threads: int = 1,
    shards: range | None = None,
) -> AnyCandidates:
    """What the index `name` chooses from, held by this process: all of its rows, or those of neighbouring `shards`.

    `exact` searches without the index. Raises ArtifactError for an index that misfits.
    """
    entry = artifact.manifest["indexes"][name]
    metric, vectors = entry["metric"], artifact.vectors(entry["vectors"])  # an unknown row behind is no candidate
    ranges = artifact.index_ranges(name)
    chosen = range(len(ranges)) if shards is None else shards
    rows = rows_of(artifact, name, chosen)
    if exact or len(chosen) == 1:
        index = None if exact else artifact.index(name, chosen[0])
        return Candidates(vectors.part(rows), metric, index, pool, threads)
    held = []
    for i in chosen:
        index = artifact.index(name, i, mapped=shards is None)
        held.append(Candidates(vectors.part(ranges[i]), metric, index, pool, threads))
    return ShardedCandidates(
        vectors.part(rows),
        [range(ranges[i].start - rows.start, ranges[i].stop - rows.start) for i in chosen],
        lambda questions: [one.answer(part) for one, part in zip(questions, held, strict=True)],
    )


def rows_of(artifact: Artifact, name: str, shards: range) -> range:
    """The rows of neighbouring shards of the index `name`."""
    ranges = artifact.index_ranges(name)
    return range(ranges[shards[0]].start, ranges[shards[-1]].stop)


def shards_of(artifact: Artifact, name: str, number: int, count: int) -> range:
    """Which shards of the index `name` the holder `number` of `count` has: neighbours, and at least one.

    Raises ArtifactError for an index of fewer shards.
    """
    there = len(artifact.index_ranges(name))
    if there < count:
        pieces = "one piece" if there == 1 else f"{there} shards"
        raise ArtifactError(
            f"{artifact.path}: its index {name!r} is in {pieces} and cannot be divided among {count}: export it with "
            f"export.index_shards = {count}, or serve it with serve.shards = {there if there > 1 else 0}"
        )
    return row_ranges(there, count)[number]
