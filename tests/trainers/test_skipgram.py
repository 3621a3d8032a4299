from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from embedding_service.ragged import Ragged
from trainers.objectives import skip_gram
from trainers.skipgram import run_block

SESSIONS = Ragged.from_lists([[0, 1, 2, 3], [], [4], [2, 2, 5, 0, 1, 6], [6, 3]])
DIM, ROWS = 8, 12


def tables(seed: int = 0, scale: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    source, target = (random.normal(0, scale, (ROWS, DIM)).astype(np.float32) for _ in range(2))
    return source, target


def run(source: np.ndarray, target: np.ndarray, sessions: Ragged = SESSIONS, **change: Any) -> tuple[float, int]:
    settings: dict[str, Any] = {"window": 0, "num_negatives": 3, "learning_rate": 0.1, "seed": 5, "threads": 1}
    negatives = change.pop("negatives", np.arange(ROWS))
    return run_block(source, target, sessions.values, sessions.offsets, negatives, **{**settings, **change})


class Generator:
    """The kernel's random numbers: the upper 31 bits of a linear congruential generator (Knuth's MMIX)."""

    def __init__(self, seed: int) -> None:
        self.state = (seed * 0x9E3779B97F4A7C15 + 0x1234567) % 2**64

    def next(self, bound: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % bound


def slow_block(
    source: np.ndarray,
    target: np.ndarray,
    negatives: np.ndarray,
    *,
    window: int,
    num_negatives: int,
    rate: float,
    seed: int,
) -> tuple[float, int]:
    """The docstring's formula, one number at a time, with the sigmoid itself."""
    random = Generator(seed * 1_000_003)
    position, loss, pairs = 0, 0.0, 0
    for session in SESSIONS.to_lists():
        for t, item in enumerate(session):
            drawn = random.next(window or 1)
            reach = window - drawn if window else len(session)
            contexts = [c for place, c in enumerate(session) if place != t and abs(place - t) <= reach]
            watched = position % 16 == 0
            position += 1
            if not contexts:
                continue
            outputs = [(item, 1.0)]
            for _ in range(num_negatives):
                row = negatives[random.next(len(negatives))]
                if row != item:
                    outputs.append((row, 0.0))
            moves = [np.zeros(DIM) for _ in contexts]
            for row, label in outputs:
                before = target[row].copy()
                for i, context in enumerate(contexts):
                    chance = 1.0 / (1.0 + np.exp(-(source[context] @ before)))
                    moves[i] += rate * (label - chance) * before
                    target[row] += rate * (label - chance) * source[context]
                    if watched:
                        loss -= np.log(chance if label else 1.0 - chance)
                        pairs += int(label)
            for context, move in zip(contexts, moves, strict=True):
                source[context] += move
    return loss, pairs


@pytest.mark.parametrize("window", [0, 1, 2, 5])
@pytest.mark.parametrize("num_negatives", [1, 4])
def test_the_kernel_is_the_slow_formula(window: int, num_negatives: int) -> None:
    negatives = np.array([7, 0, 11, 3, 3, 9])
    source, target = tables()
    slow_source, slow_target = (table.astype(np.float64) for table in tables())
    found = run(source, target, negatives=negatives, window=window, num_negatives=num_negatives)
    wanted = slow_block(
        slow_source, slow_target, negatives, window=window, num_negatives=num_negatives, rate=0.1, seed=5
    )
    np.testing.assert_allclose(source, slow_source, atol=2e-3)  # the kernel's sigmoid is a table of 4096 steps
    np.testing.assert_allclose(target, slow_target, atol=2e-3)
    assert found[0] == pytest.approx(wanted[0], rel=5e-3)
    assert found[1] == wanted[1]
    assert np.abs(source - tables()[0]).max() > 0.05


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
        np.testing.assert_allclose(gradient, wanted.numpy(), rtol=5e-3, atol=0.03)
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
    assert run(source, target, Ragged.from_lists([]), negatives=np.empty(0, np.int64)) == (0.0, 0)
    assert run(source, target, Ragged.from_lists([[]]), negatives=np.empty(0, np.int64), threads=2) == (0.0, 0)
    assert np.array_equal(source, tables()[0])


def test_one_thread_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        source, target = tables()
        results.append((*run(source, target, window=3), source, target))
    assert results[0][:2] == results[1][:2]
    assert np.array_equal(results[0][2], results[1][2])
    assert np.array_equal(results[0][3], results[1][3])
    source, target = tables()
    run(source, target, window=3, seed=6)
    assert not np.array_equal(source, results[0][2])


def test_products_beyond_the_sigmoids_table_stay_finite() -> None:
    source, target = tables(scale=50.0)
    loss, _ = run(source, target)
    assert np.isfinite(loss)
    assert np.isfinite(source).all()
    assert np.isfinite(target).all()


@pytest.mark.parametrize(("threads", "window"), [(1, 0), (1, 3), (3, 0)])
def test_planted_clusters_are_found(threads: int, window: int) -> None:
    random = np.random.default_rng(0)
    lists = [random.integers(0, 4, 6) + 4 * random.integers(0, 3) for _ in range(600)]
    sessions = Ragged.from_lists([one.tolist() for one in lists])
    source = random.uniform(-0.05, 0.05, (ROWS, DIM)).astype(np.float32)
    target = np.zeros((ROWS, DIM), np.float32)
    losses = []
    for epoch in range(4):
        loss, pairs = run(source, target, sessions, window=window, threads=threads, seed=epoch, learning_rate=0.05)
        losses.append(loss / pairs)
    assert losses[-1] < losses[0] < 0.6 * 4 * np.log(2)  # every term of a pair begins at log 2
    scores = source @ target.T
    own = np.arange(ROWS)[:, None] // 4 == np.arange(ROWS) // 4
    for row in range(ROWS):
        assert scores[row][own[row]].min() > scores[row][~own[row]].max()
