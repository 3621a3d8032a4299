"""Towers from training to serving: every history encoder and kind of feature gives the same vectors in both, and new
items are placed by their features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.config import Config, load_config
from cluster.rank import current_rank, process_group
from embedding_service.artifact import Artifact
from embedding_service.http_artifact import http_api
from embedding_service.ragged import Ragged, take_values
from embedding_service.retrieval import Retriever
from embedding_service.towers import Given, InputRows, weighted
from tests.embedding_service.test_http_api import ask
from tests.ranks import run_on_ranks
from tests.trainers.runs import small_config, write_sessions
from trainers.evaluate import evaluate, load_trained
from trainers.export import export_run
from trainers.loop import train
from trainers.prepare import load_prepared, query_values
from trainers.session_batch import Field, decode_column, feature_type
from trainers.two_tower import TwoTower

NUM_GROUPS = 12
MOODS = feature_type(pa.map_(pa.string(), pa.float32()))
ENCODERS: dict[str, dict[str, Any]] = {
    "recency": {"query": ["history", "user"]},
    "mean": {"history_encoder": "mean", "list_pooling": "sum", "hidden": [12]},
    "last": {"history_encoder": "last", "share_items": False},
    "attention": {"history_encoder": "attention", "history_length": 5, "normalize": False},
    "gru": {"history_encoder": "gru", "history_length": 5, "hidden": [12]},
    "hashed": {"query": ["history", "user"], "hidden": [12]},
    "compressed": {"query": ["history", "user"], "history_encoder": "attention", "share_items": False},
}
TABLES: dict[str, dict[str, Any]] = {  # of an encoder of the same name: tables whose keys share rows
    "hashed": {
        "item": {"map": "head_tail", "compression": 1.5, "learned_weights": True},
        "user": {"map": "hashed", "rows": 200, "vocabulary": False},
        "query_country": {"map": "hashed", "rows": 40, "vocabulary": False, "hashes": 3, "learned_weights": True},
        "query_moods": {"map": "hashed", "rows": 20, "vocabulary": False},
        "query_tags": {"map": "hashed", "rows": 30, "vocabulary": False, "dim": 12, "precision": "fp16"},
        "item_kind": {"map": "quotient_remainder", "rows": 8, "combine": "sum"},
    },
    "compressed": {
        "item": {"map": "quotient_remainder", "compression": 1.5},
        "user": {"map": "head_tail", "compression": 4, "hashes": 3, "learned_weights": True},
    },
}
FEATURES = ("country", "tags", "moods", "age", "taste")


def query_columns(group: np.ndarray, seed: int) -> dict[str, pa.Array]:
    """A feature column of every kind that tells something of the group [n], with some unknown values."""
    random = np.random.default_rng(seed)
    unknown = random.random((5, len(group))) < 0.1
    moods = [[(f"mood {g % 6}", 0.5 + g), ("none", -0.5)][: random.integers(1, 3)] for g in group.tolist()]
    tags = [[f"tag {g % 4}"] * random.integers(1, 3) + ["other"] * random.integers(0, 2) for g in group.tolist()]
    taste = np.stack([group % 2, group % 3, group % 5], 1) + random.normal(size=(len(group), 3)) * 0.1
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(taste.ravel(), pa.float64()), 3)
    return {
        "country": pa.array([f"country {g % 3}" for g in group.tolist()], mask=unknown[0]),
        "tags": pa.array([None if no else one for no, one in zip(unknown[1].tolist(), tags, strict=True)]),
        "moods": pa.array(
            [None if no else one for no, one in zip(unknown[4].tolist(), moods, strict=True)],
            pa.map_(pa.string(), pa.float32()),
        ),
        "age": pa.array(1000.0 + group + random.normal(size=len(group)), mask=unknown[2]),
        "taste": vectors.take(pa.array(np.arange(len(group)), mask=unknown[3])),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    sessions = pq.read_table(write_sessions(folder / "plain.parquet"))
    group = np.array([items[0] // 10 % 100 for items in sessions["items"].to_pylist()])
    for name, column in query_columns(group, 0).items():
        sessions = sessions.append_column(name, column)
    pq.write_table(sessions, folder / "train.parquet")
    keys = np.arange(1001, 1000 + 10 * NUM_GROUPS)  # of item 1000 nothing is known but its id
    new = np.arange(5000, 5000 + NUM_GROUPS)  # one more item in every group, which no session has
    group = np.append(keys // 10 % 100, new - 5000)
    side = query_columns(group, 1) | {"kind": pa.array([f"kind {g}" for g in group.tolist()])}
    pq.write_table(pa.table({"item": np.append(keys, new), **side}), folder / "side.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    return {
        name: trained(data, tmp_path_factory.mktemp("run") / "run", model, TABLES.get(name, {}))
        for name, model in ENCODERS.items()
    }


def trained(data: Path, folder: Path, model: dict[str, Any], tables: dict[str, Any]) -> Config:
    config = small_config(
        folder,
        data / "train.parquet",
        data={"query_features": FEATURES, "item_features": str(data / "side.parquet"), "user": "user"},
        model={"kind": "two_tower", "query": ["history"], "id_dropout": 0.2, "history_length": 20} | model,
        train={"epochs": 3, "batch_size": 256, "learning_rate": 0.1, "dense_learning_rate": 0.02}
        | {"checkpoint_seconds": 60.0, "validate_every": 0},
        export={"precision": "fp32"},
        tables=tables,
    )
    train(config, on_event=lambda event: None)
    export_run(config.run, on_event=lambda event: None)
    return config


@pytest.fixture(params=ENCODERS)
def run(request: pytest.FixtureRequest, runs: dict[str, Config]) -> Config:
    return runs[request.param]


def random_queries(folder: str, num: int, seed: int) -> tuple[Ragged, dict[str, Given]]:
    """Histories of 0 to 8 items, those that training never saw among them, users and features, as rows."""
    prepared = load_prepared(folder)
    random = np.random.default_rng(seed)
    histories = [random.integers(0, prepared.keys["item"].num_rows, n).tolist() for n in random.integers(0, 9, num)]
    columns = query_columns(random.integers(0, NUM_GROUPS, num), seed)
    decoded = {"country": columns["country"].cast(pa.large_string()), "age": columns["age"]}
    decoded["tags"] = columns["tags"].fill_null([]).cast(pa.large_list(pa.large_string()))
    moods, _ = decode_column(Field("", "moods", "feature", ""), [columns["moods"]], MOODS)
    decoded["moods"] = moods
    decoded["taste"] = columns["taste"].cast(pa.list_(pa.float32(), 3))
    single = query_values(decoded, prepared.query_features, prepared.key_maps)
    return Ragged.from_lists(histories), single | {"user": random.integers(-1, 600, num)}


def encoded(folder: str) -> dict[str, torch.Tensor]:
    """Vectors of random queries and of all items by the run's last checkpoint, on the ranks of this process group."""
    config = load_config(Path(folder) / "config.toml")
    prepared = load_prepared(folder)
    model, _ = load_trained(config, prepared, current_rank("cpu"), which="last")
    return {
        "queries": model.encode_queries(*random_queries(folder, 50, 0)),
        "items": model.encode_items(0, model.num_items),
    }


def test_training_and_serving_agree_on_every_vector(run: Config) -> None:
    with process_group("cpu"):
        wanted = encoded(run.run)
    artifact = Artifact.open(Path(run.run) / "artifacts")
    retriever = Retriever(artifact)
    history, single = random_queries(run.run, 50, 0)
    user = np.asarray(single.pop("user"))
    queries = retriever.encode_rows(history, user, single)
    assert np.abs(queries).max() > 0.1
    np.testing.assert_allclose(queries, wanted["queries"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(artifact.vectors("item").take(np.arange(len(wanted["items"]))), wanted["items"])
    for i in range(50):
        one = np.array([i])
        alone = retriever.encode_rows(
            history.take(one), user[one], {name: take_values(values, one) for name, values in single.items()}
        )
        np.testing.assert_array_equal(alone[0], queries[i])


def test_every_input_matters(run: Config) -> None:
    retriever = Retriever(Artifact.open(Path(run.run) / "artifacts"))
    history, single = random_queries(run.run, 50, 0)
    user = np.asarray(single.pop("user"))
    whole = retriever.encode_rows(history, user, single)
    for name in single:
        without = {other: values for other, values in single.items() if other != name}
        assert np.abs(retriever.encode_rows(history, user, without) - whole).max() > 1e-3, name
    shorter = retriever.encode_rows(history.tail(0), user, single)
    assert np.abs(shorter - whole).max() > 1e-3


def test_keys_and_values_of_a_request_are_those_of_training(run: Config) -> None:
    """`recommend`, in Python and over HTTP, takes what JSON has: keys, lists of keys, numbers, lists of numbers and
    null.
    """
    artifact = Artifact.open(Path(run.run) / "artifacts")
    retriever = Retriever(artifact)
    features = {
        "country": ["country 1", None, "nowhere"],
        "tags": [["tag 1", "other", "unheard of"], [], None],
        "moods": [[["mood 1", 2.0], ["unheard of", 1.0], ["none", -1]], None, []],
        "age": [1003.5, None, 1000],
        "taste": [[0.0, 1.0, 2.0], None, [1, 1, 1]],
    }
    prepared = load_prepared(run.run)
    assert features.keys() == prepared.query_features.keys()
    tags = prepared.key_maps["query_tags"].rows(["tag 1", "other", "unheard of"])
    moods = prepared.key_maps["query_moods"].rows(["mood 1", "unheard of", "none"])
    n = np.count_nonzero(moods >= 0)
    hashed = "query_tags" in prepared.hashed_keys  # which knows every key
    assert (tags >= 0).tolist() == [True, True, hashed]
    rows: dict[str, Given] = {
        "country": prepared.key_maps["query_country"].rows(features["country"]),
        "tags": Ragged.from_lists([tags[tags >= 0].tolist(), [], []]),
        "moods": Ragged(weighted(moods[moods >= 0], np.float32([2, 1, -1])[moods >= 0]), np.int64([0, n, n, n])),
        "age": np.array([[1003.5], [np.nan], [1000.0]]),
        "taste": np.array([[0, 1, 2], [np.nan] * 3, [1, 1, 1]], np.float32),
    }
    sessions = [[1000, 1013], [1021], []]
    asked = retriever.recommend(sessions, 5, features=features)
    history = Ragged.from_lists([prepared.keys["item"].rows(keys).tolist() for keys in sessions])
    scores, found = retriever.recommend_rows(history, None, rows, 5, history)
    np.testing.assert_array_equal(asked.rows, found)
    np.testing.assert_array_equal(asked.scores, scores)
    assert asked.cold_start == [False, False, False]
    reply = ask(http_api(artifact), "POST", "/v1/recommend", {"sessions": sessions, "features": features, "k": 5}).json
    assert [[item["key"] for item in result["items"]] for result in reply["results"]] == asked.keys
    assert retriever.recommend([[]], 3, features={"age": [None], "tags": [["unheard of"]]}).cold_start == [not hashed]
    assert retriever.recommend([[5003]], 3).cold_start == [True]  # an item that training never saw says nothing


def test_the_map_is_coloured_by_the_items_features(runs: dict[str, Config], data: Path) -> None:
    """By those with one key an item: not by lists (tags) and numbers (age, taste)."""
    artifact = Artifact.open(Path(runs["hashed"].run) / "artifacts")
    drawn = artifact.map()
    assert drawn is not None
    assert set(drawn.colours) == {"k-means", "country", "kind"}
    side = pq.read_table(data / "side.parquet").to_pydict()
    countries = dict(zip(side["item"], side["country"], strict=True))
    labels = [drawn.labels["country"][code] for code in drawn.colours["country"]]
    assert labels == [countries.get(key) or "other or none" for key in artifact.keys("item").keys.to_pylist()]
    assert len(drawn.labels["kind"]) == 12  # eleven of the twelve kinds, and the others


def test_new_items_are_found_by_their_features(run: Config, tmp_path: Path) -> None:
    """What is asked for after a group's items is the group's new item, which has no interaction: recall by chance
    is .16 (20 of 126 candidates).
    """
    groups = range(NUM_GROUPS)
    columns = query_columns(np.arange(NUM_GROUPS), 2) | {
        "history": [[1000 + 10 * group + i for i in (2, 5, 7)] for group in groups],
        "items": [[5000 + group] for group in groups],
        "user": list(groups),
    }
    pq.write_table(pa.table(columns), tmp_path / "cases.parquet")
    checkpoint, exact, index = evaluate(run.run, cases=str(tmp_path / "cases.parquet"), ks=(20,))["results"]
    for figures in (checkpoint, exact, index):
        assert figures["by_frequency"] == {"0": {"items": NUM_GROUPS, "recall@20": figures["recall@20"]}}
        assert figures["recall@20"] > 0.8


def test_training_leaves_the_ids_of_new_items_alone(run: Config) -> None:
    prepared = load_prepared(run.run)
    items = prepared.keys["item"]
    assert items.num_seen == 10 * NUM_GROUPS
    assert items.keys[items.num_seen :].to_pylist() == list(range(5000, 5000 + NUM_GROUPS))
    with process_group("cpu") as place:
        model, _ = load_trained(run, prepared, place, which="last")
        if "item" in model.tables.maps:
            pytest.skip("items share rows")
        before = model.encode_items(items.num_seen, items.num_rows)
        for _, weights in model.tables.local_shards("item"):
            weights[items.num_seen :] += 100.0
        assert torch.equal(model.encode_items(items.num_seen, items.num_rows), before)


def test_dropped_ids_leave_the_features_and_an_item_without_features_keeps_its_id(run: Config) -> None:
    prepared = load_prepared(run.run)
    rows = prepared.keys["item"].rows([1000, 1001, 5000])
    with process_group("cpu") as place:
        model, _ = load_trained(run, prepared, place, which="last")
        assert isinstance(model, TwoTower)
        for dropped, with_id in ((True, rows[:1]), (False, rows[:2])):
            found = model._item_inputs(rows, np.full(3, dropped))
            assert isinstance(candidate := found["candidate"], InputRows)
            assert candidate.rows.tolist() == with_id.tolist()
            assert isinstance(kind := found["item_kind"], InputRows)
            assert np.diff(kind.offsets).tolist() == [0, 1, 1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_vectors(runs: dict[str, Config], world_size: int) -> None:
    folders = [config.run for config in runs.values()]
    with process_group("cpu"):
        wanted = encoded_all(folders)
    for rank in run_on_ranks(world_size, encoded_all, folders):
        for vectors, one in zip(rank, wanted, strict=True):
            torch.testing.assert_close(vectors, one, rtol=1e-5, atol=1e-6)


def encoded_all(folders: list[str]) -> list[dict[str, torch.Tensor]]:
    return [encoded(folder) for folder in folders]
