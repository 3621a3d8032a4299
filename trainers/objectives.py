"""Losses: plain functions of tensors."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    query: Tensor,
    positive: Tensor,
    pool: Tensor,
    *,
    log_q: Tensor,
    positive_log_q: Tensor,
    hits: Tensor,
    scale: Tensor | float,
    products: torch.dtype | None = None,
) -> Tensor:
    """Summed InfoNCE loss (van den Oord et al. 2018): every query's positive against one pool of candidates.

        own[i] = scale query[i] . positive[i] - positive_log_q[i]
        logit[i, j] = scale query[i] . pool[j] - log_q[j]
        loss = - sum_i log(exp own[i] / (exp own[i] + sum_j exp logit[i, j]))      j over the pool but for i's hits

    scale: 1 / temperature. log_q: log of how often candidate j is expected in the pool, which makes the sum an estimate
    of the sum over the catalogue; positive_log_q: the same of the positives (Yi et al. 2019), or 0, since a positive
    always is there once (Blanc and Rendle 2018); see `contrast.py`. hits: pairs that are no negatives; where the pool
    holds the batch's positives, each query's own place must be one of them. Order: temperature, log_q, mask.

    query, positive: float [n, d]; pool: float [c, d]; log_q: float [c]; positive_log_q: float [n]; hits: int64 [p],
    places i * c + j, queries in order. products: dtype to which the factors and results of the matrix products with
    the pool are rounded, bfloat16 or None; positives and softmax are not. Returns a scalar; the gradient reaches query,
    positive, pool and scale.
    """
    return _InfoNCE.apply(query, positive, pool, log_q, positive_log_q, hits, scale, products)  # type: ignore[no-any-return, no-untyped-call]


_BLOCK = 256  # queries whose logits are at work: of 2048 candidates 2 MB, which stay in the cache


class _InfoNCE(torch.autograd.Function):
    """`info_nce` by blocks of queries: logits turn into a softmax and into gradients while they are in the cache.

    With `total` the log of the pool's sum, a loss is log(1 + exp(total - own)) and its derivative the sigmoid of that:
    a weight per row. The gradients are made in `forward`, so that no n x c matrix is ever kept. (A test holds it to
    F.cross_entropy.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        pool: Tensor,
        log_q: Tensor,
        positive_log_q: Tensor,
        hits: Tensor,
        scale: Tensor | float,
        products: torch.dtype | None,
    ) -> Tensor:
        factor, dtype = float(scale), products or query.dtype
        short_query, short_pool = query.to(dtype), pool.to(dtype)  # the same tensors where nothing is rounded
        own = factor * (query * positive).sum(1) - positive_log_q
        along_query, along_pool = -positive, torch.zeros_like(pool)
        weighted = factor * query
        loss = query.new_zeros(())
        bounds = torch.arange(0, len(query) + _BLOCK, _BLOCK, device=hits.device) * len(pool)
        cuts = torch.searchsorted(hits, bounds).tolist()  # hits are in the order of the queries
        for block, start in enumerate(range(0, len(query), _BLOCK)):
            rows = slice(start, start + _BLOCK)
            if products is None:
                logits = torch.addmm(log_q, query[rows], pool.T, beta=-1.0, alpha=factor)
            else:
                logits = torch.sub(factor * (short_query[rows] @ short_pool.T).to(query.dtype), log_q)
            logits.view(-1).index_fill_(0, hits[cuts[block] : cuts[block + 1]] - start * len(pool), -torch.inf)
            largest = logits.amax(1) if len(pool) else own.new_full((len(logits),), -torch.inf)
            logits.index_fill_(0, torch.nonzero(largest == -torch.inf)[:, 0], 0.0)  # no negative: weight 0 below
            softmax = torch.softmax(logits, 1, out=logits)
            total = largest - softmax.amax(1).log() if len(pool) else largest  # log-sum through the largest logit
            weight = torch.sigmoid(total - own[rows])[:, None]
            loss += F.softplus(total - own[rows]).sum()
            shares = softmax.to(dtype)
            along_query[rows] = weight * (along_query[rows] + shares @ short_pool)
            weighted[rows] *= weight
            if products is None:
                along_pool.addmm_(shares.T, weighted[rows])
            else:
                along_pool += shares.T @ weighted[rows].to(dtype)
        ctx.save_for_backward(query, along_query, weighted, along_pool)
        ctx.scale = scale
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, along_query, weighted, along_pool = ctx.saved_tensors
        along_scale = None
        if ctx.needs_input_grad[6]:
            along_scale = outer[0] * (along_query * query).sum().reshape_as(ctx.scale)
        by_query = outer[0] * float(ctx.scale) * along_query
        return by_query, -outer[0] * weighted, outer[0] * along_pool, None, None, None, along_scale, None


def cosine_contrastive(
    query: Tensor,
    positive: Tensor,
    pool: Tensor,
    *,
    hits: Tensor,
    margin: float,
    negative_weight: float,
    products: torch.dtype | None = None,
) -> Tensor:
    """Summed cosine contrastive loss (SimpleX, Mao et al. 2021, equation 1), of vectors of unit length.

        loss = sum_i [ 1 - query_i . positive_i + negative_weight mean_j max(0, query_i . pool_j - margin) ]

    with j over the pool but for i's hits. Arguments as in `info_nce`.
    """
    excess = (_similarities(query, pool, products) - margin).clamp_min(0.0)
    excess = excess.view(-1).index_fill(0, hits, 0.0).view(len(query), len(pool))
    num = len(pool) - torch.bincount(_owner(hits, pool), minlength=len(query))
    negative = negative_weight * excess.sum(1) / num.clamp_min(1)
    return (1.0 - (query * positive).sum(1) + negative).sum()


def triplet(
    query: Tensor,
    positive: Tensor,
    pool: Tensor,
    *,
    hits: Tensor,
    margin: float,
    scale: Tensor | float,
    choice: Literal["random", "semi_hard", "hard"],
    first: Tensor,
    products: torch.dtype | None = None,
) -> Tensor:
    """Summed triplet loss with one negative per query, mined in the pool, on similarities s, by which retrieval ranks.

        margin > 0    max(0, s_negative - s_positive + margin)          (Schroff et al. 2015; for unit vectors
                      |x - y|^2 = 2 - 2 s, so it is half of theirs with half of their margin)
        margin = 0    log(1 + exp(scale (s_negative - s_positive)))     (the soft margin of Hermans et al. 2017)

    choice: `hard` is the most similar negative; `semi_hard` the most similar one that is less similar than the
    positive, the least similar one of all where there is none; `random` the first from place `first` on, and around.
    first: int64 [n], used by `random`. A query without negatives costs nothing. Other arguments as in `info_nce`.
    """
    own = (query * positive).sum(1)
    similar = _similarities(query, pool, products).view(-1).index_fill(0, hits, -torch.inf).view(len(query), len(pool))
    with torch.no_grad():
        allowed = similar > -torch.inf
        rows = allowed.any(1).nonzero()[:, 0]
        if choice == "random":
            order = -((torch.arange(len(pool), device=query.device) - first[:, None]) % max(1, len(pool))).to(own.dtype)
            rank = order.masked_fill(~allowed, -torch.inf)
        elif choice == "semi_hard":
            below = similar.masked_fill(similar >= own[:, None], -torch.inf)
            easiest = (-similar).masked_fill(~allowed, -torch.inf)
            rank = torch.where((below > -torch.inf).any(1, keepdim=True), below, easiest)
        else:
            rank = similar
        chosen = rank[rows].argmax(1) if len(rows) else rows
    excess = similar[rows, chosen] - own[rows]
    return (F.relu(excess + margin) if margin > 0.0 else F.softplus(scale * excess)).sum()


def _similarities(query: Tensor, pool: Tensor, products: torch.dtype | None) -> Tensor:
    """query @ pool.T, factors and result rounded to `products`: [n, c], with the dtype of `query`."""
    return query @ pool.T if products is None else (query.to(products) @ pool.to(products).T).to(query.dtype)


def _owner(hits: Tensor, pool: Tensor) -> Tensor:
    """The query of each place i * c + j."""
    return hits // max(1, len(pool))


def skip_gram(center: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    """Summed skip-gram loss with negative sampling (Mikolov et al. 2013, equation 4).

        loss = - sum_i [ log sigmoid(center_i . context_i) + sum_k log sigmoid(- center_i . negatives_ik) ]

    center, context: float32 [n, d]; negatives: float32 [n, k, d]. Returns a float32 scalar. This is the formula that
    the compiled kernel in `skipgram.py` follows by sequential SGD; tests hold the two together.
    """
    positive = F.logsigmoid((center * context).sum(1))
    negative = F.logsigmoid(-torch.einsum("nd,nkd->nk", center, negatives))
    return -(positive.sum() + negative.sum())


def schedule(progress: float, *, warmup: float, decay: Literal["linear", "cosine"], final_rate: float) -> float:
    """Factor on the peak learning rates at `progress` in [0, 1] of the training.

    A linear rise over the first `warmup`, then from 1 to `final_rate`, along a line or half a cosine (Loshchilov and
    Hutter 2017). A function of the data position, so the rate does not depend on the number of workers.
    """
    if progress < warmup:
        return progress / warmup
    left = 1.0 - (progress - warmup) / max(1.0 - warmup, 1e-12)
    if decay == "cosine":
        left = 0.5 - 0.5 * math.cos(math.pi * left)
    return final_rate + (1.0 - final_rate) * left
