"""Columns of session data: which there are, what type they must have, and a chunk of them as a SessionBatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DataError
from embedding_service.ragged import Ragged, concat_values, offsets_of, take_values
from trainers.session_files import SessionFile

KeyType = Literal["int64", "string"]
ARROW_TYPE: dict[KeyType, pa.DataType] = {"int64": pa.int64(), "string": pa.large_string()}


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read; empty: there is none."""

    items: str = "items"
    user: str = ""
    history: str = ""
    time: str = ""
    features: tuple[str, ...] = ()
    text: bool = False  # items are text, and the keys its words

    def fields(self) -> tuple[Field, ...]:
        """The columns that are there, items first."""
        named = (
            Field("items", self.items, "text" if self.text else "lists", "--set data.items="),
            Field("history", self.history, "lists", "--set data.history="),
            Field("user", self.user, "keys", "--set data.user="),
            Field("time", self.time, "time", "time="),
            *(Field(f"feature {name}", name, "feature", "--set data.query_features=") for name in self.features),
        )
        return tuple(one for one in named if one.name)


@dataclass(frozen=True)
class Field:
    """One column to read. `option` is the beginning of the command-line option that names it."""

    role: str
    name: str
    kind: Literal["lists", "text", "keys", "feature", "time"]
    option: str


@dataclass(frozen=True, eq=False)
class SessionBatch:
    """n sessions. Keys are int64 or large_string Arrow arrays, whatever their type in the file; in the place of item
    keys may be their rows, a numpy array of int64.

    `row_ids` int64 [n] is the number of a session in file order, bad rows counted. `user` [n] has no nulls; `time` [n]
    is timestamp[us] (UTC), int64 or float64 and has no nulls; `features` [n] are keys, large_lists of keys or of
    structs (key, weight float32), float64 numbers or fixed_size_lists of float32, and may have nulls: unknown.
    """

    items: Ragged
    row_ids: npt.NDArray[np.int64]
    user: pa.Array | None = None
    history: Ragged | None = None
    time: pa.Array | None = None
    features: dict[str, pa.Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row_ids)

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> SessionBatch:
        """The sessions at positions `rows` (integer [m]) of this batch, in that order."""
        return SessionBatch(
            self.items.take(rows),
            self.row_ids[rows],
            None if self.user is None else take_values(self.user, rows),
            None if self.history is None else self.history.take(rows),
            None if self.time is None else take_values(self.time, rows),
            {name: take_values(values, rows) for name, values in self.features.items()},
        )

    def slice(self, start: int, stop: int) -> SessionBatch:
        """The sessions start..stop - 1, sharing their memory."""
        stop = min(stop, len(self))
        return SessionBatch(
            self.items.slice(start, stop),
            self.row_ids[start:stop],
            None if self.user is None else self.user.slice(start, stop - start),
            None if self.history is None else self.history.slice(start, stop),
            None if self.time is None else self.time.slice(start, stop - start),
            {name: values.slice(start, stop - start) for name, values in self.features.items()},
        )

    @classmethod
    def concat(cls, parts: Sequence[SessionBatch]) -> SessionBatch:
        """The sessions of all `parts` (at least one, with the same columns), in order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            Ragged.concat([part.items for part in parts]),
            np.concatenate([part.row_ids for part in parts]),
            None if first.user is None else concat_values(part.user for part in parts),
            Ragged.concat([part.history for part in parts if part.history is not None])
            if first.history is not None
            else None,
            None if first.time is None else concat_values(part.time for part in parts),
            {name: concat_values(part.features[name] for part in parts) for name in first.features},
        )


def check_schema(schema: pa.Schema, fields: Iterable[Field], file: str) -> dict[str, pa.DataType]:
    """The type that every column has once decoded (of a list column: its keys'), by column name.

    Raises DataError for a column that is missing, ambiguous or of a type that cannot be used.
    """
    return {one.name: _decoded_type(schema, one, file) for one in fields}


def one_type(files: Sequence[SessionFile], fields: Sequence[Field]) -> dict[str, pa.DataType]:
    """The decoded type of every column, by name: one in all files, and in all columns of items. Raises DataError."""
    types: dict[str, pa.DataType] = {}
    for file in files:
        for name, found in check_schema(file.schema, fields, file.name).items():
            if types.setdefault(name, found) != found:
                raise DataError(
                    f"column `{name}` holds {found}, but {types[name]} in {files[0].name}; every file must have the "
                    "same type: convert one of them, or name files of one type in the source",
                    file=file.name,
                )
    lists = [one for one in fields if one.kind == "lists"]
    for one in lists[1:]:
        if types[one.name] != types[lists[0].name]:
            raise DataError(
                f"column `{one.name}` (for {one.role}) holds {types[one.name]} keys, but `{lists[0].name}` holds "
                f"{types[lists[0].name]}; both are item keys and must have one type: convert one of them",
                file=files[0].name,
            )
    return types


def decode_chunk(
    arrays: dict[str, list[pa.Array]],
    columns: Columns,
    types: dict[str, pa.DataType],
    *,
    first_row: int,
    bad_rows: Literal["error", "skip"],
    file: str,
    chunk: int,
) -> tuple[SessionBatch, npt.NDArray[np.bool_] | None]:
    """The good sessions of a chunk, and which of its rows they are (bool; None: all).

    `first_row` is the row id of the chunk's first row. Raises DataError for the first bad row if `bad_rows` is "error".
    """
    decoded: dict[str, Any] = {}
    problems: list[tuple[str, npt.NDArray[np.bool_]]] = []
    for one in columns.fields():
        decoded[one.name], found = decode_column(one, arrays[one.name], types[one.name])
        problems += found
    items = decoded[columns.items]
    batch = SessionBatch(
        items,
        np.arange(first_row, first_row + len(items), dtype=np.int64),
        decoded.get(columns.user),
        decoded.get(columns.history),
        decoded.get(columns.time),
        {name: decoded[name] for name in columns.features},
    )
    if not problems:
        return batch, None
    bad = np.logical_or.reduce([rows for _, rows in problems])
    if bad_rows == "error":
        row = int(bad.argmax())
        problem = next(text for text, rows in problems if rows[row])
        way_out = "mend the row, or skip and count such rows: `--set data.bad_rows=skip`"
        raise DataError(f"{problem}; {way_out}", file=file, row_group=chunk, row=row)
    return batch.take(np.flatnonzero(~bad)), ~bad


def decode_column(
    one: Field, chunks: Sequence[pa.Array], to: pa.DataType
) -> tuple[Ragged | pa.Array, list[tuple[str, npt.NDArray[np.bool_]]]]:
    """The column as a Ragged (kinds "lists" and "text") or an array of type `to`, and its problems: what, and in which
    rows.
    """
    if one.kind == "feature" and not _is_key(to):
        return _decode_feature(one, chunks, to)
    if one.kind not in ("lists", "text"):
        values, out_of_range = _decode_values(chunks, to)
        nulls = _mask(pc.is_null(values, nan_is_null=True)) if one.kind != "feature" else None
        expected = "a key" if one.kind == "keys" else "a time"
        return values, _problems(one.name, (f"is null; expected {expected}", nulls), (_TOO_LARGE, out_of_range))
    if one.kind == "text":
        texts, _ = _decode_values(chunks, to)
        return _words(texts), _problems(
            one.name, ("is null; expected a text (an empty one is fine)", _mask(texts.is_null()))
        )
    null_lists = np.concatenate([_mask(part.is_null()) for part in chunks]) if chunks else np.zeros(0, bool)
    parts = [Ragged.from_arrow(part) for part in chunks]
    values, out_of_range = _decode_values([part.values for part in parts], to)
    lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
    lists = Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))
    return lists, _problems(
        one.name,
        ("is null; expected a list of keys (an empty list is fine)", null_lists),
        ("has a null key in its list", _rows_of(lists, _mask(values.is_null())) if values.null_count else None),
        (_TOO_LARGE, None if out_of_range is None else _rows_of(lists, out_of_range)),
    )


def _decode_feature(
    one: Field, chunks: Sequence[pa.Array], to: pa.DataType
) -> tuple[pa.Array, list[tuple[str, npt.NDArray[np.bool_]]]]:
    """A feature that is no key: a large_list of keys without nulls, float64 (nan is null), or a fixed_size_list."""
    if is_weighted(to):
        return _decode_weighted(one, chunks, to)
    if pa.types.is_large_list(to):
        parts = [Ragged.from_arrow(part) for part in chunks]
        keys, out_of_range = _decode_values([part.values for part in parts], to.value_type)
        lists = Ragged(keys, offsets_of(np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])))
        problem = None if out_of_range is None else _rows_of(lists, out_of_range)
        if keys.null_count:
            lists = lists.keep(~_mask(keys.is_null()))
        array = pa.LargeListArray.from_arrays(pa.array(lists.offsets), lists.values)
        return array, _problems(one.name, (_TOO_LARGE, problem))
    joined = concat_values([chunk.cast(to) for chunk in chunks]) if chunks else pa.array([], to)
    if to == pa.float64():
        numbers = joined.to_numpy(zero_copy_only=False)
        array = pa.array(numbers, mask=np.isnan(numbers))
        return array, _problems(one.name, ("is infinite; expected a number", np.isinf(numbers)))
    components = joined.flatten().to_numpy(zero_copy_only=False).reshape(-1, to.list_size)  # of those that are not null
    wrong = np.zeros(len(joined), bool)
    wrong[_mask(joined.is_valid())] = ~np.isfinite(components).all(axis=1)
    return joined, _problems(one.name, ("has a null, nan or infinite number in its vector", wrong))


def _decode_weighted(
    one: Field, chunks: Sequence[pa.Array], to: pa.DataType
) -> tuple[pa.Array, list[tuple[str, npt.NDArray[np.bool_]]]]:
    """Keys with weights: a large_list of structs; those without a key are left out."""
    parts = [Ragged.from_arrow(part) for part in chunks]
    fields = [part.values.flatten() for part in parts]  # the nulls of a struct are those of its fields
    keys, out_of_range = _decode_values([key for key, _ in fields], to.value_type.field(0).type)
    weights = (
        concat_values([weight.cast(pa.float32()) for _, weight in fields]) if fields else pa.array([], pa.float32())
    )
    lists = Ragged(
        pa.StructArray.from_arrays([keys, weights], fields=list(to.value_type)),
        offsets_of(np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])),
    )
    known = _mask(keys.is_valid())
    wrong = known & ~np.isfinite(weights.to_numpy(zero_copy_only=False))
    problems = _problems(
        one.name,
        (_TOO_LARGE, None if out_of_range is None else _rows_of(lists, out_of_range)),
        ("has a null, nan or infinite weight", _rows_of(lists, wrong)),
    )
    if not known.all():
        lists = lists.keep(known)
    return pa.LargeListArray.from_arrays(pa.array(lists.offsets), lists.values).cast(to), problems


_TOO_LARGE = "has a key above 9223372036854775807, the largest int64"


def _problems(name: str, *found: tuple[str, npt.NDArray[np.bool_] | None]) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    return [(f"column `{name}` {text}", rows) for text, rows in found if rows is not None and rows.any()]


def _rows_of(lists: Ragged, values: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which lists have one of the marked values."""
    rows = np.zeros(len(lists), bool)
    rows[lists.owners()[values]] = True
    return rows


def _mask(array: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(array.to_numpy(zero_copy_only=False), bool)


def _words(texts: pa.Array) -> Ragged:
    """The words of each text, as white space separates them; a null has none."""
    words = Ragged.from_arrow(pc.utf8_split_whitespace(texts))
    return words.keep(np.asarray(pc.not_equal(words.values, "")))  # white space at the ends, and empty texts


def _decode_values(chunks: Sequence[pa.Array], to: pa.DataType) -> tuple[pa.Array, npt.NDArray[np.bool_] | None]:
    """The values as one array of type `to`, and which of them int64 cannot hold (None: all fit)."""
    arrays, out_of_range = [], []
    for chunk in chunks:
        values = chunk
        if isinstance(chunk, pa.DictionaryArray):  # the dictionary is converted, not its many copies
            words = chunk.dictionary
            if words.type not in (pa.uint64(), to):
                words = words.cast(to)
            values = pa.DictionaryArray.from_arrays(chunk.indices, words).dictionary_decode()
        if values.type == pa.uint64():
            out_of_range.append(_mask(pc.fill_null(pc.greater(values, pa.scalar(2**63 - 1, pa.uint64())), False)))
        arrays.append(values if values.type == to else values.cast(to, safe=False))
    joined = concat_values(arrays) if arrays else pa.array([], to)
    return joined, np.concatenate(out_of_range) if out_of_range else None


def _decoded_type(schema: pa.Schema, one: Field, file: str) -> pa.DataType:
    places = schema.get_all_field_indices(one.name)
    if len(places) != 1:
        problem = f"there is no column `{one.name}`" if not places else f"there are {len(places)} columns `{one.name}`"
        raise DataError(
            f"{problem} (for {one.role}); the columns are {', '.join(f'`{name}`' for name in schema.names)}: "
            f"name the right one with `{one.option}NAME`",
            file=file,
        )
    found = schema.field(places[0]).type
    decoded = _decoded(found, one.kind)
    if decoded is None:
        raise DataError(_wrong_type(schema, one, found), file=file)
    return decoded


def _decoded(found: pa.DataType, kind: str) -> pa.DataType | None:
    """What a column of type `found` is decoded to; None if it cannot serve as `kind`."""
    if kind == "lists":
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        return _key_type(found.value_type) if is_list else None
    if kind == "feature":
        return feature_type(found)
    if kind == "text":
        return pa.large_string() if _key_type(found) == pa.large_string() else None
    return _time_type(found) if kind == "time" else _key_type(found)


def feature_type(found: pa.DataType) -> pa.DataType | None:
    """What a feature column is decoded to: keys, large_lists of keys or of (key, weight) structs, float64 numbers,
    fixed_size_lists of float32; None for a type that can be none of these.
    """
    weighted = _weighted_type(found)
    if weighted is not None:
        return weighted
    if pa.types.is_floating(found):
        return pa.float64()
    if pa.types.is_fixed_size_list(found) and pa.types.is_floating(found.value_type):
        return pa.list_(pa.float32(), found.list_size)
    if pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found):
        key = _key_type(found.value_type)
        return None if key is None else pa.large_list(key)
    return _key_type(found)


def _weighted_type(found: pa.DataType) -> pa.DataType | None:
    """What keys with weights are decoded to: a map from keys to floats, or a list of structs of a key and a float."""
    if pa.types.is_map(found):
        key, weight = found.key_type, found.item_type
    elif (pa.types.is_list(found) or pa.types.is_large_list(found)) and pa.types.is_struct(found.value_type):
        if found.value_type.num_fields != 2:
            return None
        key, weight = (one.type for one in found.value_type)
    else:
        return None
    keys = _key_type(key)
    if keys is None or not pa.types.is_floating(weight):
        return None
    return pa.large_list(pa.struct([("key", keys), ("weight", pa.float32())]))


def is_weighted(decoded: pa.DataType) -> bool:
    """Whether a decoded feature column holds keys with weights."""
    return bool(pa.types.is_large_list(decoded) and pa.types.is_struct(decoded.value_type))


def _is_key(decoded: pa.DataType) -> bool:
    return decoded in (pa.int64(), pa.large_string())


def _key_type(found: pa.DataType) -> pa.DataType | None:
    value = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_integer(value):
        return pa.int64()
    if pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value):
        return pa.large_string()
    return None


def _time_type(found: pa.DataType) -> pa.DataType | None:
    if pa.types.is_timestamp(found) or pa.types.is_date(found):
        return pa.timestamp("us")
    if pa.types.is_integer(found):
        return pa.int64()
    return pa.float64() if pa.types.is_floating(found) else None


def _wrong_type(schema: pa.Schema, one: Field, found: pa.DataType) -> str:
    key = "integers, strings or a dictionary of them"
    expected = {
        "lists": f"a list or large_list of {key}",
        "text": "a string, as data.text is true",
        "time": "a timestamp, a date or a number",
        "feature": f"{key}, lists of these, maps from these to floats, floats or a fixed_size_list of floats",
    }.get(one.kind, key)
    message = f"column `{one.name}` (for {one.role}) is {found}; expected {expected}"
    fitting = [f"`{other.name}`" for other in schema if _decoded(other.type, one.kind) is not None]
    if one.kind == "lists" and not fitting and _key_type(found) is not None:
        hint = "; text? Its words are the keys with `--set data.text=true`" if _key_type(found) != pa.int64() else ""
        return message + "; one row per event? Make sessions of it first: `lexshard sessions`" + hint
    hint = f" (of that type: {', '.join(fitting)})" if fitting else ""
    return message + f"; convert it, or name another column with `{one.option}NAME`{hint}"
