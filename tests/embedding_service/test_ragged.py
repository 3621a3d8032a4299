from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_service.ragged import Ragged

LISTS = st.lists(st.lists(st.integers(-5, 5), max_size=4), max_size=8)


def ragged(lists: list[list[Any]], kind: str) -> Ragged:
    if kind == "strings":
        return Ragged.from_lists([[str(value) for value in one] for one in lists], pa.large_string())
    return Ragged.from_lists(lists, pa.int64() if kind == "arrow" else np.int64)


def back(result: Ragged) -> list[list[int]]:
    return [[int(value) for value in one] for one in result.to_lists()]


@pytest.mark.parametrize("kind", ["numpy", "arrow", "strings"])
@settings(deadline=None, derandomize=True)
@given(lists=LISTS, data=st.data())
def test_every_operation_is_the_one_on_python_lists(kind: str, lists: list[list[int]], data: st.DataObject) -> None:
    whole = ragged(lists, kind)
    assert len(whole) == len(lists)
    assert back(whole) == lists
    assert whole.lengths.tolist() == [len(one) for one in lists]
    assert whole.owners().tolist() == [i for i, one in enumerate(lists) for _ in one]
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    assert back(whole.slice(start, stop)) == lists[start:stop]
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=9)) if lists else []
    assert back(whole.slice(0, len(lists)).take(np.array(rows, np.int64))) == [lists[row] for row in rows]
    length = data.draw(st.integers(0, 3))
    assert back(whole.tail(length)) == [one[len(one) - min(len(one), length) :] for one in lists]
    mask = np.array([value % 2 == 0 for one in lists for value in one], bool)
    assert back(whole.keep(mask)) == [[value for value in one if value % 2 == 0] for one in lists]
    assert back(Ragged.concat([whole, whole.slice(start, stop), whole])) == lists + lists[start:stop] + lists


@pytest.mark.parametrize("arrow_type", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)])
def test_from_arrow_reads_a_slice_of_any_list_type_and_empties_null_lists(arrow_type: pa.DataType) -> None:
    lists = pa.array([[9, 9], [1, 2], None, [3, 4], [8, 8]], arrow_type).slice(1, 3)
    assert Ragged.from_arrow(lists).to_lists() == [[1, 2], [], [3, 4]]


def test_from_arrow_does_not_copy_the_values() -> None:
    lists = pa.array([[1, 2], [3]])
    assert Ragged.from_arrow(lists).values.buffers()[1].address == lists.values.buffers()[1].address


def test_values_hidden_behind_a_null_list_are_dropped() -> None:
    offsets, hidden = pa.array([0, 2, 4, 5], pa.int32()), pa.array([False, True, False])
    lists = pa.ListArray.from_arrays(offsets, pa.array([1, 2, 6, 6, 3]), mask=hidden)
    assert Ragged.from_arrow(lists).to_lists() == [[1, 2], [], [3]]
    assert len(Ragged.from_arrow(lists).values) == 3


def test_from_arrow_refuses_what_is_no_list() -> None:
    with pytest.raises(TypeError, match="int64 is not a list"):
        Ragged.from_arrow(pa.array([1, 2]))


def test_with_values_keeps_the_lengths() -> None:
    keys = Ragged.from_lists([["a", "b"], [], ["a"]], pa.large_string())
    assert keys.with_values(np.array([4, 5, 4])).to_lists() == [[4, 5], [], [4]]


def test_offsets_that_do_not_fit_the_values_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        Ragged(np.arange(3), np.array([0, 2], np.int64))
