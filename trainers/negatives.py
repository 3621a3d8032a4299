"""Where negatives come from, and the corrections that their sampling asks for."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor, nn

from embedding_service.hashing import stable_hash
from trainers.row_runs import RowRuns


class UnigramSampler:
    """Draws rows with probability proportional to count ** exponent, in constant time (Walker's alias method, 1977).

    exponent .75 is word2vec's (Mikolov et al. 2013); 0 is uniform; items want less than words, or even a negative one
    (Caselles-Dupré et al. 2018). Rows with count 0 are never drawn, unless all are. A run of rows with one count is
    drawn as a whole, then a row of it, so that memory is that of the runs.
    """

    def __init__(self, counts: np.ndarray | RowRuns, exponent: float) -> None:
        """counts: int64 [rows]."""
        self.probability = unigram_probability(counts, exponent)
        self._starts, self._lengths = self.probability.starts, self.probability.lengths
        self._accept, self._alias = _alias_tables(self.probability.values * self._lengths)

    def draw(self, num: int, seed: int) -> np.ndarray:
        """`num` rows as int64, a pure function of `seed`."""
        rows: np.ndarray = _draw(self._accept, self._alias, self._starts, self._lengths, num, np.uint64(seed))
        return rows


def unigram_probability(counts: np.ndarray | RowRuns, exponent: float) -> RowRuns:
    """count ** exponent, normalised over the rows that occur: float64 for each of `counts`."""
    runs = RowRuns.of(counts)
    seen = runs.values > 0
    if not seen.any():
        return runs.map(lambda values: np.full(len(values), 1.0 / max(1, len(runs))))
    weight = np.zeros(len(seen))
    weight[seen] = runs.values[seen].astype(np.float64) ** exponent
    weight /= (weight * runs.lengths).sum()
    return RowRuns(runs.starts, weight, len(runs))


def frequency(counts: np.ndarray | RowRuns) -> RowRuns:
    """The share of all events that each row has, which is how often it is a batch's positive: float64 for each.

    Rows that never occur get half an event, so that the log stays finite.
    """
    runs = RowRuns.of(counts)
    return runs.map(lambda values: np.maximum(values, 0.5) / max(1, int(runs.sum())))


class StreamingFrequency(nn.Module):
    """`frequency` of a stream, estimated as it goes by (Yi et al. 2019, section 4, algorithms 2 and 3).

    Two hashed arrays hold when a slot was last met and the mean gap between its meetings, in examples (the paper counts
    steps, whose size depends on the workers); a frequency is 1 / gap. Where items share a slot the gap is too short, so
    the larger of the two counts. A gap is the mean of a slot's first `1 / rate` ones, and then moves by `rate`: with
    the paper's fixed rate a rare item would keep its first gap, which is off by a factor of e as easily as not.

    The arrays are buffers, so that checkpoints hold them; they are the same on all workers.
    """

    last: Tensor
    gap: Tensor
    meetings: Tensor
    clock: Tensor

    def __init__(self, slots: int, *, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("last", torch.zeros(2, slots, dtype=torch.int64))
        self.register_buffer("gap", torch.zeros(2, slots, dtype=torch.float64))
        self.register_buffer("meetings", torch.zeros(2, slots, dtype=torch.int64))
        self.register_buffer("clock", torch.zeros(1, dtype=torch.int64))

    def update(self, items: np.ndarray) -> None:
        """Meet `items` (int64 [n]), in this order."""
        _meet(
            self._slots(items),
            self.last.numpy(),
            self.gap.numpy(),
            self.meetings.numpy(),
            self.clock.numpy(),
            self.rate,
        )

    def share(self, items: np.ndarray) -> np.ndarray:
        """The estimate for each of `items`, float64 [n]; of items that were not met yet, half an event."""
        gap = np.take_along_axis(self.gap.numpy(), self._slots(items), axis=1)
        gap = np.where(gap > 0.0, gap, 2.0 * (1.0 + self.clock.item()))  # an empty slot: no other item was met there
        share: np.ndarray = 1.0 / gap.max(axis=0)
        return share

    def _slots(self, items: np.ndarray) -> np.ndarray:
        """Each item's slot in both arrays: int64 [2, n]."""
        slots = np.uint64(self.gap.shape[1])
        return np.stack([stable_hash(items, seed=table + 1) % slots for table in range(2)]).astype(np.int64)


def keep_probability(counts: np.ndarray | RowRuns, threshold: float) -> RowRuns:
    """Subsampling of frequent keys: min(1, sqrt(t / f) + t / f) with f the key's share of all events: float32 for each.

    word2vec's code (Mikolov et al. 2013, whose paper leaves the second term out). threshold: t, above 0.
    """
    runs = RowRuns.of(counts)
    total = max(1, int(runs.sum()))

    def kept(values: np.ndarray) -> np.ndarray:
        share = np.maximum(values, 1) / total
        probability: np.ndarray = np.minimum(1.0, np.sqrt(threshold / share) + threshold / share)
        return probability.astype(np.float32)

    return runs.map(kept)


@numba.njit("Tuple((float64[::1], int64[::1]))(float64[::1])", nogil=True, cache=True)
def _alias_tables(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vose's (1991) construction: row i is taken with accept[i], else alias[i]."""
    n = probability.size
    accept = probability * n
    alias = np.arange(n)
    small = np.empty(n, np.int64)
    large = np.empty(n, np.int64)
    num_small = num_large = 0
    for i in range(n):
        if accept[i] < 1.0:
            small[num_small] = i
            num_small += 1
        else:
            large[num_large] = i
            num_large += 1
    while num_small > 0 and num_large > 0:
        num_small -= 1
        little, big = small[num_small], large[num_large - 1]
        alias[little] = big
        accept[big] -= 1.0 - accept[little]
        if accept[big] < 1.0:
            num_large -= 1
            small[num_small] = big
            num_small += 1
    for i in range(num_large):
        accept[large[i]] = 1.0
    for i in range(num_small):  # left over by rounding only: their probability is 1/n to machine precision
        accept[small[i]] = 1.0 if probability[small[i]] > 0.0 else accept[small[i]]
    return accept, alias


@numba.njit("int64[::1](float64[::1], int64[::1], int64[::1], int64[::1], int64, uint64)", nogil=True, cache=True)
def _draw(
    accept: np.ndarray, alias: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num: int, seed: np.uint64
) -> np.ndarray:
    out = np.empty(num, np.int64)
    base = (seed + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
    for i in range(num):
        z = base + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        run = np.int64(z % np.uint64(accept.size))
        z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        coin = np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        if coin >= accept[run]:
            run = alias[run]
        row = starts[run]
        if lengths[run] > 1:
            z = (z + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0x94D049BB133111EB)
            row += np.int64((z ^ (z >> np.uint64(31))) % np.uint64(lengths[run]))
        out[i] = row
    return out


@numba.njit("void(int64[:, ::1], int64[:, ::1], float64[:, ::1], int64[:, ::1], int64[::1], float64)", cache=True)
def _meet(
    slots: np.ndarray, last: np.ndarray, gap: np.ndarray, meetings: np.ndarray, clock: np.ndarray, rate: float
) -> None:
    for table in range(slots.shape[0]):
        for i in range(slots.shape[1]):
            slot = slots[table, i]
            now = clock[0] + i + 1
            meetings[table, slot] += 1
            weight = max(rate, 1.0 / meetings[table, slot])
            gap[table, slot] += weight * (now - last[table, slot] - gap[table, slot])
            last[table, slot] = now
    clock[0] += slots.shape[1]
