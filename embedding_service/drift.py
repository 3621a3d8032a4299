"""How far two versions of the same items are apart: pure functions of their vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from embedding_service.exact import Metric, exact_search, unit_length

Float32 = npt.NDArray[np.float32]


def procrustes(source: Float32, target: Float32) -> npt.NDArray[np.float64]:
    """The map R [d, e] with orthonormal rows or columns that brings source [n, d] closest to target [n, e].

    argmin_R |source R - target|_F over R'R = I (d >= e) or RR' = I: R = U V' of the singular value decomposition
    U S V' = source' target (Schoenemann 1966, eq. 1.7). Vectors of two trainings differ by such a turn at least.
    """
    u, _, v = np.linalg.svd(source.astype(np.float64).T @ target.astype(np.float64), full_matrices=False)
    turn: npt.NDArray[np.float64] = np.matmul(u, v)
    return turn


def aligned_cosine(former: Float32, present: Float32) -> float:
    """The mean cosine of n items' vectors [n, e] and [n, d] after both are of unit length and `present` is turned.

    1 for the same vectors up to a rotation or reflection; about sqrt(d / n) for unrelated ones.
    """
    source, target = unit_length(present), unit_length(former)
    turned = source @ procrustes(source, target)
    lengths = np.maximum(np.linalg.norm(turned, axis=1), 1e-12)
    return float((np.einsum("nd,nd->n", turned, target) / lengths).mean())


def neighbour_overlap(former: npt.NDArray[Any], present: npt.NDArray[Any]) -> float:
    """The mean share of the k neighbours that two lists [n, k] of n items have in common; order does not matter."""
    if former.shape != present.shape or not former.size:
        raise ValueError(f"neighbours of the same items are compared, k for each: {former.shape}, {present.shape}")
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(former, present, strict=True))
    return shared / former.size


def nearest_others(vectors: Float32, sample: npt.NDArray[np.int64], k: int, metric: Metric) -> npt.NDArray[np.int64]:
    """For each row of `sample` [n] the k nearest other rows of vectors [rows, d], exactly: int64 [n, k]."""
    _, rows = exact_search(vectors[sample], vectors, k + 1, metric=metric)
    others = np.empty((len(sample), k), np.int64)
    for line, own, found in zip(others, sample, rows, strict=True):
        line[:] = found[found != own][:k]
    return others
