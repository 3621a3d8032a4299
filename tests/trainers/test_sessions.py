from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError, SettingError
from tests.trainers.session_data import KINDS, numbered_sessions, write_table
from trainers.sessions import Columns, SessionBatch, SessionReader, read_ahead

COLUMNS = Columns(user="user")


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """103 numbered sessions in three files and an empty one, in chunks smaller and larger than a window of 16."""
    kind: str = request.param
    write_table(tmp_path / "data" / "a", numbered_sessions(35), kind)
    write_table(tmp_path / "data" / "b" / "c", numbered_sessions(40, 35), kind, chunk=20)
    write_table(tmp_path / "data" / "empty", numbered_sessions(0), kind)
    write_table(tmp_path / "data" / "z", numbered_sessions(28, 75), kind, chunk=7)
    return tmp_path / "data"


def content(batch: SessionBatch) -> list[tuple[int, int, tuple[int, ...]]]:
    """(row id, user, items) of every session."""
    assert batch.user is not None
    lists = [tuple(one) for one in batch.items.to_lists()]
    return list(zip(batch.row_ids.tolist(), batch.user.to_pylist(), lists, strict=True))


def epoch_content(
    reader: SessionReader, epoch: int, start: int = 0
) -> list[tuple[int, list[tuple[int, int, tuple[int, ...]]]]]:
    return [(window, content(batch)) for window, batch in reader.windows(epoch, start)]


def test_an_epoch_holds_every_session_once_with_its_own_columns(folder: Path) -> None:
    reader = SessionReader(str(folder), COLUMNS, window_sessions=16)
    for epoch in range(3):
        sessions = [one for _, window in epoch_content(reader, epoch) for one in window]
        assert sorted(sessions) == [(i, i, tuple(range(i, i + i % 4))) for i in range(103)]


def test_restarting_at_any_window_continues_as_if_nothing_had_happened(folder: Path) -> None:
    reader = SessionReader(str(folder), COLUMNS, window_sessions=16, seed=7)
    assert reader.num_windows() == 7
    for epoch in range(2):
        whole = epoch_content(reader, epoch)
        assert [window for window, _ in whole] == list(range(7))
        for start in range(8):
            fresh = SessionReader(str(folder), COLUMNS, window_sessions=16, seed=7)
            assert epoch_content(fresh, epoch, start) == whole[start:]
        scattered = [content(reader.read_window(epoch, window)) for window in (3, 0, 6, 3)]
        assert scattered == [whole[window][1] for window in (3, 0, 6, 3)]


def test_a_window_does_not_depend_on_what_was_read_before(folder: Path) -> None:
    def fresh() -> SessionReader:
        return SessionReader(str(folder), COLUMNS, window_sessions=16)

    windows = [(epoch, window) for epoch in range(2) for window in range(7)]
    expected = {place: content(fresh().read_window(*place)) for place in windows}
    reader = fresh()
    for before in windows:
        for after in windows:
            assert content(reader.read_window(*before)) == expected[before]
            assert content(reader.read_window(*after)) == expected[after]


def test_windows_are_nearly_equal_and_no_larger_than_asked(folder: Path) -> None:
    for window_sessions in (1, 16, 40, 102, 103, 1000):
        reader = SessionReader(str(folder), COLUMNS, window_sessions=window_sessions)
        sizes = {len(window) for _, window in epoch_content(reader, 0)}
        assert max(sizes) <= window_sessions
        assert max(sizes) - min(sizes) <= 1
        assert reader.num_windows() == -(-103 // window_sessions)


def test_the_order_is_the_same_for_all_formats(tmp_path: Path) -> None:
    orders = set()
    for kind in KINDS:
        write_table(tmp_path / kind / "part", numbered_sessions(100), kind)
        reader = SessionReader(str(tmp_path / kind), window_sessions=32, seed=3)
        orders.add(tuple(np.concatenate([batch.row_ids for _, batch in reader.windows(1)]).tolist()))
    assert len(orders) == 1


def test_the_order_differs_between_epochs_and_seeds_and_mixes_chunks(tmp_path: Path) -> None:
    file = write_table(tmp_path / "part", numbered_sessions(1000), chunk=50)

    def order(seed: int, epoch: int) -> list[int]:
        reader = SessionReader(str(file), window_sessions=250, seed=seed)
        return [row for _, batch in reader.windows(epoch) for row in batch.row_ids.tolist()]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20  # 1 expected by chance
    first_window = {row // 50 for row in orders[0][:250]}
    assert 5 <= len(first_window) <= 6  # whole chunks, but for the one that the window's end cuts
    assert first_window != {row // 50 for row in orders[1][:250]}


def test_windows_go_on_from_epoch_to_epoch(folder: Path) -> None:
    reader = SessionReader(str(folder), COLUMNS, window_sessions=16)
    several = [(window, content(batch)) for window, batch in reader.windows(1, 5, num_epochs=3)]
    assert several == epoch_content(reader, 1, 5) + epoch_content(reader, 2) + epoch_content(reader, 3)
    assert list(reader.windows(2, num_epochs=0)) == []


def test_keys_become_rows_before_they_are_permuted(folder: Path) -> None:
    def negated(keys: pa.Array) -> np.ndarray:
        return -keys.to_numpy()

    reader = SessionReader(str(folder), COLUMNS, window_sessions=16)
    for window in range(reader.num_windows()):  # by turns: a chunk that windows share is not taken for the other kind
        keys, rows = reader.read_window(0, window), reader.read_window(0, window, negated)
        assert isinstance(rows.items.values, np.ndarray)
        assert np.array_equal(rows.items.values, -keys.items.values.to_numpy())
        assert np.array_equal(rows.items.offsets, keys.items.offsets)
        assert np.array_equal(rows.row_ids, keys.row_ids)


def test_a_chunk_larger_than_a_window_is_mixed_over_its_windows(tmp_path: Path) -> None:
    file = write_table(tmp_path / "part", numbered_sessions(1000), chunk=1000)
    reader = SessionReader(str(file), window_sessions=100)
    means = [batch.row_ids.mean() for _, batch in reader.windows(0)]
    assert min(means) > 350  # 50, 150, ... if the chunk were cut in file order
    assert max(means) < 650


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A checkpoint's position means the same sessions after an upgrade of numpy, or the upgrade is noticed here."""
    reader = SessionReader(
        str(write_table(tmp_path / "part", numbered_sessions(20), chunk=5)), window_sessions=8, seed=1
    )
    assert [batch.row_ids.tolist() for _, batch in reader.windows(2)] == [
        [11, 7, 14, 12, 10, 13],
        [19, 9, 6, 16, 5, 17, 8],
        [15, 18, 1, 4, 2, 3, 0],
    ]


def test_stream_gives_file_order_in_bounded_pieces(folder: Path) -> None:
    reader = SessionReader(str(folder), COLUMNS, window_sessions=16)
    batches = list(reader.stream())
    assert max(len(batch) for batch in batches) <= 16
    assert [row for batch in batches for row in batch.row_ids.tolist()] == list(range(103))
    assert all(batch.user is None for batch in reader.stream(Columns()))


def test_the_fingerprint_follows_the_data_and_not_its_place(tmp_path: Path) -> None:
    for place in ("here", "there/deeper", "changed", "renamed"):
        write_table(tmp_path / place / "a", numbered_sessions(31 if place == "changed" else 30))
        write_table(tmp_path / place / ("c" if place == "renamed" else "b"), numbered_sessions(5))
    prints = [
        SessionReader(str(tmp_path / place)).fingerprint for place in ("here", "there/deeper", "changed", "renamed")
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_memory_is_that_of_windows_and_not_of_the_data_set(tmp_path: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(400_000)), 20)
    file = write_table(tmp_path / "part", {"items": lists}, "ipc_stream", chunk=500)
    window_bytes = 1000 * (20 + 1) * 8
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    peak = 0
    for _, batch in SessionReader(str(file), window_sessions=1000).windows(0):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert len(batch) == 1000
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lists.nbytes > 19 * window_bytes
    assert peak + numpy_peak < 8 * window_bytes


def test_skipped_rows_are_left_out_and_counted_once(tmp_path: Path) -> None:
    lists = [[1], None, [2, None], [], [3, 4]] * 20
    write_table(tmp_path / "part", {"items": pa.array(lists), "user": [*range(99), None]}, chunk=30)
    reader = SessionReader(str(tmp_path), COLUMNS, bad_rows="skip", window_sessions=25)
    for epoch in range(2):
        sessions = sorted(one for _, window in epoch_content(reader, epoch) for one in window)
        good = [(i, i, tuple(lists[i] or ())) for i in range(99) if i % 5 in (0, 3, 4)]
        assert sessions == good
        assert reader.num_bad == 41
        for window in range(4):
            fresh = SessionReader(str(tmp_path), COLUMNS, bad_rows="skip", window_sessions=25)
            assert epoch_content(fresh, epoch, window) == epoch_content(reader, epoch, window)
    assert reader.num_sessions == 100


def test_skipping_every_row_gives_empty_windows(tmp_path: Path) -> None:
    write_table(tmp_path / "part", {"items": pa.array([None] * 10, pa.list_(pa.int64()))})
    reader = SessionReader(str(tmp_path), bad_rows="skip", window_sessions=4)
    assert [len(batch) for _, batch in reader.windows(0)] == [0, 0, 0]


def test_a_bad_row_stops_the_epoch_with_its_place(tmp_path: Path) -> None:
    file = write_table(tmp_path / "part", {"items": pa.array([[1]] * 25 + [None] + [[2]] * 4)})
    with pytest.raises(DataError) as caught:
        list(SessionReader(str(file), window_sessions=8).windows(0))
    assert str(caught.value) == (
        f"{file}, row group 2, row 5: column `items` is null; expected a list of keys (an empty list is fine); "
        "mend the row, or skip and count such rows: `--set data.bad_rows=skip`"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_vanishes_is_named(tmp_path: Path, kind: str) -> None:
    file = write_table(tmp_path / "part", numbered_sessions(30), kind)
    reader = SessionReader(str(tmp_path))
    file.unlink()
    with pytest.raises(DataError, match="vanished") as caught:
        reader.read_window(0, 0)
    assert str(caught.value) == f"{file}: has vanished since the data set was opened; restore it, or start again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_is_named(tmp_path: Path, kind: str) -> None:
    file = write_table(tmp_path / "part", numbered_sessions(30), kind)
    reader = SessionReader(str(tmp_path))
    write_table(file, numbered_sessions(300), kind)
    with pytest.raises(
        DataError, match=r"part: has changed since it was opened \(\d+ bytes then, \d+ now\); start again"
    ):
        reader.read_window(0, 0)


def test_files_of_different_key_types_are_refused(tmp_path: Path) -> None:
    first = write_table(tmp_path / "a", {"items": [[1]]})
    second = write_table(tmp_path / "b", {"items": [["x"]]})
    with pytest.raises(DataError) as caught:
        SessionReader(str(tmp_path))
    assert str(caught.value) == (
        f"{second}: column `items` holds large_string, but int64 in {first}; every file must have the same type: "
        "convert one of them, or name files of one type in the source"
    )


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data\.shuffle_sessions: must be at least 1; got 0"):
        SessionReader(str(tmp_path), window_sessions=0)
    with pytest.raises(SettingError, match=r"data\.bad_rows: must be error or skip; got 'drop'"):
        SessionReader(str(tmp_path), bad_rows="drop")  # type: ignore[arg-type]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_read_ahead_runs_one_item_ahead_and_no_further() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            if i == 2:
                third.set()
            yield i

    ahead = read_ahead(items())
    assert (next(ahead), next(ahead)) == (0, 1)
    assert third.wait(10)  # the item after the one in hand is made without being asked for
    assert made == [0, 1, 2]
    assert list(ahead) == list(range(2, 10))
    assert not reading_threads()


def test_closing_a_read_ahead_ends_its_thread_and_closes_the_items() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    ahead = read_ahead(items())
    next(ahead)
    assert len(reading_threads()) == 1
    ahead.close()  # type: ignore[attr-defined]
    assert not reading_threads()
    assert closed == [True]


def test_the_error_of_a_read_ahead_is_the_original_one() -> None:
    error = DataError("broken", file="f", row=3)

    def items() -> Iterator[int]:
        yield 1
        raise error

    received: list[int] = []
    with pytest.raises(DataError) as caught:
        received.extend(read_ahead(items()))
    assert caught.value is error
    assert not reading_threads()
