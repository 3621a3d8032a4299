"""Losses: plain functions of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    query: Tensor,
    candidate: Tensor,
    log_q: Tensor,
    hits: Tensor,
    *,
    temperature: float,
) -> Tensor:
    """Summed InfoNCE loss with in-batch negatives (van den Oord et al. 2018) and sampling correction (Yi et al. 2019).

    Row i's positive is candidate i, its negatives are the other candidates of the batch:

        logit[i, j] = query[i] . candidate[j] / temperature - log_q[j]
        loss = - sum_i log softmax(logit[i])[i]

    where `log_q[j]` is the log of the probability that candidate j is drawn into a batch; subtracting it makes the
    sampled softmax an estimate of the full one. Pairs (i, j) in `hits` (accidental hits: candidate j is i's own item
    once more) leave the softmax. Order: temperature, then log_q, then the mask.

    query, candidate: float32 [n, d]; log_q: float32 [n]; hits: int64 [p], places i * n + j. Returns a float32 scalar.
    """
    return _InfoNCE.apply(query, candidate, log_q, hits, 1.0 / temperature)  # type: ignore[no-any-return, no-untyped-call]


class _InfoNCE(torch.autograd.Function):
    """`info_nce` with one n x n matrix that is turned in place from logits to probabilities to their gradient.

    The same numbers as F.cross_entropy(logits, arange(n), reduction="sum") (a test holds the two together).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidate: Tensor, log_q: Tensor, hits: Tensor, scale: float) -> Tensor:
        logits = torch.addmm(log_q, query, candidate.T, beta=-1.0, alpha=scale)
        logits.view(-1).index_fill_(0, hits, -torch.inf)
        own, largest = logits.diagonal().clone(), logits.amax(1) if len(logits) else logits.new_empty(0)
        gradient = torch.softmax(logits, 1, out=logits)
        log_total = largest - (gradient.amax(1).log() if len(logits) else largest)  # log softmax at the largest logit
        loss = (log_total - own).sum()
        gradient.diagonal().sub_(1.0)
        ctx.save_for_backward(query, candidate, gradient)
        ctx.scale = scale
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query, candidate, gradient = ctx.saved_tensors
        factor = outer[0] * ctx.scale
        return factor * (gradient @ candidate), factor * (gradient.T @ query), None, None, None


def skip_gram(center: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
    """Summed skip-gram loss with negative sampling (Mikolov et al. 2013, equation 4).

        loss = - sum_i [ log sigmoid(center_i . context_i) + sum_k log sigmoid(- center_i . negatives_ik) ]

    center, context: float32 [n, d]; negatives: float32 [n, k, d]. Returns a float32 scalar. This is the formula that
    the compiled kernel in `skipgram.py` follows by sequential SGD; tests hold the two together.
    """
    positive = F.logsigmoid((center * context).sum(1))
    negative = F.logsigmoid(-torch.einsum("nd,nkd->nk", center, negatives))
    return -(positive.sum() + negative.sum())


def linear_schedule(progress: float, *, warmup: float, final_rate: float) -> float:
    """Factor on the peak learning rate at `progress` in [0, 1] of the training.

    A linear rise over the first `warmup`, then linear from 1 to `final_rate`. A function of the data position, so the
    rate does not depend on the number of workers.
    """
    if progress < warmup:
        return progress / warmup
    return 1.0 - (1.0 - final_rate) * (progress - warmup) / max(1.0 - warmup, 1e-12)
