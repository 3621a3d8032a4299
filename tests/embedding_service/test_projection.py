"""Planes and groups of vectors: planted ones are found, and the fast way agrees with the plain one."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from cluster.errors import SettingError
from embedding_service.exact import ArrayVectors
from embedding_service.projection import check_umap, clusters, neighbour_plane, principal_plane, project
from tests.embedding_service.artifacts import clustered


def directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class TestPrincipalPlane:
    def test_is_that_of_the_singular_value_decomposition(self) -> None:
        vectors = clustered(800, 24, clusters=7, seed=3)
        plane = principal_plane(ArrayVectors(vectors))
        unit = directions(vectors.astype(np.float64))
        _, strengths, axes = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
        assert np.abs(np.sum(plane.axes * axes[:2].T, axis=0)) == pytest.approx([1, 1], abs=1e-3)
        assert plane.shares == pytest.approx(strengths[:2] ** 2 / np.sum(strengths**2), rel=1e-3)
        assert (plane.axes[np.abs(plane.axes).argmax(axis=0), [0, 1]] > 0).all()

    def test_projection_in_chunks_is_that_of_the_whole(self) -> None:
        vectors = clustered(70_000, 3, clusters=5, seed=3)  # more than a chunk, and than the sample
        plane = principal_plane(ArrayVectors(vectors))
        placed = project(ArrayVectors(vectors), plane)
        assert placed.dtype == np.float32
        np.testing.assert_allclose(placed, (directions(vectors) - plane.centre) @ plane.axes, atol=1e-5)

    def test_lengths_do_not_matter(self) -> None:
        vectors = clustered(200, 8, clusters=4, seed=1)
        longer = vectors * np.arange(1, 201, dtype=np.float32)[:, None]
        one, other = (project(ArrayVectors(v), principal_plane(ArrayVectors(v))) for v in (vectors, longer))
        np.testing.assert_allclose(one, other, atol=1e-4)

    @pytest.mark.parametrize(
        "vectors", [np.zeros((5, 4)), np.ones((5, 4)), np.ones((1, 4)), np.arange(1.0, 7)[:, None]], ids=str
    )
    def test_nothing_to_tell_apart(self, vectors: np.ndarray) -> None:
        given = ArrayVectors(vectors.astype(np.float32))
        plane = principal_plane(given)
        assert np.isfinite(project(given, plane)).all()
        assert project(given, plane).shape == (len(vectors), 2)


class TestClusters:
    def test_planted_groups_are_found_largest_first(self) -> None:
        centres = np.eye(4, 12, dtype=np.float32)
        group = np.repeat([0, 1, 2, 3], [10, 400, 100, 200])
        noise = np.random.default_rng(0).normal(scale=0.02, size=(len(group), 12))
        found = clusters(ArrayVectors((centres[group] + noise).astype(np.float32)), 4)
        assert found.dtype == np.uint8
        assert np.bincount(found).tolist() == [400, 200, 100, 10]
        assert all(len(set(found[group == g])) == 1 for g in range(4))

    def test_fewer_rows_than_groups(self) -> None:
        assert sorted(clusters(ArrayVectors(np.eye(3, dtype=np.float32)), 12)) == [0, 1, 2]

    def test_equal_rows(self) -> None:
        assert set(clusters(ArrayVectors(np.ones((50, 4), np.float32)), 12)) == {0}


class TestUmap:
    def test_where_it_is_missing_the_setting_and_the_way_out_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "umap", None)
        with pytest.raises(SettingError, match=r"export\.map.*pip install 'lexshard\[map\]'"):
            check_umap()

    def test_gets_directions_a_start_and_a_seed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The library itself compiles for a minute: what is tested is what it is asked for."""
        asked: dict[str, Any] = {}

        class Umap:
            def __init__(self, **options: Any) -> None:
                asked.update(options)

            def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
                asked["vectors"] = vectors
                return np.zeros((len(vectors), 2))

        monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
        vectors = clustered(9, 4, clusters=2, seed=1)
        placed = neighbour_plane(ArrayVectors(vectors), np.full((9, 2), 0.5, np.float32), seed=7)
        assert placed.dtype == np.float32
        assert (asked["random_state"], asked["n_neighbors"], asked["n_jobs"]) == (7, 8, 1)
        np.testing.assert_allclose(asked["vectors"], directions(vectors), rtol=1e-5)
        assert asked["init"].max() == 10
