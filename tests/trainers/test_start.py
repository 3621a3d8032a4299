"""Tables that begin with vectors of a file: each key with its own, trained on or frozen, on one rank and on three."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.config import Config
from cluster.errors import DataError, SettingError
from cluster.rank import current_rank, process_group
from embedding_service.interchange import write_parquet, write_word2vec
from embedding_service.keys import Vocabulary
from embedding_service.sharding import ShardedTables
from embedding_service.tables import TableSpec
from embedding_service.vectors import VectorSet
from tests.trainers.runs import small_config, write_sessions
from trainers.checkpoint import CheckpointStore
from trainers.evaluate import load_trained
from trainers.loop import train
from trainers.prepare import load_prepared
from trainers.start import Rows

MODELS: dict[str, dict[str, Any]] = {"item2vec": {}, "two_tower": {"kind": "two_tower"}}
KNOWN = np.arange(1000, 1110)  # keys 1110..1119 of the data have no vector
VECTORS = np.random.default_rng(5).normal(size=(len(KNOWN) + 2, 8)).astype(np.float32)


def silent(event: dict[str, Any]) -> None:
    """A listener that lets every event pass."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("start")
    keys = Vocabulary(pa.array(np.append(KNOWN[::-1], [7, 8])), np.zeros(len(VECTORS), np.int64))
    vectors = VectorSet(VECTORS, None, "fp32")
    write_word2vec(folder / "text.vec", keys, vectors)
    write_word2vec(folder / "binary.vec", keys, vectors, binary=True)
    write_parquet(folder / "vectors.parquet", keys, vectors)
    return {
        "sessions": write_sessions(folder / "train.parquet"),
        "text": folder / "text.vec",
        "binary": folder / "binary.vec",
        "parquet": folder / "vectors.parquet",
    }


def config_of(run: Path, files: dict[str, Path], model: str, item: dict[str, Any], **train: Any) -> Config:
    return small_config(
        run, files["sessions"], model=MODELS[model], tables={"item": item}, train={"epochs": 1, **train}
    )


def table_of(config: Config, name: str) -> dict[int, list[float]]:
    """Key -> its row in the last checkpoint."""
    with process_group("cpu"):
        prepared = load_prepared(config.run)
        model = load_trained(config, prepared, current_rank("cpu"), which="last")[0]
        keys = prepared.keys["item"].keys
        with torch.no_grad():
            rows = model.tables.lookup({name: torch.arange(len(keys))})[name]
        return dict(zip(keys.to_pylist(), rows.tolist(), strict=True))


PLANTED = dict(zip(KNOWN[::-1].tolist(), VECTORS[: len(KNOWN)].tolist(), strict=True))


@pytest.mark.parametrize(("model", "form"), [("item2vec", "text"), ("two_tower", "binary"), ("two_tower", "parquet")])
def test_a_frozen_table_is_that_of_the_file_after_training(
    files: dict[str, Path], tmp_path: Path, model: str, form: str
) -> None:
    config = config_of(tmp_path / "run", files, model, {"vectors": str(files[form]), "frozen": True})
    if model == "two_tower":  # what is learned when the items are not
        config = small_config(
            tmp_path / "run",
            files["sessions"],
            data={"user": "user"},
            model={"kind": "two_tower", "query": ["history", "user"]},
            tables={"item": {"vectors": str(files[form]), "frozen": True}},
            train={"epochs": 1},
        )
    notes: list[str] = []
    train(config, on_event=lambda event: notes.append(event.get("text", "")))
    name = "input" if model == "item2vec" else "item"
    found = table_of(config, name)
    assert all(found[key] == vector for key, vector in PLANTED.items())
    assert set(found) - set(PLANTED) == set(range(1110, 1120))
    assert f"table {name}: 110 of 120 keys begin with their vectors of {files[form]}; 10 are not in it" in "".join(
        notes
    )
    (start,) = json.loads((tmp_path / "run" / "start.json").read_text())
    assert (start["known"], start["new"], start["unused"]) == (110, 10, 2)
    other = table_of(config, "output") if model == "item2vec" else {}
    assert all(np.any(row) for row in other.values()), "the other table has learned"


def test_a_table_that_is_not_frozen_learns_from_there(files: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", files, "two_tower", {"vectors": str(files["text"])}, learning_rate=1e-4)
    train(config, on_event=silent)
    found = table_of(config, "item")
    moved = np.array([np.abs(np.array(found[key]) - vector).max() for key, vector in PLANTED.items()])
    assert (moved > 0).all()
    assert moved.max() < 0.05


def test_a_run_that_goes_on_does_not_begin_again(files: dict[str, Path], tmp_path: Path) -> None:
    item = {"vectors": str(files["text"])}
    train(config_of(tmp_path / "run", files, "two_tower", item), on_event=silent)
    before = table_of(config_of(tmp_path / "run", files, "two_tower", item), "item")
    store = CheckpointStore(tmp_path / "run")
    names = store.names()
    train(config_of(tmp_path / "run", files, "two_tower", {**item, "disk": str(tmp_path)}), on_event=silent)
    assert store.names() == names  # nothing was left to do, and the table may move to disk in between
    assert table_of(config_of(tmp_path / "run", files, "two_tower", item), "item") == before


@pytest.mark.parametrize(
    ("item", "model", "problem"),
    [
        ({"vectors": "text"}, {"dim": 12}, r"tables\.item\.vectors: .*text\.vec holds vectors of 8 numbers.* of 12"),
        ({"vectors": "text", "map": "hashed", "rows": 50}, {}, "need a row for every key"),
        ({"frozen": True}, {}, "leaves the table as random as it begins"),
        ({"disk": "/nonexistent"}, {}, r"tables\.item\.disk: /nonexistent is not a folder of this machine"),
        ({"vectors": "sessions"}, {}, "needs the columns `key` and `vector`"),
    ],
)
def test_what_does_not_fit_is_refused(
    files: dict[str, Path], tmp_path: Path, item: dict[str, Any], model: dict[str, Any], problem: str
) -> None:
    named = {name: str(files[value]) if name == "vectors" else value for name, value in item.items()}
    config = small_config(
        tmp_path / "run", files["sessions"], model={"kind": "two_tower", **model}, tables={"item": named}
    )
    with pytest.raises((SettingError, DataError), match=problem):
        train(config, on_event=silent)


def test_a_file_of_other_keys_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "words.vec").write_text("1 8\nword 1 2 3 4 5 6 7 8\n")
    config = config_of(tmp_path / "run", files, "two_tower", {"vectors": str(tmp_path / "words.vec")})
    with pytest.raises(DataError, match=r"words\.vec: has none of the 120 keys of table item \(int64\)"):
        train(config, on_event=silent)


def test_fp16_that_cannot_hold_a_number_is_told() -> None:
    with process_group("cpu"):
        tables = ShardedTables([TableSpec("items", 3, 4, 0.5, "fp16")], optimizer="sgd", learning_rate=1.0, seed=0)
        with pytest.raises(DataError, match="does not reach beyond 65504"):
            Rows(tables, "items").put(np.array([1]), np.full((1, 4), 1e5, np.float32))
