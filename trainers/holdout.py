"""Which part of the sessions is trained on and which is kept to validate: a pure function of (seed, session number)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from embedding_service.hashing import stable_hash
from embedding_service.ragged import Ragged, offsets_of, take_values
from trainers.sessions import SessionBatch

Kind = Literal["none", "items", "last_item", "sessions", "last_sessions"]


@dataclass(frozen=True)
class Holdout:
    """What validation hides of the training sessions.

    `items`: a share of every session's items; `last_item`: the last item of every session; `sessions`: a random share
    of whole sessions; `last_sessions`: the last ones of the `num_sessions`. A held-out session gives a case for every
    item but its first: the items before it, and the item.
    """

    kind: Kind
    fraction: float
    seed: int
    num_sessions: int

    def training(self, batch: SessionBatch) -> SessionBatch:
        """`batch` without what is held out; sessions may become empty, or leave."""
        if self.kind == "none":
            return batch
        if self.kind in ("sessions", "last_sessions"):
            return batch.take(np.flatnonzero(~self._held_out(batch)))
        return dataclasses.replace(batch, items=batch.items.keep(~self._hidden(batch)))

    def cases(self, batch: SessionBatch) -> SessionBatch:
        """The validation cases in `batch`: `history` is what the model may see, `items` what it should find."""
        if self.kind in ("sessions", "last_sessions"):
            return _next_item_cases(batch.take(np.flatnonzero(self._held_out(batch))))
        hidden = self._hidden(batch)
        cases = dataclasses.replace(batch, items=batch.items.keep(hidden), history=batch.items.keep(~hidden))
        return cases.take(np.flatnonzero(cases.items.lengths > 0))

    def _held_out(self, batch: SessionBatch) -> np.ndarray:
        if self.kind == "last_sessions":
            return batch.row_ids >= self.num_sessions - round(self.fraction * self.num_sessions)
        return uniform(batch.row_ids, self.seed) < self.fraction

    def _hidden(self, batch: SessionBatch) -> np.ndarray:
        """bool [len(items.values)]; a session never loses all of its items."""
        items = batch.items
        if self.kind == "none":
            return np.zeros(len(items.values), bool)
        if self.kind == "last_item":
            hidden = np.zeros(len(items.values), bool)
            long = items.lengths >= 2
            hidden[items.offsets[1:][long] - 1] = True
            return hidden
        owners = items.owners()
        place = np.arange(len(owners)) - items.offsets[owners]
        hidden = uniform(batch.row_ids[owners] * 1_000_003 + place, self.seed) < self.fraction
        left = np.bincount(owners[~hidden], minlength=len(items))
        return hidden & (left[owners] > 0)


def uniform(ids: np.ndarray, seed: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on int64 `ids` [n] and `seed` alone: float64 [n]."""
    return (stable_hash(ids.astype(np.int64), seed=seed) >> np.uint64(11)) * 2.0**-53


def _next_item_cases(sessions: SessionBatch) -> SessionBatch:
    """Every prefix of every session with the item that follows it."""
    items = sessions.items
    owners = items.owners()
    place = np.arange(len(owners)) - items.offsets[owners]
    target = np.flatnonzero(place > 0)
    owner, length = owners[target], place[target]
    offsets = offsets_of(length)
    index = np.arange(offsets[-1]) + np.repeat(items.offsets[owner] - offsets[:-1], length)
    one_each = np.arange(len(target) + 1, dtype=np.int64)
    return dataclasses.replace(
        sessions.take(owner),
        items=Ragged(take_values(items.values, target), one_each),
        history=Ragged(take_values(items.values, index), offsets),
        row_ids=sessions.row_ids[owner] * 1_000_003 + length,
    )


class CaseSample:
    """At most `limit` cases of a stream, chosen by a hash of their number, in whatever pieces they come."""

    def __init__(self, limit: int, seed: int) -> None:
        self.limit = limit
        self.seed = seed
        self._parts: list[SessionBatch] = []
        self._held = 0

    def add(self, cases: SessionBatch) -> None:
        if len(cases):
            self._parts.append(cases)
            self._held += len(cases)
        if self._held > 4 * self.limit:
            self._prune()

    def result(self) -> SessionBatch | None:
        """The chosen cases in stream order; None if there were none."""
        self._prune()
        return self._parts[0] if self._parts else None

    def _prune(self) -> None:
        if not self._parts:
            return
        cases = SessionBatch.concat(self._parts)
        if len(cases) > self.limit:
            rank = uniform(cases.row_ids, self.seed + 1)
            cases = cases.take(np.sort(np.argpartition(rank, self.limit)[: self.limit]))
        self._parts, self._held = [cases], len(cases)


def cases_table(cases: SessionBatch) -> pa.Table:
    """Cases as a table with the column `items`, and `history`, `user` and features where there are some."""
    columns: dict[str, pa.Array] = {}
    for name, lists in (("history", cases.history), ("items", cases.items)):
        if lists is not None:
            columns[name] = pa.LargeListArray.from_arrays(pa.array(lists.offsets), lists.values)
    if cases.user is not None:
        columns["user"] = cases.user
    return pa.table({**columns, **cases.features})
