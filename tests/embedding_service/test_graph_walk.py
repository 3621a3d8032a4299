"""The walk of a graph against FAISS's own search of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedding_service.candidates import Candidates
from embedding_service.exact import Metric, exact_search
from embedding_service.graph_walk import Graph, GraphWalk
from embedding_service.index import Arrangement, VectorIndex
from embedding_service.quantize import PRECISIONS, Precision, encode
from embedding_service.ragged import Ragged
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


def by_hand(neighbours: list[list[int]], width: int) -> Graph:
    """A graph of one level with room for `width` neighbours of each row, entered at row 0."""
    table = np.full((len(neighbours), width), -1, np.int32)
    for row, those in enumerate(neighbours):
        table[row, : len(those)] = those
    offsets = np.arange(len(neighbours) + 1, dtype=np.int64) * width
    return Graph(table.ravel(), offsets, np.array([0, width], np.int64), 0, 0, table)


def test_a_row_that_lacks_a_level_ends_the_way_up() -> None:
    """A damaged graph may lead, on a high level, to a row that has no such level: there is nothing of it to read."""
    # row 0 is on levels 0 and 1, all others on level 0 alone; behind the neighbours of row 1 come those of row 2
    neighbours = np.array([1, -1, 1, -1, 0, -1, 3, -1, 2, -1], np.int32)
    graph = Graph(neighbours, np.array([0, 4, 6, 8, 10]), np.array([0, 2, 4]), 0, 1, None)
    vectors = VectorSet(np.array([[1.0], [2.0], [3.0], [4.0]], np.float32), None, "fp32")
    found = GraphWalk(graph, vectors, "ip").search_rows(np.ones((1, 1), np.float32), 4, 4)
    assert found.tolist() == [[1, 0, -1, -1]]  # 3 would be met by reading on at what is row 2's


def test_a_row_with_thousands_of_neighbours() -> None:
    rows = 9000
    graph = by_hand([[*range(1, rows)], *([0] for _ in range(rows - 1))], rows - 1)
    vectors = VectorSet(np.arange(rows, dtype=np.float32)[:, None], None, "fp32")
    found = GraphWalk(graph, vectors, "ip").search_rows(np.ones((2, 1), np.float32), 3, 3)
    assert found.tolist() == [[rows - 1, rows - 2, rows - 3]] * 2


def test_a_walk_begins_where_it_is_told_to() -> None:
    graph = by_hand([[1], [0], [3], [2]], 1)  # two halves: only the first can be reached from the entry
    walk = GraphWalk(graph, VectorSet(np.eye(4, dtype=np.float32), None, "fp32"), "ip")
    found = walk.search_rows(np.eye(4, dtype=np.float32)[[3, 3, 0]], 2, 2, np.array([-1, 3, 2]))
    assert [sorted(line) for line in found.tolist()] == [[0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neighbours_of_rows_are_found_from_the_rows_themselves(precision: Precision, vectors: np.ndarray) -> None:
    stored = VectorSet(*encode(vectors, precision), precision)
    index = graph(stored.take(np.arange(ROWS)), "cosine", "plain", ef=64)
    candidates = Candidates(stored, "cosine", index)
    own = np.random.default_rng(5).choice(np.delete(np.arange(ROWS), 7), 300, replace=False)
    queries, hidden = stored.take(own), Ragged(own, np.arange(len(own) + 1))
    best = exact_search(queries, stored, 11, metric="cosine")[1]
    told, plain = (candidates.search_unseen(queries, 10, hidden, rows)[1] for rows in (own, None))
    assert not (told == own[:, None]).any()
    recalls = [
        np.mean([len({*a} & {*b} - {row}) / 10 for a, b, row in zip(found, best, own, strict=True)])
        for found in (told, plain)
    ]
    assert recalls[0] >= 0.97
    assert recalls[0] >= recalls[1] - 0.01
    # queries that are no rows go the usual way, also in one batch with such that are
    mixed = np.where(np.arange(len(own)) % 2, own, -1)
    both = candidates.search_unseen(queries, 10, hidden, mixed)[1]
    np.testing.assert_array_equal(both, np.where((mixed >= 0)[:, None], told, plain))


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_each_search_by_cosine_begins_at_its_own_row(metric: Metric, vectors: np.ndarray) -> None:
    """In shares for two threads, and in groups of queries with few and with many rows to leave out."""
    stored = VectorSet(vectors, None, "fp32")
    with ThreadPoolExecutor(1) as pool:
        candidates = Candidates(stored, metric, graph(vectors, metric, "plain"), pool, threads=2)
        walk, begun = candidates._walk, []
        assert walk is not None
        search_rows = walk.search_rows

        def noted(queries: np.ndarray, k: int, breadth: int, starts: np.ndarray | None = None) -> np.ndarray:
            begun.append((queries, starts))
            return search_rows(queries, k, breadth, starts)

        walk.search_rows = noted  # type: ignore[method-assign]
        own = np.arange(200)
        hidden = Ragged.from_lists([[row, *range(1000, 1000 + 8 * (row % 2))] for row in own.tolist()])
        candidates.search_unseen(vectors[own], 10, hidden, own)
    assert len(begun) > 2
    assert sum(len(queries) for queries, _ in begun) == len(own)
    for queries, starts in begun:
        if metric == "ip":
            assert starts is None
        else:
            np.testing.assert_array_equal(queries, vectors[starts])


def test_an_empty_graph_has_nothing() -> None:
    graph = by_hand([[1], [0]], 1)._replace(entry=-1, top=-1)
    walk = GraphWalk(graph, VectorSet(np.ones((2, 3), np.float32), None, "fp32"), "ip")
    assert walk.search_rows(np.ones((1, 3), np.float32), 2, 5).tolist() == [[-1, -1]]


def test_what_does_not_fit_is_refused() -> None:
    graph = by_hand([[1], [0]], 1)
    with pytest.raises(ValueError, match="3 vectors for a graph of 2 rows"):
        GraphWalk(graph, VectorSet(np.ones((3, 4), np.float32), None, "fp32"), "ip")
    walk = GraphWalk(graph, VectorSet(np.ones((2, 4), np.float32), None, "fp32"), "ip")
    with pytest.raises(ValueError, match=r"queries must be \[n, 4\]"):
        walk.search_rows(np.ones((1, 5), np.float32), 2, 5)
    for starts in ([2], [-2], [0, 1]):
        with pytest.raises(ValueError, match=r"starts must be \[1\] rows in -1\.\.1"):
            walk.search_rows(np.ones((1, 4), np.float32), 2, 5, np.array(starts))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_unit_factors_make_unit_vectors(precision: Precision) -> None:
    vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    vectors[1] = 0.0
    vectors[2] *= np.float32(1e-24 if precision == "fp32" else 1e-3)
    stored = VectorSet(*encode(vectors, precision), precision)
    codes = stored.stored[0].view(np.float16) if precision == "fp16" else stored.stored[0]
    lengths = np.linalg.norm(codes.astype(np.float64) * stored.unit_factors.astype(np.float64)[:, None], axis=1)
    np.testing.assert_allclose(lengths, [1, 0, 1, 1, 1], atol=1e-6)


def test_candidates_walk_with_the_breadth_that_is_set(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = graph(vectors, ef=1)
    candidates = Candidates(VectorSet(vectors, None, "fp32"), "ip", index)
    index.search_rows = None  # type: ignore[assignment, method-assign]  # FAISS is not asked
    exact = exact_search(queries, vectors, 1, metric="ip")[1]
    narrow = (candidates.search(queries, 1)[1] == exact).mean()
    index.set_parameters({"efSearch": 200})
    assert (candidates.search(queries, 1)[1] == exact).mean() > narrow


def test_faiss_searches_what_has_codes_of_its_own(vectors: np.ndarray) -> None:
    stored = VectorSet(vectors, None, "fp32")
    for factory in ("Flat", "HNSW8,SQ8", "IVF16,Flat"):
        assert VectorIndex.build(vectors, metric="ip", factory=factory, threads=1).walk_over(stored) is None
