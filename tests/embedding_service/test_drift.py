"""Drift of two versions, against planted turns and known overlaps."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_service.drift import aligned_cosine, nearest_others, neighbour_overlap, procrustes


def turned(vectors: np.ndarray, seed: int) -> np.ndarray:
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(vectors.shape[1], vectors.shape[1])))
    return np.asarray(vectors @ turn, np.float32)


VECTORS = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)


def test_a_turn_is_found_and_is_no_drift() -> None:
    other = turned(VECTORS, 1)
    np.testing.assert_allclose(other @ procrustes(other, VECTORS), VECTORS, atol=1e-5)
    assert aligned_cosine(VECTORS, other) == pytest.approx(1.0, abs=1e-6)
    assert aligned_cosine(VECTORS, 3 * other) == pytest.approx(1.0, abs=1e-6)


def test_noise_is_drift_in_proportion() -> None:
    noise = np.random.default_rng(2).normal(size=VECTORS.shape).astype(np.float32)
    levels = [aligned_cosine(VECTORS, turned(VECTORS + level * noise, 3)) for level in (0.1, 0.5, 2.0)]
    assert levels[0] > 0.98
    assert levels[0] > levels[1] > levels[2] > aligned_cosine(VECTORS, noise)
    assert aligned_cosine(VECTORS, noise) < 0.3  # sqrt(8 / 500) and what alignment finds in noise


def test_versions_of_different_width_are_compared() -> None:
    padded = np.concatenate([turned(VECTORS, 4), np.zeros((500, 3), np.float32)], axis=1)
    assert aligned_cosine(VECTORS, padded) == pytest.approx(1.0, abs=1e-6)
    assert aligned_cosine(padded, VECTORS) == pytest.approx(1.0, abs=1e-6)


def test_overlap_counts_what_is_shared_in_any_order() -> None:
    assert neighbour_overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 9]])) == 0.75
    with pytest.raises(ValueError, match="neighbours of the same items"):
        neighbour_overlap(np.zeros((2, 3)), np.zeros((2, 4)))


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_the_nearest_others_are_those_of_a_full_sort(metric: str) -> None:
    sample = np.array([3, 77, 499])
    found = nearest_others(VECTORS, sample, 5, metric)  # type: ignore[arg-type]
    wide = VECTORS.astype(np.float64)
    if metric == "cosine":
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    for row, near in zip(sample, found, strict=True):
        scores = wide @ wide[row]
        scores[row] = -np.inf
        assert near.tolist() == np.argsort(-scores)[:5].tolist()
