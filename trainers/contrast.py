"""What a two-tower step compares its queries with, and the loss of that: candidates, their corrections, the objective.

A step has one pool of candidates, filled by up to three sources:

    in-batch    the positives of the step's N examples (of all workers where gathered)      N - 1 draws by frequency
    sampled     S rows drawn by count ** a, shared by all examples                          S draws by that probability
    mined       M rows drawn from the union of the queries' hard windows of W rows          M draws, count in union / W

The softmax over the pool estimates the one over the catalogue if every candidate's logit is lowered by the log of how
often it is expected there, all sources together (the balance heuristic of Veach and Guibas 1995, whose in-batch form is
Yi et al. 2019 and whose first two sources are Yang et al. 2020):

    E[j] = (N - 1) frequency[j] + S p[j] + M windows[j] / W
    sum_j exp(s_j) / E[j] over the pool is, in the mean, sum_j exp(s_j) over the catalogue
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.examples import PairBatch, generator
from trainers.mining import NOTHING, HardNegatives, Mined, MiningSpec
from trainers.negatives import StreamingFrequency, UnigramSampler, frequency
from trainers.objectives import cosine_contrastive, info_nce, triplet
from trainers.row_runs import RowRuns

Objective = Literal["info_nce", "nt_xent", "ccl", "triplet"]

TEMPERATURES = (0.01, 10.0)  # that may be learned; the lower bound is CLIP's (Radford et al. 2021)


@dataclass(frozen=True)
class ContrastSpec:
    """The settings of `model` of the same names, and train.matmul; see `lexshard config`."""

    objective: Objective = "info_nce"
    in_batch: bool = True
    gather: bool = False
    sampled_negatives: int = 0
    sampled_exponent: float = 0.0
    mining: MiningSpec | None = None
    temperature: float = 0.1
    learn_temperature: bool = False
    logq: float = 1.0
    logq_positive: bool = False
    frequency_slots: int = 0
    margin: float = 0.2
    negative_weight: float = 100.0
    triplet_negative: Literal["random", "semi_hard", "hard"] = "semi_hard"
    matmul: Literal["fp32", "bf16"] = "fp32"

    @property
    def products(self) -> torch.dtype | None:
        """What matrix products are rounded to; None: they are not."""
        return torch.bfloat16 if self.matmul == "bf16" else None


@dataclass(frozen=True)
class Pool:
    """The candidates of one worker's share of a step, but for their vectors.

    rows: int64 [c], the in-batch positives, then `extra`, the sampled and mined ones (int64 [e]); hits, query_hits: see
    `PairBatch`, queries in order; first: int64 [n], where a random triplet begins to look.
    """

    batch: PairBatch
    rows: np.ndarray
    extra: np.ndarray
    mined: Mined
    hits: Tensor
    query_hits: Tensor
    first: Tensor


class Contrast(nn.Module):
    """The loss of a step. What it learns or remembers are parameters and buffers, so that checkpoints hold it."""

    def __init__(
        self, counts: np.ndarray | RowRuns, spec: ContrastSpec, *, dim: int, device: torch.device | None = None
    ) -> None:
        """counts: int64 [items], how often each occurs, taken for its share of the positives (exact where every item
        of a session is one).
        """
        super().__init__()
        self.spec = spec
        self.sampler = UnigramSampler(counts, spec.sampled_exponent) if spec.sampled_negatives else None
        self._frequency = frequency(counts)
        self.streaming = StreamingFrequency(spec.frequency_slots) if spec.frequency_slots else None
        self.miner = HardNegatives(len(counts), dim, spec.mining) if spec.mining else None
        self.log_scale: nn.Parameter | None = None
        if spec.learn_temperature:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(spec.temperature), device=device))

    @property
    def scale(self) -> Tensor | float:
        """1 / temperature."""
        return 1.0 / self.spec.temperature if self.log_scale is None else self.log_scale.exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep a learned temperature in its range, after an update."""
        if self.log_scale is not None:
            self.log_scale.clamp_(*(-math.log(temperature) for temperature in TEMPERATURES[::-1]))

    def pool(self, batch: PairBatch, mined: Mined = NOTHING) -> Pool:
        """The candidates of a batch; needs no other worker, so it can run ahead."""
        extra = np.concatenate([batch.sampled, mined.rows])
        rows = np.concatenate([batch.positives, extra]) if self.spec.in_batch else extra
        hits = batch.hits(rows)
        if len(mined.hits):
            i, j = np.divmod(mined.hits, len(mined.rows))
            hits = np.union1d(hits, i * len(rows) + len(rows) - len(mined.rows) + j)
        query_hits, first = np.empty(0, np.int64), np.empty(0, np.int64)
        if self.spec.objective == "nt_xent":
            query_hits = batch.query_hits()
        if self.spec.objective == "triplet":  # drawn for the whole step, so that it does not depend on the workers
            whole = generator(batch.seed, 4).integers(max(1, len(rows)), size=len(batch.positives))
            first = whole[batch.first : batch.first + len(batch)]
        return Pool(batch, rows, extra, mined, *(torch.from_numpy(found) for found in (hits, query_hits, first)))

    def log_q(self, pool: Pool, items: np.ndarray) -> Tensor:
        """logq times the log of E[item], see above: float32 [n]."""
        expected = np.zeros(len(items))
        if self.spec.in_batch:
            share = self._frequency[items] if self.streaming is None else self.streaming.share(items)
            expected += max(1, len(pool.batch.positives) - 1) * share
        if self.sampler is not None:
            expected += self.spec.sampled_negatives * self.sampler.probability[items]
        expected += pool.mined.expected(items)
        return torch.from_numpy((self.spec.logq * np.log(np.maximum(expected, 1e-30))).astype(np.float32))

    def backward(self, query: Tensor, item: Tensor, extra: Tensor, pool: Pool, *, chunk: int) -> float:
        """Run backward from the summed loss of the batch; its value. A collective call where batches are gathered.

        query, item: float32 [n, dim], the examples and their positives; extra: float32 [e, dim], of `pool.extra`.
        chunk: so many queries' rows of the n x c matrix at once, to the same gradient; 0: all.
        """
        if self.streaming is not None:
            self.streaming.update(pool.batch.step_items)
        candidates = gather(item, pool.batch.sizes) if self.spec.in_batch else item[:0]
        if len(extra):
            candidates = torch.cat([candidates, extra])
        queries = gather(query, pool.batch.sizes) if self.spec.objective == "nt_xent" else query[:0]
        terms = _Terms(self, pool, item.device)
        if not chunk:
            loss: Tensor = terms.loss(query, item, candidates, queries, 0, len(query))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()
        ends = (query, item, candidates, queries)
        leaves = [end.detach().requires_grad_() for end in ends]
        total = 0.0
        for start in range(0, max(1, len(query)), chunk):
            loss = terms.loss(leaves[0], leaves[1], leaves[2], leaves[3], start, min(len(query), start + chunk))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        torch.autograd.backward(ends, gradients)
        return total


class _Terms:
    """The constants of a step's loss on its device, and the loss of some of its rows."""

    def __init__(self, contrast: Contrast, pool: Pool, device: torch.device) -> None:
        self.contrast, self.spec = contrast, contrast.spec
        self.hits, self.query_hits, self.first = (t.to(device) for t in (pool.hits, pool.query_hits, pool.first))
        if self.spec.objective in ("info_nce", "nt_xent"):
            self.log_q = contrast.log_q(pool, pool.rows).to(device)
            self.positive_log_q = torch.zeros(len(pool.batch), device=device)
            if self.spec.logq_positive:
                self.positive_log_q = contrast.log_q(pool, pool.batch.item).to(device)

    def loss(self, query: Tensor, item: Tensor, pool: Tensor, queries: Tensor, start: int, stop: int) -> Tensor:
        """Summed over examples start..stop - 1. queries: those of all examples that share candidates, for nt_xent."""
        spec, scale, products = self.spec, self.contrast.scale, self.spec.products
        if stop - start < len(query):  # or a slice would copy its gradient for nothing
            query, item = query[start:stop], item[start:stop]
        hits = _rows(self.hits, len(pool), start, stop)
        if spec.objective == "ccl":
            return cosine_contrastive(
                query,
                item,
                pool,
                hits=hits,
                margin=spec.margin,
                negative_weight=spec.negative_weight,
                products=products,
            )
        if spec.objective == "triplet":
            return triplet(
                query,
                item,
                pool,
                hits=hits,
                margin=spec.margin,
                scale=scale,
                choice=spec.triplet_negative,
                first=self.first[start:stop],
                products=products,
            )
        own = self.positive_log_q[start:stop]
        loss = info_nce(
            query, item, pool, log_q=self.log_q, positive_log_q=own, hits=hits, scale=scale, products=products
        )
        if spec.objective == "info_nce":
            return loss
        none = torch.zeros(len(queries), device=query.device)  # every example's query is there equally often
        hits = _rows(self.query_hits, len(queries), start, stop)
        own = none[: len(item)]
        other = info_nce(
            item, query, queries, log_q=none, positive_log_q=own, hits=hits, scale=scale, products=products
        )
        return 0.5 * (loss + other)


def _rows(hits: Tensor, width: int, start: int, stop: int) -> Tensor:
    """The hits (sorted places i * width + j) of rows start..stop - 1, as places in these rows."""
    if start == 0 and stop * width > (hits[-1] if len(hits) else -1):
        return hits
    low, high = torch.searchsorted(hits, hits.new_tensor([start * width, stop * width])).tolist()
    return hits[low:high] - start * width


def gather(mine: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The vectors [sizes[r], dim] of all workers r as one tensor, whose gradient flows back to the workers they are of.

    With one entry in `sizes` it is `mine` alone. A collective call, and so is its backward.
    """
    return mine if len(sizes) == 1 else _Gather.apply(mine, sizes)  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        padded = mine.new_zeros(max(sizes), mine.shape[1])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        whole = outer[0].clone()
        dist.all_reduce(whole)
        start = sum(ctx.sizes[: dist.get_rank()])
        return whole[start : start + ctx.sizes[dist.get_rank()]], None
