"""The compiled kernels against the formulas they stand for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from embedding_service import rank_kernels as kernels
from embedding_service.exact import Metric, pair_scores
from embedding_service.quantize import PRECISIONS, Precision, encode
from embedding_service.vectors import VectorSet


def reference(scores: np.ndarray, rows: np.ndarray, seen: set[int], k: int) -> tuple[list[float], list[int]]:
    """Sort (score descending, row ascending), leave out -1 and `seen`, take k, pad."""
    order = sorted(range(len(rows)), key=lambda j: (-scores[j], rows[j]))
    kept = [j for j in order if rows[j] >= 0 and rows[j] not in seen][:k]
    padding = k - len(kept)
    return [scores[j] for j in kept] + [-np.inf] * padding, [int(rows[j]) for j in kept] + [-1] * padding


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("width", [1, 5, 40, 200])  # below and above the insertion sort
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_best_unseen(metric: Metric, width: int, ties: bool, precision: Precision) -> None:
    rng = np.random.default_rng(width)
    num, dim, k = 7, 6, 4
    queries = rng.standard_normal((num, dim)).astype(np.float32)
    found = np.stack([rng.permutation(300)[:width] for _ in range(num)]).astype(np.int64)
    vectors = rng.standard_normal((300, dim)).astype(np.float32)
    if ties:
        vectors[:] = vectors[0]
    stored = VectorSet(*encode(vectors, precision), precision)
    found[2, width // 2 :] = -1
    seen = [rng.choice(found[i], min(width, i)) for i in range(num)]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in seen])]).astype(np.int64)
    scores, rows = np.empty((num, k), np.float32), np.empty((num, k), np.int64)
    lacking = np.empty(num, np.bool_)
    count = kernels.best_unseen(
        queries, found, *stored.stored, metric == "cosine", width, False, np.concatenate(seen), offsets, scores, rows,
        lacking,
    )  # fmt: skip
    exact = pair_scores(queries, stored.take(found), metric)
    for i in range(num):
        want_scores, want_rows = reference(exact[i], found[i], set(seen[i].tolist()), k)
        assert rows[i].tolist() == want_rows
        np.testing.assert_allclose(scores[i], want_scores, rtol=1e-6)
    assert lacking.tolist() == [i == 2 for i in range(num)]
    assert count == 1


def test_a_tie_at_the_border_lacks() -> None:
    vectors = np.array([[1, 1], [1, 1], [1, 1], [3, 1], [2, 1], [1, 1]], np.float32)
    rows = np.array([[0, 1, 2], [3, 4, 5]])
    out_scores, out_rows, lacking = np.empty((2, 2), np.float32), np.empty((2, 2), np.int64), np.empty(2, np.bool_)
    none, offsets = np.empty(0, np.int64), np.zeros(3, np.int64)
    queries, stored = np.ones((2, 2), np.float32), VectorSet(vectors, None, "fp32").stored
    out = (none, offsets, out_scores, out_rows, lacking)
    assert kernels.best_unseen(queries, rows, *stored, False, 2, True, *out) == 1
    assert lacking.tolist() == [True, False]
    assert kernels.best_unseen(queries, rows, *stored, False, 2, False, *out) == 0, "more than wanted, to be rescored"
    rows[1, 1:] = -1
    assert kernels.best_unseen(queries, rows, *stored, False, 2, False, *out) == 1
    assert lacking.tolist() == [False, True]
    rows[1, 1] = 4
    assert kernels.best_unseen(queries, rows, *stored, False, 2, False, *out) == 0, "as many as are wanted"


def test_every_half_is_decoded_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    stored = VectorSet(halves[np.isfinite(halves), None], None, "fp16")
    num = stored.rows
    scores, rows, lacking = np.empty((num, 1), np.float32), np.empty((num, 1), np.int64), np.empty(num, np.bool_)
    none, offsets, found = np.empty(0, np.int64), np.zeros(num + 1, np.int64), np.arange(num)[:, None]
    queries = np.ones((num, 1), np.float32)
    kernels.best_unseen(queries, found, *stored.stored, False, 1, False, none, offsets, scores, rows, lacking)
    assert (scores == stored.take(found[:, 0])).all()


def test_pool() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 3)).astype(np.float32)
    weights = rng.random(6).astype(np.float32)
    offsets = np.array([0, 2, 2, 6])
    out = np.full((3, 3), np.nan, np.float32)
    kernels.pool(rows, offsets, weights, out)
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        np.testing.assert_allclose(out[i], (weights[start:stop, None] * rows[start:stop]).sum(0), rtol=1e-6)
