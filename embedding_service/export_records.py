"""What is known of the exports that a service was asked for: plain files, so that every replica tells the same.

    <root>/.serving/exports/<id>.json     a record: {"id", "run", "state", ...}; the ids follow each other in time

Whoever works on an export holds a lock on the folder, which the kernel gives back when its process ends. A record that
says that it runs, while nobody holds the lock, is of a process that was stopped: "interrupted".
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.storage import write_json

logger = logging.getLogger(__name__)

RECORD_ID = re.compile(r"[0-9a-f]{16}")
MAX_KEPT = 50
MAX_RECORD_BYTES = 64 * 1024
_TRIES = 50  # a reader holds the lock for a moment, to see whether it is held
_PAUSE_SECONDS = 0.01
INTERRUPTED = "the replica that worked on it was stopped; export the run again, it goes on where it was"


class ExportRecords:
    """The records in one folder, which need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def claim(self) -> int:
        """A handle: as long as it is open, no other export can begin. Raises BlockingIOError where one runs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder, os.O_RDONLY)
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                if not left:
                    os.close(handle)
                    raise
            time.sleep(_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def end_those_left(self) -> None:
        """Note as interrupted what goes on: for whoever has just claimed the folder, before it writes a record.

        Else they would be read as going on again, as long as the lock is held.
        """
        for name in self._names():
            record = self._read(name.removesuffix(".json"))
            if record is not None and _goes_on(record):
                self.write(_interrupted(record))

    def new_id(self) -> str:
        return f"{time.time_ns():016x}"

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace what was known of the export; the oldest records beyond MAX_KEPT go."""
        write_json(self._folder / f"{record['id']}.json", record)
        for name in self._names()[:-MAX_KEPT]:
            (self._folder / name).unlink(missing_ok=True)

    def all(self) -> list[dict[str, Any]]:
        """The latest first."""
        found = [self.find(name.removesuffix(".json")) for name in reversed(self._names())]
        return [record for record in found if record is not None]

    def find(self, id: str) -> dict[str, Any] | None:
        """None for one that is not known, or whose record is damaged."""
        record = self._read(id)
        if record is None or not _goes_on(record):
            return record
        if not self._is_claimed():
            record = self._read(id)  # it may have ended between the two
            if record is None or not _goes_on(record):
                return record
            return _interrupted(record)
        if record["state"] == "running":
            record["seconds"] = round(max(0.0, time.time() - record["began"]), 1)
        return record

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        return sorted(name for name in os.listdir(self._folder) if RECORD_ID.fullmatch(name.removesuffix(".json")))

    def _is_claimed(self) -> bool:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(handle)

    def _read(self, id: str) -> dict[str, Any] | None:
        file = self._folder / f"{id}.json"
        try:
            with open(file, "rb") as handle:
                record = json.loads(handle.read(MAX_RECORD_BYTES))
            if not (isinstance(record["state"], str) and isinstance(record["began"], int | float)):
                raise TypeError("it has no state, or no beginning")
            if not isinstance(record.get("activation"), dict | None):
                raise TypeError("its activation is no object")
            return dict(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: an export is left out: %s", file, error)
            return None


def _goes_on(record: Mapping[str, Any]) -> bool:
    return record["state"] == "running" or (record.get("activation") or {}).get("state") == "checking"


def _interrupted(record: dict[str, Any]) -> dict[str, Any]:
    if record["state"] == "running":
        return {**record, "state": "interrupted", "message": INTERRUPTED}
    reason = "its replica was stopped meanwhile; activate the version"
    return {**record, "activation": {"state": "interrupted", "reason": reason}}
