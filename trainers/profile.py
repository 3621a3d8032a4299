"""`lexshard profile`: one bounded pass over session data, in one process or in Ray tasks, told in figures."""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import datasketches as ds
import numpy as np
import pyarrow as pa

from cluster.config import Config
from cluster.errors import DataError
from cluster.tasks import run_tasks
from trainers.key_sketch import KeySketch
from trainers.prepare import open_reader
from trainers.session_batch import Columns, SessionBatch, is_weighted
from trainers.sessions import SessionReader

FORMAT = "lexshard profile"
_LENGTHS_K = 400  # ranks of a quantile to 0.7 %
_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

Listener = Callable[[dict[str, Any]], None]


class PartProfile:
    """What a part of the data holds; parts merge in any order."""

    def __init__(self) -> None:
        self.num_sessions = 0
        self.num_bad = 0
        self.keys: dict[str, KeySketch] = {}  # item, user, query_<feature>
        self.numbers: set[str] = set()  # query_<feature> that hold numbers, and so have no keys
        self._lengths = ds.kll_ints_sketch(_LENGTHS_K)

    def add(self, batch: SessionBatch) -> None:
        """Count the sessions of a batch."""
        self.num_sessions += len(batch)
        if len(batch):
            self._lengths.update(batch.items.lengths.astype(np.int32))
        columns = {"item": batch.items.values}
        if batch.user is not None:
            columns["user"] = batch.user
        columns |= {f"query_{name}": values for name, values in batch.features.items()}
        for name, column in columns.items():
            keys = _keys_of(column)
            if keys is None:
                self.numbers.add(name)
                continue
            if name not in self.keys:
                self.keys[name] = KeySketch.of(keys)
            self.keys[name].add(keys)

    def merge(self, other: PartProfile) -> None:
        """Count what `other` has counted. Raises DataError where a column's keys are of another type there."""
        self.num_sessions += other.num_sessions
        self.num_bad += other.num_bad
        self._lengths.merge(other._lengths)
        self.numbers |= other.numbers
        for name, sketch in other.keys.items():
            if name not in self.keys:
                self.keys[name] = KeySketch(sketch.key_type)
            self.keys[name].merge(sketch)

    def state(self) -> dict[str, Any]:
        """The part as JSON types; `from_state` is the inverse, on any machine."""
        return {
            "sessions": self.num_sessions,
            "bad": self.num_bad,
            "lengths": base64.b64encode(self._lengths.serialize()).decode(),
            "numbers": sorted(self.numbers),
            "keys": {name: sketch.state() for name, sketch in self.keys.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PartProfile:
        part = cls()
        part.num_sessions, part.num_bad = state["sessions"], state["bad"]
        part.numbers = set(state["numbers"])
        part._lengths = ds.kll_ints_sketch.deserialize(base64.b64decode(state["lengths"]))
        part.keys = {name: KeySketch.from_state(keys) for name, keys in state["keys"].items()}
        return part

    def to_dict(self) -> dict[str, Any]:
        """The report. Raises DataError where there is nothing to tell."""
        if not self.num_sessions or not self.keys["item"].num_keys:
            raise DataError("there are no keys: every session is empty or bad")
        values = self._lengths.get_quantiles(list(_QUANTILES))
        items = self.keys["item"].num_keys
        return {
            "format": FORMAT,
            "version": 1,
            "sessions": self.num_sessions,
            "bad_rows": self.num_bad,
            "lengths": {
                "mean": items / self.num_sessions,
                "max": self._lengths.get_max_value(),
                "quantiles": {str(rank): value for rank, value in zip(_QUANTILES, values, strict=True)},
                "rank_error": self._lengths.normalized_rank_error(False),
            },
            "columns": {
                name: {**sketch.summary().to_dict(), "per_session": sketch.num_keys / self.num_sessions}
                for name, sketch in self.keys.items()
            },
            "numbers": sorted(self.numbers),
        }


def profile(config: Config, *, on_event: Listener = lambda event: None) -> dict[str, Any]:
    """The profile of `data.train`: `PartProfile.to_dict` and how fast it was.

    With `cluster.workers` above 1 (or engine "ray") that many Ray tasks read a part each; the result is the same within
    the sketches' stated errors. Memory of a process: the reader's (see `SessionReader`) and 40 MB per column.
    Raises DataError, SettingError; LaunchError of Ray.
    """
    reader = open_reader(config)  # a mistake in the data is told before anything is started
    workers = config.cluster.workers
    started = time.monotonic()
    if workers == 1 and config.cluster.engine != "ray":
        whole = _profile_part(reader, 0, 1, on_event, every_seconds=config.train.report_seconds)
    else:
        whole = _profile_on_ray(config, reader, workers, on_event)
    seconds = time.monotonic() - started
    found = whole.to_dict()
    occurrences = sum(sketch.num_keys for sketch in whole.keys.values())
    speed = {"workers": workers, "seconds": seconds, "keys_per_second": occurrences / max(seconds, 1e-9)}
    return {**found, "source": config.data.train, **speed}


def _profile_on_ray(config: Config, reader: SessionReader, workers: int, on_event: Listener) -> PartProfile:
    settings = {
        "source": config.data.train,
        "columns": dataclasses.asdict(reader.columns),
        "bad_rows": config.data.bad_rows,
        "window_sessions": config.data.shuffle_sessions,
        "num_parts": workers,
    }
    tasks = [{"part": part} for part in range(workers)]
    parts: dict[int, Any] = {}
    for part, state in run_tasks(
        profile_task, settings, tasks, threads=workers, engine="ray", address=config.cluster.address
    ):
        parts[part] = state
        on_event({"text": f"{len(parts)} of {workers} parts read"})
    whole = PartProfile()
    for part in range(workers):
        whole.merge(PartProfile.from_state(parts[part]))
    return whole


def profile_task(settings: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """The part task["part"] of the data, in a Ray task: `PartProfile.state`."""
    columns = settings["columns"]
    reader = SessionReader(
        settings["source"],
        Columns(**{**columns, "features": tuple(columns["features"])}),
        bad_rows=settings["bad_rows"],
        window_sessions=settings["window_sessions"],
    )
    found = _profile_part(reader, task["part"], settings["num_parts"], lambda event: None, every_seconds=60.0)
    return found.state()


def _profile_part(
    reader: SessionReader, part: int, num_parts: int, on_event: Listener, *, every_seconds: float
) -> PartProfile:
    found = PartProfile()
    told = time.monotonic()
    for batch in reader.stream(part=part, num_parts=num_parts):
        found.add(batch)
        if time.monotonic() - told > max(1.0, every_seconds):
            told = time.monotonic()
            on_event({"text": f"{found.num_sessions:,} of {reader.num_sessions:,} sessions read"})
    found.num_bad = reader.num_bad
    return found


def _keys_of(column: pa.Array) -> pa.Array | None:
    """The keys of a decoded column, those of lists one after the other, without nulls; None: it holds numbers."""
    if pa.types.is_large_list(column.type):
        flat = column.flatten()
        return flat.flatten()[0] if is_weighted(column.type) else flat
    return None if pa.types.is_floating(column.type) or pa.types.is_fixed_size_list(column.type) else column.drop_null()
