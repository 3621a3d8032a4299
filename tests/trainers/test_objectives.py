from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.objectives import cosine_contrastive, info_nce, schedule, skip_gram, triplet

NO_HITS = torch.empty(0, dtype=torch.int64)


def random_vectors(n: int, c: int, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """query [n, dim], positive [n, dim], pool [c, dim] that want a gradient."""
    random = torch.Generator().manual_seed(n)
    shapes = ((n, dim), (n, dim), (c, dim))
    query, positive, pool = (torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes)
    return query, positive, pool


def random_logs(n: int, seed: int = 9) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()


def random_hits(n: int, c: int, share: float) -> Tensor:
    mask = torch.rand(n, c, generator=torch.Generator().manual_seed(1)) < share
    return torch.nonzero(mask.view(-1)).squeeze(1)


def masked(n: int, c: int, hits: Tensor) -> Tensor:
    mask = torch.zeros(n, c, dtype=torch.bool)
    mask.view(-1)[hits] = True
    return mask


@pytest.mark.parametrize(("n", "c"), [(1, 1), (2, 7), (7, 2), (64, 96)])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_info_nce_is_the_cross_entropy_of_corrected_masked_logits(
    n: int, c: int, temperature: float, share: float
) -> None:
    query, positive, pool = random_vectors(n, c)
    log_q, positive_log_q, hits = random_logs(c), random_logs(n, 8), random_hits(n, c, share)
    scale = torch.tensor(1.0 / temperature, dtype=torch.float64, requires_grad=True)
    found = info_nce(query, positive, pool, log_q=log_q, positive_log_q=positive_log_q, hits=hits, scale=scale)

    own = (query * positive).sum(1) * scale - positive_log_q
    logits = (query @ pool.T * scale - log_q).masked_fill(masked(n, c, hits), -torch.inf)
    first = torch.zeros(n, dtype=torch.int64)
    wanted = F.cross_entropy(torch.cat([own[:, None], logits], 1), first, reduction="sum")
    torch.testing.assert_close(found, wanted)
    variables = (query, positive, pool, scale)
    torch.testing.assert_close(
        torch.autograd.grad(found * 1.7, variables), torch.autograd.grad(wanted * 1.7, variables)
    )


def test_info_nce_of_a_batch_is_the_cross_entropy_of_its_square() -> None:
    """The positives are the pool, and each query's own place is a hit: the textbook's in-batch loss."""
    query, positive, _ = random_vectors(12, 0)
    log_q, own_places = random_logs(12), torch.arange(12) * 13
    found = info_nce(query, positive, positive, log_q=log_q, positive_log_q=log_q, hits=own_places, scale=4.0)
    logits = query @ positive.T * 4.0 - log_q
    wanted = F.cross_entropy(logits, torch.arange(12), reduction="sum")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, (query, positive)), torch.autograd.grad(wanted, (query, positive))
    )


def test_info_nce_with_products_of_bfloat16_is_close() -> None:
    query, positive, pool = (F.normalize(v.float(), dim=1).detach().requires_grad_() for v in random_vectors(300, 90))
    hits, log_q, own = random_hits(300, 90, 0.1), random_logs(90).float(), random_logs(300, 8).float()

    def gradients(products: torch.dtype | None) -> list[Tensor]:
        loss = info_nce(
            query, positive, pool, log_q=log_q, positive_log_q=own, hits=hits, scale=20.0, products=products
        )
        return [loss, *torch.autograd.grad(loss, (query, positive, pool))]

    for found, wanted in zip(gradients(torch.bfloat16), gradients(None), strict=True):
        assert 0.0 < (found - wanted).norm() < 0.02 * wanted.norm()  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("objective", ["ccl", "triplet"])
def test_other_losses_with_products_of_bfloat16_are_close(objective: str) -> None:
    query, positive, pool = (F.normalize(v.float(), dim=1).detach().requires_grad_() for v in random_vectors(300, 90))
    hits = random_hits(300, 90, 0.1)

    def gradient(products: torch.dtype | None) -> Tensor:
        if objective == "ccl":
            loss = cosine_contrastive(
                query, positive, pool, hits=hits, margin=0.2, negative_weight=50.0, products=products
            )
        else:
            first = torch.zeros(300, dtype=torch.int64)
            loss = triplet(
                query, positive, pool, hits=hits, margin=0.0, scale=10.0, choice="random", first=first,
                products=products,
            )  # fmt: skip
        return torch.autograd.grad(loss, query)[0]

    assert 0.0 < (gradient(torch.bfloat16) - gradient(None)).norm() < 0.03 * gradient(None).norm()


def test_info_nce_passes_the_gradient_check() -> None:
    query, positive, pool = random_vectors(5, 6)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, p: Tensor, c: Tensor, s: Tensor) -> Tensor:
        hits = random_hits(5, 6, 0.3)
        return info_nce(q, p, c, log_q=random_logs(6), positive_log_q=random_logs(5), hits=hits, scale=s)

    assert torch.autograd.gradcheck(loss, (query, positive, pool, scale))


def test_info_nce_stays_finite_at_a_small_temperature() -> None:
    query, positive, pool = (F.normalize(v.detach().float(), dim=1).requires_grad_() for v in random_vectors(32, 32))
    log_q = torch.zeros(32)
    loss = info_nce(query, positive, pool, log_q=log_q, positive_log_q=log_q, hits=NO_HITS, scale=1e3)
    for gradient in torch.autograd.grad(loss, (query, positive, pool)):
        assert torch.isfinite(gradient).all()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("c", [0, 3])
def test_a_query_without_negatives_costs_nothing(c: int) -> None:
    query, positive, pool = random_vectors(3, c)
    hits = torch.arange(2 * c)  # those of the first two
    zeros = torch.zeros(3, dtype=torch.float64)
    loss = info_nce(query, positive, pool, log_q=zeros[:c], positive_log_q=zeros, hits=hits, scale=10.0)
    gradients = torch.autograd.grad(loss, (query, positive, pool))
    alone = info_nce(query[2:], positive[2:], pool, log_q=zeros[:c], positive_log_q=zeros[2:], hits=NO_HITS, scale=10.0)
    torch.testing.assert_close(loss, alone)
    assert not gradients[0][:2].any()
    assert not gradients[1][:2].any()
    assert gradients[0][2:].any() == bool(c)


def test_an_empty_batch_has_loss_zero_and_a_gradient() -> None:
    for c in (0, 4):
        query, positive, pool = random_vectors(0, c)
        zeros = torch.zeros(c, dtype=torch.float64)
        loss = info_nce(query, positive, pool, log_q=zeros, positive_log_q=zeros[:0], hits=NO_HITS, scale=10.0)
        gradients = torch.autograd.grad(loss, (query, positive, pool))
        assert loss.item() == 0.0
        assert [gradient.shape for gradient in gradients] == [(0, 5), (0, 5), (c, 5)]


def test_cosine_contrastive_is_simplexs_formula() -> None:
    query, positive, pool = (F.normalize(v.detach(), dim=1).requires_grad_() for v in random_vectors(6, 9))
    hits, margin, weight = random_hits(6, 9, 0.3), 0.1, 5.0
    mask = masked(6, 9, hits)
    wanted = 0.0
    for i in range(6):
        costs = [max(0.0, (query[i] @ pool[j]).item() - margin) for j in range(9) if not mask[i, j]]
        wanted += 1.0 - (query[i] @ positive[i]).item() + weight * sum(costs) / len(costs)
    found = cosine_contrastive(query, positive, pool, hits=hits, margin=margin, negative_weight=weight)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda *v: cosine_contrastive(*v, hits=hits, margin=margin, negative_weight=weight), (query, positive, pool)
    )


def run_triplet(query: Tensor, positive: Tensor, pool: Tensor, hits: Tensor, **change: Any) -> Tensor:
    settings = {"margin": 0.2, "scale": 3.0, "choice": "hard", "first": torch.zeros(len(query), dtype=torch.int64)}
    return triplet(query, positive, pool, hits=hits, **{**settings, **change})


def brute_choice(similar: list[float], own: float, allowed: list[int], choice: str, first: int) -> int:
    if choice == "hard":
        return max(allowed, key=lambda j: similar[j])
    if choice == "random":
        return min(allowed, key=lambda j: (j - first) % len(similar))
    below = [j for j in allowed if similar[j] < own]
    return max(below, key=lambda j: similar[j]) if below else min(allowed, key=lambda j: similar[j])


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("choice", ["random", "semi_hard", "hard"])
def test_triplet_takes_the_negative_that_it_should(choice: str, margin: float) -> None:
    query, positive, pool = random_vectors(40, 9, dim=3)
    hits, mask = random_hits(40, 9, 0.6), masked(40, 9, random_hits(40, 9, 0.6))
    first = torch.arange(40) % 9
    wanted, without = 0.0, 0
    for i in range(40):
        similar = [(query[i] @ pool[j]).item() for j in range(9)]
        own = (query[i] @ positive[i]).item()
        allowed = [j for j in range(9) if not mask[i, j]]
        without += not any(similar[j] < own for j in allowed)
        if not allowed:
            continue
        excess = similar[brute_choice(similar, own, allowed, choice, int(first[i]))] - own
        wanted += max(0.0, excess + margin) if margin else math.log1p(math.exp(3.0 * excess))
    assert without > 3, "the semi-hard choice is never without a candidate"
    found = run_triplet(query, positive, pool, hits, margin=margin, choice=choice, first=first)
    assert found.item() == pytest.approx(wanted, rel=1e-10)
    assert torch.autograd.gradcheck(
        lambda *v: run_triplet(*v, hits, margin=margin, choice=choice, first=first), (query, positive, pool)
    )


def test_triplet_pulls_the_positive_and_pushes_the_negative() -> None:
    query, positive, pool = random_vectors(1, 1)
    loss = run_triplet(query, positive, pool, NO_HITS, margin=100.0)
    gradients = torch.autograd.grad(loss, (query, positive, pool))
    torch.testing.assert_close(gradients, (pool - positive, -query, query.detach()))


@pytest.mark.parametrize("c", [0, 4])
def test_triplets_without_negatives_cost_nothing(c: int) -> None:
    query, positive, pool = random_vectors(2, c)
    for choice in ("random", "semi_hard", "hard"):
        loss = run_triplet(query, positive, pool, torch.arange(2 * c), choice=choice)
        assert loss.item() == 0.0
        loss.backward()  # type: ignore[no-untyped-call]


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
    values = [schedule(x, warmup=0.2, decay="linear", final_rate=0.1) for x in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


def test_the_schedule_falls_along_half_a_cosine() -> None:
    values = [schedule(x, warmup=0.2, decay="cosine", final_rate=0.1) for x in (0.1, 0.2, 0.4, 0.6, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 4)), 0.55, 0.1])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_schedule_at_its_limits(decay: Any) -> None:
    assert schedule(0.0, warmup=0.0, decay=decay, final_rate=0.0) == 1.0
    assert schedule(1.0, warmup=0.0, decay=decay, final_rate=0.0) == 0.0
    assert schedule(0.7, warmup=0.0, decay=decay, final_rate=1.0) == 1.0
    assert schedule(1.0, warmup=1.0, decay=decay, final_rate=0.3) == 1.0
