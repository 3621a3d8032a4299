"""A sample of a run's training sessions with its validation cases, as files: what trials of a search train on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Config
from cluster.errors import DataError
from embedding_service.hashing import stable_hash
from trainers.holdout import CaseSample, cases_table, uniform
from trainers.prepare import holdout_of, open_reader
from trainers.sessions import Columns, SessionBatch, SessionReader

_SEED = 2  # added to train.seed: a choice of sessions that has nothing to do with which are held out


def draw_sample(config: Config, folder: Path, share: float) -> Config:
    """Write a random `share` of the training sessions, and validation cases, into `folder` (made); `config` for these.

    Where `data.user` is named, whole users are drawn, with all of their sessions, and cases are of these users: a case
    without its user's training sessions would tell nothing. Elsewhere cases are those of all the sessions. At most
    `train.validate_cases` are kept. Items that the sample lacks count as missed, in every trial alike.
    Raises DataError if no session or no case is left.
    """
    folder.mkdir(parents=True)
    data = config.data
    sessions = _draw_sessions(config, folder / "train.parquet", share)
    cases = _draw_file(config, share) if data.valid else sessions
    if cases is None:
        raise DataError(
            "the sample holds no validation cases; take a larger --sample, or hold out more", file=data.train
        )
    table = cases_table(cases)
    pq.write_table(table, folder / "valid.parquet")
    changed = dataclasses.replace(
        data,
        train=str(folder / "train.parquet"),
        valid=str(folder / "valid.parquet"),
        items="items",
        user="user" if data.user else "",
        history="history" if "history" in table.column_names else "",
        holdout="none",
    )
    return dataclasses.replace(config, data=changed)


def _draw_sessions(config: Config, path: Path, share: float) -> SessionBatch | None:
    """Write the sample's training sessions; the validation cases that the training sessions give, if they do."""
    reader = open_reader(config)
    holdout = holdout_of(config, reader.num_sessions)
    cases = CaseSample(config.train.validate_cases, config.train.seed)
    writer = None
    try:
        for batch in reader.stream():
            drawn = _draw(batch, config, share)
            if holdout.kind != "none":
                cases.add(holdout.cases(drawn if config.data.user else batch))
            training = holdout.training(drawn)
            table = _sessions_table(training.take(np.flatnonzero(training.items.lengths)))
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table, row_group_size=65_536)
    finally:
        if writer is not None:
            writer.close()
    if not pq.read_metadata(path).num_rows:
        raise DataError("the sample holds no session; take a larger --sample", file=config.data.train)
    return cases.result()


def _draw_file(config: Config, share: float) -> SessionBatch | None:
    """Cases of `data.valid`, those of the sample's users only."""
    data = config.data
    columns = Columns(data.items, data.user, data.history, "", data.query_features)
    cases = CaseSample(config.train.validate_cases, config.train.seed)
    for batch in SessionReader(data.valid, columns, bad_rows=data.bad_rows).stream():
        cases.add(_draw(batch, config, share) if data.user else batch)
    return cases.result()


def _draw(batch: SessionBatch, config: Config, share: float) -> SessionBatch:
    """The sessions of `batch` that the sample has, by their number or by their user."""
    seed = config.train.seed + _SEED
    if batch.user is None:
        return batch.take(np.flatnonzero(uniform(batch.row_ids, seed) < share))
    numbers = (stable_hash(batch.user, seed=seed) >> np.uint64(11)) * 2.0**-53
    return batch.take(np.flatnonzero(numbers < share))


def _sessions_table(sessions: SessionBatch) -> pa.Table:
    """Sessions as a table with the columns `items`, and `user` and features where there are some."""
    items = pa.LargeListArray.from_arrays(pa.array(sessions.items.offsets), sessions.items.values)
    user = {} if sessions.user is None else {"user": sessions.user}
    return pa.table({"items": items, **user, **sessions.features})
