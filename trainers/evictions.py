"""Who has lost a row of a dynamic table: written down while training, and named by their keys at export.

<run>/evicted.jsonl    {"step", "table", "ids"}: ids that lost their row with this step; a resumed run goes on behind
                       its checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.config import Config
from cluster.storage import write_atomic
from embedding_service.hashed_keys import HashedKeys
from trainers.prepare import Prepared, open_reader
from trainers.sessions import Columns

_FILE = "evicted.jsonl"
Int64 = npt.NDArray[np.int64]


class EvictionLog:
    """Writes `<run>/evicted.jsonl`; what was written after `step` is dropped first, since it is trained once more."""

    def __init__(self, run: Path, step: int) -> None:
        self._path = run / _FILE
        kept = [line for line in _lines(run) if line["step"] <= step]
        write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(self._path, "a")  # noqa: SIM115 - closed by close()

    def write(self, step: int, evicted: Mapping[str, Int64]) -> None:
        """evicted: table -> int64 [n] ids."""
        for table, ids in evicted.items():
            self._file.write(json.dumps({"step": step, "table": table, "ids": ids.tolist()}) + "\n")
        if evicted:
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def evicted_ids(run: str | Path, table: str, *, step: int) -> Int64:
    """The ids that had lost a row of `table` by `step`, whether or not they got one again: int64 [n], ascending."""
    found = [line["ids"] for line in _lines(Path(run)) if line["table"] == table and line["step"] <= step]
    return np.unique(np.array([one for ids in found for one in ids], np.int64))


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    path = run / _FILE
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            return  # a line that a kill cut off, the last one
        yield found


def keys_of(config: Config, prepared: Prepared, name: str, ids: Int64) -> pa.Array:
    """The keys of the key map `name` that have `ids` [n] (ascending), found in the training data: one streaming pass.

    Null for an id that no key has there. Raises DataError or SettingError where the data cannot be read.
    """
    key_map = prepared.hashed_keys[name]
    missing = set(range(len(ids)))
    keys: list[Any] = [None] * len(ids)
    for column in _columns(config, prepared, name):
        if not missing:
            break
        places, found = _among(key_map, column, ids)
        for place, key in zip(places.tolist(), found.to_pylist(), strict=True):
            if place in missing:
                keys[place] = key
                missing.remove(place)
    return pa.array(keys, pa.int64() if key_map.key_type == "int64" else pa.large_string())


def _among(key_map: HashedKeys, column: pa.Array, ids: Int64) -> tuple[Int64, pa.Array]:
    """(places among `ids`, the keys) of what `column` has of them."""
    of_column = key_map.rows(column)
    place = np.minimum(np.searchsorted(ids, of_column), len(ids) - 1)
    hits = np.flatnonzero(ids[place] == of_column) if len(ids) else np.empty(0, np.int64)
    return place[hits], column.take(pa.array(hits))


def _columns(config: Config, prepared: Prepared, name: str) -> Iterator[pa.Array]:
    """The key column of the key map `name` (user, or query_<feature>), part by part."""
    reader, data = open_reader(config), config.data
    if name == "user":
        for batch in reader.stream(Columns(items=data.items, user=data.user, text=data.text)):
            yield batch.user
        return
    feature = name.removeprefix("query_")
    for batch in reader.stream(Columns(items=data.items, features=(feature,), text=data.text)):
        yield prepared.query_features[feature].keys(batch.features[feature])
