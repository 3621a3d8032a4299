"""Features of sessions and of items: what kind a column is, and its values as towers take them.

The type of the column decides: integers and strings are keys with an embedding each, lists of these are pooled, with
weights where they are maps to floats (or lists of structs of a key and a float), floats are standardised numbers, and
fixed-size lists of floats are vectors that somebody else has trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from cluster.storage import open_filesystem
from embedding_service.hashed_keys import KeyMap
from embedding_service.keys import Vocabulary
from embedding_service.ragged import Ragged
from embedding_service.towers import Given, TowerInput, weighted
from trainers.session_batch import Field, decode_column, feature_type, is_weighted

Kind = Literal["key", "list", "weighted", "number", "vector"]


@dataclass(frozen=True)
class Feature:
    """A feature column: its kind, and how many numbers a value has and how they are standardised: (x - center) * scale.

    A `number` gets mean 0 and variance 1 over the training data; a `vector` keeps its directions, with mean square 1.
    """

    kind: Kind
    width: int = 0
    center: float = 0.0
    scale: float = 1.0

    @property
    def has_keys(self) -> bool:
        return self.kind in ("key", "list", "weighted")

    @property
    def is_list(self) -> bool:
        return self.kind in ("list", "weighted")

    def keys(self, column: pa.Array) -> pa.Array:
        """The keys in the decoded `column` of such a feature, without nulls."""
        if self.kind == "key":
            return column.drop_null()
        flat = column.flatten()
        return flat.flatten()[0] if self.kind == "weighted" else flat

    @classmethod
    def of_type(cls, decoded: pa.DataType) -> Feature:
        """The feature whose decoded column has this type, not standardised."""
        return cls(_kind(decoded), _width(decoded))

    @classmethod
    def of(cls, block: TowerInput) -> Feature:
        """The feature behind an input of a tower."""
        if block.encoder == "project":
            return cls("number" if block.width == 1 else "vector", block.width, block.center, block.scale)
        kinds: dict[str, Kind] = dict.fromkeys(("mean", "sum"), "list")
        kinds |= dict.fromkeys(("weighted_mean", "weighted_sum"), "weighted")
        return cls(kinds.get(block.encoder, "key"))

    def values(self, column: pa.Array, keys: KeyMap | None) -> Given:
        """The decoded `column` [n] as towers take it; `keys`: its key map, where it has one.

        Raises DataError for a column of another kind.
        """
        if (_kind(column.type), _width(column.type)) != (self.kind, self.width):
            raise DataError(f"holds {column.type}, but in training it was a {self.kind} feature: convert it")
        if keys is None:
            return _numbers(column)
        if self.kind == "key":
            return keys.rows(column)
        lists = Ragged.from_arrow(column)
        if self.kind == "list":
            rows = keys.rows(lists.values)
            return lists.with_values(rows).keep(rows >= 0)
        found, weights = lists.values.flatten()
        rows = keys.rows(found)
        return lists.with_values(weighted(rows, weights.to_numpy(zero_copy_only=False))).keep(rows >= 0)


def describe(chunks: Iterable[pa.Array]) -> tuple[Feature, Vocabulary | None]:
    """The feature whose decoded column comes in `chunks` (at least one), and its key map where it has one: one pass.

    Raises DataError for a column without any value.
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        raise DataError("there are no rows")
    column = (chunk for part in ([first], chunks) for chunk in part)
    kind, width = _kind(first.type), _width(first.type)
    feature = Feature(kind)
    if feature.has_keys:
        return feature, Vocabulary.build((feature.keys(chunk) for chunk in column), unknown="skip")
    moments = _Moments()
    for chunk in column:
        numbers = _numbers(chunk)
        moments.add(numbers[~np.isnan(numbers)].astype(np.float64))
    if not moments.num:
        raise DataError("there are no numbers: every row is null")
    if not math.isfinite(moments.mean):
        raise DataError("the numbers are too large to be standardised: their squares overflow; scale them down")
    if kind == "number":
        return Feature(kind, width, moments.mean, _inverse(moments.variance)), None
    return Feature(kind, width, 0.0, _inverse(moments.variance + moments.mean**2)), None


def _kind(decoded: pa.DataType) -> Kind:
    if is_weighted(decoded):
        return "weighted"
    if pa.types.is_large_list(decoded):
        return "list"
    if pa.types.is_fixed_size_list(decoded):
        return "vector"
    return "number" if pa.types.is_floating(decoded) else "key"


def _width(decoded: pa.DataType) -> int:
    """How many numbers a value has."""
    return int(decoded.list_size) if pa.types.is_fixed_size_list(decoded) else int(pa.types.is_floating(decoded))


class _Moments:
    """Mean and variance of a stream, in a form that keeps its digits (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.num, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def variance(self) -> float:
        return self._squares / self.num

    def add(self, values: npt.NDArray[np.float64]) -> None:
        if not len(values):
            return
        if not np.abs(values).max() < 1e150:
            self.num, self.mean = self.num + len(values), math.inf  # `describe` refuses it
            return
        total, mean = self.num + len(values), float(values.mean())
        difference = mean - self.mean
        self._squares += float(((values - mean) ** 2).sum()) + difference**2 * self.num * len(values) / total
        self.mean += difference * len(values) / total
        self.num = total


def _inverse(square: float) -> float:
    """1 / sqrt(square); 1 where nothing varies."""
    return 1.0 / math.sqrt(square) if square > 0.0 and math.isfinite(1.0 / math.sqrt(square)) else 1.0


def _numbers(column: pa.Array) -> npt.NDArray[np.floating]:
    """float [n, width], float64 of a number and float32 of a vector; nan for null."""
    if pa.types.is_floating(column.type):
        numbers: npt.NDArray[np.float64] = column.to_numpy(zero_copy_only=False).reshape(-1, 1)
        return numbers
    out = np.full((len(column), column.type.list_size), np.nan, np.float32)
    given = column.is_valid().to_numpy(zero_copy_only=False)
    out[given] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, out.shape[1])
    return out


@dataclass(frozen=True)
class SideTable:
    """The side table of items: keys [n], int64 or large_string, each once, and the decoded feature columns [n]."""

    items: pa.Array
    columns: dict[str, pa.Array]

    def described(self) -> pa.Array:
        """The keys of items of which at least one feature is known."""
        known = np.zeros(len(self.items), bool)
        for column in self.columns.values():
            here = column.is_valid().to_numpy(zero_copy_only=False)
            if pa.types.is_large_list(column.type):
                here &= np.diff(column.offsets.to_numpy()) > 0
            known |= here
        return self.items.filter(pa.array(known))


def read_side_table(source: str) -> SideTable:
    """The Parquet file of `data.item_features`. Raises DataError naming the file, and the column and row."""
    filesystem, path = open_filesystem(source)
    try:
        table = pq.read_table(path, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"is not a readable Parquet file of item features: {error}", file=source) from None
    names = [name for name in table.column_names if name != "item"]
    if "item" not in table.column_names or not names:
        raise DataError("needs a column `item` and at least one feature column", file=source)
    items = _column(table, "item", source)
    if pa.types.is_floating(items.type) or pa.types.is_nested(items.type):
        raise DataError("column `item` must hold keys: integers or strings", file=source)
    _refuse_first(source, "item", "is null; expected a key", items.is_null())
    repeated = np.ones(len(items), bool)
    repeated[np.unique(items.dictionary_encode().indices.to_numpy(), return_index=True)[1]] = False
    _refuse_first(source, "item", "names an item that a row before has named", pa.array(repeated))
    return SideTable(items, {name: _column(table, name, source) for name in names})


def _column(table: pa.Table, name: str, source: str) -> pa.Array:
    """A decoded column of the side table. Raises DataError."""
    column = table[name].combine_chunks()
    found = column.type
    if (pa.types.is_list(found) or pa.types.is_large_list(found)) and pa.types.is_floating(found.value_type):
        column = _fixed_size(column, name, source)
    to = feature_type(column.type)
    if to is None:
        expected = "integers, strings, lists of these, maps of these to floats, floats, or lists of equally many floats"
        problem = f"column `{name}` is {found}; expected {expected}: convert it, or leave it out of the table"
        raise DataError(problem, file=source)
    decoded, problems = decode_column(Field(f"item feature {name}", name, "feature", ""), [column], to)
    for problem, rows in problems:
        raise DataError(problem, file=source, row=int(rows.argmax()))
    assert isinstance(decoded, pa.Array)
    return decoded


def _fixed_size(column: pa.Array, name: str, source: str) -> pa.Array:
    """Lists of floats, as most writers have vectors, as a fixed_size_list of float32."""
    lists = Ragged.from_arrow(column)
    given = column.is_valid().to_numpy(zero_copy_only=False)
    if not given.any():
        raise DataError(f"column `{name}` has no vector: every row is null", file=source)
    width = int(lists.lengths[given][0])
    if width == 0:
        raise DataError(f"column `{name}` has an empty vector", file=source, row=int(given.argmax()))
    wrong = given & (lists.lengths != width)
    if wrong.any():
        row = int(wrong.argmax())
        problem = f"column `{name}` has a vector of {lists.lengths[row]} numbers, but those before have {width}"
        raise DataError(f"{problem}; lists of floats are vectors of one length", file=source, row=row)
    place = np.where(given, np.cumsum(given) - 1, 0)
    vectors = pa.FixedSizeListArray.from_arrays(lists.values.cast(pa.float32()), width)
    return vectors.take(pa.array(place, mask=~given))


def _refuse_first(source: str, name: str, problem: str, rows: pa.Array) -> None:
    wrong = rows.to_numpy(zero_copy_only=False)
    if wrong.any():
        raise DataError(f"column `{name}` {problem}", file=source, row=int(wrong.argmax()))
