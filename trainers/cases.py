"""Queries with their ground truth: read from a file, or held out of the training sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.config import Config
from cluster.errors import DataError, SettingError
from embedding_service.hashed_keys import KeyMap
from embedding_service.ragged import Ragged, take_values
from embedding_service.towers import Given
from trainers.features import Feature
from trainers.holdout import CaseSample, Holdout
from trainers.prepare import Prepared, query_values
from trainers.sessions import Columns, SessionBatch, SessionReader


@dataclass(frozen=True)
class Cases:
    """n queries with their ground truth, as rows.

    `history`: what the query sees, n lists, oldest first; `truth`: what it should find, -1 for items outside the
    vocabulary, which count as missed; `single`: user and features, as `towers.Given` of n examples.
    """

    history: Ragged
    truth: Ragged
    single: dict[str, Given]

    def __len__(self) -> int:
        return len(self.history)

    def take(self, index: np.ndarray) -> Cases:
        single = {name: take_values(values, index) for name, values in self.single.items()}
        return Cases(self.history.take(index), self.truth.take(index), single)


def load_validation(config: Config, prepared: Prepared) -> Cases | None:
    """The run's validation cases, at most `train.validate_cases`; None if it has none."""
    if config.data.valid:
        return load_cases(
            config, prepared.key_maps, prepared.query_features, config.data.valid, limit=config.train.validate_cases
        )
    held_out = prepared.folder / "valid.parquet"
    if not held_out.exists():
        return None
    columns = Columns("items", "user" if config.data.user else "", "history", "", config.data.query_features)
    return _to_cases(SessionReader(str(held_out), columns), prepared.key_maps, prepared.query_features)


def sample_training(config: Config, prepared: Prepared, *, limit: int) -> Cases | None:
    """At most `limit` training sessions as cases, their last item being the truth; None if none has two items.

    A sample of the first 100 times `limit` sessions. Raises DataError if the training data are no longer there.
    """
    data = config.data
    columns = Columns(data.items, data.user, features=data.query_features, text=data.text)
    sample, holdout = CaseSample(limit, config.train.seed), Holdout("last_item", 0.0, config.train.seed, 0)
    num_read = 0
    for batch in SessionReader(data.train, columns, bad_rows=data.bad_rows).stream():
        sample.add(holdout.cases(batch))
        num_read += len(batch)
        if num_read >= 100 * limit:
            break
    found = sample.result()
    if found is None or found.history is None:
        return None
    items = prepared.keys["item"]
    single = _single(found, prepared.key_maps, prepared.query_features)
    return Cases(_known(found.history, items), _known(found.items, items), single)


def load_cases(
    config: Config,
    keys: Mapping[str, KeyMap],
    features: Mapping[str, Feature],
    source: str,
    *,
    limit: int = 0,
) -> Cases:
    """The cases of a file: columns `data.history` (or the users' training sessions) and `data.items` (the truth).

    limit: at most so many, evenly spread over the file; 0: all. Raises DataError, SettingError.
    """
    data = config.data
    columns = Columns(data.items, data.user, data.history, "", data.query_features)
    if not data.history and not data.user:
        raise SettingError(
            "data.history", "is empty, and so is data.user: cases need a history, or a user to look it up"
        )
    cases = _to_cases(SessionReader(source, columns, bad_rows=data.bad_rows), keys, features)
    if limit and len(cases) > limit:
        cases = cases.take(np.linspace(0, len(cases) - 1, limit).astype(np.int64))
    if not data.history:
        users = np.asarray(cases.single["user"])
        cases = Cases(_training_histories(config, keys, users), cases.truth, cases.single)
    if not len(cases):
        raise DataError("holds no cases", file=source)
    return cases


def _to_cases(reader: SessionReader, keys: Mapping[str, KeyMap], features: Mapping[str, Feature]) -> Cases:
    histories, truths, singles = [], [], []
    for batch in reader.stream():
        rows = keys["item"].rows(batch.items.values)
        limit = keys["item"].num_keys
        truths.append(batch.items.with_values(np.where(rows < limit, rows, -1)))
        histories.append(_known(batch.history, keys["item"]) if batch.history is not None else _no_lists(len(batch)))
        singles.append(_single(batch, keys, features))
    if not singles:
        raise DataError("holds no cases", file=", ".join(reader.files))
    single = {name: _concat([part[name] for part in singles]) for name in singles[0]}
    return Cases(Ragged.concat(histories), Ragged.concat(truths), single)


def _concat(parts: list[Given]) -> Given:
    return Ragged.concat(parts) if isinstance(parts[0], Ragged) else np.concatenate(parts)  # type: ignore[arg-type]


def _single(batch: SessionBatch, keys: Mapping[str, KeyMap], features: Mapping[str, Feature]) -> dict[str, Given]:
    single = query_values(batch.features, features, keys)
    if batch.user is not None:
        single["user"] = keys["user"].rows(batch.user)
    return single


def _known(lists: Ragged, items: KeyMap) -> Ragged:
    rows = items.rows(lists.values)
    return lists.with_values(rows).keep(rows >= 0)


def _no_lists(num: int) -> Ragged:
    return Ragged(np.empty(0, np.int64), np.zeros(num + 1, np.int64))


def _training_histories(config: Config, keys: Mapping[str, KeyMap], users: np.ndarray) -> Ragged:
    """The training sessions of `users` [n], those of one user joined in file order: n lists of rows."""
    if not config.data.train:
        raise SettingError("data.train", "is empty, but data.history is too: histories come from the training sessions")
    wanted = np.unique(users[users >= 0])  # not an array of all users: there may be 2 ** 62 ids
    owners, parts = [np.empty(0, np.int64)], [_no_lists(0)]
    columns = Columns(config.data.items, config.data.user, text=config.data.text)
    for batch in SessionReader(config.data.train, columns, bad_rows=config.data.bad_rows).stream():
        assert batch.user is not None
        owner, known = _places(keys["user"].rows(batch.user), wanted)
        chosen = np.flatnonzero(known)
        owners.append(owner[chosen])
        parts.append(_known(batch.take(chosen).items, keys["item"]))
    owner, sessions = np.concatenate(owners), Ragged.concat(parts)
    order = np.argsort(owner, kind="stable")
    by_user = sessions.take(order)
    first = np.searchsorted(owner[order], np.arange(len(wanted) + 1))
    joined = Ragged(by_user.values, by_user.offsets[first])  # wanted user -> all their items
    place, known = _places(users, wanted)
    return Ragged.concat([joined, _no_lists(1)]).take(np.where(known, place, len(wanted)))


def _places(ids: np.ndarray, ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `ids` [n] is among distinct `ascending` ones, int64 [n], and whether it is there, bool [n]."""
    places = np.searchsorted(ascending, ids)
    known = places < len(ascending)
    known[known] = ascending[places[known]] == ids[known]
    return places, known
