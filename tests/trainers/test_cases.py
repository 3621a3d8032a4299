from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import Config, config_from_dict
from cluster.errors import DataError, SettingError
from embedding_service.ragged import Ragged
from trainers.cases import Cases, load_cases, load_validation
from trainers.prepare import load_prepared, open_reader, prepare

# rows by frequency: a 0, b 1, c 2; users 5, 7, 9 are rows 0, 1, 2
TRAIN = pa.table(
    {
        "items": [["a", "b"], ["a"], ["c", "a", "b"], ["a"]],
        "user": [5, 7, 5, 9],
        "city": ["x", "x", "y", "x"],
    }
)
TEST = {
    "history": [["c", "new", "a"], [], ["b"]],
    "items": [["b"], ["new", "a"], ["c"]],
    "user": [7, 5, 99],
    "city": ["y", None, "new"],
}


def config_of(folder: Path, **data: Any) -> Config:
    pq.write_table(TRAIN, folder / "train.parquet", row_group_size=3)
    pq.write_table(pa.table(TEST), folder / "test.parquet", row_group_size=2)
    (folder / "run").mkdir()
    settings = {"train": str(folder / "train.parquet"), "user": "user", "query_features": ["city"], **data}
    config = config_from_dict({"run": str(folder / "run"), "data": settings, "model": {"kind": "two_tower"}})
    prepare(config, open_reader(config), is_begun=False)
    return config


def load(config: Config, name: str = "test.parquet", **options: int) -> Cases:
    prepared = load_prepared(config.run)
    return load_cases(config, prepared.keys, prepared.query_features, str(Path(config.run).parent / name), **options)


def test_histories_of_users_without_a_vocabulary(tmp_path: Path) -> None:
    """A user's history is found by the hash of the key; a user whom training has not seen has none."""
    pq.write_table(TRAIN, tmp_path / "train.parquet", row_group_size=3)
    pq.write_table(pa.table({"items": [["b"], ["c"], ["c"]], "user": [5, 99, 7]}), tmp_path / "test.parquet")
    (tmp_path / "run").mkdir()
    settings = {"train": str(tmp_path / "train.parquet"), "user": "user", "history": ""}
    model = {"kind": "two_tower", "query": ["user", "history"]}
    tables = {"user": {"map": "hashed", "rows": 10, "vocabulary": False}}
    config = config_from_dict({"run": str(tmp_path / "run"), "data": settings, "model": model, "tables": tables})
    prepare(config, open_reader(config), is_begun=False)
    prepared = load_prepared(config.run)
    assert "user" not in prepared.keys
    cases = load_cases(config, prepared.key_maps, {}, str(tmp_path / "test.parquet"))
    assert cases.history.to_lists() == [[0, 1, 2, 0, 1], [], [0]]
    assert np.asarray(cases.single["user"]).tolist() == prepared.hashed_keys["user"].rows([5, 99, 7]).tolist()


def as_lists(cases: Cases) -> list[Any]:
    single = {name: rows.tolist() for name, rows in cases.single.items()}
    return [cases.history.to_lists(), cases.truth.to_lists(), single]


def test_a_file_of_cases_becomes_rows(tmp_path: Path) -> None:
    cases = load(config_of(tmp_path))
    assert as_lists(cases) == [
        [[2, 0], [], [1]],  # what is unknown cannot be asked with
        [[1], [-1, 0], [2]],  # but counts as missed
        {"city": [1, -1, -1], "user": [1, 0, -1]},
    ]


def test_an_unknown_row_is_never_the_truth(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tree = {
        "run": str(tmp_path / "other"),
        "data": {"train": config.data.train},
        "keys": {"unknown": "row", "min_count": 2},
    }
    (tmp_path / "other").mkdir()
    other = config_from_dict(tree)
    prepare(other, open_reader(other), is_begun=False)
    cases = load(other)  # c occurs once: it has the unknown row, 2
    assert cases.history.to_lists() == [[2, 2, 0], [], [1]]
    assert cases.truth.to_lists() == [[1], [-1, 0], [-1]]


def test_without_a_history_column_the_users_training_sessions_are_joined(tmp_path: Path) -> None:
    cases = load(config_of(tmp_path, history=""))
    assert as_lists(cases)[:2] == [[[0], [0, 1, 2, 0, 1], []], [[1], [-1, 0], [2]]]


def test_a_user_may_have_several_cases(tmp_path: Path) -> None:
    config = config_of(tmp_path, history="")
    many = pa.table({"items": [["a"]] * 4, "user": [5, 9, 5, 98], "city": ["x"] * 4})
    pq.write_table(many, tmp_path / "many.parquet")
    assert load(config, "many.parquet").history.to_lists() == [[0, 1, 2, 0, 1], [0], [0, 1, 2, 0, 1], []]


def test_a_limit_spreads_over_the_file(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert load(config, limit=2).truth.to_lists() == [[1], [2]]
    assert len(load(config, limit=3)) == len(load(config, limit=100)) == 3


def test_take_takes_every_part(tmp_path: Path) -> None:
    whole = load(config_of(tmp_path))
    assert as_lists(whole.take(np.array([2, 0]))) == [[[1], [2, 0]], [[2], [1]], {"city": [-1, 1], "user": [-1, 1]}]
    assert len(whole.take(np.empty(0, np.int64))) == 0
    assert isinstance(whole.take(np.array([1])).history, Ragged)


def test_validation_cases_are_those_held_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, holdout="last_item")
    cases = load_validation(config, load_prepared(config.run))
    assert cases is not None
    keys = load_prepared(config.run).keys["item"].keys.to_pylist()
    assert [[keys[row] for row in one] for one in cases.history.to_lists()] == [["a"], ["c", "a"]]
    assert cases.single["user"].tolist() == [0, 0]
    assert cases.truth.to_lists() == [[-1], [-1]]  # b is held out everywhere, so training does not know it


def test_validation_cases_of_a_file_are_limited(tmp_path: Path) -> None:
    config = config_of(tmp_path, valid=str(tmp_path / "test.parquet"))
    cases = load_validation(config, load_prepared(config.run))
    assert cases is not None
    assert as_lists(cases) == as_lists(load(config))


def test_a_run_without_validation_has_no_cases(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert load_validation(config, load_prepared(config.run)) is None


def test_cases_need_a_history_or_a_user(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pq.write_table(TRAIN, tmp_path / "train.parquet")
    config = config_from_dict(
        {"run": str(tmp_path / "run"), "data": {"train": str(tmp_path / "train.parquet"), "history": ""}}
    )
    prepare(config, open_reader(config), is_begun=False)
    with pytest.raises(SettingError, match=r"data\.history: is empty, and so is data\.user"):
        load(config, "train.parquet")


def test_a_missing_column_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="history"):
        load(config_of(tmp_path), "train.parquet")


def test_a_file_of_bad_rows_only_holds_no_cases(tmp_path: Path) -> None:
    config = config_of(tmp_path, bad_rows="skip")
    schema = pa.schema(
        {"history": pa.list_(pa.string()), "items": pa.list_(pa.string()), "user": pa.int64(), "city": pa.string()}
    )
    bad = pa.table({"history": [None], "items": [["a"]], "user": [5], "city": ["x"]}, schema=schema)
    pq.write_table(bad, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="holds no cases"):
        load(config, "bad.parquet")
