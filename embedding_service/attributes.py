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
MAX_ITEM_BYTES, MIN_BYTES = 1024, 64 * 2**20  # of the table when it is read: so much per item, but at least
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
            metadata = pq.read_metadata(file)
            if metadata.num_rows > 4 * rows + 1000:
                raise ArtifactError(f"{file}: has far more rows than the {rows} items")
            if (size := _uncompressed_bytes(metadata)) > max(MIN_BYTES, MAX_ITEM_BYTES * rows):
                raise ArtifactError(f"{file}: is {size} bytes when it is read, too much for {rows} items")
            table = pq.read_table(file, read_dictionary=_texts(metadata.schema.to_arrow_schema()))
            items = table["item"].unify_dictionaries().combine_chunks()
            places = catalogue.rows(items)
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


def _uncompressed_bytes(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return sum(group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns))


def _texts(schema: pa.Schema) -> list[str]:
    """Columns that are read as codes: a few bytes of a file may repeat one long string for every row. Raises TypeError
    for types that are none of an attribute's, before they are read.
    """
    types = {one.name: one.type.value_type if pa.types.is_dictionary(one.type) else one.type for one in schema}
    texts = [name for name, type_ in types.items() if pa.types.is_string(type_) or pa.types.is_large_string(type_)]
    for name, type_ in types.items():
        if name not in texts and not pa.types.is_integer(type_) and not pa.types.is_boolean(type_):
            raise TypeError(f"{name}: a column of {type_}; filters take strings, whole numbers and true / false")
    return texts


def _codes(
    column: pa.ChunkedArray, places: npt.NDArray[np.int64], known: Mask, rows: int
) -> tuple[npt.NDArray[np.int32], dict[Value, int]]:
    given = column.unify_dictionaries().combine_chunks()
    encoded = given if isinstance(given, pa.DictionaryArray) else pc.dictionary_encode(given)
    values = pc.dictionary_encode(encoded.dictionary)  # a file may have one value twice
    numbers = np.append(values.indices.fill_null(-1).to_numpy(), -1)  # the last one is for nulls
    codes = np.full(rows, -1, np.int32)
    codes[places] = numbers[encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy()][known]
    return codes, {value: number for number, value in enumerate(values.dictionary.to_pylist())}
