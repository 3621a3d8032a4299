"""From a config to what a run trains on: key maps, validation cases, item features; built once and kept in the run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import Config
from cluster.errors import ArtifactError, CheckpointError, DataError, SettingError
from cluster.storage import open_filesystem, publish_folder, remove_folder, write_json
from embedding_service.keys import Vocabulary
from embedding_service.ragged import Ragged
from trainers.holdout import CaseSample, Holdout, cases_table
from trainers.sessions import Columns, SessionBatch, SessionReader

_START_OVER = "name another folder with `--set run=...`, or start over with `--fresh`"


@dataclass(frozen=True)
class Sessions:
    """Sessions whose keys are rows: unknown items are left out, other unknown values are -1 (or their unknown row)."""

    items: Ragged
    user: np.ndarray | None
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left in a run's folder."""

    keys: dict[str, Vocabulary]  # item, user, and query_<feature>, item_<feature>
    item_features: dict[str, np.ndarray]  # feature -> int64 [item rows]: its row, -1 where the item has none
    fingerprint: str
    num_sessions: int
    shape: dict[str, Any]  # the settings that all this follows from
    folder: Path

    def rows(self, batch: SessionBatch) -> Sessions:
        """`batch` with rows in the place of keys."""
        return Sessions(
            self.item_rows(batch.items),
            self.keys["user"].rows(batch.user) if batch.user is not None and "user" in self.keys else None,
            {name: self.keys[f"query_{name}"].rows(values) for name, values in batch.features.items()},
        )

    def item_rows(self, items: Ragged) -> Ragged:
        """Lists of item keys as lists of rows, without the unknown ones."""
        rows = self.keys["item"].rows(items.values)
        return items.with_values(rows).keep(rows >= 0)


def open_reader(config: Config) -> SessionReader:
    """The reader of the run's training sessions. Raises SettingError where no data are named."""
    data = config.data
    if not data.train:
        raise SettingError("data.train", "is empty; name a file, folder, glob or URL of training sessions")
    columns = Columns(items=data.items, user=data.user, features=data.query_features, text=data.text)
    return SessionReader(
        data.train, columns, bad_rows=data.bad_rows, window_sessions=data.shuffle_sessions, seed=config.train.seed
    )


def holdout_of(config: Config, num_sessions: int) -> Holdout:
    """What of the training sessions is kept for validation: nothing if `data.valid` names cases of its own."""
    kind = "none" if config.data.valid else config.data.holdout
    return Holdout(kind, config.data.holdout_fraction, config.train.seed, num_sessions)


def prepare(config: Config, reader: SessionReader, *, is_begun: bool) -> None:
    """Build the run's key maps and validation cases into `<run>/prepared`, unless they are there: streaming passes.

    is_begun: the run has checkpoints, which the key maps belong to; else those of other data or settings are replaced.
    Raises DataError, SettingError; CheckpointError if what a begun run has was made from other data.
    """
    folder = Path(config.run) / "prepared"
    if is_begun:
        load_prepared(config.run, reader.fingerprint)
        return
    shape = _shape(config)
    if folder.exists():
        try:
            if load_prepared(config.run, reader.fingerprint).shape == shape:
                return
        except (ArtifactError, CheckpointError):
            pass  # of other data, or damaged: nothing depends on it yet
        remove_folder(folder)
    temporary = folder.with_name(".prepared.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    holdout = holdout_of(config, reader.num_sessions)
    sample = CaseSample(config.train.validate_cases, config.train.seed)

    def items() -> Iterator[pa.Array]:
        for batch in reader.stream():
            if holdout.kind != "none":
                sample.add(holdout.cases(batch))
            yield holdout.training(batch).items.values

    try:
        keys = {"item": Vocabulary.build(items(), min_count=config.keys.min_count, unknown=config.keys.unknown)}
    except DataError as error:
        raise error if error.file else DataError(error.problem, file=config.data.train) from None
    if config.data.user:
        users = (
            batch.user
            for batch in reader.stream(Columns(items=config.data.items, user=config.data.user, text=config.data.text))
        )
        keys["user"] = Vocabulary.build((user for user in users if user is not None), unknown="skip")
    for name in config.data.query_features:
        columns = Columns(items=config.data.items, features=(name,), text=config.data.text)
        values = (batch.features[name].drop_null() for batch in reader.stream(columns))
        keys[f"query_{name}"] = Vocabulary.build(values, unknown="skip")
    features, feature_keys = _item_features(config, keys["item"])
    for name, vocabulary in {**keys, **feature_keys}.items():
        vocabulary.save(temporary / f"{name}.arrow")
    for name, rows in features.items():
        np.save(temporary / f"item_{name}.npy", rows, allow_pickle=False)
    cases = sample.result()
    if cases is not None:
        pq.write_table(cases_table(cases), temporary / "valid.parquet")
    elif holdout.kind != "none":
        raise DataError(
            f"data.holdout = {holdout.kind!r} finds nothing to hold out in {config.data.train}; its sessions are too "
            "short, or data.holdout_fraction is too small"
        )
    description = {"fingerprint": reader.fingerprint, "num_sessions": reader.num_sessions, "shape": shape}
    write_json(temporary / "prepared.json", description)
    publish_folder(temporary, folder)


def load_prepared(run: str | Path, fingerprint: str | None = None) -> Prepared:
    """What `prepare` built. Raises CheckpointError if it is missing, or made from data with another fingerprint."""
    folder = Path(run) / "prepared"
    try:
        description = json.loads((folder / "prepared.json").read_text())
        known, num_sessions, shape = (description[name] for name in ("fingerprint", "num_sessions", "shape"))
    except FileNotFoundError:
        raise CheckpointError(f"{run} is not a run of `lexshard train`: it has no prepared/prepared.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'prepared.json'} is damaged ({error}); {_START_OVER}") from None
    if fingerprint not in (None, known):
        raise CheckpointError(
            f"{run} was begun with other training data (files, sizes or row counts differ); restore the data, or "
            + _START_OVER
        )
    keys = {path.stem: Vocabulary.load(path) for path in sorted(folder.glob("*.arrow"))}
    features = {}
    for path in sorted(folder.glob("item_*.npy")):
        try:
            features[path.stem.removeprefix("item_")] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {_START_OVER}") from None
    return Prepared(keys, features, known, num_sessions, shape, folder)


def _shape(config: Config) -> dict[str, Any]:
    """The settings that decide what `prepare` builds, as JSON."""
    names = "items text user query_features item_features valid holdout holdout_fraction bad_rows"
    data = {name: getattr(config.data, name) for name in names.split()}
    shape = {**data, **vars(config.keys), "seed": config.train.seed, "cases": config.train.validate_cases}
    return dict(json.loads(json.dumps(shape)))


def check_feature_names(setting: str, names: Iterable[str]) -> None:
    """Raises SettingError for a feature column whose name cannot name a table or file, or has a meaning of its own."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_]{1,64}", name):
            raise SettingError(setting, f"column `{name}`: rename it to letters, digits and _, at most 64 of them")
        if name in ("user", "history", "last_item", "item"):
            raise SettingError(setting, f"column `{name}`: this name has a meaning of its own; rename the column")


def _item_features(config: Config, items: Vocabulary) -> tuple[dict[str, np.ndarray], dict[str, Vocabulary]]:
    """The side table of items as feature -> int64 [item rows], and the key map of each feature."""
    source = config.data.item_features
    if not source:
        return {}, {}
    filesystem, path = open_filesystem(source)
    try:
        table = pq.read_table(path, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"is not a readable Parquet file of item features: {error}", file=source) from None
    if "item" not in table.column_names or table.num_columns < 2:
        raise DataError("needs a column `item` and at least one feature column", file=source)
    check_feature_names("data.item_features", [name for name in table.column_names if name != "item"])
    try:
        rows = items.rows(table["item"].combine_chunks())
    except DataError as error:
        raise DataError(f"column `item`: {error}", file=source) from None
    features, keys = {}, {}
    for name in table.column_names:
        if name == "item":
            continue
        values = table[name].combine_chunks()
        try:
            keys[f"item_{name}"] = Vocabulary.build([pc.drop_null(values)], unknown="skip")
        except DataError as error:
            raise DataError(f"column `{name}`: {error}", file=source) from None
        column = np.full(items.num_rows, -1, np.int64)
        known = rows >= 0
        column[rows[known]] = keys[f"item_{name}"].rows(values)[known]
        features[name] = column
    return features, keys
