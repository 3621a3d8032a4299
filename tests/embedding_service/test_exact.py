"""Exact search against the slow formula, its ties, and its independence of blocks and batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_service.exact import Metric, exact_search, pair_scores, unit_length


def _slow(queries: np.ndarray, vectors: np.ndarray, k: int, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Score everything, sort by (score descending, row ascending), take k."""
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "cosine":
        q = q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-30)
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    scores = (q @ x.T).astype(np.float32)
    order = np.array([sorted(range(len(x)), key=lambda row: (-line[row], row))[:k] for line in scores])
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize(("query_block", "row_block"), [(256, 16_384), (3, 16), (1, 7)])
def test_equals_the_slow_formula(metric: Metric, query_block: int, row_block: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32) * rng.uniform(0.1, 3, (300, 1)).astype(np.float32)
    queries = rng.normal(size=(11, 8)).astype(np.float32)
    scores, rows = exact_search(queries, vectors, 10, metric=metric, query_block=query_block, row_block=row_block)
    slow_scores, slow_rows = _slow(queries, vectors, 10, metric)
    np.testing.assert_array_equal(rows, slow_rows)
    np.testing.assert_array_equal(scores, slow_scores)


@given(
    values=st.lists(st.integers(-2, 2), min_size=1, max_size=60),
    k=st.integers(1, 70),
    row_block=st.integers(1, 20),
)
def test_ties_go_to_the_lower_row(values: list[int], k: int, row_block: int) -> None:
    vectors = np.array(values, np.float32)[:, None]
    scores, rows = exact_search(np.ones((1, 1), np.float32), vectors, k, row_block=row_block)
    expected = sorted(range(len(values)), key=lambda row: (-values[row], row))[:k]
    assert rows[0].tolist() == expected
    assert scores[0].tolist() == [values[row] for row in expected]


def test_a_query_alone_is_answered_as_in_a_batch() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(2000, 33)).astype(np.float32), rng.normal(size=(50, 33)).astype(np.float32)
    scores, rows = exact_search(queries, vectors, 20)
    for i in range(50):
        one_score, one_row = exact_search(queries[i : i + 1], vectors, 20, row_block=100)
        np.testing.assert_array_equal(one_row[0], rows[i])
        np.testing.assert_array_equal(one_score[0], scores[i])
    np.testing.assert_array_equal(pair_scores(queries, vectors[rows], "ip"), scores)


def test_unit_length_keeps_zero_and_huge_rows_finite() -> None:
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [3e38, 0.0], [1e-30, 0.0]], np.float32)
    expected = np.array([[0.6, 0.8], [0, 0], [1, 0], [1, 0]], np.float32)
    np.testing.assert_allclose(unit_length(vectors), expected, rtol=1e-6)
