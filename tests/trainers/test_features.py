"""Feature columns: which kind each type is, their statistics, and side tables that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError
from embedding_service.keys import Vocabulary
from embedding_service.ragged import Ragged
from embedding_service.towers import TowerInput
from trainers.features import Feature, describe, read_side_table


def written(folder: Path, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), folder / "side.parquet")
    return str(folder / "side.parquet")


@pytest.mark.parametrize(
    ("column", "kind", "width"),
    [
        (pa.array([3, None]), "key", 0),
        (pa.array(["x", None]).dictionary_encode(), "key", 0),
        (pa.array([[3], None]), "list", 0),
        (pa.array([["x", None], []], pa.large_list(pa.string())), "list", 0),
        (pa.array([[1, 2], None], pa.list_(pa.int32(), 2)), "list", 0),
        (pa.array([[("x", 0.5)], None], pa.map_(pa.string(), pa.float64())), "weighted", 0),
        (pa.array([[{"id": 3, "share": 0.5}], []]), "weighted", 0),
        (pa.array([3.0, None], pa.float32()), "number", 1),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2)), "vector", 2),
        (pa.array([[1.0, 2.0, 3.0], None]), "vector", 3),
    ],
)
def test_the_type_of_a_column_decides_its_kind(tmp_path: Path, column: pa.Array, kind: str, width: int) -> None:
    decoded = read_side_table(written(tmp_path, {"item": ["a", "b"], "x": column})).columns["x"]
    feature, keys = describe([decoded])
    assert (feature.kind, feature.width, keys is not None) == (kind, width, feature.has_keys)
    values = feature.values(decoded, keys)
    assert len(values) == 2
    if isinstance(values, Ragged):
        assert values.to_lists()[1] == []
    else:
        assert values[1].tolist() == (-1 if kind == "key" else pytest.approx([np.nan] * width, nan_ok=True))


def test_statistics_do_not_depend_on_the_chunks_and_keep_their_digits() -> None:
    numbers = 1e9 + np.random.default_rng(0).normal(size=1000) * 3.0
    for cuts in ([], [1, 1, 400], [999]):
        chunks = [pa.array(part, pa.float64()) for part in np.split(numbers, cuts)]
        feature, _ = describe(chunks)
        assert feature.center == pytest.approx(numbers.mean(), abs=1e-5)
        assert 1 / feature.scale == pytest.approx(numbers.std(), rel=1e-6)


def test_a_constant_number_and_a_zero_vector_are_not_scaled() -> None:
    assert describe([pa.array([7.0, 7.0])])[0] == Feature("number", 1, 7.0, 1.0)
    assert describe([pa.array([[0.0, 0.0]], pa.list_(pa.float32(), 2))])[0] == Feature("vector", 2, 0.0, 1.0)


def test_a_column_without_values_is_refused() -> None:
    with pytest.raises(DataError, match="no numbers: every row is null"):
        describe([pa.array([None, float("nan")], pa.float64())])
    with pytest.raises(DataError, match="no keys"):
        describe([pa.array([[], []], pa.large_list(pa.int64()))])


def test_a_column_of_another_kind_is_refused() -> None:
    for feature in (Feature("list"), Feature("number", 1), Feature("vector", 2)):
        with pytest.raises(DataError, match=f"holds int64, but in training it was a {feature.kind} feature"):
            feature.values(pa.array([1, 2]), None)
    with pytest.raises(DataError, match=r"holds fixed_size_list<.*>\[3\], but in training"):
        Feature("vector", 2).values(pa.array([[1.0, 2, 3]], pa.list_(pa.float32(), 3)), None)


@pytest.mark.parametrize("as_map", [True, False])
def test_keys_keep_their_weights(tmp_path: Path, as_map: bool) -> None:
    lists = [[("x", 0.5), ("y", -2.0)], None, [], [("y", 1.0), (None, 7.0), ("z", 3.0)]]
    structs = [None if one is None else [{"key": key, "weight": weight} for key, weight in one] for one in lists]
    column = pa.array(structs)
    if as_map:
        lists[3] = [("y", 1.0), ("z", 3.0)]  # a map has no null keys
        column = pa.array(lists, pa.map_(pa.string(), pa.float32()))
    table = read_side_table(written(tmp_path, {"item": list("abcd"), "x": column}))
    assert table.described().to_pylist() == ["a", "d"]
    decoded = table.columns["x"].take(pa.array([3, 0, 1, 2]))
    feature, keys = describe([decoded])
    assert keys is not None
    assert sorted(keys.keys.to_pylist()) == ["x", "y", "z"]
    values = feature.values(decoded, Vocabulary(pa.array(["y", "x"]), np.array([2, 1])))  # z is unknown
    assert isinstance(values, Ragged)
    assert [[tuple(pair) for pair in one] for one in values.to_lists()] == [[(0, 1.0)], [(1, 0.5), (0, -2.0)], [], []]


def test_a_towers_input_tells_its_feature() -> None:
    assert Feature.of(TowerInput("a", "a", "a", 4)) == Feature("key")
    assert Feature.of(TowerInput("a", "a", "a", 4, encoder="sum")) == Feature("list")
    number = TowerInput("a", "a", "", 4, encoder="project", width=1, center=2.0, scale=3.0)
    assert Feature.of(number) == Feature("number", 1, 2.0, 3.0)
    assert Feature.of(TowerInput("a", "a", "a", 4, encoder="weighted_mean")) == Feature("weighted")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item": ["a", "b", None], "x": [1, 2, 3]}, r"row 2: column `item` is null; expected a key"),
        ({"item": ["a", "b", "a"], "x": [1, 2, 3]}, r"row 2: column `item` names an item that a row before"),
        ({"item": [1.0], "x": [1]}, r"column `item` must hold keys: integers or strings"),
        ({"item": ["a"], "x": [True]}, r"column `x` is bool; expected integers, strings, lists.*leave it out"),
        ({"item": ["a", "b"], "x": [1.0, float("inf")]}, r"row 1: column `x` is infinite; expected a number"),
        (
            {"item": ["a", "b"], "x": pa.array([[], [("x", None)]], pa.map_(pa.string(), pa.float32()))},
            r"row 1: column `x` has a null, nan or infinite weight",
        ),
        ({"item": ["a"], "x": [[{"id": 1, "at": 2, "share": 0.5}]]}, r"column `x` is list<.*expected integers"),
        (
            {"item": ["a", "b"], "x": [[1.0, 2.0], [1.0]]},
            r"row 1: column `x` has a vector of 1 numbers, but those before have 2; lists of floats are vectors",
        ),
        (
            {"item": ["a", "b"], "x": pa.array([[1.0], [None]], pa.list_(pa.float64(), 1))},
            r"row 1: column `x` has a null, nan or infinite number in its vector",
        ),
        ({"item": ["a"], "x": pa.array([None], pa.list_(pa.float32()))}, r"column `x` has no vector"),
        ({"item": ["a"], "x": [[0.0][:0]], "y": pa.array([[]], pa.list_(pa.float32()))}, r"column `x`"),
        (
            {"item": ["a", "b"], "x": pa.array([[1], [2**63]], pa.list_(pa.uint64()))},
            r"row 1: column `x` has a key above 9223372036854775807",
        ),
    ],
)
def test_what_is_wrong_in_a_side_table_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"side\.parquet.*" + message):
        read_side_table(written(tmp_path, columns))


def test_described_items_are_those_of_which_something_is_known(tmp_path: Path) -> None:
    columns = {"item": list("abcd"), "x": [None, 1.0, None, None], "y": [[], [], ["t"], None]}
    assert read_side_table(written(tmp_path, columns)).described().to_pylist() == ["b", "c"]
