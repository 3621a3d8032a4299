"""One contract for every kind of index, tuning to a recall target, and refusals."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from cluster.errors import ArtifactError, SettingError
from embedding_service import index as index_module
from embedding_service import tuning
from embedding_service.candidates import Candidates
from embedding_service.exact import ArrayVectors, Metric, exact_search
from embedding_service.index import VectorIndex, nearest_rows
from embedding_service.tuning import Queries, RecallTest, tuned_index
from embedding_service.vectors import VectorSet
from tests.embedding_service.artifacts import clustered

ROWS, DIM = 2500, 16
KINDS = ["Flat", "HNSW16", "HNSW16,SQ8", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8x4,RFlat", "RR16,IVF16,SQ8", "SQ8"]
KINDS += ["IVF16,PQ8x4fs", "PQ8x4fs", "IVF16_HNSW8,SQ8"]  # these lose much, and are rescored


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Clusters with a common direction and lengths that differ: what a plain graph under inner product is bad at."""
    lengths = np.random.default_rng(3).lognormal(0, 0.4, (ROWS, 1))
    return np.asarray((clustered(ROWS, DIM, clusters=40, seed=0) + 1.0) * lengths, np.float32)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return clustered(60, DIM, clusters=40, seed=0) + np.float32(0.3)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_every_kind_meets_the_contract(
    kind: str, metric: Metric, vectors: np.ndarray, queries: np.ndarray, tmp_path: Path
) -> None:
    index, record = tuned_index(
        vectors, metric=metric, factory=kind, recall_target=0.95, recall_k=10, queries=queries, threads=1
    )
    assert (index.rows, index.dim, index.metric, index.factory) == (ROWS, DIM, metric, kind)
    recall = record["recall"]
    assert recall["met"] == (recall["value"] >= 0.95)
    assert recall["value"] >= 0.95
    assert (recall["k"], recall["queries"], recall["num_queries"]) == (10, "given", 60)
    assert recall["half_width"] <= 1.96 * (0.95 * 0.05 / 60) ** 0.5
    assert record["build_seconds"] > 0
    _check_curve(record["curve"], index, recall["value"])

    scores, rows = index.search(queries, 10)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    assert scores.shape == rows.shape == (60, 10)
    assert (np.diff(scores, axis=1) <= 1e-5).all()
    truth, _ = exact_search(queries, vectors, ROWS, metric=metric)
    assert all(len(set(line)) == 10 for line in rows.tolist())

    # the recorded recall is that of what is served: (rows whose exact score is among the best 10) / 10
    exact, _ = exact_search(queries, vectors, 10, metric=metric)
    every = np.asarray(_all_scores(queries, vectors, metric))
    _, served = Candidates(VectorSet(vectors, None, "fp32"), metric, index).search(queries, 10)
    hits = np.take_along_axis(every, served, 1) >= exact[:, -1:] - 1e-6
    assert hits.mean() == pytest.approx(recall["value"], abs=1e-9)
    # the index's own scores are the metric's, up to quantisation
    error = np.abs(scores - np.take_along_axis(every, rows, 1))
    assert error.max() <= (0.5 if "PQ" in kind and "RFlat" not in kind else 0.02) * np.abs(truth).max()

    index.save(tmp_path / "x.faiss")
    loaded = VectorIndex.load(tmp_path / "x.faiss")
    again_scores, again_rows = loaded.search(queries, 10)
    np.testing.assert_array_equal(again_rows, rows)
    np.testing.assert_array_equal(again_scores, scores)
    assert (loaded.parameters, loaded.arrangement) == (index.parameters, index.arrangement)
    assert {file.name for file in tmp_path.iterdir()} == {"x.faiss", "x.faiss.json"}


def _check_curve(curve: list[dict[str, Any]], index: VectorIndex, recall: float) -> None:
    """Every point differs in one parameter, which rises, and recall with it; the chosen one is among them."""
    assert dict(index.parameters) in [point["parameters"] for point in curve]
    assert [point["recall"] for point in curve if point["parameters"] == index.parameters] == [recall]
    assert all(point["microseconds"] > 0 for point in curve)
    if index.exhaustive:
        assert len(curve) == 1
        return
    name = index.knob[0] if index.knob else "rescore"
    values = [point["parameters"][name] for point in curve]
    assert values == sorted(set(values))
    recalls = [point["recall"] for point in curve]
    assert all(later >= earlier - 0.02 for earlier, later in itertools.pairwise(recalls))
    assert len({tuple(sorted({**point["parameters"], name: 0}.items())) for point in curve}) == 1


def _all_scores(queries: np.ndarray, vectors: np.ndarray, metric: Metric) -> np.ndarray:
    q, x = queries.astype(np.float64), vectors.astype(np.float64)
    if metric == "cosine":
        q, x = q / np.linalg.norm(q, axis=1, keepdims=True), x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray((q @ x.T).astype(np.float32))


@pytest.mark.parametrize("arrangement", ["plain", "centred", "augmented"])
def test_every_arrangement_gives_inner_products(
    arrangement: index_module.Arrangement, vectors: np.ndarray, queries: np.ndarray
) -> None:
    index = VectorIndex.build(vectors, metric="ip", factory="HNSW16", arrangement=arrangement, threads=1)
    index.set_parameters({"efSearch": 2500})
    scores, rows = index.search(queries, 5)
    np.testing.assert_allclose(
        scores, np.take_along_axis(_all_scores(queries, vectors, "ip"), rows, 1), rtol=1e-3, atol=1e-3
    )


def test_a_graph_over_unequal_lengths_needs_its_arrangement(vectors: np.ndarray, queries: np.ndarray) -> None:
    """Planted: a large common direction. The plain graph loses itself in the longest vectors, the centred does not."""
    shifted = vectors + np.float32(20.0)
    recall = {}
    for arrangement in ("plain", "centred"):
        index = VectorIndex.build(shifted, metric="ip", factory="HNSW8", arrangement=arrangement, threads=1)
        index.set_parameters({"efSearch": 32})
        found, (_, true) = index.search(queries, 10)[1], exact_search(queries, shifted, 10)
        recall[arrangement] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, true, strict=True)])
    assert recall["centred"] > recall["plain"] + 0.1


def test_the_other_arrangement_is_taken_where_it_is_cheaper(
    vectors: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def tune(index: VectorIndex, test: object, target: float) -> float:
        asked.append(index.arrangement)
        index.set_parameters({"efSearch": {"centred": 1024, "augmented": 64}[index.arrangement]})
        return 0.97

    monkeypatch.setattr(tuning, "_tune", tune)
    options = {"factory": "HNSW8", "recall_target": 0.95, "recall_k": 10, "threads": 1}
    index, _ = tuned_index(vectors[:500], metric="ip", queries=queries, **options)  # type: ignore[arg-type]
    assert asked == ["centred", "augmented"]
    assert index.arrangement == "augmented"


def test_stored_vectors_are_the_queries_where_none_are_given(vectors: np.ndarray) -> None:
    index, record = tuned_index(vectors, metric="cosine", factory="Flat", recall_target=0.9, recall_k=5, threads=1)
    assert record["recall"] == {
        "value": 1.0, "half_width": 0.0, "k": 5, "target": 0.9, "met": True, "queries": "stored", "num_queries": 1000
    }  # fmt: skip
    assert index.parameters == {}


def test_a_target_out_of_reach_is_recorded_and_warned_of(
    vectors: np.ndarray, queries: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="embedding_service.tuning"):
        _, record = tuned_index(
            vectors, metric="ip", factory="PQ1x2", recall_target=0.99, recall_k=10, queries=queries, threads=1
        )
    assert not record["recall"]["met"]
    assert record["recall"]["value"] < 0.9
    assert "not the target 0.99" in caplog.text


@pytest.mark.parametrize("factory", ["IVF64,Flat", "HNSW8", "IVF64,PQ8x4fs"])
def test_tuning_takes_the_least_value_that_suffices(factory: str, vectors: np.ndarray) -> None:
    """On all the queries that it is given, and for the depth that it chose."""
    queries = clustered(1500, DIM, clusters=40, seed=0) + np.float32(0.3)
    stored = VectorSet(vectors, None, "fp32")
    for target in (0.6, 0.97):
        index, record = tuned_index(
            vectors, metric="ip", factory=factory, recall_target=target, recall_k=10, queries=queries, threads=1
        )
        test = RecallTest(stored, "ip", 10, Queries(queries), 1)
        assert index.knob is not None
        name = index.knob[0]
        least = {"nprobe": 1, "efSearch": 10}[name]
        assert record["recall"]["value"] == pytest.approx(test.recall(index), abs=1e-12)
        assert record["recall"]["value"] >= target
        if index.parameters[name] > least:
            index.set_parameters({name: index.parameters[name] - 1})
            assert test.recall(index) < target


def test_the_sampling_error_is_the_stated_one(vectors: np.ndarray) -> None:
    """The target tuned on some queries holds on others within the two samples' errors, at 3 standard errors."""
    queries = clustered(6000, DIM, clusters=40, seed=0) + np.float32(0.3)
    index, record = tuned_index(
        vectors, metric="ip", factory="IVF64,SQ8", recall_target=0.9, recall_k=10, queries=queries[:3000], threads=1
    )
    recalls = RecallTest(VectorSet(vectors, None, "fp32"), "ip", 10, Queries(queries[3000:]), 1).recalls(index)
    error = recalls.std() / len(recalls) ** 0.5
    assert record["recall"]["half_width"] == pytest.approx(1.96 * error, rel=0.2)
    assert abs(recalls.mean() - record["recall"]["value"]) <= 3 * error * 2**0.5


def test_a_deeper_look_makes_up_for_lossy_codes(vectors: np.ndarray, queries: np.ndarray) -> None:
    index = VectorIndex.build(vectors, metric="ip", factory="PQ4x4", threads=1)
    test = RecallTest(VectorSet(vectors, None, "fp32"), "ip", 10, Queries(queries), 1)
    recalls = []
    for depth in (1, 4, 16, 64):
        index.set_parameters({"rescore": depth})
        recalls.append(test.recall(index))
    assert recalls == sorted(recalls)
    assert recalls[-1] > recalls[0] + 0.3
    with pytest.raises(ArtifactError, match=r"rescore 0 is not in 1\.\.1024"):
        index.set_parameters({"rescore": 0})


def test_rows_that_ask_for_their_neighbours_are_not_their_own_answers(vectors: np.ndarray) -> None:
    rows = np.arange(0, ROWS, 7)
    stored = VectorSet(vectors, None, "fp32")
    _, record = tuned_index(
        stored, metric="cosine", factory="Flat", recall_target=0.9, recall_k=5, threads=1,
        queries=Queries.of_rows(stored, rows, "validation"),
    )  # fmt: skip
    assert (record["recall"]["value"], record["recall"]["queries"]) == (1.0, "validation")
    assert record["recall"]["num_queries"] == len(rows)
    test = RecallTest(stored, "cosine", 5, Queries.of_rows(stored, rows), 1)
    best, found = exact_search(vectors[rows], vectors, 6, metric="cosine")
    np.testing.assert_array_equal(found[:, 0], rows)
    np.testing.assert_allclose(test.threshold, best[:, 5], rtol=1e-6)


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_nearest_rows_are_those_of_exact_search(
    metric: Metric, vectors: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "ADDED_ROWS", 700)  # chunks that are merged
    found = nearest_rows(ArrayVectors(vectors), queries, 10, metric)
    np.testing.assert_array_equal(found, exact_search(queries, vectors, 18, metric=metric)[1])
    assert nearest_rows(ArrayVectors(vectors[:12]), queries, 10, metric).shape == (60, 12)


def _recall(index: VectorIndex, vectors: np.ndarray, queries: np.ndarray) -> float:
    found, (_, true) = index.search(queries, 10)[1], exact_search(queries, vectors, 10)
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, true, strict=True)]))


def test_ties_count_as_found(kind: str, queries: np.ndarray) -> None:
    """All vectors equal: whichever rows an index returns, they are as good as exact search's, and all different."""
    same = np.ones((700, DIM), np.float32)
    index, record = tuned_index(
        same, metric="ip", factory=kind, recall_target=0.9, recall_k=7, queries=queries, threads=1
    )
    assert record["recall"]["value"] == 1.0
    scores, rows = Candidates(VectorSet(same, None, "fp32"), "ip", index).search(queries, 7)
    assert (scores == scores[:, :1]).all()
    assert all(len(set(line)) == 7 for line in rows.tolist())


def test_building_reads_bounded_chunks(vectors: np.ndarray) -> None:
    class Counting(ArrayVectors):
        largest = 0

        def take(self, rows: np.ndarray) -> np.ndarray:
            Counting.largest = max(Counting.largest, len(rows))
            return super().take(rows)

        def chunks(self, size: int = 300):  # type: ignore[no-untyped-def]
            return super().chunks(300)

    index = VectorIndex.build(Counting(vectors), metric="ip", factory="HNSW8", threads=1)
    assert index.rows == ROWS
    assert Counting.largest == 0


def test_padding_where_the_index_finds_too_few(vectors: np.ndarray) -> None:
    index = VectorIndex.build(vectors, metric="ip", factory="IVF16,Flat", threads=1)
    scores, rows = index.search(vectors[:3], 2000)
    assert (rows[:, -1] == -1).all()
    assert np.isneginf(scores[:, -1]).all()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Magic7", "cannot make 'Magic7' for 16 dimensions and inner product: could not parse index string Magic7"),
        ("", "cannot make '' for 16 dimensions"),
        ("PQ7", "cannot make 'PQ7' for 16 dimensions and inner product: The dimension of the vector (d) should"),
        ("HNSW32,xx", "and inner product: could not parse HNSW code description xx in HNSW32,xx"),
        ("IVF16,PQ5", "cannot make 'IVF16,PQ5' for 16 dimensions"),
        ("IVF4096,Flat", "wants 39 vectors for each, 159744 in all; there are 2500: take at most 64 lists"),
        ("OPQ8,IVF16,PQ8x4", "256 centroids and wants 39 vectors for each, 9984 in all; there are 2500"),
        ("PQ8", "256 centroids and wants 39 vectors for each, 9984 in all; there are 2500"),
        ("HNSW16,PQ8", "for another metric"),
        ("L2norm,Flat", "changes inner products"),
        ("PCA12,Flat", "changes inner products"),
        ("IDMap,Flat", "no ids"),
    ],
)
def test_factories_that_cannot_be_honoured_are_refused(vectors: np.ndarray, factory: str, message: str) -> None:
    with pytest.raises(SettingError, match=r"setting export\.index: ") as info:
        VectorIndex.build(vectors, metric="ip", factory=factory, threads=1)
    assert message in str(info.value)


def test_the_gpu_is_taken_where_it_can_be(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FAISS's GPU functions played by others: which kinds are moved, the limit on k, the way back to a file."""
    moved: list[str] = []
    back: list[str] = []

    def to_cpu(index: faiss.Index) -> faiss.Index:
        back.append(type(index).__name__)
        return index

    monkeypatch.setattr(index_module, "MAX_GPU_K", 100)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuParameterSpace", faiss.ParameterSpace, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", to_cpu, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
    halved: list[bool] = []

    def to_gpu(resources: object, device: int, index: faiss.Index, options: SimpleNamespace) -> faiss.Index:
        moved.append(type(index).__name__)
        halved.append(options.useFloat16)
        return index

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    for factory in ("Flat", "HNSW8", "IVF16,Flat", "IVF16,SQ8"):
        index = VectorIndex.build(vectors, metric="ip", factory=factory, threads=1)
        index.set_parameters({"nprobe": 16} if "IVF" in factory else {})
        scores, rows = index.search(vectors[:2], 120)
        limited = factory != "HNSW8"
        assert (rows[:, 100:] == -1).all() == limited
        assert np.isneginf(scores[:, 100:]).all() == limited
        assert (rows[:, :100] >= 0).all()
    assert moved == ["IndexFlat", "IndexIVFFlat", "IndexIVFScalarQuantizer"]
    assert halved == [False, True, True], "an exhaustive index stays exact"
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "x.faiss")
    assert back == ["IndexIVFScalarQuantizer"]


def test_a_gpu_that_is_asked_for_and_cannot_be_had_is_refused(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(SettingError, match=r"export\.index_device: gpu, but FAISS sees no GPU here.*set auto"):
        VectorIndex.build(vectors, metric="ip", factory="Flat", threads=1, device="gpu")
    VectorIndex.build(vectors, metric="ip", factory="Flat", threads=1).save(tmp_path / "x")
    with pytest.raises(SettingError, match="FAISS sees no GPU here"):
        VectorIndex.load(tmp_path / "x", device="gpu")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    with pytest.raises(SettingError, match="FAISS has no GPU form of HNSW8; it has Flat, and IVF"):
        VectorIndex.build(vectors, metric="ip", factory="HNSW8", threads=1, device="gpu")
    assert not VectorIndex.build(vectors, metric="ip", factory="Flat", threads=1, device="cpu").on_gpu


def test_few_queries_are_searched_by_one_thread(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    index = VectorIndex.build(vectors, metric="ip", factory="Flat", threads=1)
    used = []

    class Noting:
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            used.append(faiss.omp_get_max_threads())
            if k > 5:
                raise RuntimeError("too many")
            return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)

    monkeypatch.setattr(index, "_index", Noting())
    faiss.omp_set_num_threads(3)
    try:
        index.search_rows(vectors[:33], 5)
        with pytest.raises(RuntimeError):
            index.search_rows(vectors[:1], 6)
        assert (used, faiss.omp_get_max_threads()) == ([1, 1], 3)
    finally:
        faiss.omp_set_num_threads(1)


def test_wrong_queries_and_parameters_are_refused(vectors: np.ndarray) -> None:
    index = VectorIndex.build(vectors[:100], metric="ip", factory="Flat", threads=1)
    with pytest.raises(ValueError, match=r"queries must be \[n, 16\]; got \[2, 15\]"):
        index.search(np.zeros((2, 15), np.float32), 1)
    with pytest.raises(ArtifactError, match="has no search parameter 'efSearch'"):
        index.set_parameters({"efSearch": 3})


def test_damaged_files_are_refused_by_name(vectors: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.faiss"
    VectorIndex.build(vectors[:100], metric="ip", factory="HNSW8", threads=1).save(path)
    good, settings = path.read_bytes(), json.loads((tmp_path / "a.faiss.json").read_bytes())

    for damaged in (b"", b"no index", good[: len(good) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"a\.faiss: is not a readable FAISS index"):
            VectorIndex.load(path)
    path.write_bytes(good)
    wrong: list[tuple[dict[str, object], str]] = [
        ({"metric": "l1"}, "metric 'l1'"),
        ({"arrangement": "plain"}, "a centre belongs to"),
        ({"arrangement": "augmented"}, "metric is not the one"),
        ({"centre": [0.0] * 3}, "does not have the index's dimension 8|dimension 16"),
        ({"parameters": {"nprobe": 3}}, "no search parameter 'nprobe'"),
        ({"parameters": [1]}, "is not an index's settings file"),
    ]
    for change, message in wrong:
        (tmp_path / "a.faiss.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ArtifactError, match=message):
            VectorIndex.load(path)
    (tmp_path / "a.faiss.json").unlink()
    with pytest.raises(ArtifactError, match=r"a\.faiss\.json: is not an index's settings file"):
        VectorIndex.load(path)
