"""similar, search and recommend: planted neighbours, exclusion, cold starts, batches, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ArtifactError, DataError, KeyNotFound
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.candidates import first_unseen, num_fetched
from embedding_service.exact import exact_search
from embedding_service.ragged import Ragged
from embedding_service.retrieval import Results, Retriever
from embedding_service.towers import Tower, TowerInput, TowerSpec, pool, recency_weights
from tests.embedding_service.artifacts import DIM, HISTORY, NUM_CLUSTERS, NUM_ITEMS, publish, vocabulary

USER = TowerInput("user", "user", "user", DIM)
SHOP = TowerInput("shop", "shop", "shop", DIM)
LAST = TowerInput("last", "last_item", "input", DIM)
SPECS = {
    "history": TowerSpec((HISTORY,), DIM),
    "short": TowerSpec((TowerInput("history", "history", "input", DIM, 0.5, 3),), DIM, normalize=True),
    "sum": TowerSpec((HISTORY, USER, SHOP, LAST), DIM, normalize=True),
    "hidden": TowerSpec((HISTORY, USER, SHOP), DIM, hidden=(24,), normalize=True),
}
FACTORIES = ["Flat", "HNSW16", "HNSW16,SQ8", "IVF8,SQ8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def _retriever(folder: Path, name: str, **options: Any) -> Retriever:
    """A retriever over an artifact that is published once per module and name."""
    exact = options.pop("exact", False)
    if not (folder / name).exists():
        torch.manual_seed(0)
        publish(folder / name, **options)
    return Retriever(Artifact.open(folder / name), exact=exact, threads=1)


@pytest.fixture(scope="module", params=[*FACTORIES, "exact"])
def retriever(request: pytest.FixtureRequest, folder: Path) -> Retriever:
    """The same catalogue behind every kind of index, and exactly searched."""
    exact = request.param == "exact"
    name = "HNSW16" if exact else request.param
    return _retriever(folder, name.replace(",", "_"), factory=name, precision="fp16", exact=exact)


@pytest.fixture(scope="module", params=list(SPECS))
def tower_retriever(request: pytest.FixtureRequest, folder: Path) -> Retriever:
    return _retriever(folder, f"tower_{request.param}", spec=SPECS[request.param])


def _cluster(key: Any) -> int:
    return int(str(key)[1:]) % NUM_CLUSTERS


def _sessions(num: int, seed: int = 0) -> list[list[str]]:
    """Sessions of 0 to 12 items, repeats and unknown keys among them."""
    rng = np.random.default_rng(seed)
    return [[f"i{i:04d}" for i in rng.integers(0, NUM_ITEMS + 20, rng.integers(0, 13))] for _ in range(num)]


def test_threads_share_a_batch_without_a_trace(retriever: Retriever) -> None:
    """Several requests at once, each a batch of several shares, over one pool of threads."""
    together = Retriever(retriever.artifact, threads=3)
    batches = [_sessions(400, seed) for seed in range(4)]
    with ThreadPoolExecutor(len(batches)) as clients:
        answers = list(clients.map(lambda sessions: together.recommend(sessions, 7), batches))
    for sessions, answer in zip(batches, answers, strict=True):
        alone = Retriever(retriever.artifact, threads=1).recommend(sessions, 7)
        np.testing.assert_array_equal(answer.rows, alone.rows)
        np.testing.assert_array_equal(answer.scores, alone.scores)


def test_neighbours_are_those_planted(retriever: Retriever) -> None:
    results = retriever.similar(["i0007", "i0123"], 8)
    for key, keys in zip(["i0007", "i0123"], results.keys, strict=True):
        assert len(keys) == len(set(keys)) == 8
        assert key not in keys
        assert {_cluster(found) for found in keys} == {_cluster(key)}
    assert results.cold_start == [False, False]
    assert (np.diff(results.scores, axis=1) <= 0).all()


def test_recommendations_follow_the_session(retriever: Retriever) -> None:
    results = retriever.recommend([["i0003", "i0023"], ["i0011"]], 6)
    assert [{_cluster(key) for key in keys} for keys in results.keys] == [{3}, {11}]
    assert not {"i0003", "i0023", "i0011"} & {key for keys in results.keys for key in keys}


def test_scores_are_exact_and_equal_through_every_index(retriever: Retriever) -> None:
    sessions = [session for session in _sessions(30) if session]
    results = retriever.recommend(sessions, 10, exclude_seen=False)
    items = retriever.artifact.keys("item")
    rows = Ragged.from_lists([[row for row in items.rows(session) if row >= 0] for session in sessions])
    queries = retriever.encode_rows(rows, None, {})
    stored = retriever.artifact.vectors("item")
    for i, (found, scores) in enumerate(zip(results.rows, results.scores, strict=True)):
        if not results.cold_start[i]:
            expected = (stored.take(found).astype(np.float64) @ queries[i].astype(np.float64)).astype(np.float32)
            np.testing.assert_array_equal(scores, expected)
    _, truth = exact_search(queries, stored, 10)
    warm = ~np.array(results.cold_start)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(results.rows[warm], truth[warm], strict=True)])
    assert recall >= 0.9


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_single_and_batch_are_identical(retriever: Retriever, exclude_seen: bool) -> None:
    sessions = _sessions(60)
    batch = retriever.recommend(sessions, 10, exclude_seen=exclude_seen)
    for i, session in enumerate(sessions):
        _same(retriever.recommend([session], 10, exclude_seen=exclude_seen), batch, i)
    known = [key for session in sessions for key in session if key < f"i{NUM_ITEMS:04d}"][:80]
    batch = retriever.similar(known, 10)
    for i, key in enumerate(known):
        _same(retriever.similar([key], 10), batch, i)
    vectors = np.random.default_rng(0).normal(size=(80, DIM)).astype(np.float32)
    batch = retriever.search(vectors, 10)
    for i in range(80):
        _same(retriever.search(vectors[i], 10), batch, i)


def _same(single: Results, batch: Results, i: int) -> None:
    np.testing.assert_array_equal(single.rows[0], batch.rows[i])
    np.testing.assert_array_equal(single.scores[0], batch.scores[i])
    assert single.keys[0] == batch.keys[i]
    assert single.cold_start[0] == batch.cold_start[i]


def test_single_and_batch_are_identical_for_every_tower(tower_retriever: Retriever) -> None:
    sessions = _sessions(40)
    rng = np.random.default_rng(1)
    given = _given(tower_retriever, rng.integers(0, 60, 40), rng.integers(0, 40, 40))
    batch = tower_retriever.recommend(sessions, 10, **given)
    for i, session in enumerate(sessions):
        one: dict[str, Any] = {}
        if "users" in given:
            one = {"users": [given["users"][i]], "features": {"shop": [given["features"]["shop"][i]]}}
        _same(tower_retriever.recommend([session], 10, **one), batch, i)


def _given(retriever: Retriever, users: np.ndarray, shops: np.ndarray) -> dict[str, Any]:
    sources = {block.source for block in retriever.artifact.query_tower().spec.inputs}
    if "user" not in sources:
        return {}
    return {"users": [f"u{i}" if i < 55 else None for i in users], "features": {"shop": [int(i) for i in shops]}}


def test_query_vectors_are_those_of_the_tower(tower_retriever: Retriever) -> None:
    """Slow formula: look up every vector, pool with `towers.pool`, run `Tower`."""
    artifact = tower_retriever.artifact
    tower = artifact.query_tower()
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, NUM_ITEMS, n).tolist() for n in (4, 0, 1, 9, 2)]
    users, shops = np.array([3, 4, -1, 0, 49]), np.array([-1, 2, 3, 29, 0])
    blocks = {}
    for block in tower.spec.inputs:
        stored = artifact.vectors(block.vectors)
        vectors = torch.from_numpy(stored.take(np.arange(stored.rows)))
        if block.source in ("history", "last_item"):
            length = 1 if block.source == "last_item" else block.length or 99
            seen = Ragged.from_lists([items[-length:] for items in lists])
            weights = torch.from_numpy(recency_weights(seen.offsets, block.decay))
            blocks[block.name] = pool(
                vectors, torch.from_numpy(seen.values), torch.from_numpy(seen.offsets[:-1]), weights
            )
        else:
            rows = users if block.source == "user" else shops
            blocks[block.name] = torch.stack([vectors[row] if row >= 0 else torch.zeros(DIM) for row in rows])
    with torch.no_grad():
        expected = tower(blocks).numpy()
    found = tower_retriever.encode_rows(Ragged.from_lists(lists), users, {"shop": shops})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_unknown_items_are_passed_over(tower_retriever: Retriever) -> None:
    lists = [[3, -1, 7], [-1, 3, 7, -1]]
    nobody = np.array([-1, -1])
    found = tower_retriever.encode_rows(Ragged.from_lists(lists), nobody, {"shop": nobody})
    expected = tower_retriever.encode_rows(Ragged.from_lists([[3, 7], [3, 7]]), None, {})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_seen", [1, 5, 40, 200, NUM_ITEMS - 3])
def test_seen_items_are_left_out_and_k_is_filled(retriever: Retriever, num_seen: int) -> None:
    rng = np.random.default_rng(num_seen)
    session = [f"i{i:04d}" for i in rng.permutation(NUM_ITEMS)[:num_seen]]
    results = retriever.recommend([session * 2, session[:1]], 20)  # every item twice: seen once
    left = min(20, NUM_ITEMS - num_seen)
    assert [len(keys) for keys in results.keys] == [left, 20]
    assert not set(session) & set(results.keys[0])
    assert len(set(results.keys[0])) == left
    assert (results.rows[0, left:] == -1).all()
    assert np.isneginf(results.scores[0, left:]).all()


def test_exclusion_equals_exact_search_with_masked_items(folder: Path) -> None:
    """Slow formula: score all, strike out the seen, sort."""
    retriever = _retriever(folder, "HNSW16", exact=True)
    items, stored = retriever.artifact.keys("item"), retriever.artifact.vectors("item").take(np.arange(NUM_ITEMS))
    sessions = [session for session in _sessions(30, seed=5) if session]
    results = retriever.recommend(sessions, 15)
    for session, rows in zip(sessions, results.rows, strict=True):
        seen = [row for row in items.rows(session) if row >= 0]
        query = retriever.encode_rows(Ragged.from_lists([seen]), None, {})[0]
        scores = (stored.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
        scores[seen] = -np.inf
        assert rows.tolist() == sorted(range(NUM_ITEMS), key=lambda row: (-scores[row], row))[:15]


def test_k_beyond_the_catalogue_is_trimmed(retriever: Retriever) -> None:
    assert retriever.search(np.ones((2, DIM), np.float32), 10 * NUM_ITEMS).rows.shape == (2, NUM_ITEMS)
    assert len(set(retriever.similar(["i0000"], 10 * NUM_ITEMS).keys[0])) == NUM_ITEMS - 1
    cold = retriever.recommend([[]], 10 * NUM_ITEMS)
    assert cold.keys[0] == retriever.artifact.keys("item").keys.to_pylist()
    assert len(set(retriever.recommend([["i0001"]], 10 * NUM_ITEMS).keys[0])) == NUM_ITEMS - 1


def test_ties_go_to_the_more_frequent_item(folder: Path) -> None:
    """All item vectors equal: through a Flat index as exactly, single or batch, the first rows are the answer."""
    for exact in (False, True):
        retriever = _retriever(folder, "same", factory="Flat", same=True, exact=exact)
        for num in (1, 50):
            results = retriever.search(np.ones((num, DIM), np.float32), 10)
            np.testing.assert_array_equal(results.rows, np.broadcast_to(np.arange(10), (num, 10)))
        assert retriever.recommend([["i0000", "i0004"]], 3).keys == [["i0001", "i0002", "i0003"]]


def test_cold_starts_get_the_most_frequent_items(retriever: Retriever) -> None:
    results = retriever.recommend([["nobody"], [], ["i0001", "nobody"], ["i0001"]], 3)
    assert results.cold_start == [True, True, False, False]
    assert results.keys[0] == results.keys[1] == ["i0000", "i0001", "i0002"]
    assert results.scores[0].tolist() == [1000.0, 1000.0, 1000.0], "the scores of a cold start are counts"
    assert results.keys[2] == results.keys[3]


def test_a_trained_unknown_row_serves_queries_but_is_no_answer_and_no_knowledge(folder: Path) -> None:
    retriever = _retriever(folder, "unknown_row", unknown="row")
    assert retriever.artifact.vectors("item").rows == NUM_ITEMS + 1
    assert retriever.recommend([["nobody"]], 3).cold_start == [True]
    mixed, plain = retriever.recommend([["nobody", "i0001"], ["i0001"]], NUM_ITEMS + 10, exclude_seen=False).rows
    assert mixed.max() == NUM_ITEMS - 1
    assert mixed.tolist() != plain.tolist(), "its vector takes part in the query"
    with pytest.raises(KeyNotFound, match="'nobody' is not in the item vocabulary"):
        retriever.similar(["nobody"])


def test_users_and_features_alone_make_a_query(folder: Path) -> None:
    retriever = _retriever(folder, "tower_sum", spec=SPECS["sum"])
    results = retriever.recommend([[], [], []], 5, users=["u3", None, "nobody"], features={"shop": [None, 7, 99]})
    assert results.cold_start == [False, False, True]
    assert [{_cluster(key) for key in keys} for keys in results.keys[:2]] == [{3}, {7}]


def test_rows_and_keys_give_the_same_answers(tower_retriever: Retriever) -> None:
    """`recommend_rows`, which evaluation uses, is `recommend` without the keys."""
    items, sessions = tower_retriever.artifact.keys("item"), _sessions(30)
    rng = np.random.default_rng(1)
    users, shops = rng.integers(0, 50, 30), rng.integers(0, 30, 30)
    given = _given(tower_retriever, users, shops)
    results = tower_retriever.recommend(sessions, 12, **given)
    history = Ragged.from_lists([items.rows(session).tolist() for session in sessions])
    scores, rows = tower_retriever.recommend_rows(
        history, users if given else None, {"shop": shops} if given else {}, 12, history
    )
    np.testing.assert_array_equal(rows, results.rows)
    np.testing.assert_array_equal(scores, results.scores)


def test_integer_keys(folder: Path) -> None:
    retriever = _retriever(folder, "integers", integer_keys=True)
    assert {(int(key) - 10) % NUM_CLUSTERS for key in retriever.similar([13], 5).keys[0]} == {3}
    assert all(type(key) is int for key in retriever.recommend([[13, 33]], 5).keys[0])
    with pytest.raises(KeyNotFound, match="'13' is not in the item vocabulary"):
        retriever.similar(["13"], 5)


def test_wrong_requests_are_refused_with_the_reason(folder: Path) -> None:
    retriever = _retriever(folder, "HNSW16")
    wrong_k: list[Any] = [0, -1, 2.5, True, "3"]
    asks: list[Callable[[], object]] = [
        lambda: retriever.search(np.ones((1, DIM - 1), np.float32)),
        lambda: retriever.search(np.ones((1, 1, DIM), np.float32)),
        lambda: retriever.search(np.array([[np.nan] * DIM], np.float32)),
        lambda: retriever.search(np.vstack([np.ones(DIM), np.full(DIM, np.inf)])),
        lambda: retriever.search(np.ones((0, DIM), np.float32)),
        lambda: retriever.similar([]),
        lambda: retriever.recommend([]),
        lambda: retriever.recommend([["i0001"]], users=["u1"]),
        lambda: retriever.recommend([["i0001"]], features={"colour": [1]}),
        *(functools.partial(retriever.similar, ["i0001"], k) for k in wrong_k),
    ]
    reasons = [
        r"query vectors must be \[n, 16\]; got \[1, 15\]",
        r"query vectors must be \[n, 16\]; got \[1, 1, 16\]",
        "query vector 0 holds nan",
        "query vector 1 holds nan or an infinity",
        *["the batch is empty"] * 3,
        "queries have no 'user'; they have: sessions",
        "queries have no 'colour'",
        *["k must be a whole number of at least 1"] * 5,
    ]
    for ask, reason in zip(asks, reasons, strict=True):
        with pytest.raises(DataError, match=reason):
            ask()
    with pytest.raises(KeyNotFound, match="'nobody' is not in the item vocabulary"):
        retriever.similar(["i0001", "nobody"])
    with pytest.raises(DataError, match="1 values of 'user' were given for 2 sessions"):
        _retriever(folder, "tower_sum", spec=SPECS["sum"]).recommend([[], []], users=["u1"])


def test_an_artifact_without_parts_says_so(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path) as writer:
        writer.add_keys("word", vocabulary(["a", "b", "c"]))
        sink = writer.add_vectors("input", rows=3, dim=2, keys="word", precision="fp32")
        sink.write(0, np.eye(3, 2, dtype=np.float32))
        writer.add_index("similar", vectors="input", metric="cosine", recall_target=0.9, recall_k=2)
        writer.publish(lineage={}, figures={})
    retriever = Retriever(Artifact.open(tmp_path))
    assert retriever.similar(["a"], 2).keys == [["b", "c"]]
    with pytest.raises(KeyNotFound, match="not in the word vocabulary"):
        retriever.similar(["z"])
    with pytest.raises(ArtifactError, match="has no index 'recommend'"):
        retriever.recommend([["a"]])
    with pytest.raises(ArtifactError, match="has no query tower"):
        retriever.encode_rows(Ragged.from_lists([[0]]), None, {})


def test_a_tower_that_does_not_fit_the_index_is_refused(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path) as writer:
        writer.add_keys("item", vocabulary(["a", "b"]))
        for name, dim in (("item", 2), ("input", 3)):
            vectors = np.ones((2, dim), np.float32)
            writer.add_vectors(name, rows=2, dim=dim, keys="item", precision="fp32").write(0, vectors)
        spec = TowerSpec((TowerInput("history", "history", "input", 3),), 3)
        writer.set_query_tower(spec, Tower(spec).state_dict())
        writer.add_index("recommend", vectors="item", metric="ip", recall_target=0.9, recall_k=1)
        writer.publish(lineage={}, figures={})
    with pytest.raises(ArtifactError, match="queries have width 3, candidates 2"):
        Retriever(Artifact.open(tmp_path))


def test_first_unseen_and_its_fetch() -> None:
    rows = np.array([[4, 2, 9, 1], [4, 2, 9, 1], [1, 2, 3, 4]])
    scores = np.array([[4, 3, 2, 1]] * 3, np.float32)
    seen = Ragged.from_lists([[2, 2, -1], [], [1, 2, 3, 4, 50]])
    found_scores, found_rows = first_unseen(scores, rows, seen, 3)
    assert found_rows.tolist() == [[4, 9, 1], [4, 2, 9], [-1, -1, -1]]
    assert found_scores.tolist() == [[4, 2, 1], [4, 3, 2], [-np.inf] * 3]
    assert num_fetched(10, np.array([0, 1, 4, 5, 8, 9, 811])).tolist() == [10, 14, 14, 18, 18, 26, 1034]


FEATURES_SPEC = TowerSpec(
    (
        HISTORY,
        TowerInput("shops", "shops", "shop", DIM, encoder="mean"),
        TowerInput("age", "age", "", DIM, encoder="project", width=1),
        TowerInput("taste", "taste", "", DIM, encoder="project", width=3),
    ),
    DIM,
)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shops", 3, "'shops' takes a list of keys, or None, for each session"),
        ("shops", "3", "'shops' takes a list of keys"),
        ("age", "old", "'age' takes a finite number, or None"),
        ("age", [1.0, 2.0], "'age' takes a finite number"),
        ("age", float("inf"), "'age' takes a finite number"),
        ("taste", [1.0, 2.0], "'taste' takes 3 finite numbers"),
        ("taste", 1.0, "'taste' takes 3 finite numbers"),
        ("nothing", 1.0, "have no 'nothing'; they have: sessions, shops, age, taste"),
    ],
)
def test_features_of_another_kind_are_refused(folder: Path, name: str, value: Any, message: str) -> None:
    retriever = _retriever(folder, "tower_features", spec=FEATURES_SPEC)
    with pytest.raises(DataError, match=message):
        retriever.recommend([["i0001"], []], 3, features={name: [None, value]})


def test_a_list_of_shops_and_nothing_else_makes_a_query(folder: Path) -> None:
    retriever = _retriever(folder, "tower_features", spec=FEATURES_SPEC)
    results = retriever.recommend([[], [], []], 5, features={"shops": [[7, 27, 999], None, [999]]})
    assert results.cold_start == [False, True, True]
    assert {_cluster(key) for key in results.keys[0]} == {7}
    numbers = retriever.recommend([[], []], 5, features={"age": [0.5, None], "taste": [None, [0, 1, 2]]})
    assert numbers.cold_start == [False, False]
