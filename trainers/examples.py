"""Sessions of one window -> batches of examples: pure, vectorised, and the same for any number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

from embedding_service.ragged import Ragged, offsets_of
from trainers.prepare import Sessions


def generator(*numbers: int) -> np.random.Generator:
    """Random numbers that follow from `numbers` (seed, epoch, window...) alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


@dataclass(frozen=True)
class TokenBlock:
    """Sessions for skip-gram: n lists of item rows."""

    items: Ragged


class TokenPlan:
    """A window as blocks of whole sessions of about `block_items` items a worker."""

    def __init__(
        self, sessions: Sessions, *, block_items: int, ordered: bool, keep: np.ndarray, numbers: tuple[int, ...]
    ) -> None:
        """keep: float32 [rows], the probability with which an item is kept; numbers: (seed, epoch, window)."""
        items = sessions.items
        random = generator(*numbers, 1)
        if (keep < 1.0).any():
            items = items.keep(random.random(len(items.values), dtype=np.float32) < keep[items.values])
        if not ordered:
            items = shuffle_lists(items, random)
        self.items = items
        self.block_items = block_items
        self.size = len(items)
        self.num_trainable = int((items.lengths > 1).sum())

    def stop_after(self, offset: int, num_workers: int) -> int:
        """Where the step that begins at session `offset` ends: always at least one session further."""
        wanted = self.items.offsets[offset] + self.block_items * num_workers
        return max(offset + 1, int(np.searchsorted(self.items.offsets, wanted, side="right")) - 1)

    def share(self, start: int, stop: int, rank: int, num_workers: int) -> tuple[int, int]:
        """The sessions of one worker: nearly equal numbers of items."""
        cuts = equal_shares(self.items.offsets[start : stop + 1], num_workers)
        return start + cuts[rank], start + cuts[rank + 1]

    def batch(self, start: int, stop: int) -> TokenBlock:
        return TokenBlock(self.items.slice(start, stop))


def equal_shares(offsets: np.ndarray, num: int) -> list[int]:
    """Where to cut lists with these `offsets` int64 [n + 1] into `num` shares of nearly equal numbers of values.

    Returns num + 1 list numbers from 0 to n, ascending.
    """
    cuts = np.searchsorted(offsets, np.linspace(offsets[0], offsets[-1], num + 1))
    cuts[0], cuts[-1] = 0, len(offsets) - 1
    return [int(cut) for cut in cuts]


@dataclass(frozen=True)
class PairBatch:
    """n examples of a query and its positive item.

    `item` int64 [n] rows; `history` n lists of rows, oldest first, the positive not among them at its place; `user`
    int64 [n] and `features` name -> int64 [n], -1 where unknown; `hits` int64 [p], places i * n + j of pairs where
    item j is no negative of example i.
    """

    item: np.ndarray
    history: Ragged
    user: np.ndarray | None
    features: dict[str, np.ndarray]
    hits: np.ndarray

    def __len__(self) -> int:
        return len(self.item)


class PairPlan:
    """A window as a random order of (session, place of the positive item)."""

    def __init__(
        self,
        sessions: Sessions,
        *,
        batch_size: int,
        kind: Literal["every_item", "next_item", "last_item"],
        with_history: bool,
        only_history: bool,
        history_length: int,
        mask: Literal["item", "session"],
        numbers: tuple[int, ...],
    ) -> None:
        """kind: see `model.examples`; with_history, only_history: whether queries see histories, and nothing else;
        numbers: (seed, epoch, window).
        """
        random = generator(*numbers, 1)
        self.sessions = sessions
        self.items = shuffle_lists(sessions.items, random) if kind == "every_item" else sessions.items
        self.batch_size, self.kind, self.mask = batch_size, kind, mask
        self.with_history, self.history_length = with_history, history_length
        owners = self.items.owners()
        place = np.arange(len(owners)) - self.items.offsets[owners]
        chosen = np.ones(len(owners), bool)
        if kind == "last_item":
            chosen = place == self.items.lengths[owners] - 1
        if only_history:  # without one there is nothing to ask with
            chosen &= (self.items.lengths[owners] > 1) if kind == "every_item" else (place > 0)
        self.examples = random.permutation(np.flatnonzero(chosen))
        self.size = self.num_trainable = len(self.examples)

    def stop_after(self, offset: int, num_workers: int) -> int:
        """Where the step that begins at example `offset` ends."""
        return min(self.size, offset + self.batch_size * num_workers)

    def share(self, start: int, stop: int, rank: int, num_workers: int) -> tuple[int, int]:
        """The examples of one worker."""
        return start + (stop - start) * rank // num_workers, start + (stop - start) * (rank + 1) // num_workers

    def batch(self, start: int, stop: int) -> PairBatch:
        """Examples start..stop - 1 of the window's order."""
        place = self.examples[start:stop]
        offsets = self.items.offsets
        owner = np.searchsorted(offsets, place, side="right") - 1
        item = self.items.values[place]
        history = self._history(place, offsets[owner], offsets[owner + 1])
        if self.mask == "session":
            hits = session_hits(item, self.items.values, offsets[owner], offsets[owner + 1])
        else:
            hits = session_hits(item, item, np.arange(len(item)), np.arange(1, len(item) + 1))
        user = None if self.sessions.user is None else self.sessions.user[owner]
        features = {name: values[owner] for name, values in self.sessions.features.items()}
        return PairBatch(item, history, user, features, hits)

    def _history(self, place: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Ragged:
        """What the query sees: the items before the positive or, for a basket (in random order), those around it."""
        if not self.with_history:
            return Ragged(np.empty(0, np.int64), np.zeros(len(place) + 1, np.int64))
        available = end - begin - 1 if self.kind == "every_item" else place - begin
        length = np.minimum(available, self.history_length) if self.history_length else available
        offsets = offsets_of(length)
        step = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length)
        if self.kind != "every_item":
            return Ragged(self.items.values[np.repeat(place - length, length) + step], offsets)
        size = np.repeat(end - begin, length)
        index = np.repeat(begin, length) + (np.repeat(place - begin, length) + 1 + step) % size
        return Ragged(self.items.values[index], offsets)


def shuffle_lists(lists: Ragged, random: np.random.Generator) -> Ragged:
    """Each list in a random order of its own."""
    values = np.ascontiguousarray(lists.values).copy()
    _shuffle(values, lists.offsets, np.uint64(random.integers(1 << 63)))
    return Ragged(values, lists.offsets)


def session_hits(items: np.ndarray, values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Pairs i, j (i != j) of a batch of n where items[j] is among values[begin[i]:end[i]], as places i * n + j.

    items: int64 [n]; values: int64 [m]; begin, end: int64 [n]. Returns int64 [p], each pair once.
    """
    order = np.argsort(items, kind="stable")
    return _session_hits(items[order], order, values, begin, end)  # type: ignore[no-any-return]


@numba.njit("void(int64[::1], int64[::1], uint64)", nogil=True, cache=True)
def _shuffle(values: np.ndarray, offsets: np.ndarray, seed: np.uint64) -> None:
    """Fisher-Yates in every list."""
    state = seed
    for s in range(offsets.size - 1):
        begin = offsets[s]
        for i in range(offsets[s + 1] - begin - 1, 0, -1):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            j = np.int64((state >> np.uint64(33)) % np.uint64(i + 1))
            values[begin + i], values[begin + j] = values[begin + j], values[begin + i]


@numba.njit("int64[::1](int64[::1], int64[::1], int64[::1], int64[::1], int64[::1])", nogil=True, cache=True)
def _session_hits(ordered, order, values, begin, end):  # type: ignore[no-untyped-def]
    n = ordered.size
    bits = 4
    while (1 << bits) < 2 * n:
        bits += 1
    shift, wrap = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
    slots = np.full(1 << bits, -1, np.int64)  # item -> its first place in `ordered`
    size = np.zeros(n, np.int64)  # at that place: how often the item is in the batch
    first = 0
    for place in range(n):
        if place == 0 or ordered[place] != ordered[place - 1]:
            first = place
            slot = (np.uint64(ordered[first]) * np.uint64(0x9E3779B97F4A7C15)) >> shift
            while slots[slot] >= 0:
                slot = (slot + np.uint64(1)) & wrap
            slots[slot] = first
        size[first] += 1
    met = np.full(n, -1, np.int64)  # the last query that met the item at this place: lists may repeat an item
    groups = np.empty((end - begin).sum(), np.int64)  # for each query the items of its list that the batch has
    bounds = np.zeros(n + 1, np.int64)
    num_groups = num_hits = 0
    for i in range(n):
        for p in range(begin[i], end[i]):
            slot = (np.uint64(values[p]) * np.uint64(0x9E3779B97F4A7C15)) >> shift
            while slots[slot] >= 0 and ordered[slots[slot]] != values[p]:
                slot = (slot + np.uint64(1)) & wrap
            first = slots[slot]
            if first >= 0 and met[first] != i:
                met[first] = i
                groups[num_groups] = first
                num_groups += 1
                num_hits += size[first]
        bounds[i + 1] = num_groups
    hits = np.empty(num_hits, np.int64)
    count = 0
    for i in range(n):
        for g in range(bounds[i], bounds[i + 1]):
            first = groups[g]
            for place in range(first, first + size[first]):
                if order[place] != i:
                    hits[count] = i * n + order[place]
                    count += 1
    return hits[:count]  # every query's own place is left out
