from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError
from embedding_service.ragged import Ragged
from tests.trainers.session_data import KINDS, write_table
from trainers.session_batch import Columns, SessionBatch
from trainers.sessions import SessionReader

LISTS = [[3, 1], [], [7]]
WORDS = [["c", "a"], [], ["ü"]]


def read(path: Path, columns: Columns = Columns(), bad_rows: str = "error") -> SessionBatch:  # noqa: B008
    reader = SessionReader(str(path), columns, bad_rows=bad_rows)  # type: ignore[arg-type]
    return SessionBatch.concat(list(reader.stream()))


def dictionary_lists(lists: Sequence[Sequence[object]], words: pa.DataType) -> pa.Array:
    flat = pa.array([word for one in lists for word in one], words).dictionary_encode()
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, lists)]), pa.int32()), flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "items",
    [
        *(pa.array(LISTS, pa.list_(key)) for key in (pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64())),
        pa.array(LISTS, pa.large_list(pa.int64())),
        pa.array(WORDS, pa.list_(pa.string())),
        pa.array(WORDS, pa.large_list(pa.large_string())),
        dictionary_lists(WORDS, pa.string()),
        dictionary_lists(WORDS, pa.large_string()),
        dictionary_lists(LISTS, pa.int32()),
    ],
    ids=lambda items: str(items.type),
)
def test_every_key_and_list_type_becomes_int64_or_large_string(tmp_path: Path, items: pa.Array, kind: str) -> None:
    reader = SessionReader(str(write_table(tmp_path / "part", {"items": items}, kind, chunk=2)))
    batch = SessionBatch.concat(list(reader.stream()))
    expected = LISTS if reader.key_type == "int64" else WORDS
    assert batch.items.to_lists() == expected
    assert batch.items.values.type == (pa.int64() if expected is LISTS else pa.large_string())
    assert batch.row_ids.tolist() == [0, 1, 2]


def test_fixed_size_lists(tmp_path: Path) -> None:
    items = pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    assert read(write_table(tmp_path / "part", {"items": items})).items.to_lists() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("kind", KINDS)
def test_all_columns_under_names_of_their_own(tmp_path: Path, kind: str) -> None:
    day = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    table = {
        "basket.ids": [["a"], ["b", "c"]],
        "past": [[], ["a"]],
        "who": pa.array(["u", "v"]).dictionary_encode(),
        "when": pa.array([day, day], pa.timestamp("ns", "Europe/Paris")),
        "device": pa.array(["tv", None]),
        "age": pa.array([4, None], pa.int8()),
        "noise": [{"deep": 1.5}, None],
    }
    columns = Columns("basket.ids", user="who", history="past", time="when", features=("device", "age"))
    batch = read(write_table(tmp_path / "part", table, kind), columns)
    assert batch.history is not None
    assert batch.user is not None
    assert batch.time is not None
    assert (batch.items.to_lists(), batch.history.to_lists()) == ([["a"], ["b", "c"]], [[], ["a"]])
    assert batch.user == pa.array(["u", "v"], pa.large_string())
    assert batch.time == pa.array([day.replace(tzinfo=None)] * 2, pa.timestamp("us"))
    assert batch.features["device"] == pa.array(["tv", None], pa.large_string())
    assert batch.features["age"] == pa.array([4, None], pa.int64())
    for moved in (batch.take(np.array([1])), batch.slice(1, 9), SessionBatch.concat([batch.slice(1, 2)])):
        assert (moved.items.to_lists(), moved.row_ids.tolist()) == ([["b", "c"]], [1])
        assert moved.user.to_pylist() == ["v"]  # type: ignore[union-attr]
        assert moved.features["age"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pa.array([1, 2], pa.int32()), pa.array([1, 2], pa.int64())),
        (pa.array([1.5, 2], pa.float32()), pa.array([1.5, 2], pa.float64())),
        (pa.array([0, 1], pa.date32()), pa.array([0, 86_400_000_000], pa.timestamp("us"))),
    ],
    ids=["int", "float", "date"],
)
def test_times(tmp_path: Path, times: pa.Array, expected: pa.Array) -> None:
    file = write_table(tmp_path / "part", {"items": [[1], [2]], "t": times})
    assert read(file, Columns(time="t")).time == expected


TEXTS = ["  the cat\tsat ", "", "the\u00a0 mat\n\n", " \t"]
TEXT_WORDS = [["the", "cat", "sat"], [], ["the", "mat"], []]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "texts",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array(TEXTS).dictionary_encode(),
        pa.array(["left out", *TEXTS]).slice(1),
    ],
    ids=["string", "large_string", "dictionary", "slice"],
)
def test_text_is_split_into_words(tmp_path: Path, texts: pa.Array, kind: str) -> None:
    file = write_table(tmp_path / "part", {"line": texts, "user": [1, 2, 3, 4]}, kind, chunk=3)
    batch = read(file, Columns("line", user="user", text=True))
    assert batch.items.to_lists() == TEXT_WORDS
    assert batch.items.values.type == pa.large_string()
    assert batch.user == pa.array([1, 2, 3, 4])


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["a  b", None, "", "c"]),
        pa.array(["a  b", None, "", "c"]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3]), pa.array(["a  b", None, "", "c"])),
    ],
    ids=["string", "dictionary", "null in the dictionary"],
)
def test_a_null_text_is_named_or_skipped(tmp_path: Path, texts: pa.Array) -> None:
    file = write_table(tmp_path / "part", {"items": texts}, "ipc_file")
    with pytest.raises(DataError) as caught:
        read(file, Columns(text=True))
    assert str(caught.value) == (
        f"{file}, row group 0, row 1: column `items` is null; expected a text (an empty one is fine){WAY_OUT}"
    )
    batch = read(file, Columns(text=True), "skip")
    assert batch.items.to_lists() == [["a", "b"], [], ["c"]]
    assert batch.row_ids.tolist() == [0, 2, 3]


def test_concat_of_empty_batches_keeps_the_columns() -> None:
    empty = SessionBatch(Ragged.from_lists([], pa.int64()), np.array([], np.int64), history=Ragged.from_lists([]))
    joined = SessionBatch.concat([empty, empty])
    assert joined.history is not None
    assert len(joined) == 0


WAY_OUT = "; mend the row, or skip and count such rows: `--set data.bad_rows=skip`"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"items": [[1], [2], None, [4], [5]]}, "`items` is null; expected a list of keys (an empty list is fine)"),
        ({"items": [[1], [2], [3, None], [4], [5]]}, "`items` has a null key in its list"),
        ({"past": [[1], [2], None, [4], [5]]}, "`past` is null; expected a list of keys (an empty list is fine)"),
        ({"past": [[1], [2], [None], [4], [5]]}, "`past` has a null key in its list"),
        ({"who": ["a", "b", None, "d", "e"]}, "`who` is null; expected a key"),
        ({"t": [1.0, 2.0, None, 4.0, 5.0]}, "`t` is null; expected a time"),
        ({"t": pa.array([1.0, 2.0, np.nan, 4.0, 5.0])}, "`t` is null; expected a time"),
        (
            {"items": pa.array([[1], [2], [2**63], [4], [5]], pa.list_(pa.uint64()))},
            "`items` has a key above 9223372036854775807, the largest int64",
        ),
        ({"who": pa.array([1, 2, 2**64 - 1, 4, 5], pa.uint64())},
         "`who` has a key above 9223372036854775807, the largest int64"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, changed: dict[str, object], problem: str, kind: str) -> None:
    good = {"items": [[1], [2], [3], [4], [5]], "past": [[1]] * 5, "who": list("abcde"), "t": [1.0] * 5}
    columns = Columns(history="past", user="who", time="t")
    file = write_table(tmp_path / "part", {**good, **changed}, kind, chunk=2)
    with pytest.raises(DataError) as caught:
        read(file, columns)
    assert str(caught.value) == f"{file}, row group 1, row 0: column {problem}{WAY_OUT}"
    assert read(file, columns, "skip").row_ids.tolist() == [0, 1, 3, 4]


def test_a_null_in_a_dictionary_is_a_null_key(tmp_path: Path) -> None:
    flat = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["a", None]))
    items = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), flat)
    file = write_table(tmp_path / "part", {"items": items}, "ipc_file")
    with pytest.raises(DataError, match="row group 0, row 1: column `items` has a null key in its list"):
        read(file)


def message(path: Path, columns: Columns = Columns()) -> str:  # noqa: B008
    with pytest.raises(DataError) as caught:
        SessionReader(str(path), columns)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_told_with_those_that_exist(tmp_path: Path, kind: str) -> None:
    file = write_table(tmp_path / "part", {"basket": [[1]], "user_id": [1]}, kind)
    assert message(file) == (
        f"{file}: there is no column `items` (for items); the columns are `basket`, `user_id`: "
        "name the right one with `--set data.items=NAME`"
    )
    assert message(file, Columns("basket", user="who")).endswith(
        "there is no column `who` (for user); the columns are `basket`, `user_id`: "
        "name the right one with `--set data.user=NAME`"
    )
    assert "`--set data.query_features=NAME`" in message(file, Columns("basket", features=("age",)))


def test_a_column_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([[1]]), pa.array([[2]])], names=["items", "items"])
    assert "there are 2 columns `items` (for items)" in message(write_table(tmp_path / "part", table))


KEY = "integers, strings or a dictionary of them"


@pytest.mark.parametrize(
    ("table", "columns", "expected"),
    [
        (
            {"items": [[1.5]], "basket": [["a"]]},
            Columns(),
            f"column `items` (for items) is list<element: double>; expected a list or large_list of {KEY}; convert it, "
            "or name another column with `--set data.items=NAME` (of that type: `basket`)",
        ),
        (
            {"items": [1], "user": [2]},
            Columns(),
            f"column `items` (for items) is int64; expected a list or large_list of {KEY}; one row per event? "
            "Make sessions of it first: `lexshard sessions`",
        ),
        (
            {"items": ["a b"]},
            Columns(),
            f"column `items` (for items) is string; expected a list or large_list of {KEY}; one row per event? Make "
            "sessions of it first: `lexshard sessions`; text? Its words are the keys with `--set data.text=true`",
        ),
        (
            {"basket": [["a"]], "line": ["a b"]},
            Columns("basket", text=True),
            "column `basket` (for items) is list<element: string>; expected a string, as data.text is true; convert "
            "it, or name another column with `--set data.items=NAME` (of that type: `line`)",
        ),
        (
            {"items": [[1]], "user": [1.5]},
            Columns(user="user"),
            f"column `user` (for user) is double; expected {KEY}; convert it, or name another column with "
            "`--set data.user=NAME`",
        ),
        (
            {"items": [[1]], "t": ["noon"]},
            Columns(time="t"),
            "column `t` (for time) is string; expected a timestamp, a date or a number; convert it, or name another "
            "column with `time=NAME`",
        ),
        (
            {"items": [[1]], "history": [["a"]]},
            Columns(history="history"),
            "column `history` (for history) holds large_string keys, but `items` holds int64; both are item keys and "
            "must have one type: convert one of them",
        ),
    ],
    ids=["float keys", "event log", "text", "lists for text", "float user", "string time", "history of another type"],
)
def test_a_wrong_type_says_what_was_expected(
    tmp_path: Path, table: dict[str, object], columns: Columns, expected: str
) -> None:
    file = write_table(tmp_path / "part", table)
    assert message(file, columns) == f"{file}: {expected}"
