"""Sessions of one window -> batches of examples: pure, vectorised, and the same for any number of workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

from embedding_service.ragged import Ragged, offsets_of, take_values
from embedding_service.towers import Given
from trainers.negatives import UnigramSampler
from trainers.prepare import Sessions
from trainers.row_runs import RowRuns


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
        self, sessions: Sessions, *, block_items: int, ordered: bool, keep: RowRuns | None, numbers: tuple[int, ...]
    ) -> None:
        """keep: float32 by row, the probability with which an item is kept; None: 1; numbers: (seed, epoch, window)."""
        items = sessions.items
        random = generator(*numbers, 1)
        if keep is not None:
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

    def batch(self, start: int, stop: int, rank: int = 0, num_workers: int = 1) -> TokenBlock:
        """One worker's share of the step of the sessions start..stop - 1."""
        return TokenBlock(self.items.slice(*self.share(start, stop, rank, num_workers)))


def equal_shares(offsets: np.ndarray, num: int) -> list[int]:
    """Where to cut lists with these `offsets` int64 [n + 1] into `num` shares of nearly equal numbers of values.

    Returns num + 1 list numbers from 0 to n, ascending.
    """
    cuts = np.searchsorted(offsets, np.linspace(offsets[0], offsets[-1], num + 1))
    cuts[0], cuts[-1] = 0, len(offsets) - 1
    return [int(cut) for cut in cuts]


@dataclass(frozen=True)
class PairBatch:
    """n examples of a query and its positive item, and what they share with the N examples of their step's pool.

    `item` int64 [n] rows; `history` n lists of rows, oldest first, the positive not among them at its place; `user`
    int64 [n], -1 where unknown, and `features` name -> values; `without_id` bool [n]: the item is seen by its features
    alone.

    `positives` int64 [N]: the items of the examples whose positives are each other's candidates, those of this worker
    or, gathered, of all (`sizes`: how many of each worker), this batch's from place `first` on; `sampled` int64 [s]:
    candidates drawn for all examples of the step, the same on every worker; `seed`: for more draws of that kind. The
    items that are no negatives of the k-th of those N examples are `values[begin[k] : end[k]]`.
    """

    item: np.ndarray
    history: Ragged
    user: np.ndarray | None
    features: dict[str, Given]
    without_id: np.ndarray
    positives: np.ndarray
    sizes: tuple[int, ...]
    first: int
    sampled: np.ndarray
    seed: int
    values: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    step_items: np.ndarray  # the positives of all workers, gathered or not

    def __len__(self) -> int:
        return len(self.item)

    def hits(self, pool: np.ndarray) -> np.ndarray:
        """Pairs of an example i and a candidate pool[j] (int64 [c]) that is no negative of it: int64 [p], i * c + j."""
        mine = slice(self.first, self.first + len(self.item))
        return session_hits(pool, self.values, self.begin[mine], self.end[mine])

    def query_hits(self) -> np.ndarray:
        """Pairs of an item i of this batch and an example k of the N whose negative it is not: int64 [p], i * N + k.

        What `hits` is when items look for their queries; sorted.
        """
        k, i = np.divmod(session_hits(self.item, self.values, self.begin, self.end), max(1, len(self.item)))
        return np.sort(i * len(self.positives) + k)


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
        id_dropout: float = 0.0,
        gather: bool = False,
        sampler: UnigramSampler | None = None,
        num_sampled: int = 0,
    ) -> None:
        """kind: see `model.examples`; with_history, only_history: whether queries see histories, and nothing else;
        numbers: (seed, epoch, window); id_dropout: share of the examples whose item is seen without its id; gather: the
        examples of a step are those of all workers; sampler: of `num_sampled` further candidates a step.
        """
        random = generator(*numbers, 1)
        self.sessions = sessions
        self.items = shuffle_lists(sessions.items, random) if kind == "every_item" else sessions.items
        self.batch_size, self.kind, self.mask = batch_size, kind, mask
        self.with_history, self.history_length = with_history, history_length
        self.gather, self.sampler, self.num_sampled, self.numbers = gather, sampler, num_sampled, numbers
        owners = self.items.owners()
        place = np.arange(len(owners)) - self.items.offsets[owners]
        chosen = np.ones(len(owners), bool)
        if kind == "last_item":
            chosen = place == self.items.lengths[owners] - 1
        if only_history:  # without one there is nothing to ask with
            chosen &= (self.items.lengths[owners] > 1) if kind == "every_item" else (place > 0)
        self.has_example = np.zeros(len(self.items), np.bool_)  # of the sessions
        self.has_example[owners[chosen]] = True
        self.examples = random.permutation(np.flatnonzero(chosen))
        self.without_id = generator(*numbers, 3).random(len(self.examples)) < id_dropout
        self.size = self.num_trainable = len(self.examples)

    def stop_after(self, offset: int, num_workers: int) -> int:
        """Where the step that begins at example `offset` ends."""
        return min(self.size, offset + self.batch_size * num_workers)

    def share(self, start: int, stop: int, rank: int, num_workers: int) -> tuple[int, int]:
        """The examples of one worker."""
        return start + (stop - start) * rank // num_workers, start + (stop - start) * (rank + 1) // num_workers

    def batch(self, start: int, stop: int, rank: int = 0, num_workers: int = 1) -> PairBatch:
        """One worker's share of the step of the examples start..stop - 1 of the window's order."""
        mine = self.share(start, stop, rank, num_workers)
        span = (start, stop) if self.gather else mine  # the examples with which candidates are shared
        place = self.examples[slice(*mine)]
        offsets = self.items.offsets
        owner = np.searchsorted(offsets, place, side="right") - 1
        positives = self.items.values[self.examples[slice(*span)]]
        if self.mask == "session":
            owners = np.searchsorted(offsets, self.examples[slice(*span)], side="right") - 1 if self.gather else owner
            values, begin, end = self.items.values, offsets[owners], offsets[owners + 1]
        else:
            values, begin, end = positives, np.arange(len(positives)), np.arange(1, len(positives) + 1)
        shares = [self.share(start, stop, r, num_workers) for r in range(num_workers)]
        seed = int(generator(*self.numbers, 2, start).integers(1 << 63))
        return PairBatch(
            item=self.items.values[place],
            history=self._history(place, offsets[owner], offsets[owner + 1]),
            user=None if self.sessions.user is None else self.sessions.user[owner],
            features={name: take_values(values, owner) for name, values in self.sessions.features.items()},
            without_id=self.without_id[slice(*mine)],
            positives=positives,
            sizes=tuple(last - first for first, last in shares) if self.gather else (len(place),),
            first=mine[0] - span[0],
            sampled=self.sampler.draw(self.num_sampled, seed) if self.sampler else np.empty(0, np.int64),
            seed=seed,
            values=values,
            begin=begin,
            end=end,
            step_items=self.items.values[self.examples[start:stop]],
        )

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
    """Pairs i, j of n queries and c items where items[j] is among values[begin[i]:end[i]], as places i * c + j.

    items: int64 [c]; values: int64 [m]; begin, end: int64 [n]. Returns int64 [p], each pair once, those of a query
    together and queries in order.
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
    n, c = begin.size, ordered.size
    bits = 4
    while (1 << bits) < 2 * c:
        bits += 1
    shift, wrap = np.uint64(64 - bits), np.uint64((1 << bits) - 1)
    slots = np.full(1 << bits, -1, np.int64)  # item -> its first place in `ordered`
    size = np.zeros(c, np.int64)  # at that place: how often the item is in the pool
    first = 0
    for place in range(c):
        if place == 0 or ordered[place] != ordered[place - 1]:
            first = place
            slot = (np.uint64(ordered[first]) * np.uint64(0x9E3779B97F4A7C15)) >> shift
            while slots[slot] >= 0:
                slot = (slot + np.uint64(1)) & wrap
            slots[slot] = first
        size[first] += 1
    met = np.full(c, -1, np.int64)  # the last query that met the item at this place: lists may repeat an item
    groups = np.empty((end - begin).sum(), np.int64)  # for each query the items of its list that the pool has
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
                hits[count] = i * c + order[place]
                count += 1
    return hits
