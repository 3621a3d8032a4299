"""Items added to, and taken off, a version that is served, until the next training knows better: one small file.

    <root>/.serving/overlay/<version>.json     {"added": [{"key", "recommend", "similar", "attributes"}], "deleted": []}

An overlay belongs to one version: its vectors mean nothing in another one's space. What it loses when another version
goes live is told then (`lost`).
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import ArtifactError, DataError
from cluster.storage import write_atomic
from embedding_service.exact import Float32
from embedding_service.keys import Key

logger = logging.getLogger(__name__)

MAX_ADDED, MAX_DELETED = 1000, 100_000
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Added:
    """A new item: its vectors under the indexes `recommend` and `similar`, float32 [dim] each."""

    key: Key
    recommend: Float32
    similar: Float32
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """What one reading of the file says; immutable, and what requests need of it is worked out once."""

    added: tuple[Added, ...] = ()
    deleted: frozenset[Key] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.added or self.deleted)

    def find(self, key: Key) -> Added | None:
        place = self.places.get(key)
        return None if place is None else self.added[place]

    @functools.cached_property
    def places(self) -> dict[Key, int]:
        """Key -> its place in `added`."""
        return {one.key: place for place, one in enumerate(self.added)}

    @functools.cached_property
    def recommend(self) -> Float32:
        """float32 [added, dim]."""
        return np.stack([one.recommend for one in self.added])

    @functools.cached_property
    def similar(self) -> Float32:
        """float32 [added, dim]."""
        return np.stack([one.similar for one in self.added])


class Overlay:
    """`now` is what requests read, once each. Without a file there is nothing, and nothing can be added."""

    def __init__(self, file: Path | None = None) -> None:
        """A damaged file is logged and stands for no changes, until `refresh` or a change meets it: a version is served
        without them rather than not at all.
        """
        self._file = file
        self._stamp: tuple[int, int] | None = None
        self._damage: str = ""
        self._refreshing = threading.Lock()
        self.now = Changes()
        try:
            self.refresh()
        except ArtifactError as error:
            logger.error("served without the changes to its items: %s", error)

    def refresh(self) -> None:
        """Read the file again if it has changed. Raises ArtifactError for a damaged one; `now` stays as it is then."""
        if self._file is None:
            return
        with self._refreshing:  # else a thread that has read earlier could have the last word
            try:
                found = self._file.stat()
            except FileNotFoundError:
                self._stamp, self.now, self._damage = None, Changes(), ""
                return
            if (stamp := (found.st_ino, found.st_mtime_ns)) != self._stamp:
                try:
                    self.now, self._damage = self._read(), ""
                except ArtifactError as error:
                    self._damage = str(error)
                self._stamp = stamp
            if self._damage:
                raise ArtifactError(self._damage)

    def add(self, items: Iterable[Added]) -> Changes:
        """Add items, or replace those with their keys. Raises DataError beyond the limit, and for a vector that holds
        nan or an infinity; ArtifactError where the file is damaged.
        """
        items = list(items)
        for one in items:
            if not all(vector.ndim == 1 and np.isfinite(vector).all() for vector in (one.recommend, one.similar)):
                raise DataError(f"item {one.key!r}: its vectors are not finite; place it at other items or a vector")
        with self._changing():
            keys = {one.key for one in items}
            added = (*[one for one in self.now.added if one.key not in keys], *items)
            if len(added) > MAX_ADDED:
                raise DataError(f"{len(added)} added items; the limit is {MAX_ADDED}: train and publish a version")
            return self._write(Changes(added, self.now.deleted - keys))

    def delete(self, keys: Sequence[Key], *, is_own: Callable[[Key], bool] = lambda _: True) -> Changes:
        """Take items off the answers, those of the version and added ones. is_own(key): whether the version itself has
        it, so that it would come back if only the added one went. Raises DataError beyond the limit, ArtifactError
        where the file is damaged.
        """
        with self._changing():
            gone = self.now.places.keys() & set(keys)
            deleted = self.now.deleted | {key for key in keys if key not in gone or is_own(key)}
            if len(deleted) > MAX_DELETED:
                raise DataError(f"{len(deleted)} deleted items; the limit is {MAX_DELETED}: publish a version")
            return self._write(Changes(tuple(one for one in self.now.added if one.key not in gone), frozenset(deleted)))

    def _read(self) -> Changes:
        assert self._file is not None
        try:
            if self._file.stat().st_size > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES} bytes")
            document = json.loads(self._file.read_bytes())
            added = [
                Added(one["key"], _vector(one["recommend"]), _vector(one["similar"]), dict(one["attributes"]))
                for one in document["added"][:MAX_ADDED]
            ]
            return Changes(tuple(added), frozenset(document["deleted"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self._file}: is damaged ({error}); remove it") from None

    def _write(self, changes: Changes) -> Changes:
        assert self._file is not None
        added = [
            {
                "key": one.key,
                "recommend": one.recommend.tolist(),
                "similar": one.similar.tolist(),
                "attributes": dict(one.attributes),
            }
            for one in changes.added
        ]
        document = {"added": added, "deleted": sorted(changes.deleted)}
        data = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
        if len(data) > MAX_BYTES:
            raise DataError(f"the added items take {len(data)} bytes; the limit is {MAX_BYTES}: publish a version")
        write_atomic(self._file, data)
        self.refresh()
        return changes

    def _changing(self) -> _Lock:
        if self._file is None:
            raise DataError("this service serves one folder only and keeps no changes to its items")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        return _Lock(self)


class _Lock:
    """Of the overlays' folder, for one change after the other, each on what the one before has written."""

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay

    def __enter__(self) -> None:
        assert self._overlay._file is not None
        self._handle = os.open(self._overlay._file.parent, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            self._overlay.refresh()
        except BaseException:  # else the lock would stay with this process, and every later change wait for it
            os.close(self._handle)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _vector(values: Any) -> Float32:
    vector = np.array(values, np.float32)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ValueError("a vector is not a list of finite numbers")
    return vector
