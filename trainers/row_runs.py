"""A number for every row of a table, held as runs of rows that have the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_CHUNK_ROWS = 1 << 22


class RowRuns:
    """Indexed by rows like the array it stands for, in the memory of its runs.

    A key map orders rows by frequency, so the counts of a billion rows are some ten thousand runs, and so is what
    follows from a count alone: a probability, a share. Any order is right; without runs it takes 16 bytes a row.

    `starts` int64 [runs], the first row of each run, ascending from 0; `values` [runs], its number; `num_rows`.
    """

    def __init__(self, starts: np.ndarray, values: np.ndarray, num_rows: int) -> None:
        assert len(starts) == len(values)
        assert num_rows == 0 or (len(starts) > 0 and starts[0] == 0)
        self.starts, self.values, self.num_rows = starts, values, num_rows

    @classmethod
    def of(cls, numbers: np.ndarray | RowRuns) -> RowRuns:
        """The runs of an array [rows], read once from its beginning to its end."""
        if isinstance(numbers, RowRuns):
            return numbers
        starts = []
        for start in range(0, len(numbers), _CHUNK_ROWS):
            part = numbers[max(0, start - 1) : start + _CHUNK_ROWS]
            changes = np.flatnonzero(part[1:] != part[:-1]) + 1
            starts.append(changes + max(0, start - 1) if start else np.append(0, changes))
        found = np.concatenate(starts).astype(np.int64) if starts else np.empty(0, np.int64)
        return cls(found, np.asarray(numbers)[found], len(numbers))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, rows: Any) -> Any:
        """The numbers of `rows`, integers of any shape that lie in 0..num_rows - 1."""
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows {rows.min()}..{rows.max()} are not all in 0..{self.num_rows - 1}")
        if rows.size > self.num_rows:  # then the array is smaller than the answer, and faster
            return self.dense()[rows]
        return self.values[np.searchsorted(self.starts, rows, side="right") - 1]

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each run: int64 [runs]."""
        return np.diff(self.starts, append=self.num_rows)

    def sum(self) -> Any:
        """Over all rows."""
        return (self.values * self.lengths).sum()

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> RowRuns:
        """The rows with change(number) instead of each number."""
        return RowRuns(self.starts, change(self.values), self.num_rows)

    def dense(self) -> np.ndarray:
        """The array that it stands for, [rows]."""
        return np.repeat(self.values, self.lengths)
