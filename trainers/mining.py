"""Hard negatives: what an index of the current item vectors ranks high for the batch's queries (Xiong et al. 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding_service.index import VectorIndex, set_threads
from trainers.examples import PairBatch, generator

_ENCODE_ROWS = 65_536  # item vectors computed at a time


@dataclass(frozen=True)
class MiningSpec:
    """`num` negatives a step, drawn from the ranks `skip`.. of every query's ranking, `take` of them.

    margin: an item is no negative of a query to which it is more similar than the positive by more than this. every:
    steps between two snapshots of the item vectors.
    """

    num: int
    every: int
    skip: int
    take: int
    margin: float


@dataclass(frozen=True)
class Mined:
    """rows: int64 [m], drawn with replacement from the queries' windows, which hold the rows `windows` (int64 [w],
    ascending) as often as `counts` (int64 [w]) says; hits: int64 [p], places i * m + j of drawn items that the margin
    takes for false negatives of query i.
    """

    rows: np.ndarray
    windows: np.ndarray
    counts: np.ndarray
    hits: np.ndarray

    def expected(self, items: np.ndarray) -> np.ndarray:
        """How often each of `items` (int64 [n]) is expected among `rows`, the windows given: float64 [n]."""
        if not len(self.rows):
            return np.zeros(len(items))
        place = np.minimum(np.searchsorted(self.windows, items), len(self.windows) - 1)
        count = np.where(self.windows[place] == items, self.counts[place], 0)
        expected: np.ndarray = count * (len(self.rows) / self.counts.sum())
        return expected


NOTHING = Mined(*(np.empty(0, np.int64) for _ in range(4)))


class HardNegatives(nn.Module):
    """An index of a snapshot of all item vectors, the same on every worker.

    A snapshot is taken at every `every`-th step, and its index is built by a background thread while training goes on
    with the one before; it is used from the middle between two snapshots on, whenever the thread was done. So every
    number is a function of the number of steps. The snapshots and that number are buffers: checkpoints hold them, and a
    resumed run builds the same indexes again.
    """

    vectors: Tensor
    upcoming: Tensor
    steps: Tensor

    def __init__(self, num_items: int, dim: int, spec: MiningSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("vectors", torch.zeros(num_items, dim))
        self.register_buffer("upcoming", torch.zeros(num_items, dim))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self._index: VectorIndex | None = None
        self._building: Future[VectorIndex] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mining")

    def begin_step(self, encode: Callable[[int, int], Tensor]) -> None:
        """To be called once a step by every worker. encode: `TwoTower.encode_items`, a collective call."""
        steps, every = int(self.steps.item()), self.spec.every
        if steps >= every and steps % every == 0:
            self.upcoming.copy_(encode_all(encode, len(self.upcoming)))
            self._building = self._thread.submit(build_index, self.upcoming.numpy())
        elif steps >= every and steps % every == every // 2:
            building = self._building or self._thread.submit(build_index, self.upcoming.numpy())
            self.vectors.copy_(self.upcoming)
            self._index, self._building = building.result(), None
        if self._index is None and steps >= every + every // 2:  # a resumed run
            self._index = self._thread.submit(build_index, self.vectors.numpy()).result()
        self.steps += 1

    def mine(self, query: Tensor, batch: PairBatch) -> Mined:
        """Negatives for the batch's queries, float32 [n, dim]. A collective call where batches are gathered."""
        if self._index is None:
            return NOTHING
        asked = query.detach().float().cpu()
        own = (asked * self.vectors[batch.item]).sum(1).numpy()
        windows = np.full((len(asked), self.spec.take), -1, np.int64)
        if len(asked):
            scores, rows = self._index.search(asked.numpy(), self.spec.skip + self.spec.take)
            windows = np.where(scores > own[:, None] + self.spec.margin, -1, rows)[:, self.spec.skip :]
        whole = np.concatenate(gather_arrays(windows, batch.sizes)).reshape(-1)
        whole = whole[whole >= 0]
        if not len(whole):
            return NOTHING
        drawn = whole[generator(batch.seed, 3).integers(len(whole), size=self.spec.num)]
        similar = asked @ self.vectors[drawn].T
        hits = np.flatnonzero(similar.numpy() > own[:, None] + self.spec.margin)
        return Mined(drawn, *np.unique(whole, return_counts=True), hits)


def build_index(vectors: np.ndarray) -> VectorIndex:
    """An index of float32 [n, dim] that is fast to build and the same every time."""
    set_threads(1)  # of the calling thread: the others train
    lists = 2 ** round(np.log2(max(1.0, len(vectors) / 160)))
    factory = "Flat" if lists < 64 else f"IVF{min(lists, 4096)},Flat"
    index = VectorIndex.build(vectors, metric="ip", factory=factory, threads=1)
    if index.knob is not None:
        index.set_parameters({"nprobe": 8})
    return index


def encode_all(encode: Callable[[int, int], Tensor], num: int) -> Tensor:
    """encode(0, num), of which every worker computes a share: float32 [num, dim] on the CPU. A collective call."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = [num * r // world for r in range(world + 1)]
    first, size = bounds[rank], bounds[rank + 1] - bounds[rank]
    parts = -(-num // (world * _ENCODE_ROWS))  # as many on every worker
    cuts = [first + size * part // parts for part in range(parts + 1)]
    mine = torch.cat([encode(start, stop).float().cpu() for start, stop in itertools.pairwise(cuts)])
    return torch.from_numpy(np.concatenate(gather_arrays(mine.numpy(), tuple(np.diff(bounds).tolist()))))


def gather_arrays(mine: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """The arrays [sizes[r], ...] of all workers r, or only `mine` where `sizes` has one entry. A collective call."""
    if len(sizes) == 1:
        return [mine]
    padded = np.zeros((max(sizes), *mine.shape[1:]), mine.dtype)
    padded[: len(mine)] = mine
    parts = [torch.empty(padded.shape, dtype=torch.from_numpy(padded).dtype) for _ in sizes]
    dist.all_gather(parts, torch.from_numpy(padded))
    return [part[:size].numpy() for part, size in zip(parts, sizes, strict=True)]
