"""Attributes of items, from the Parquet side table of an artifact: which rows have the values a filter asks for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import ArtifactError, DataError
from embedding_service.keys import Vocabulary

FILE = "attributes.parquet"
MAX_BYTES = 4 * 2**30
Value = str | int | float | bool
Mask = npt.NDArray[np.bool_]


class Attributes:
    """Columns of single values (strings, whole numbers, true / false), each a code per catalogue row, -1 for none."""

    def __init__(self, columns: Mapping[str, tuple[npt.NDArray[np.int32], dict[Value, int]]], rows: int) -> None:
        self._columns, self._rows = columns, rows
        self._mask = functools.lru_cache(maxsize=64)(self._compute)

    @classmethod
    def read(cls, file: Path, catalogue: Vocabulary) -> Attributes:
        """The table with the column `item` of keys. Raises ArtifactError for another, and for one that is too large."""
        rows = len(catalogue.keys)
        try:
            if file.stat().st_size > MAX_BYTES:
                raise ArtifactError(f"{file}: is larger than {MAX_BYTES} bytes")
            if pq.read_metadata(file).num_rows > 4 * rows + 1000:
                raise ArtifactError(f"{file}: has far more rows than the {rows} items")
            table = pq.read_table(file)
            places = catalogue.rows(table["item"].combine_chunks())
            known = (places >= 0) & (places < rows)
            columns = {
                name: _codes(table[name], places[known], known, rows) for name in table.column_names if name != "item"
            }
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{file}: is no table of items' attributes ({error})") from None
        return cls(columns, rows)

    @property
    def names(self) -> list[str]:
        return sorted(self._columns)

    def mask(self, where: Mapping[str, Value | Sequence[Value]]) -> Mask:
        """bool [rows]: the items that have, in every column named, one of the values. Raises DataError."""
        allowed = np.ones(self._rows, np.bool_)
        for name, values in where.items():
            if name not in self._columns:
                known = ", ".join(self.names) or "none"
                raise DataError(f"there is no attribute {name[:100]!r}; this version has: {known}")
            wanted = values if isinstance(values, (list, tuple)) else [values]
            allowed &= self._mask(name, tuple((type(value), value) for value in wanted))
        return allowed

    def _compute(self, name: str, wanted: tuple[tuple[type, Value], ...]) -> Mask:
        codes, values = self._columns[name]
        kind = {type(value) for value in values}
        chosen = [values[value] for type_, value in wanted if type_ in kind and value in values]
        mask: Mask = np.isin(codes, np.array(chosen, np.int32))
        mask.flags.writeable = False
        return mask


def _codes(
    column: pa.ChunkedArray, places: npt.NDArray[np.int64], known: Mask, rows: int
) -> tuple[npt.NDArray[np.int32], dict[Value, int]]:
    type_ = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(type_) or pa.types.is_string(type_) or pa.types.is_large_string(type_)) and (
        not pa.types.is_boolean(type_)
    ):
        raise TypeError(f"a column of {type_}; filters take strings, whole numbers and true / false")
    encoded = pc.dictionary_encode(column.combine_chunks().cast(type_))
    codes = np.full(rows, -1, np.int32)
    codes[places] = encoded.indices.fill_null(-1).to_numpy()[known]
    return codes, {value: number for number, value in enumerate(encoded.dictionary.to_pylist())}
