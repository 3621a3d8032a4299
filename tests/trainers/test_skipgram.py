from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from embedding_service.ragged import Ragged
from trainers.objectives import skip_gram
from trainers.skipgram import padded, run_block, subtract_rows, subtract_taken, take_padded

SESSIONS = Ragged.from_lists([[0, 1, 2, 3], [], [4], [2, 2, 5, 0, 1, 6], [6, 3]])
DIM, ROWS = 36, 12


def tables(seed: int = 0, scale: float = 0.5, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    source, target = (random.normal(0, scale, (ROWS, dim)).astype(np.float32) for _ in range(2))
    return source, target


def run(source: np.ndarray, target: np.ndarray, sessions: Ragged = SESSIONS, **change: Any) -> tuple[float, int, int]:
    """`run_block` on tables [ROWS, dim], which it changes."""
    dim = source.shape[1]
    settings: dict[str, Any] = {"cbow": False, "window": 0, "num_negatives": 3, "learning_rate": 0.1, "seed": 5}
    negatives = change.pop("negatives", np.arange(ROWS))
    wide = [take_padded(table, np.arange(ROWS)) for table in (source, target)]
    result = run_block(*wide, sessions.values, sessions.offsets, negatives, **{**settings, **change})
    for table, changed in zip((source, target), wide, strict=True):
        assert changed.shape == (ROWS, padded(dim))
        assert not changed[:, dim:].any()
        table[:] = changed[:, :dim]
    return result


class Generator:
    """The kernel's random numbers: the upper 31 bits of a linear congruential generator (Knuth's MMIX)."""

    def __init__(self, seed: int) -> None:
        self.state = (seed * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64

    def next(self, bound: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return ((self.state >> 33) * bound) >> 31


def slow_block(
    source: np.ndarray,
    target: np.ndarray,
    negatives: np.ndarray,
    *,
    cbow: bool,
    window: int,
    num_negatives: int,
    rate: float,
    seed: int,
) -> tuple[float, int, int]:
    """The docstring's formula, one number at a time, with the sigmoid itself."""
    random = Generator(seed)
    position, loss, pairs, num_contexts = 0, 0.0, 0, 0
    for session in SESSIONS.to_lists():
        for t, item in enumerate(session):
            drawn = random.next(window or 1)
            reach = window - drawn if window else len(session)
            contexts = [place for place in range(len(session)) if place != t and abs(place - t) <= reach]
            watched = position % 16 == 0
            position += 1
            if not contexts:
                continue
            num_contexts += len(contexts)
            outputs = [(item, 1.0)]
            for _ in range(num_negatives):
                row = negatives[random.next(len(negatives))]
                if row != item:
                    outputs.append((row, 0.0))
            queries = [source[session[c]].copy() for c in contexts]
            if cbow:
                queries = [np.mean(queries, axis=0)]
            old = target.copy()
            moves = [np.zeros_like(source[0]) for _ in queries]
            for row, label in outputs:
                for i, query in enumerate(queries):
                    chance = 1.0 / (1.0 + np.exp(-(query @ old[row])))
                    moves[i] += rate * (label - chance) * old[row]
                    target[row] += rate * (label - chance) * query
                    if watched:
                        loss -= np.log(chance if label else 1.0 - chance)
                        pairs += int(label)
            for i, c in enumerate(contexts):
                source[session[c]] += moves[0 if cbow else i]
    return loss, pairs, num_contexts


@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("num_negatives", [1, 4, 7])
@pytest.mark.parametrize("cbow", [False, True])
# rows of one vector of registers, of several, of an even and of an odd number of cache lines
@pytest.mark.parametrize("dim", [4, 12, 20, DIM])
def test_the_kernel_is_the_slow_formula(cbow: bool, window: int, num_negatives: int, dim: int) -> None:
    negatives = np.array([7, 0, 11, 3, 3, 9])
    source, target = tables(dim=dim)
    slow_source, slow_target = (table.astype(np.float64) for table in tables(dim=dim))
    found = run(source, target, cbow=cbow, negatives=negatives, window=window, num_negatives=num_negatives)
    wanted = slow_block(
        slow_source, slow_target, negatives, cbow=cbow, window=window, num_negatives=num_negatives, rate=0.1, seed=5
    )
    np.testing.assert_allclose(source, slow_source, atol=1e-5)
    np.testing.assert_allclose(target, slow_target, atol=1e-5)
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    assert found[1:] == wanted[1:]
    assert np.abs(source - tables(dim=dim)[0]).max() > 0.05


def test_the_first_update_is_the_gradient_of_the_objective() -> None:
    """At a rate so small that order does not matter; negatives outside the sessions are never left out."""
    rate, num_negatives = 1e-4, 3
    before = tables(1)
    after = [table.copy() for table in before]
    run(after[0], after[1], negatives=np.array([8]), num_negatives=num_negatives, learning_rate=rate)
    source, target = (torch.from_numpy(table).double().requires_grad_() for table in before)
    positives = [
        (context, item)
        for session in SESSIONS.to_lists()
        for t, item in enumerate(session)
        for place, context in enumerate(session)
        if place != t
    ]
    center, context = (torch.tensor(rows) for rows in zip(*positives, strict=True))
    negatives = target[torch.full((len(positives), num_negatives), 8)]
    skip_gram(source[center], target[context], negatives).backward()  # type: ignore[no-untyped-call]
    for old, new, wanted in zip(before, after, (source.grad, target.grad), strict=True):
        assert wanted is not None
        gradient = (old.astype(np.float64) - new) / rate
        np.testing.assert_allclose(gradient, wanted.numpy(), rtol=5e-3, atol=0.06)
        assert np.abs(gradient).max() > 1.0


def test_a_negative_that_is_the_target_is_left_out() -> None:
    source, target = tables()
    run(source, target, Ragged.from_lists([[1, 1]]), negatives=np.array([1]), num_negatives=5)
    slow_source, slow_target = tables()
    for _ in range(2):  # the pair (1, 1), twice, positive only
        g = 0.1 * (1.0 - 1.0 / (1.0 + np.exp(-(slow_source[1] @ slow_target[1]))))
        old = slow_target[1].copy()
        slow_target[1] += g * slow_source[1]
        slow_source[1] += g * old
    np.testing.assert_allclose(source, slow_source, atol=1e-3)
    np.testing.assert_allclose(target, slow_target, atol=1e-3)


def test_nothing_crosses_the_border_of_a_session() -> None:
    source, target = tables()
    run(source, target, Ragged.from_lists([[0], [1], [], [2]]))
    assert np.array_equal(source, tables()[0])
    assert np.array_equal(target, tables()[1])


def test_an_empty_block_does_nothing() -> None:
    source, target = tables()
    assert run(source, target, Ragged.from_lists([]), negatives=np.empty(0, np.int64)) == (0.0, 0, 0)
    assert run(source, target, Ragged.from_lists([[]]), negatives=np.empty(0, np.int64)) == (0.0, 0, 0)
    assert np.array_equal(source, tables()[0])


def test_it_is_a_pure_function() -> None:
    results = []
    for _ in range(2):
        source, target = tables()
        results.append((*run(source, target, window=3), source, target))
    assert results[0][:3] == results[1][:3]
    assert np.array_equal(results[0][3], results[1][3])
    assert np.array_equal(results[0][4], results[1][4])
    source, target = tables()
    run(source, target, window=3, seed=6)
    assert not np.array_equal(source, results[0][3])


def test_large_products_stay_finite() -> None:
    source, target = tables(scale=50.0)
    loss, *_ = run(source, target)
    assert np.isfinite(loss)
    assert np.isfinite(source).all()
    assert np.isfinite(target).all()


@pytest.mark.parametrize(("cbow", "window"), [(False, 0), (False, 3), (True, 0)])
def test_planted_clusters_are_found(cbow: bool, window: int) -> None:
    random = np.random.default_rng(0)
    lists = [random.integers(0, 4, 6) + 4 * random.integers(0, 3) for _ in range(600)]
    sessions = Ragged.from_lists([one.tolist() for one in lists])
    source = random.uniform(-0.05, 0.05, (ROWS, DIM)).astype(np.float32)
    target = np.zeros((ROWS, DIM), np.float32)
    losses = []
    for epoch in range(4):
        loss, pairs, _ = run(source, target, sessions, window=window, cbow=cbow, seed=epoch, learning_rate=0.05)
        losses.append(loss / pairs)
    assert losses[-1] < losses[0] < 0.6 * 4 * np.log(2)  # every term of a pair begins at log 2
    scores = source @ target.T
    own = np.arange(ROWS)[:, None] // 4 == np.arange(ROWS) // 4
    for row in range(ROWS):
        assert scores[row][own[row]].min() > scores[row][~own[row]].max()


def test_rows_are_taken_and_given_back() -> None:
    table = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    rows = np.array([7, 0, 3])
    taken = take_padded(table, rows)
    assert np.array_equal(taken[:, :5], table[rows])
    assert taken.shape == (3, 8)
    assert not taken[:, 5:].any()
    taken[1, :5] += 2.0
    subtract_taken(taken, table, rows)
    np.testing.assert_allclose(taken, [[0.0] * 8, [2.0] * 5 + [0.0] * 3, [0.0] * 8], atol=1e-6)
    wanted = table.copy()
    wanted[0] -= taken[1, :5]
    subtract_rows(table, rows, taken)
    assert np.array_equal(table, wanted)


@pytest.mark.parametrize("cbow", [False, True])
def test_a_frozen_side_stays_and_the_other_learns_against_it(cbow: bool) -> None:
    """With inputs that stay, outputs are a logistic regression on them: each session trained alone gives the same."""
    source, target = tables()
    kept = source.copy()
    run(source, target, cbow=cbow, frozen=(True, False))
    assert np.array_equal(source, kept)
    both_source, both_target = tables()
    run(both_source, both_target, cbow=cbow)
    assert not np.array_equal(both_target, target), "later steps see other inputs where these learn"
    first = Ragged.from_lists([[0, 1]])  # one step of either side: nothing has moved before it
    results = []
    for frozen in ((False, False), (False, True)):
        one, other = tables()
        kept = other.copy()
        run(one, other, first, cbow=cbow, frozen=frozen, negatives=np.array([5]))
        assert np.array_equal(other, kept) == frozen[1]
        results.append(one)
    np.testing.assert_array_equal(results[0][1], results[1][1])  # the first step's context
