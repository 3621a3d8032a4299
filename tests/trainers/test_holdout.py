from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embedding_service.ragged import Ragged
from trainers.holdout import CaseSample, Holdout, cases_table, uniform
from trainers.sessions import SessionBatch

COUNT = 400
KINDS = ("items", "last_item", "sessions", "last_sessions")


def batch(count: int = COUNT) -> SessionBatch:
    """Session i has the items 100 * i, 100 * i + 1, ... (i % 6 of them), user i and a city that may be null."""
    lists = [[100 * i + place for place in range(i % 6)] for i in range(count)]
    return SessionBatch(
        Ragged.from_lists(lists, pa.int64()),
        np.arange(count),
        user=pa.array(range(count), pa.int64()),
        features={"city": pa.array([None if i % 7 == 0 else f"c{i % 3}" for i in range(count)], pa.large_string())},
    )


def holdout(kind: Any, fraction: float = 0.3, seed: int = 0) -> Holdout:
    return Holdout(kind, fraction, seed, COUNT)


def contents(found: SessionBatch) -> list[tuple[Any, ...]]:
    histories = found.history.to_lists() if found.history is not None else [None] * len(found)
    assert found.user is not None
    return list(zip(found.items.to_lists(), histories, found.user.to_pylist(), found.row_ids.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_out_does_not_depend_on_the_pieces_or_their_order(kind: str) -> None:
    held, whole = holdout(kind), batch()
    order = np.random.default_rng(0).permutation(COUNT)
    pieces = [whole.take(order[:150]), whole.take(order[150:151]), whole.take(order[151:])]
    for part in (held.training, held.cases):
        found = [entry for piece in pieces for entry in contents(part(piece))]
        assert sorted(found, key=lambda entry: entry[2:]) == contents(part(whole))
    assert contents(held.training(whole)) == contents(holdout(kind).training(whole))


@pytest.mark.parametrize("kind", ["items", "sessions"])
def test_another_seed_holds_out_something_else(kind: str) -> None:
    assert contents(holdout(kind, seed=1).cases(batch())) != contents(holdout(kind).cases(batch()))


def test_none_trains_on_everything() -> None:
    assert contents(holdout("none").training(batch())) == contents(batch())
    assert len(holdout("none").cases(batch())) == 0


def test_items_are_shared_between_training_and_cases() -> None:
    training, cases = holdout("items").training(batch()), holdout("items").cases(batch())
    assert len(training) == COUNT
    kept = training.items.to_lists()
    hidden: dict[int, list[int]] = dict(zip(cases.row_ids.tolist(), cases.items.to_lists(), strict=True))
    assert cases.history is not None
    for row, seen in zip(cases.row_ids, cases.history.to_lists(), strict=True):
        assert seen == kept[row]
    for row, items in enumerate(batch().items.to_lists()):
        assert sorted(kept[row] + hidden.get(row, [])) == items
        assert kept[row] or not items, "a session lost all of its items"
    num_items = len(batch().items.values)
    share = sum(map(len, hidden.values())) / num_items
    assert share == pytest.approx(0.3, abs=0.06)  # a little less: sessions keep one
    cities = batch().features["city"].to_pylist()
    assert cases.features["city"].to_pylist() == [cities[row] for row in cases.row_ids]


def test_the_last_item_of_every_longer_session_is_held_out() -> None:
    training, cases = holdout("last_item").training(batch()), holdout("last_item").cases(batch())
    assert cases.history is not None
    for items, kept in zip(batch().items.to_lists(), training.items.to_lists(), strict=True):
        assert kept == (items[:-1] if len(items) >= 2 else items)
    assert cases.row_ids.tolist() == [i for i in range(COUNT) if i % 6 >= 2]
    for row, truth, seen in zip(cases.row_ids, cases.items.to_lists(), cases.history.to_lists(), strict=True):
        assert [*seen, *truth] == batch().items.to_lists()[row]


@pytest.mark.parametrize("kind", ["sessions", "last_sessions"])
def test_held_out_sessions_leave_and_become_next_item_cases(kind: str) -> None:
    training, cases = holdout(kind).training(batch()), holdout(kind).cases(batch())
    held = sorted(set(range(COUNT)) - set(training.row_ids.tolist()))
    if kind == "last_sessions":
        assert held == list(range(COUNT - 120, COUNT))
    else:
        assert len(held) == pytest.approx(120, abs=5 * np.sqrt(COUNT * 0.21))
    wanted = [
        ([items[place]], items[:place], row)
        for row, items in enumerate(batch().items.to_lists())
        if row in held
        for place in range(1, len(items))
    ]
    assert [entry[:3] for entry in contents(cases)] == wanted
    assert len(set(cases.row_ids.tolist())) == len(cases), "cases need numbers of their own to be sampled by"


def test_uniform_numbers_are_uniform_and_pinned() -> None:
    numbers = uniform(np.arange(20_000), 3)
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert np.histogram(numbers, bins=10, range=(0, 1))[0] == pytest.approx(2000, abs=5 * np.sqrt(1800))
    assert np.array_equal(uniform(np.arange(100, 200), 3), numbers[100:200])
    assert not np.array_equal(uniform(np.arange(100), 4), numbers[:100])


@pytest.mark.parametrize("limit", [1, 7, 50, 10_000])
def test_a_sample_is_the_same_in_whatever_pieces_the_cases_come(limit: int) -> None:
    cases = holdout("sessions", 0.9).cases(batch())
    found = []
    for size in (len(cases), 40, 3):
        sample = CaseSample(limit, seed=2)
        for start in range(0, len(cases), size):
            sample.add(cases.slice(start, start + size))
        result = sample.result()
        assert result is not None
        found.append(contents(result))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == min(limit, len(cases))
    places = {entry: i for i, entry in enumerate(map(str, contents(cases)))}
    order = [places[str(entry)] for entry in found[0]]
    assert order == sorted(order)


def test_a_sample_of_nothing_is_nothing() -> None:
    sample = CaseSample(5, 0)
    assert sample.result() is None
    sample.add(holdout("none").cases(batch()))
    assert sample.result() is None


def test_cases_become_a_table() -> None:
    cases = holdout("last_item").cases(batch(6))
    table = cases_table(cases)
    assert table.column_names == ["history", "items", "user", "city"]
    assert table.slice(0, 2).to_pylist() == [
        {"history": [200], "items": [201], "user": 2, "city": "c2"},
        {"history": [300, 301], "items": [302], "user": 3, "city": "c0"},
    ]
