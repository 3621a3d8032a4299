"""Key -> id without a vocabulary: a stable hash, which takes no memory however many keys there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import ArtifactError, DataError
from cluster.storage import write_json
from embedding_service.hashing import key_array, stable_hash
from embedding_service.keys import KeyType

NUM_IDS = 2**62  # of 10 ** 9 keys, a tenth of one shares its id

_FORMAT = "lexshard.hashed_keys"
_FORMAT_VERSION = 1


class KeyMap(Protocol):
    """What a `Vocabulary` and `HashedKeys` have in common: keys in, ids out.

    `num_rows` ids, of which the first `num_keys` are of keys; "row" is what a vocabulary calls an id, since in an exact
    table it is one.
    """

    key_type: KeyType
    num_rows: int
    unknown: Literal["skip", "row"]

    @property
    def num_keys(self) -> int: ...
    def row(self, key: object) -> int: ...
    def rows(self, keys: pa.Array | pa.ChunkedArray | npt.NDArray[Any] | Sequence[Any]) -> npt.NDArray[np.int64]: ...
    def save(self, path: str | Path) -> None: ...


class HashedKeys:
    """Every key of its type has an id in 0..2**62 - 1, the upper bits of its stable hash; null has -1.

    Two keys may have one id; how few do says `NUM_IDS`. Keys cannot be listed or found by their id, and nothing is
    known of their frequency. Immutable, and safe to use from many threads at once.
    """

    num_rows = num_keys = NUM_IDS
    unknown: Literal["skip", "row"] = "skip"

    def __init__(self, key_type: KeyType) -> None:
        self.key_type: KeyType = key_type
        self._arrow = pa.int64() if key_type == "int64" else pa.large_string()

    def rows(self, keys: pa.Array | pa.ChunkedArray | npt.NDArray[Any] | Sequence[Any]) -> npt.NDArray[np.int64]:
        """Ids of `keys` [n], int64 [n]; -1 for nulls.

        Arrow and NumPy arrays hold keys of one type: DataError if it is not this map's. A Python sequence may hold
        anything; what is not a key of that type has no id.
        """
        if not isinstance(keys, (pa.Array, pa.ChunkedArray, np.ndarray)):
            return np.fromiter(map(self.row, keys), dtype=np.int64, count=len(keys))
        if isinstance(keys, pa.DictionaryArray):
            ids = np.append(self.rows(keys.dictionary), -1)  # the last one is for nulls
            places: npt.NDArray[np.int64] = keys.indices.cast(pa.int64()).fill_null(len(ids) - 1).to_numpy()
            return ids[places]
        array = key_array(keys)
        if array.type != self._arrow:
            raise DataError(f"these keys are {array.type}, those of training {self._arrow}")
        if not array.null_count:
            return _ids(stable_hash(array))
        out = np.full(len(array), -1, np.int64)
        out[array.is_valid().to_numpy(zero_copy_only=False)] = _ids(stable_hash(array.drop_null()))
        return out

    def row(self, key: object) -> int:
        """The id of one key; -1 for anything that is not one. "7" is not 7."""
        own = isinstance(key, str) if self.key_type == "string" else isinstance(key, (int, np.integer))
        if not own or isinstance(key, bool):
            return -1
        try:
            return int(_ids(stable_hash(pa.array([key], self._arrow)))[0])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # no key of a file can be this
            return -1

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file."""
        write_json(Path(path), {"format": _FORMAT, "version": _FORMAT_VERSION, "key_type": self.key_type})

    @classmethod
    def load(cls, path: str | Path) -> HashedKeys:
        """What `save` wrote. Raises ArtifactError, which names the file."""
        try:
            found = json.loads(Path(path).read_bytes())
            if (found["format"], found["version"]) != (_FORMAT, _FORMAT_VERSION):
                raise ValueError(f"format {found['format']!r}, version {found['version']!r}")
            if found["key_type"] not in ("int64", "string"):
                raise ValueError(f"keys of type {found['key_type']!r}")
            return cls(found["key_type"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: does not say how keys are hashed ({error})") from None


def _ids(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    hashes >>= np.uint64(2)
    return hashes.view(np.int64)
