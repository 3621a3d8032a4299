from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import row_runs
from trainers.row_runs import RowRuns


@settings(deadline=None, derandomize=True)
@given(numbers=st.lists(st.integers(0, 3), max_size=50), chunk=st.integers(1, 9))
def test_runs_stand_for_their_array(numbers: list[int], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_runs, "_CHUNK_ROWS", chunk)
        runs = RowRuns.of(np.array(numbers, np.int64))
    assert runs.dense().tolist() == numbers
    assert len(runs) == len(numbers)
    assert runs.sum() == sum(numbers)
    assert (runs.values[1:] != runs.values[:-1]).all()
    if numbers:
        rows = np.arange(len(numbers)).reshape(1, -1)[:, ::-1]
        assert runs[rows].tolist() == [numbers[::-1]]
        assert runs[np.repeat(rows, 2)].tolist() == [n for n in numbers[::-1] for _ in range(2)]  # more than it has
        assert runs.map(lambda values: values * 0.5)[rows[0]].tolist() == [n * 0.5 for n in numbers[::-1]]


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_outside_is_refused(row: int) -> None:
    with pytest.raises(IndexError, match=r"not all in 0\.\.2"):
        RowRuns.of(np.array([5, 5, 1]))[np.array([0, row])]


def test_a_billion_rows_take_the_memory_of_their_runs() -> None:
    runs = RowRuns(np.array([0, 3, 2**32]), np.array([9, 2, 1]), 2**33)
    assert runs[np.array([2, 3, 2**32 - 1, 2**32, 2**33 - 1])].tolist() == [9, 2, 2, 1, 1]
    assert runs.sum() == 27 + 2 * (2**32 - 3) + 2**32
