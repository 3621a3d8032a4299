from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.objectives import info_nce, linear_schedule, skip_gram

NO_HITS = torch.empty(0, dtype=torch.int64)


def random_batch(n: int, dim: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(n)
    query, candidate = (torch.randn(n, dim, generator=random, dtype=dtype) for _ in range(2))
    return query, candidate, torch.rand(n, generator=random, dtype=dtype).log()


def textbook(query: Tensor, candidate: Tensor, log_q: Tensor, hits: Tensor, temperature: float) -> Tensor:
    logits = query @ candidate.T / temperature - log_q
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask.view(-1)[hits] = True
    return F.cross_entropy(logits.masked_fill(mask, -torch.inf), torch.arange(len(query)), reduction="sum")


def places(mask: Tensor) -> Tensor:
    return torch.nonzero(mask.view(-1)).squeeze(1)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_is_the_cross_entropy_of_corrected_masked_logits(n: int, temperature: float, masked: bool) -> None:
    query, candidate, log_q = random_batch(n)
    query.requires_grad_()
    candidate.requires_grad_()
    hits = NO_HITS
    if masked:
        pairs = torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.3
        hits = places(pairs & ~torch.eye(n, dtype=torch.bool))
    found = info_nce(query, candidate, log_q, hits, temperature=temperature)
    wanted = textbook(query, candidate, log_q, hits, temperature)
    torch.testing.assert_close(found, wanted)
    mine = torch.autograd.grad(found * 1.7, (query, candidate))
    theirs = torch.autograd.grad(wanted * 1.7, (query, candidate))
    torch.testing.assert_close(mine, theirs)


def test_info_nce_passes_the_gradient_check() -> None:
    query, candidate, log_q = random_batch(6)
    hits = torch.tensor([0 * 6 + 3, 4 * 6 + 0, 5 * 6 + 1])
    assert torch.autograd.gradcheck(
        lambda q, c: info_nce(q, c, log_q, hits, temperature=0.7), (query.requires_grad_(), candidate.requires_grad_())
    )


def test_info_nce_stays_finite_at_a_small_temperature() -> None:
    query, candidate, log_q = random_batch(32, dtype=torch.float32)
    query, candidate = F.normalize(query, dim=1).requires_grad_(), F.normalize(candidate, dim=1)
    loss = info_nce(query, candidate, log_q, NO_HITS, temperature=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(query.grad).all()


def test_a_batch_where_every_other_candidate_is_masked_costs_nothing() -> None:
    query, candidate, log_q = random_batch(3)
    hits = places(~torch.eye(3, dtype=torch.bool))
    query.requires_grad_()
    loss = info_nce(query, candidate, log_q, hits, temperature=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0.0)
    assert query.grad is not None
    assert not query.grad.any()


def test_an_empty_batch_has_loss_zero_and_a_gradient() -> None:
    query, candidate, log_q = random_batch(0)
    query.requires_grad_()
    candidate.requires_grad_()
    loss = info_nce(query, candidate, log_q, NO_HITS, temperature=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert query.grad is not None
    assert query.grad.shape == (0, 5)


@pytest.mark.parametrize(("strength", "close"), [(1.0, True), (0.0, False), (-1.0, False)])
def test_logq_makes_the_sampled_softmax_an_estimate_of_the_full_one(strength: float, close: bool) -> None:
    """A batch drawn by popularity: only with the right sign are loss and gradient those over the whole catalogue."""
    random = torch.Generator().manual_seed(0)
    items = torch.randn(40, 4, generator=random)
    popularity = torch.softmax(torch.randn(40, generator=random), 0)
    drawn = torch.multinomial(popularity, 3000, replacement=True, generator=random)
    query = torch.randn(3000, 4, generator=random).requires_grad_()
    full = F.cross_entropy(query @ items.T, drawn, reduction="sum")
    (full_gradient,) = torch.autograd.grad(full, query)

    log_q = popularity.log()[drawn]
    sampled = info_nce(query, items[drawn], strength * log_q, NO_HITS, temperature=1.0)
    (gradient,) = torch.autograd.grad(sampled, query)
    error = (gradient - full_gradient).norm() / full_gradient.norm()
    assert (error < 0.08) == close, error
    if close:  # each row's sum over the batch estimates 3000 times the sum over the catalogue
        loss = (sampled - (math.log(3000) + log_q).sum()) / 3000
        assert loss.item() == pytest.approx(full.item() / 3000, rel=0.01)


def pairs(seed: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    center, context = (torch.randn(n, 4, generator=random, dtype=torch.float64) for _ in range(2))
    return center, context, torch.randn(n, k, 4, generator=random, dtype=torch.float64)


@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (6, 3)])
def test_skip_gram_is_the_textbook_sum(n: int, k: int) -> None:
    center, context, negatives = pairs(n, n, k)
    wanted = 0.0
    for i in range(n):
        wanted -= math.log(1.0 / (1.0 + math.exp(-float(center[i] @ context[i]))))
        for j in range(k):
            wanted -= math.log(1.0 / (1.0 + math.exp(float(center[i] @ negatives[i, j]))))
    assert skip_gram(center, context, negatives).item() == pytest.approx(wanted, rel=1e-12)


def test_skip_gram_passes_the_gradient_check() -> None:
    assert torch.autograd.gradcheck(skip_gram, tuple(tensor.requires_grad_() for tensor in pairs(0, 4, 3)))


def test_skip_gram_of_extreme_products_is_finite() -> None:
    large = torch.full((1, 4), 1e3, dtype=torch.float64)
    assert skip_gram(large, -large, large[:, None]).item() == pytest.approx(8e6)


def test_the_schedule_rises_and_falls_linearly() -> None:
    values = [linear_schedule(progress, warmup=0.2, final_rate=0.1) for progress in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


def test_the_schedule_without_warmup_starts_at_its_peak() -> None:
    assert [linear_schedule(progress, warmup=0.0, final_rate=0.0) for progress in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert linear_schedule(0.7, warmup=0.0, final_rate=1.0) == 1.0
    assert linear_schedule(1.0, warmup=1.0, final_rate=0.0) == 1.0
