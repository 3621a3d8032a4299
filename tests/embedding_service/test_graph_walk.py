"""The walk of a graph against FAISS's own search of it."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_service.exact import Metric
from embedding_service.index import Arrangement, VectorIndex
from embedding_service.quantize import PRECISIONS, Precision, encode
from embedding_service.vectors import VectorSet
from tests.embedding_service.artifacts import clustered

ROWS, DIM = 3000, 24
ARRANGED: list[tuple[Metric, Arrangement]] = [
    ("ip", "plain"), ("ip", "centred"), ("ip", "augmented"), ("cosine", "plain"),
]  # fmt: skip


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    lengths = np.random.default_rng(3).lognormal(0, 0.4, (ROWS, 1))
    found = (clustered(ROWS, DIM, clusters=40, seed=0) + 0.3) * lengths
    found[7] = 0.0
    return np.asarray(found, np.float32)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(60, DIM, clusters=40, seed=1)


def graph(
    vectors: np.ndarray, metric: Metric = "ip", arrangement: Arrangement = "centred", ef: int = 40
) -> VectorIndex:
    index = VectorIndex.build(vectors, metric=metric, factory="HNSW8", arrangement=arrangement, threads=1)
    index.set_parameters({"efSearch": ef})
    return index


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("metric", "arrangement"), ARRANGED)
def test_it_finds_what_faiss_finds(
    metric: Metric, arrangement: Arrangement, precision: Precision, vectors: np.ndarray, queries: np.ndarray
) -> None:
    stored = VectorSet(*encode(vectors, precision), precision)
    index = graph(stored.take(np.arange(ROWS)), metric, arrangement)
    walk = index.walk_over(stored)
    assert walk is not None
    found = walk.search_rows(queries, 10, index.breadth)
    theirs = index.search(queries, 10)[1]
    # the same but for pairs whose float32 scores differ by rounding, and whatever follows from such a turn
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, theirs, strict=True)]) >= 0.995
    assert all(len({*line}) == 10 for line in found.tolist())


def test_a_query_is_answered_alike_in_any_batch(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = graph(vectors)
    walk = index.walk_over(VectorSet(vectors, None, "fp32"))
    assert walk is not None
    together = walk.search_rows(queries, 5, 16)
    alone = np.concatenate([walk.search_rows(queries[i : i + 1], 5, 16) for i in range(len(queries))])
    np.testing.assert_array_equal(together, alone)
    # float64 columns of something larger are taken as they are meant
    wide = np.repeat(queries.astype(np.float64), 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(walk.search_rows(wide, 5, 16), together)


def test_a_long_search_meets_what_can_be_met(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = graph(vectors, ef=ROWS)  # many more rows than the table of met ones has room for at first
    walk = index.walk_over(VectorSet(vectors, None, "fp32"))
    assert walk is not None
    found, theirs = walk.search_rows(queries, 500, ROWS), index.search(queries, 500)[1]
    assert np.mean([len({*a} & {*b}) / 500 for a, b in zip(found, theirs, strict=True)]) >= 0.999


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_a_small_graph_is_found_whole(rows: int, vectors: np.ndarray, queries: np.ndarray) -> None:
    index = graph(vectors[:rows])
    walk = index.walk_over(VectorSet(vectors[:rows], None, "fp32"))
    assert walk is not None
    found = walk.search_rows(queries, rows + 2, 4)
    assert (np.sort(found, axis=1)[:, 2:] == np.arange(rows)).all()
    assert (found[:, rows:] == -1).all()


def test_a_row_that_lacks_a_level_ends_the_way_up(vectors: np.ndarray, queries: np.ndarray) -> None:
    """A damaged graph may lead, on a high level, to a row that has no such level: there is nothing to read there."""
    index = graph(vectors)
    walk = index.walk_over(VectorSet(vectors, None, "fp32"))
    assert walk is not None
    neighbours, offsets, widths, entry, top, codes, factors = walk._graph
    low = int(np.flatnonzero(np.diff(offsets) == widths[1])[-1])
    turned = neighbours.copy()
    turned[offsets[entry] + widths[top] : offsets[entry] + widths[top + 1]] = low
    walk._graph = turned, offsets, widths, entry, top, codes, factors
    found = walk.search_rows(queries, 10, 40)
    assert ((found >= 0) & (found < ROWS)).all()


def test_faiss_searches_what_has_codes_of_its_own(vectors: np.ndarray) -> None:
    stored = VectorSet(vectors, None, "fp32")
    for factory in ("Flat", "HNSW8,SQ8", "IVF16,Flat"):
        assert VectorIndex.build(vectors, metric="ip", factory=factory, threads=1).walk_over(stored) is None
