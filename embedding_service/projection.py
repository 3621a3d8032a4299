"""Vectors on a plane, and in a few groups, for people to look at: PCA, UMAP and k-means, deterministic given a seed.

All three look at directions: rows are scaled to unit length first, as cosine does. Lengths tell how frequent an item
is, and would draw one far-off cloud of the frequent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import SettingError
from embedding_service.exact import Float32, Vectors

_SAMPLE_ROWS = 50_000
_OVERSAMPLING = 8
_POWER_ROUNDS = 6
_CLUSTER_ROUNDS = 25


@dataclass(frozen=True)
class Plane:
    """The plane of greatest variance: `centre` float32 [dim], `axes` float32 [dim, 2], orthonormal columns.

    shares: how much of the sample's variance lies along either axis.
    """

    centre: Float32
    axes: Float32
    shares: tuple[float, float]


def principal_plane(vectors: Vectors, *, seed: int = 0) -> Plane:
    """The two principal components of the directions of `vectors`, or of an even sample of 50,000 of them.

    Randomised subspace iteration (Halko, Martinsson, Tropp 2011, SIAM Review 53, algorithm 4.4): never a dim x dim
    matrix. The sign of an axis is such that its largest entry is positive.
    """
    sample = _directions(vectors.take(_even_rows(vectors.rows)))
    centre = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
    sample = sample - centre
    rng = np.random.default_rng(seed)
    width = min(2 + _OVERSAMPLING, vectors.dim)
    basis: npt.NDArray[Any] = np.linalg.qr(rng.normal(size=(vectors.dim, width)))[0].astype(np.float32)
    for _ in range(_POWER_ROUNDS):
        basis = np.linalg.qr(sample.T @ (sample @ basis))[0]
    _, strengths, inner = np.linalg.svd(sample @ basis, full_matrices=False)
    axes = np.zeros((vectors.dim, 2), np.float32)
    found = (basis @ inner.T)[:, :2]
    axes[:, : found.shape[1]] = found
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1, 1).astype(np.float32)
    total = max(float(np.square(sample, dtype=np.float64).sum()), np.finfo(np.float64).tiny)
    first, second = [*(float(strength) ** 2 / total for strength in strengths[:2]), 0.0][:2]
    return Plane(centre, axes, (first, second))


def project(vectors: Vectors, plane: Plane) -> Float32:
    """float32 [rows, 2]: where the directions of `vectors` lie on the plane; one chunk in memory at a time."""
    placed = np.empty((vectors.rows, 2), np.float32)
    for start, chunk in vectors.chunks():
        placed[start : start + len(chunk)] = (_directions(chunk) - plane.centre) @ plane.axes
    return placed


def neighbour_plane(vectors: Vectors, start: Float32, *, seed: int = 0) -> Float32:
    """float32 [rows, 2] by UMAP (McInnes, Healy, Melville 2018), which keeps neighbours together, begun at `start`.

    Minutes for a hundred thousand rows, which are all in memory. Raises SettingError where umap-learn is missing.
    """
    umap: Any = _umap()
    directions = np.concatenate([_directions(chunk) for _, chunk in vectors.chunks()])
    spread = max(float(np.abs(start).max()), 1e-12)
    model = umap.UMAP(
        n_components=2,
        n_neighbors=max(2, min(15, vectors.rows - 1)),
        min_dist=0.1,
        metric="euclidean",  # of directions: orders neighbours as cosine does
        init=np.asarray(start / spread * 10, np.float32),
        random_state=seed,
        n_jobs=1,  # more would not be deterministic
    )
    placed: Float32 = np.asarray(model.fit_transform(directions), np.float32)
    return placed


def check_umap() -> None:
    """Raise SettingError where umap-learn is missing, before anything is computed."""
    _umap()


def clusters(vectors: Vectors, num_clusters: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [rows]: groups of similar directions by k-means on an even sample, the largest group first.

    Started by greedy k-means++ (Arthur, Vassilvitskii 2007, section 7). Groups that lose all their members stay empty.
    """
    sample = _directions(vectors.take(_even_rows(vectors.rows)))
    centres = _spread_centres(sample, min(num_clusters, len(sample)), np.random.default_rng(seed))
    for _ in range(_CLUSTER_ROUNDS):
        nearest = _nearest(sample, centres)
        counts = np.bincount(nearest, minlength=len(centres))
        sums = np.stack([np.bincount(nearest, column, len(centres)) for column in sample.T], axis=1)
        moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres).astype(np.float32)
        if np.array_equal(moved, centres):
            break
        centres = moved
    found = np.concatenate([_nearest(_directions(chunk), centres) for _, chunk in vectors.chunks()])
    order = np.argsort(-np.bincount(found, minlength=len(centres)), kind="stable")
    place = np.empty(len(centres), np.uint8)
    place[order] = np.arange(len(centres))
    ordered: npt.NDArray[np.uint8] = place[found]
    return ordered


def _umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise SettingError(
            "export.map", f"umap needs umap-learn ({error}): pip install 'lexshard[map]', or set it to pca"
        ) from None
    return umap


def _even_rows(rows: int) -> npt.NDArray[np.int64]:
    return np.linspace(0, rows - 1, min(rows, _SAMPLE_ROWS)).astype(np.int64)


def _directions(vectors: Float32) -> Float32:
    """Rows at unit length; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: Float32 = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)
    return directions


def _spread_centres(sample: Float32, num: int, rng: np.random.Generator) -> Float32:
    chosen = [int(rng.integers(len(sample)))]
    distance = np.square(sample - sample[chosen[0]]).sum(axis=1, dtype=np.float64)
    tries = 2 + int(np.log(num))
    for _ in range(num - 1):
        total = distance.sum()
        drawn = rng.choice(len(sample), tries, p=distance / total if total > 0 else None)
        left = [np.minimum(distance, np.square(sample - sample[row]).sum(axis=1, dtype=np.float64)) for row in drawn]
        best = int(np.argmin([distances.sum() for distances in left]))
        chosen.append(int(drawn[best]))
        distance = left[best]
    return sample[chosen]


def _nearest(points: Float32, centres: Float32) -> npt.NDArray[np.int64]:
    """The centre nearest to each point: the greatest p.c - |c|^2 / 2."""
    nearest: npt.NDArray[np.int64] = (points @ centres.T - np.square(centres).sum(axis=1) / 2).argmax(axis=1)
    return nearest
