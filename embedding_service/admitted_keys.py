"""Key -> row for the keys that had a row of a dynamic table when it was exported; all others share the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import ArtifactError
from cluster.storage import complete_file
from embedding_service.hashed_keys import NUM_IDS, HashedKeys
from embedding_service.keys import KeyType

_FORMAT = "lexshard.admitted_keys"
_FORMAT_VERSION = 1


class AdmittedKeys:
    """Row i is of the key whose id (see `HashedKeys`) is the i-th of `ids`, which ascend; the row behind these is of
    all other keys, and null has -1. Keys cannot be listed. Immutable, and safe to use from many threads at once.
    """

    unknown: Literal["skip", "row"] = "row"

    def __init__(self, key_type: KeyType, ids: npt.NDArray[np.int64]) -> None:
        """ids: int64 [n], distinct and ascending. Raises ValueError for others."""
        if ids.ndim != 1 or np.any(ids[1:] <= ids[:-1]) or (len(ids) and not 0 <= ids[0] <= ids[-1] < NUM_IDS):
            raise ValueError("ids must be distinct, ascending and those of hashed keys")
        self.key_type: KeyType = key_type
        self.ids = ids
        self.num_keys = len(ids)
        self.num_rows = len(ids) + 1
        self._hashed = HashedKeys(key_type)

    def rows(self, keys: pa.Array | pa.ChunkedArray | npt.NDArray[Any] | Sequence[Any]) -> npt.NDArray[np.int64]:
        """Rows of `keys` [n], int64 [n]: see `HashedKeys.rows`."""
        return self.rows_of_ids(self._hashed.rows(keys))

    def row(self, key: object) -> int:
        """The row of one key; -1 for anything that is not one."""
        return int(self.rows_of_ids(np.array([self._hashed.row(key)]))[0])

    def rows_of_ids(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows of keys that training knows by `ids` [n]: int64 [n]."""
        place = np.searchsorted(self.ids, ids)
        found = np.full(len(ids), self.num_keys, np.int64)
        inside = np.flatnonzero(place < self.num_keys)
        hit = inside[self.ids[place[inside]] == ids[inside]]
        found[hit] = place[hit]
        found[ids < 0] = -1
        return found

    def save(self, path: str | Path) -> None:
        """Write one uncompressed Arrow IPC file (column `ids`), which `load` maps into memory."""
        meta = {"format": _FORMAT, "version": _FORMAT_VERSION, "key_type": self.key_type}
        schema = pa.schema([pa.field("ids", pa.int64(), nullable=False)], metadata={_FORMAT: json.dumps(meta)})
        with (
            complete_file(path) as temporary,
            pa.OSFile(os.fspath(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            writer.write_batch(pa.record_batch([pa.array(self.ids)], schema=schema))

    @classmethod
    def load(cls, path: str | Path) -> AdmittedKeys:
        """What `save` wrote. Raises ArtifactError, which names the file."""
        try:
            with pa.memory_map(os.fspath(path)) as source, pa.ipc.open_file(source) as reader:
                meta = json.loads((reader.schema.metadata or {}).get(_FORMAT.encode(), b"null"))
                if (meta["format"], meta["version"]) != (_FORMAT, _FORMAT_VERSION):
                    raise ValueError(f"format {meta['format']!r}, version {meta['version']!r}")
                if meta["key_type"] not in ("int64", "string"):
                    raise ValueError(f"keys of type {meta['key_type']!r}")
                column = reader.get_batch(0).column("ids")
            if column.type != pa.int64() or column.null_count:
                raise ValueError("its ids are not numbers")
            return cls(meta["key_type"], column.to_numpy())
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: does not say which keys have rows ({error})") from None
