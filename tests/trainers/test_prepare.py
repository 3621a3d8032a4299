from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import Config, config_from_dict
from cluster.errors import CheckpointError, DataError, SettingError
from embedding_service.ragged import Ragged
from trainers.cases import load_validation
from trainers.prepare import Prepared, check_feature_names, holdout_of, load_prepared, open_reader, prepare
from trainers.sessions import SessionBatch

# item "a" 4 times, "b" 3, "c" 2, "d" once; users 5, 7, 5, 9; one session is empty
SESSIONS = pa.table(
    {
        "items": [["a", "b", "c", "a"], ["b", "a"], [], ["a", "c", "d", "b"]],
        "user": [5, 7, 5, 9],
        "city": ["x", None, "y", "x"],
    }
)


def config_of(folder: Path, table: pa.Table = SESSIONS, **sections: dict[str, Any]) -> Config:
    source = folder / "sessions.parquet"
    pq.write_table(table, source, row_group_size=2)
    tree: dict[str, Any] = {"run": str(folder / "run"), "data": {"train": str(source)}, "model": {"kind": "two_tower"}}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    (folder / "run").mkdir(exist_ok=True)
    return config_from_dict(tree)


def prepared_by(config: Config, *, is_begun: bool = False) -> Prepared:
    reader = open_reader(config)
    prepare(config, reader, is_begun=is_begun)
    return load_prepared(config.run, reader.fingerprint)


def everything(config: Config, found: Prepared) -> list[Any]:
    batches = list(open_reader(config).stream())
    sessions = [found.rows(batch) for batch in batches]
    return [
        [one for part in sessions for one in part.items.to_lists()],
        [row for part in sessions if part.user is not None for row in part.user.tolist()],
        {name: [row for part in sessions for row in part.features[name].tolist()] for name in sessions[0].features},
    ]


def test_keys_become_rows_by_frequency(tmp_path: Path) -> None:
    config = config_of(tmp_path, data={"user": "user", "query_features": ["city"]})
    found = prepared_by(config)
    assert sorted(found.keys) == ["item", "query_city", "user"]
    assert found.keys["item"].keys.to_pylist() == ["a", "b", "c", "d"]
    assert found.keys["item"].counts.tolist() == [4, 3, 2, 1]
    assert found.num_sessions == 4
    items, users, features = everything(config, found)
    assert items == [[0, 1, 2, 0], [1, 0], [], [0, 2, 3, 1]]
    assert users == [0, 1, 0, 2]
    assert features == {"city": [0, -1, 1, 0]}


def test_rare_items_are_left_out_or_share_a_row(tmp_path: Path) -> None:
    config = config_of(tmp_path, keys={"min_count": 3})
    assert everything(config, prepared_by(config))[0] == [[0, 1, 0], [1, 0], [], [0, 1]]
    config = config_of(tmp_path, keys={"min_count": 3, "unknown": "row"})
    assert everything(config, prepared_by(config))[0] == [[0, 1, 2, 0], [1, 0], [], [0, 2, 2, 1]]


def test_without_users_there_are_none(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    found = prepared_by(config)
    assert sorted(found.keys) == ["item"]
    assert found.rows(next(iter(open_reader(config).stream()))).user is None
    assert not (found.folder / "valid.parquet").exists()


def test_what_is_held_out_is_not_counted_and_becomes_cases(tmp_path: Path) -> None:
    config = config_of(tmp_path, data={"user": "user", "query_features": ["city"], "holdout": "last_item"})
    found = prepared_by(config)
    assert found.keys["item"].keys.to_pylist() == ["a", "b", "c", "d"]
    assert found.keys["item"].counts.tolist() == [2, 2, 2, 1]
    assert found.keys["user"].keys.to_pylist() == [5, 7, 9]
    assert pq.read_table(found.folder / "valid.parquet").to_pylist() == [
        {"history": ["a", "b", "c"], "items": ["a"], "user": 5, "city": "x"},
        {"history": ["b"], "items": ["a"], "user": 7, "city": None},
        {"history": ["a", "c", "d"], "items": ["b"], "user": 9, "city": "x"},
    ]


def test_cases_are_at_most_as_many_as_asked_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, data={"holdout": "last_item"}, train={"validate_cases": 2})
    assert pq.read_table(prepared_by(config).folder / "valid.parquet").num_rows == 2


def test_a_file_of_validation_cases_leaves_all_sessions_to_training(tmp_path: Path) -> None:
    config = config_of(tmp_path, data={"holdout": "last_item", "valid": "elsewhere.parquet"})
    assert holdout_of(config, 4).kind == "none"
    assert prepared_by(config).keys["item"].counts.tolist() == [4, 3, 2, 1]


def test_it_is_done_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder = prepared_by(config).folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepared_by(config)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_other_data_under_a_begun_run_are_refused(tmp_path: Path) -> None:
    prepared_by(config_of(tmp_path))
    with pytest.raises(CheckpointError, match=r"begun with other training data.*--fresh"):
        prepared_by(config_of(tmp_path, pa.concat_tables([SESSIONS, SESSIONS])), is_begun=True)


def test_other_data_or_settings_before_the_first_checkpoint_replace_what_was_built(tmp_path: Path) -> None:
    prepared_by(config_of(tmp_path))
    doubled = prepared_by(config_of(tmp_path, pa.concat_tables([SESSIONS, SESSIONS])))
    assert doubled.keys["item"].counts.tolist() == [8, 6, 4, 2]
    assert "user" not in doubled.keys
    with_users = prepared_by(config_of(tmp_path, data={"user": "user"}, keys={"min_count": 2}))
    assert with_users.keys["item"].counts.tolist() == [4, 3, 2]
    assert with_users.keys["user"].num_rows == 3


@pytest.mark.parametrize("name", ["geo.country", "a/b", "Länge", "", "x" * 65, "user", "item", "history"])
def test_feature_names_that_cannot_be_used_are_named(name: str) -> None:
    with pytest.raises(SettingError, match=r"data\.query_features: column `.*rename"):
        check_feature_names("data.query_features", [name])


@pytest.mark.parametrize("name", ["id", "file", "allow_pickle", "candidate", "Brand_2"])
def test_any_other_name_of_an_item_feature_will_do(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"item": ["a"], name: ["z"]}), tmp_path / "side.parquet")
    found = prepared_by(config_of(tmp_path, data={"item_features": str(tmp_path / "side.parquet")}))
    assert np.asarray(found.item_values[name]).tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize("text", ["{}", "[]", "{", "null"])
def test_a_damaged_description_is_named(tmp_path: Path, text: str) -> None:
    folder = prepared_by(config_of(tmp_path)).folder
    (folder / "prepared.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"prepared\.json is damaged.*--fresh"):
        load_prepared(tmp_path / "run")


def test_an_attempt_that_was_killed_is_begun_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    left = Path(config.run) / ".prepared.tmp"
    left.mkdir()
    (left / "item.arrow").write_text("half a file")
    assert prepared_by(config).keys["item"].num_rows == 4
    assert not left.exists()


def test_item_features_are_rows_by_item(tmp_path: Path) -> None:
    table = pa.table({"item": ["b", "a", "zz", "c"], "brand": ["p", "q", "r", None], "size": [3, 3, 4, 4]})
    pq.write_table(table, tmp_path / "side.parquet")
    found = prepared_by(config_of(tmp_path, data={"item_features": str(tmp_path / "side.parquet")}))
    for name in ("brand", "size"):
        keys, rows = found.keys[f"item_{name}"], np.asarray(found.item_values[name])
        wanted: dict[str, dict[str, Any]] = {
            "a": {"brand": "q", "size": 3},
            "b": {"brand": "p", "size": 3},
            "c": {"size": 4},
            "zz": {"brand": "r", "size": 4},
        }
        values = [keys.keys[row].as_py() if row >= 0 else None for row in rows.tolist()]
        assert values == [wanted.get(item, {}).get(name) for item in ("a", "b", "c", "d", "zz")]
        assert rows.dtype == np.int64


def test_items_that_no_session_has_are_candidates_if_they_have_features(tmp_path: Path) -> None:
    side = {
        "item": ["new", "c", "bare", "d", "again"],
        "brand": ["p", "q", None, "p", None],
        "tags": [[], [], [], [], ["x"]],
    }
    pq.write_table(pa.table(side), tmp_path / "side.parquet")
    data = {"item_features": str(tmp_path / "side.parquet")}
    found = prepared_by(config_of(tmp_path, data=data, keys={"min_count": 2}))
    items = found.keys["item"]
    assert items.keys.to_pylist() == ["a", "b", "c", "again", "d", "new"]  # d is rarer than min_count
    assert items.counts.tolist() == [4, 3, 2, 0, 0, 0]
    assert items.num_seen == 3
    assert items.dropped == 1
    assert np.asarray(found.item_values["brand"]).tolist() == [-1, -1, 1, -1, 0, 0]
    tags = found.item_values["tags"]
    assert isinstance(tags, Ragged)
    assert tags.to_lists() == [[], [], [], [0], [], []]
    config = config_of(tmp_path, data=data, keys={"min_count": 2})
    assert everything(config, found)[0] == [[0, 1, 2, 0], [1, 0], [], [0, 2, 1]]  # training does not see d
    config = config_of(tmp_path, data=data, keys={"min_count": 2, "unknown": "row"})
    assert everything(config, prepared_by(config))[0][3] == [0, 2, 6, 1]


def test_features_of_sessions_become_values_of_their_kind(tmp_path: Path) -> None:
    vectors = pa.array([[1.0, 2.0], None, [3.0, 4.0], [0.0, 0.0]], pa.list_(pa.float64(), 2))
    table = SESSIONS.append_column("age", pa.array([1.0, 3.0, None, float("nan")], pa.float32()))
    table = table.append_column("tags", pa.array([["x", "y"], None, [], ["y", None]])).append_column("text", vectors)
    config = config_of(
        tmp_path, table, data={"query_features": ["city", "age", "tags", "text"], "holdout": "last_item"}
    )
    found = prepared_by(config)
    assert {name: feature.kind for name, feature in found.query_features.items()} == {
        "city": "key", "age": "number", "tags": "list", "text": "vector"
    }  # fmt: skip
    age, text = found.query_features["age"], found.query_features["text"]
    assert (age.width, age.center, age.scale) == (1, 2.0, 1.0)
    assert (text.width, text.center, text.scale) == (2, 0.0, pytest.approx(1 / np.sqrt(30 / 6)))
    batch = SessionBatch.concat(list(open_reader(config).stream()))
    values = found.rows(batch).features
    np.testing.assert_array_equal(values["age"], [[1.0], [3.0], [np.nan], [np.nan]])
    np.testing.assert_array_equal(values["text"], [[1, 2], [np.nan] * 2, [3, 4], [0, 0]])
    assert isinstance(values["tags"], Ragged)
    assert found.keys["query_tags"].keys.to_pylist() == ["y", "x"]
    assert values["tags"].to_lists() == [[1, 0], [], [], [0]]
    cases = load_validation(config, found)
    assert cases is not None
    np.testing.assert_array_equal(cases.single["text"], [[1, 2], [np.nan] * 2, [0, 0]])
    assert cases.take(np.array([2, 0])).single["tags"].to_lists() == [[0], [1, 0]]  # type: ignore[union-attr]


def test_a_sessions_feature_and_a_items_feature_may_share_a_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": ["a"], "city": ["z"]}), tmp_path / "side.parquet")
    data = {"item_features": str(tmp_path / "side.parquet"), "query_features": ["city"]}
    found = prepared_by(config_of(tmp_path, data=data))
    assert found.keys["query_city"].keys.to_pylist() == ["x", "y"]
    assert found.keys["item_city"].keys.to_pylist() == ["z"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"brand": ["p"]}, "needs a column `item`"), ({"item": ["a"]}, "at least one feature column")],
)
def test_item_features_without_their_columns_are_refused(tmp_path: Path, columns: Any, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "side.parquet")
    with pytest.raises(DataError, match=message) as error:
        prepared_by(config_of(tmp_path, data={"item_features": str(tmp_path / "side.parquet")}))
    assert "side.parquet" in str(error.value)


def test_item_features_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "side.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match=r"side\.parquet: is not a readable Parquet file"):
        prepared_by(config_of(tmp_path, data={"item_features": str(tmp_path / "side.parquet")}))


def test_a_holdout_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    short = pa.table({"items": [["a"], ["b"]]})
    with pytest.raises(DataError, match="finds nothing to hold out"):
        prepared_by(config_of(tmp_path, short, data={"holdout": "last_item"}))
    assert not (tmp_path / "run" / "prepared").exists()


def test_no_training_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.train: is empty"):
        open_reader(config_from_dict({"run": str(tmp_path)}))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run of `lexshard train`"):
        load_prepared(tmp_path)
