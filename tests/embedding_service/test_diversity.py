"""Maximal marginal relevance against its slow formula."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_service.diversity import mmr


def slow(scores: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    chosen: list[int] = []
    while len(chosen) < k:
        values = {
            i: (1 - diversity) * relevance[i] - diversity * max((unit[i] @ unit[j] for j in chosen), default=0.0)
            for i in range(len(scores))
            if i not in chosen
        }
        chosen.append(max(values, key=lambda i: values[i]))
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.7, 1.0])
def test_it_is_the_formula(diversity: float) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    scores = np.sort(rng.normal(size=40).astype(np.float32))[::-1]
    assert mmr(scores, vectors, 12, diversity).tolist() == slow(scores, vectors.astype(np.float64), 12, diversity)


def test_twins_are_parted() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    scores = np.array([3.0, 2.9, 2.0], np.float32)
    assert mmr(scores, vectors, 3, 0.0).tolist() == [0, 1, 2]
    assert mmr(scores, vectors, 3, 0.6).tolist() == [0, 2, 1]
    assert mmr(scores, vectors, 9, 0.6).tolist() == [0, 2, 1]
    assert mmr(scores[:0], vectors[:0], 2, 0.5).tolist() == []
