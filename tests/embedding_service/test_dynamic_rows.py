"""Dynamic rows on streams whose answer is known: who is in, who is out, and that the state is all there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from embedding_service.dynamic_rows import DynamicRows, Int64, Slots

ROWS = 11  # ten ids and the shared row
POLICIES = ("lfu", "lru", "distance_lfu")


def dynamic(eviction: Any = "lfu", admission: int = 1, rows: int = ROWS) -> DynamicRows:
    return DynamicRows(rows, eviction=eviction, admission=admission)


def see(rows: DynamicRows, *windows: Any, epoch: int = 0, first: int = 0) -> Slots:
    for window, ids in enumerate(windows, first):
        rows.learn(np.array(ids, np.int64), (epoch, window))
    rows.adopt(rows.news() or rows.trained)
    return rows.trained


def window_of(counts: dict[int, int], seed: int) -> Int64:
    """Each id as often as `counts` says, in a random order."""
    ids = np.repeat(np.array(list(counts), np.int64), list(counts.values()))
    return np.random.default_rng(seed).permutation(ids)


@pytest.mark.parametrize("eviction", POLICIES)
def test_everybody_has_a_row_while_there_is_room(eviction: str) -> None:
    slots = see(dynamic(eviction), [5, 2**61, 5], [7, 5, 0])
    assert slots.ids.tolist() == [0, 5, 7, 2**61]
    assert len(set(slots.rows_of_ids.tolist())) == 4
    assert slots.find(np.array([7, 6, 2**61])).tolist() == [slots.rows_of_ids[2], ROWS - 1, slots.rows_of_ids[3]]
    assert (slots.num_admitted, slots.num_evicted) == (4, 0)


@pytest.mark.parametrize("eviction", ["lru", "distance_lfu"])
def test_new_hot_ids_take_the_rows_of_old_ones(eviction: str) -> None:
    rows = dynamic(eviction)
    old = see(rows, *(window_of(dict.fromkeys(range(10), 3), seed) for seed in range(3)))
    assert old.ids.tolist() == list(range(10))
    hot = {**dict.fromkeys(range(100, 106), 3), **dict.fromkeys(range(4), 3)}  # 4..9 are not seen any more
    for seed in range(4):
        rows.learn(window_of(hot, seed), (1, seed))
    news = rows.news()
    assert news is not None
    gone, handed_on = rows.adopt(news)
    assert gone.tolist() == list(range(4, 10))
    assert rows.trained.ids.tolist() == sorted(hot)
    assert sorted(old.find(gone).tolist()) == handed_on.tolist() == sorted(news.find(np.arange(100, 106)).tolist())
    np.testing.assert_array_equal(news.find(np.arange(4)), old.find(np.arange(4)))  # who stays keeps its row
    assert (news.num_admitted, news.num_evicted) == (16, 6)


def test_lfu_never_takes_the_row_of_a_frequent_id() -> None:
    rows = dynamic("lfu")
    first = see(rows, np.repeat(np.arange(6), 20)).find(np.arange(6))
    assert (first < ROWS - 1).all()
    for window in range(1, 19):  # every window a newcomer that is more frequent than the one before
        slots = see(rows, window_of({**dict.fromkeys(range(6), 20), 1000 + window: window}, window), first=window)
        np.testing.assert_array_equal(slots.find(np.arange(6)), first)
    assert slots.ids.tolist() == [*range(6), 1015, 1016, 1017, 1018]
    assert slots.num_evicted == 14


@pytest.mark.parametrize("eviction", POLICIES)
def test_a_rare_id_is_not_admitted_and_a_known_one_may_be_rare(eviction: str) -> None:
    rows = dynamic(eviction, admission=3)
    slots = see(rows, [1, 1, 1, 2, 2, 3])
    assert slots.ids.tolist() == [1]
    slots = see(rows, [1, 2, 3], first=1)  # the third time that 2 is seen, in any window
    assert slots.ids.tolist() == [1, 2]
    slots = see(rows, [3, 3], [1], first=2)
    assert slots.ids.tolist() == [1, 2, 3]
    counted = slots.learned.get("_mch_counts")
    if counted is not None:
        assert counted[:3].tolist() == [5, 3, 4]


def test_who_was_seen_long_ago_is_forgotten() -> None:
    others = [np.arange(400) + 10_000 * (1 + i) for i in range(10)]
    assert 1 in see(dynamic("lru", admission=2), [1], [1]).ids
    assert 1 not in see(dynamic("lru", admission=2), [1], *others, [1]).ids
    assert 1 in see(dynamic("lru", admission=2), [1], *others, [1, 1]).ids


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("admission", [1, 2])
def test_the_order_of_ids_within_a_window_does_not_matter(eviction: str, admission: int) -> None:
    found = []
    for seed in (0, 1):
        rows = dynamic(eviction, admission)
        random = np.random.default_rng(2)
        windows = [random.zipf(1.3, 50) % 97 for _ in range(12)]
        found.append(see(rows, *(np.random.default_rng(seed).permutation(ids) for ids in windows)).to_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("eviction", POLICIES)
def test_the_state_is_all_there_is(eviction: str) -> None:
    """Stopped after any window and gone on from the tensors of that moment, the rest is the same."""
    random = np.random.default_rng(3)
    windows = [random.zipf(1.3, 50) % 97 for _ in range(10)]
    whole, states = dynamic(eviction, 2), []
    for window, ids in enumerate(windows):
        states.append({name: value.clone() for name, value in see(whole, ids, first=window).to_dict().items()})
    assert whole.trained.num_evicted > 3
    for start, state in enumerate(states[:-1]):
        again = dynamic(eviction, 2)
        for name, value in again.trained.to_dict().items():
            value.copy_(state[name])
        ended = see(again, *windows[start:], first=start).to_dict()  # the first of them is known already
        assert all(torch.equal(ended[name], states[-1][name]) for name in ended), start


def test_what_is_learned_ahead_is_not_yet_trained_and_an_epoch_begins_where_training_is() -> None:
    rows = dynamic()
    see(rows, [1, 2])
    rows.learn(np.array([3]), (0, 1))
    assert rows.trained.ids.tolist() == [1, 2]
    assert rows.find_ahead(np.array([3]))[0] != ROWS - 1
    rows.learn(np.array([4]), (1, 0))  # no step came of window 1
    rows.adopt(rows.news() or rows.trained)
    assert rows.trained.ids.tolist() == [1, 2, 4]
    assert rows.news() is None


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="a shared row and one for an id"):
        dynamic(rows=1)
    with pytest.raises(ValueError, match="admission"):
        dynamic(admission=256)
