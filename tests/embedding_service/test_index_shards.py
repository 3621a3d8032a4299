"""An index in shards answers as the same index in one piece: merging, empty shards, what is seen, filters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ArtifactError
from embedding_service.admission import admit
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.candidates import Candidates
from embedding_service.exact import ArrayVectors, Metric, exact_search
from embedding_service.gates import Gates
from embedding_service.index_shards import Question, ShardedCandidates, local, merge, packed, shards_of, unpacked
from embedding_service.overlay import Overlay
from embedding_service.ragged import Ragged
from embedding_service.retrieval import Retriever
from embedding_service.selective import SelectiveRetriever, Wishes
from embedding_service.tuning import Queries
from embedding_service.vectors import VectorSet, row_ranges
from tests.embedding_service.artifacts import DIM, NUM_ITEMS, clustered, publish, vocabulary

KEYS = [f"i{row:04d}" for row in range(NUM_ITEMS)]
SESSIONS = [["i0003", "i0023"], ["i0499"], ["nobody"], [], KEYS[:400], ["i0250", "i0250", "i0000"]]


@st.composite
def parts_found(draw: st.DrawFn) -> tuple[list[list[tuple[float, int]]], int]:
    """What parts have found for one query, with many ties, none, and rows that belong to one part each."""
    scored = draw(st.lists(st.sampled_from([-np.inf, -1.5, 0.0, 0.5, 2.0, np.inf]), max_size=24))
    ends = sorted(draw(st.lists(st.integers(0, len(scored)), max_size=4)))
    bounds = [0, *ends, len(scored)]
    parts = [
        sorted(((scored[row], row) for row in range(start, stop)), key=lambda one: (-one[0], one[1]))
        for start, stop in itertools.pairwise(bounds)
    ]
    return parts, draw(st.integers(1, 12))


@given(parts_found(), st.integers(0, 3))
def test_merging_is_sorting_all(found: tuple[list[list[tuple[float, int]]], int], padding: int) -> None:
    parts, k = found
    expected = sorted((one for part in parts for one in part), key=lambda one: (-one[0], one[1]))[:k]
    arrays = []
    for part in parts:
        best = [*part[:k], *[(-np.inf, -1)] * padding]  # what a part has not found
        arrays.append((np.array([[s for s, _ in best]], np.float32), np.array([[r for _, r in best]], np.int64)))
    scores, rows = merge(arrays, 1, k)
    assert (scores.dtype, rows.dtype, scores.shape, rows.shape) == (np.float32, np.int64, (1, k), (1, k))
    missing = k - len(expected)
    assert rows[0].tolist() == [row for _, row in expected] + [-1] * missing
    assert scores[0].tolist() == [score for score, _ in expected] + [-np.inf] * missing


def test_queries_are_merged_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (50, 30)).astype(np.float32)
    parts = []
    for part in row_ranges(30, 4):
        order = np.argsort(-scores[:, part.start : part.stop], axis=1, kind="stable")
        parts.append((np.take_along_axis(scores[:, part.start : part.stop], order, 1), order + part.start))
    found, rows = merge(parts, 50, 11)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :11]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, 1))


@given(st.integers(0, 100), st.integers(1, 12))
def test_ranges_cover_the_rows_and_differ_by_one_at_most(rows: int, shards: int) -> None:
    ranges = row_ranges(rows, shards)
    assert [row for part in ranges for row in part] == list(range(rows))
    assert len(ranges) == shards
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.lists(st.booleans(), max_size=300).flatmap(lambda bits: st.tuples(st.just(bits), st.integers(0, 500))))
def test_a_mask_is_unpacked_as_it_was(drawn: tuple[list[bool], int]) -> None:
    """Of all kinds: all rows, all but few, any."""
    bits, behind = drawn
    mask = np.array([*bits, *[True] * behind], np.bool_)
    code = packed(mask)
    if code is None:
        assert mask.all()
        return
    assert code.nbytes <= len(mask) // 8 + 1
    np.testing.assert_array_equal(unpacked(code, len(mask)), mask)


def questioned(parts: list[Candidates]) -> Callable[[list[Question]], list[tuple[np.ndarray, np.ndarray]]]:
    return lambda questions: [question.answer(part) for question, part in zip(questions, parts, strict=True)]


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("sizes", [(40,), (13, 27), (13, 0, 27), (3, 36, 1), (0, 40, 0)])
def test_exact_search_by_range_is_exact_search(metric: Metric, sizes: tuple[int, ...]) -> None:
    """With k above the rows of a shard, empty shards, equal vectors in several shards, and rows that were seen."""
    vectors = clustered(40, 6, clusters=7, seed=0)
    vectors[30:] = vectors[:10]
    stored, ends = VectorSet(vectors, None, "fp32"), np.cumsum([0, *sizes])
    ranges = [range(int(start), int(stop)) for start, stop in itertools.pairwise(ends)]
    sharded = ShardedCandidates(
        stored, ranges, questioned([Candidates(stored.part(one), metric, None) for one in ranges])
    )  # fmt: skip
    whole = Candidates(stored, metric, None)
    queries = vectors[:9]
    rng = np.random.default_rng(1)
    seen = Ragged.from_lists([rng.integers(-1, 40, number).tolist() for number in (0, 1, 2, 5, 9, 20, 30, 39, 0)])
    mask = rng.random(40) < 0.6
    for k in (1, 10, 30, 40, 99):
        for asked in (None, seen):
            for got, expected in zip(
                (*sharded.search_unseen(queries, k, asked), *sharded.search_allowed(queries, k, mask, asked)),
                (*whole.search_unseen(queries, k, asked), *whole.search_allowed(queries, k, mask, asked)),
                strict=True,
            ):
                np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(sharded.search(queries, 40)[1], exact_search(queries, vectors, 40, metric=metric)[1])


def test_a_shard_is_told_which_queries_are_its_own_rows() -> None:
    stored = VectorSet(clustered(10, 4, clusters=3, seed=0), None, "fp32")
    ranges, told = [range(0, 4), range(4, 10)], []

    def noted(questions: list[Question]) -> list[tuple[np.ndarray, np.ndarray]]:
        told.extend(None if one.own is None else one.own.tolist() for one in questions)
        return questioned([Candidates(stored.part(one), "cosine", None) for one in ranges])(questions)

    sharded = ShardedCandidates(stored, ranges, noted)
    sharded.search_unseen(stored.take(np.array([3, 4, 9, 0])), 2, None, np.array([3, 4, 9, -1]))
    sharded.search(stored.take(np.array([3])), 2)
    assert told == [[3, -1, -1, -1], [-1, 0, 5, -1], None, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    for shards in (1, 2, 3):
        publish(root / f"Flat{shards}", version="v", factory="Flat", precision="int8", shards=shards, unknown="row")
    publish(root / "HNSW3", version="v", factory="HNSW16", shards=3)
    return root


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_flat_shards_answer_as_one_index(folder: Path, shards: int) -> None:
    whole, parts = (
        Retriever(Artifact.open(folder / name / "v"), threads=1) for name in ("Flat1", f"Flat{shards}")
    )  # k above a shard's 166 rows, and above all
    assert len(parts.artifact.index_ranges("recommend")) == shards
    for k in (1, 20, 200, 600):
        pairs = [
            (one.similar(KEYS[::50], k), one.recommend(SESSIONS, k), one.recommend(SESSIONS, k, exclude_seen=False))
            for one in (whole, parts)
        ]
        for expected, got in zip(*pairs, strict=True):
            np.testing.assert_array_equal(got.rows, expected.rows)
            np.testing.assert_array_equal(got.scores, expected.scores)
            assert got.keys == expected.keys


@pytest.mark.parametrize("shards", [2, 3])
def test_filters_changes_and_diversity_go_to_the_shards(folder: Path, shards: int, tmp_path: Path) -> None:
    answers = []
    for name in ("Flat1", f"Flat{shards}"):
        overlay = Overlay(tmp_path / f"{name}.json")
        selective = SelectiveRetriever(Retriever(Artifact.open(folder / name / "v"), threads=1), overlay)
        overlay.add([selective.place("new", like=["i0003"], attributes={})])
        overlay.delete(["i0023", "i0043"])
        found = []
        for wishes in (
            Wishes(),
            Wishes(allow=KEYS[160:175]),
            Wishes(allow=[*KEYS[::3], "new"], deny=KEYS[:9]),
            Wishes(diversity=0.5),
            Wishes(allow=[]),
        ):
            for chosen in (
                selective.recommend(SESSIONS, 12, wishes=wishes),
                selective.similar(["i0003", "new"], 12, wishes),
                selective.search(clustered(3, DIM, clusters=3, seed=5), 400, wishes),
            ):
                found.append((chosen.keys, [line.tolist() for line in chosen.lists], chosen.cold_start))
        answers.append(found)
    assert answers[1] == answers[0]
    assert any("new" in keys for keys in answers[0][0][0])


def test_graphs_in_shards_reach_the_target_together(folder: Path) -> None:
    artifact = Artifact.open(folder / "HNSW3" / "v")
    entry = artifact.manifest["indexes"]["recommend"]
    assert [shard["rows"] for shard in entry["shards"]] == [166, 167, 167]
    assert entry["recall"]["value"] == min(shard["recall"]["value"] for shard in entry["shards"])
    assert entry["bytes"] == sum(shard["bytes"] for shard in entry["shards"])
    found = Retriever(artifact, threads=1).similar(KEYS, 10)
    truth = Retriever(artifact, exact=True).similar(KEYS, 10)
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(found.keys, truth.keys, strict=True)]
    assert np.mean(shared) >= 0.95
    assert admit(artifact.path, None, Gates())[0].passed


def test_neighbouring_shards_are_held_together(folder: Path) -> None:
    artifact = Artifact.open(folder / "HNSW3" / "v")
    assert [list(shards_of(artifact, "similar", number, 2)) for number in range(2)] == [[0], [1, 2]]
    both = local(artifact, "similar", shards=range(1, 3))
    queries = artifact.vectors("input").take(np.array([200, 400]))
    assert (both.rows, both.search(queries, 1)[1].tolist()) == (334, [[200 - 166], [400 - 166]])


def test_too_few_shards_are_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'similar' is in one piece .* export\.index_shards = 2.*shards = 0$"):
        shards_of(Artifact.open(folder / "Flat1" / "v"), "similar", 0, 2)
    with pytest.raises(ArtifactError, match=r"is in 3 shards and cannot be divided among 4"):
        shards_of(Artifact.open(folder / "Flat3" / "v"), "similar", 0, 4)


def test_a_manifest_whose_shards_do_not_add_up_is_refused(tmp_path: Path) -> None:
    version = publish(tmp_path, version="v", num_items=60, shards=2)
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["indexes"]["similar"]["shards"][1]["rows"] = 31
    (version / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"indexes\.similar: its shards do not make up its 60 rows"):
        Artifact.open(version)


def test_a_shard_that_was_built_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedding_service import artifact_writer as writer_module

    built: list[int] = []
    original = writer_module.tuned_index

    def building(source: VectorSet, **options: object) -> object:
        if len(built) == 2:
            raise KeyboardInterrupt
        built.append(source.rows)
        return original(source, **options)

    monkeypatch.setattr(writer_module, "tuned_index", building)
    (tmp_path / "kept").mkdir()
    for attempt in range(2):
        with ArtifactWriter(tmp_path / "root") as writer:
            writer.add_keys("item", vocabulary(KEYS[:90]))
            writer.add_vectors("item", rows=90, dim=DIM, keys="item", precision="fp32").write(
                0, clustered(90, DIM, clusters=9, seed=0)
            )
            asked = {"vectors": "item", "metric": "ip", "recall_target": 0.9, "recall_k": 5}
            if attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    writer.add_index("recommend", **asked, shards=3, keep=tmp_path / "kept")
            else:
                built.clear()
                writer.add_index("recommend", **asked, shards=3, keep=tmp_path / "kept")
    assert built == [30]


def test_own_rows_are_counted_from_the_shard() -> None:
    vectors = VectorSet(clustered(9, 4, clusters=3, seed=0), None, "fp32")
    part = Queries.of_rows(vectors, np.array([0, 4, 8])).within(range(3, 6))
    assert part.own is not None
    assert part.own.tolist() == [-1, 1, -1]
    np.testing.assert_array_equal(part.vectors, ArrayVectors(vectors.take(np.arange(9))).take(np.array([0, 4, 8])))
