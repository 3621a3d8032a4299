"""From a config to what a run trains on: key maps, validation cases, item features; built once and kept in the run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Config
from cluster.errors import ArtifactError, CheckpointError, DataError, SettingError
from cluster.storage import publish_folder, remove_folder, write_json
from embedding_service.hashed_keys import HashedKeys, KeyMap
from embedding_service.hashing import key_array
from embedding_service.keys import KeyType, Vocabulary
from embedding_service.ragged import Ragged
from embedding_service.towers import Given
from trainers.features import Feature, describe, read_side_table
from trainers.holdout import CaseSample, Holdout, cases_table
from trainers.sessions import Columns, SessionBatch, SessionReader

_HASHED = ".hashed.json"  # the file of a key map without a vocabulary
_START_OVER = "name another folder with `--set run=...`, or start over with `--fresh`"


@dataclass(frozen=True)
class Sessions:
    """Sessions whose keys are rows: unknown items are left out, other unknown values are -1 (or their unknown row)."""

    items: Ragged
    user: np.ndarray | None
    features: dict[str, Given]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left in a run's folder."""

    keys: dict[str, Vocabulary]  # item, user, and query_<feature>, item_<feature>
    hashed_keys: dict[str, HashedKeys]  # those of these that have no vocabulary
    query_features: dict[str, Feature]
    item_features: dict[str, Feature]
    item_values: dict[str, Given]  # feature -> its value of every row of the item key map
    fingerprint: str
    num_sessions: int
    shape: dict[str, Any]  # the settings that all this follows from
    folder: Path

    @property
    def key_maps(self) -> dict[str, KeyMap]:
        """All key maps, with and without a vocabulary."""
        return {**self.keys, **self.hashed_keys}

    def rows(self, batch: SessionBatch) -> Sessions:
        """`batch` with rows in the place of keys; of its items it may have the `item_numbers` already."""
        key_maps = self.key_maps
        return Sessions(
            self.item_rows(batch.items),
            key_maps["user"].rows(batch.user) if batch.user is not None and "user" in key_maps else None,
            query_values(batch.features, self.query_features, key_maps),
        )

    def item_rows(self, items: Ragged) -> Ragged:
        """Lists of item keys, or of their `item_numbers`, as lists of rows, without the unknown ones."""
        rows = items.values if isinstance(items.values, np.ndarray) else self.item_numbers(items.values)
        return items.with_values(rows).keep(rows >= 0)

    def item_numbers(self, keys: pa.Array) -> np.ndarray:
        """Rows of item keys [n] as training knows them, -1 for unknown ones: int64 [n].

        Rarer items than keys.min_count are unknown to training, also where the side table makes them candidates.
        """
        items = self.keys["item"]
        rows = items.rows(keys)
        unseen = (rows >= items.num_seen) & (rows < len(items.keys))
        if unseen.any():
            rows[unseen] = len(items.keys) if items.unknown == "row" else -1
        return rows


def query_values(
    columns: Mapping[str, pa.Array], features: Mapping[str, Feature], keys: Mapping[str, KeyMap]
) -> dict[str, Given]:
    """Decoded columns of sessions or cases as the query tower takes them. Raises DataError for one of another kind."""
    found = {}
    for name, column in columns.items():
        try:
            found[name] = features[name].values(column, keys.get(f"query_{name}"))
        except DataError as error:
            raise DataError(f"column `{name}`: {error.problem}") from None
    return found


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
    hashed = {name for name, chosen in config.tables.items() if not chosen.lists_keys}
    hashed_keys: dict[str, HashedKeys] = {}
    if config.data.user:
        columns = Columns(items=config.data.items, user=config.data.user, text=config.data.text)
        users = (batch.user for batch in reader.stream(columns) if batch.user is not None)
        if "user" in hashed:
            hashed_keys["user"] = HashedKeys(_key_type(users, config.data.user, config.data.train))
        else:
            keys["user"] = Vocabulary.build(users, unknown="skip")
    query_features: dict[str, Feature] = {}
    for name in config.data.query_features:
        columns = Columns(items=config.data.items, features=(name,), text=config.data.text)
        chunks = (batch.features[name] for batch in reader.stream(columns))
        if f"query_{name}" in hashed:
            first = next(chunks, pa.array([], pa.float64()))
            query_features[name] = feature = Feature.of_type(first.type)
            if not feature.has_keys:
                raise SettingError(
                    f"tables.query_{name}", f"column `{name}` holds {first.type}, not keys: it has no table"
                )
            hashed_keys[f"query_{name}"] = HashedKeys(_key_type([feature.keys(first)], name, config.data.train))
        else:
            query_features[name] = _described(name, chunks, "query", keys, config.data.train)
    item_features = _item_features(config, keys, temporary)
    for name, vocabulary in keys.items():
        vocabulary.save(temporary / f"{name}.arrow")
    for name, one in hashed_keys.items():
        one.save(temporary / f"{name}{_HASHED}")
    cases = sample.result()
    if cases is not None:
        pq.write_table(cases_table(cases), temporary / "valid.parquet")
    elif holdout.kind != "none":
        raise DataError(
            f"data.holdout = {holdout.kind!r} finds nothing to hold out in {config.data.train}; its sessions are too "
            "short, or data.holdout_fraction is too small"
        )
    description = {
        "fingerprint": reader.fingerprint,
        "num_sessions": reader.num_sessions,
        "shape": shape,
        "query_features": {name: asdict(feature) for name, feature in query_features.items()},
        "item_features": {name: asdict(feature) for name, feature in item_features.items()},
    }
    write_json(temporary / "prepared.json", description)
    publish_folder(temporary, folder)


def load_prepared(run: str | Path, fingerprint: str | None = None) -> Prepared:
    """What `prepare` built. Raises CheckpointError if it is missing, or made from data with another fingerprint."""
    folder = Path(run) / "prepared"
    try:
        description = json.loads((folder / "prepared.json").read_text())
        known, num_sessions, shape = (description[name] for name in ("fingerprint", "num_sessions", "shape"))
        query_features, item_features = (
            {name: Feature(**feature) for name, feature in description[side].items()}
            for side in ("query_features", "item_features")
        )
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
    hashed = {path.name.removesuffix(_HASHED): HashedKeys.load(path) for path in sorted(folder.glob(f"*{_HASHED}"))}
    values = {name: _load_values(folder, name, feature) for name, feature in item_features.items()}
    return Prepared(keys, hashed, query_features, item_features, values, known, num_sessions, shape, folder)


def _shape(config: Config) -> dict[str, Any]:
    """The settings that decide what `prepare` builds, as JSON."""
    names = "items text user query_features item_features valid holdout holdout_fraction bad_rows"
    data = {name: getattr(config.data, name) for name in names.split()}
    keys = {"min_count": config.keys.min_count, "unknown": config.keys.unknown}
    shape = {**data, **keys, "seed": config.train.seed, "cases": config.train.validate_cases}
    hashed = sorted(name for name, chosen in config.tables.items() if not chosen.lists_keys)
    if hashed:
        shape["hashed"] = hashed
    return dict(json.loads(json.dumps(shape)))


def _key_type(chunks: Iterable[pa.Array], column: str, source: str) -> KeyType:
    """The type of the keys in `chunks`, of which one is enough. Raises DataError."""
    first = next(iter(chunks), None)
    if first is None:
        raise DataError(f"column `{column}`: there are no rows", file=source)
    return "int64" if key_array(first).type == pa.int64() else "string"


def check_feature_names(setting: str, names: Iterable[str]) -> None:
    """Raises SettingError for a feature column whose name cannot name a table or file, or has a meaning of its own."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
            raise SettingError(
                setting, f"column `{name}`: rename it to at most 64 letters, digits and _, beginning with a letter"
            )
        if name in ("user", "history", "last_item", "item") or name.startswith("model_"):
            raise SettingError(setting, f"column `{name}`: this name has a meaning of its own; rename the column")


def _item_features(config: Config, keys: dict[str, Vocabulary], folder: Path) -> dict[str, Feature]:
    """The features of the side table of items; their values go into `folder`, their key maps into `keys`.

    Items that training does not see are candidates if a feature of theirs is known: the item key map in `keys` is
    replaced by one with them behind the others, with count 0.
    """
    source = config.data.item_features
    if not source:
        return {}
    side = read_side_table(source)
    check_feature_names("data.item_features", side.columns)
    try:
        keys["item"] = keys["item"].with_unseen(side.described())
    except DataError as error:
        raise DataError(f"column `item`: {error}", file=source) from None
    rows = keys["item"].rows(side.items)
    rows[rows >= len(keys["item"].keys)] = -1
    place = np.full(keys["item"].num_rows, -1, np.int64)  # item row -> row of the side table
    place[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    by_row = pa.array(place, mask=place < 0)
    features = {}
    for name, column in side.columns.items():
        features[name] = _described(name, [column], "item", keys, source)
        values = features[name].values(column.take(by_row), keys.get(f"item_{name}"))
        if isinstance(values, Ragged):
            np.save(folder / f"item_{name}.offsets.npy", values.offsets, allow_pickle=False)
        flat = values.values if isinstance(values, Ragged) else values
        np.save(folder / f"item_{name}.npy", flat, allow_pickle=False)
    return features


def _described(name: str, chunks: Iterable[pa.Array], side: str, keys: dict[str, Vocabulary], source: str) -> Feature:
    """What the column is; its key map, where it has one, goes into `keys`. Raises DataError."""
    try:
        feature, vocabulary = describe(chunks)
    except DataError as error:
        raise error if error.file else DataError(f"column `{name}`: {error.problem}", file=source) from None
    if vocabulary is not None:
        keys[f"{side}_{name}"] = vocabulary
    return feature


def _load_values(folder: Path, name: str, feature: Feature) -> Given:
    """The values of an item feature, mapped into memory. Raises CheckpointError."""
    path = folder / f"item_{name}.npy"
    try:
        values: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        if feature.is_list:
            path = folder / f"item_{name}.offsets.npy"
            return Ragged(values, np.load(path, allow_pickle=False))
        return values
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_START_OVER}") from None
