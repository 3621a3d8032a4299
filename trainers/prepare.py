"""From a config to what a run trains on: key maps, validation cases, item features; built once and kept in the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import Config
from cluster.errors import CheckpointError, DataError, SettingError
from cluster.storage import open_filesystem, publish_folder, remove_folder, write_json
from embedding_service.keys import Vocabulary
from embedding_service.ragged import Ragged
from trainers.holdout import CaseSample, Holdout, cases_table
from trainers.sessions import Columns, SessionBatch, SessionReader


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
    columns = Columns(items=data.items, user=data.user, features=data.query_features)
    return SessionReader(
        data.train, columns, bad_rows=data.bad_rows, window_sessions=data.shuffle_sessions, seed=config.train.seed
    )


def holdout_of(config: Config, num_sessions: int) -> Holdout:
    """What of the training sessions is kept for validation: nothing if `data.valid` names cases of its own."""
    kind = "none" if config.data.valid else config.data.holdout
    return Holdout(kind, config.data.holdout_fraction, config.train.seed, num_sessions)


def prepare(config: Config, reader: SessionReader) -> None:
    """Build the run's key maps and validation cases into `<run>/prepared`, unless they are there: streaming passes.

    Raises DataError, SettingError; CheckpointError if what is there was made from other data.
    """
    folder = Path(config.run) / "prepared"
    if folder.exists():
        load_prepared(config.run, reader.fingerprint)
        return
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

    keys = {"item": Vocabulary.build(items(), min_count=config.keys.min_count, unknown=config.keys.unknown)}
    if config.data.user:
        users = (batch.user for batch in reader.stream(Columns(items=config.data.items, user=config.data.user)))
        keys["user"] = Vocabulary.build((user for user in users if user is not None), unknown="skip")
    for name in config.data.query_features:
        columns = Columns(items=config.data.items, features=(name,))
        values = (batch.features[name].drop_null() for batch in reader.stream(columns))
        keys[f"query_{name}"] = Vocabulary.build(values, unknown="skip")
    features, feature_keys = _item_features(config, keys["item"])
    for name, vocabulary in {**keys, **feature_keys}.items():
        vocabulary.save(temporary / f"{name}.arrow")
    np.savez(temporary / "item_features.npz", allow_pickle=False, **features)
    cases = sample.result()
    if cases is not None:
        pq.write_table(cases_table(cases), temporary / "valid.parquet")
    elif holdout.kind != "none":
        raise DataError(
            f"data.holdout = {holdout.kind!r} finds nothing to hold out in {config.data.train}; its sessions are too "
            "short, or data.holdout_fraction is too small"
        )
    description = {"fingerprint": reader.fingerprint, "num_sessions": reader.num_sessions, "bad_rows": reader.num_bad}
    write_json(temporary / "prepared.json", description)
    publish_folder(temporary, folder)


def load_prepared(run: str | Path, fingerprint: str | None = None) -> Prepared:
    """What `prepare` built. Raises CheckpointError if it is missing, or made from data with another fingerprint."""
    folder = Path(run) / "prepared"
    try:
        description = json.loads((folder / "prepared.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{run} is not a run of `lexshard train`: it has no prepared/prepared.json") from None
    if fingerprint not in (None, description["fingerprint"]):
        raise CheckpointError(
            f"{run} was begun with other training data (files, sizes or row counts differ); name another folder with "
            "`--set run=...` or restore the data"
        )
    keys = {path.stem: Vocabulary.load(path) for path in sorted(folder.glob("*.arrow"))}
    with np.load(folder / "item_features.npz", allow_pickle=False) as archive:
        features = {name: archive[name] for name in archive.files}
    return Prepared(keys, features, description["fingerprint"], description["num_sessions"], folder)


def discard(run: str | Path) -> None:
    """Remove what `prepare` built."""
    remove_folder(Path(run) / "prepared")


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
    rows = items.rows(table["item"].combine_chunks())
    features, keys = {}, {}
    for name in table.column_names:
        if name == "item":
            continue
        values = table[name].combine_chunks()
        keys[f"item_{name}"] = Vocabulary.build([pc.drop_null(values)], unknown="skip")
        column = np.full(items.num_rows, -1, np.int64)
        known = rows >= 0
        column[rows[known]] = keys[f"item_{name}"].rows(values)[known]
        features[name] = column
    return features, keys
