from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError, SettingError
from tests.trainers.session_data import KINDS, write_table
from trainers import event_log
from trainers.event_log import SessionizeSummary, sessionize
from trainers.sessions import Columns, SessionReader

Event = tuple[Any, float, Any]  # user, time, item


def slow_sessions(events: Sequence[Event], gap: float) -> list[tuple[float, Any, list[Any]]]:
    """(start, user, items) of the sessions, the plain way."""
    sessions: list[tuple[float, Any, list[Any]]] = []
    ordered = sorted(enumerate(events), key=lambda entry: (entry[1][0], entry[1][1], entry[0]))
    for user, group in itertools.groupby((event for _, event in ordered), key=lambda event: event[0]):
        last = None
        for _, time, item in group:
            if last is None or time - last > gap:
                sessions.append((time, user, []))
            sessions[-1][2].append(item)
            last = time
    return sorted(sessions, key=lambda session: session[:2])


def log(events: Sequence[Event], time: Any = None) -> pa.Table:
    users, times, items = zip(*events, strict=True)
    return pa.table({"uid": list(users), "ts": pa.array(list(times), time), "sku": list(items)})


def random_events(count: int, seed: int = 0, users: int = 6) -> list[Event]:
    rng = random.Random(seed)
    return [(f"u{rng.randrange(users)}", rng.randrange(400), rng.randrange(50)) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_events", [3, 1000])
def test_user_and_gap_give_the_sessions_of_the_slow_way(
    tmp_path: Path, kind: str, batch_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "_BATCH_EVENTS", batch_events)
    events = random_events(200)
    write_table(tmp_path / "log" / "1", log(events[:90]), kind, chunk=40)
    write_table(tmp_path / "log" / "2", log(events[90:]), kind, chunk=40)
    out = tmp_path / "out" / "sessions.parquet"
    summary = sessionize(str(tmp_path / "log"), out, item="sku", time="ts", user="uid", gap_seconds=10)
    expected = slow_sessions(events, 10)
    table = pq.read_table(out)
    assert table.column_names == ["user", "time", "items"]
    assert list(zip(*(table[name].to_pylist() for name in ("time", "user", "items")), strict=True)) == expected
    lengths = [len(items) for _, _, items in expected]
    mean = 200 / len(expected)
    assert summary == SessionizeSummary(200, len(expected), 0, 0, min(lengths), mean, max(lengths))
    reader = SessionReader(str(out), Columns(user="user", time="time"))
    assert reader.num_sessions == summary.sessions


def test_min_length_drops_and_counts_short_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "_BATCH_EVENTS", 7)
    events = random_events(100, seed=1)
    source = write_table(tmp_path / "log", log(events))
    summary = sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid", gap_seconds=10, min_length=3)
    everything = slow_sessions(events, 10)
    expected = [session for session in everything if len(session[2]) >= 3]
    assert pq.read_table(tmp_path / "out")["items"].to_pylist() == [items for _, _, items in expected]
    assert (summary.sessions, summary.dropped_sessions) == (len(expected), len(everything) - len(expected))
    assert summary.min_length == min(len(items) for _, _, items in expected)


@pytest.mark.parametrize(
    "times",
    [
        pa.array([0, 1800, 3601], pa.int32()),
        pa.array([0.0, 1800.0, 3600.5]),
        pa.array([0, 1_800_000, 3_600_001], pa.timestamp("ms")),
        pa.array([0, 1_800_000_000_000, 3_600_000_001_000], pa.timestamp("ns", "UTC")),
    ],
    ids=["int", "float", "ms", "ns"],
)
def test_a_pause_of_exactly_the_gap_does_not_end_a_session(tmp_path: Path, times: pa.Array) -> None:
    source = write_table(tmp_path / "log", {"uid": [1, 1, 1], "ts": times, "sku": ["a", "b", "c"]})
    sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid")
    assert pq.read_table(tmp_path / "out")["items"].to_pylist() == [["a", "b"], ["c"]]


def test_session_ids_with_times_order_events_and_sessions_by_time(tmp_path: Path) -> None:
    table = {"sid": [7, 3, 7, 3], "ts": [datetime.date(2024, 1, day) for day in (9, 4, 2, 3)], "sku": [1, 2, 3, 4]}
    source = write_table(tmp_path / "log", table)
    sessionize(str(source), tmp_path / "out", item="sku", time="ts", session="sid")
    first = [datetime.datetime(2024, 1, day) for day in (2, 3)]
    expected = {"session": [7, 3], "time": first, "items": [[3, 1], [4, 2]]}
    assert pq.read_table(tmp_path / "out").to_pydict() == expected


def test_session_ids_without_times_keep_the_order_of_the_log(tmp_path: Path) -> None:
    table = {"sid": ["b", "a", "b", "a", "b"], "sku": [5, 4, 3, 2, 1]}
    source = write_table(tmp_path / "log", table, chunk=2)
    summary = sessionize(str(source), tmp_path / "out", item="sku", session="sid")
    assert pq.read_table(tmp_path / "out").to_pydict() == {"session": ["a", "b"], "items": [[4, 2], [5, 3, 1]]}
    assert (summary.min_length, summary.mean_length, summary.max_length) == (2, 2.5, 3)


def test_a_session_id_that_two_users_share_is_two_sessions(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", {"sid": [1, 1, 1], "uid": ["a", "b", "a"], "sku": [1, 2, 3]})
    sessionize(str(source), tmp_path / "out", item="sku", session="sid", user="uid")
    expected = {"session": [1, 1], "user": ["a", "b"], "items": [[1, 3], [2]]}
    assert pq.read_table(tmp_path / "out").to_pydict() == expected


def test_ties_keep_the_order_of_the_log_and_the_output_is_the_same_bytes(tmp_path: Path) -> None:
    events = [(f"u{i % 50}", i // 1000, i) for i in range(5000)]
    source = write_table(tmp_path / "log", log(events), chunk=700)
    contents = set()
    for run in range(3):
        out = tmp_path / f"out{run}"
        sessionize(str(source), out, item="sku", time="ts", user="uid")
        contents.add(out.read_bytes())
        assert all(items == sorted(items) for items in pq.read_table(out)["items"].to_pylist())
    assert len(contents) == 1


def test_row_groups_have_the_size_asked_for(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", {"sid": list(range(100)), "ts": [1] * 100, "sku": ["x"] * 100})
    sessionize(str(source), tmp_path / "out", item="sku", session="sid", time="ts", row_group_sessions=40)
    metadata = pq.ParquetFile(tmp_path / "out").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [40, 40, 20]
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_names_are_only_names(tmp_path: Path) -> None:
    evil = "\"; COPY (SELECT 1) TO 'owned.csv'; --"
    source = write_table(tmp_path / "it's; DROP", {evil: [1, 1], "'": [1, 2]})
    sessionize(str(source), tmp_path / "o'ut", item="'", session=evil)
    assert pq.read_table(tmp_path / "o'ut").to_pydict() == {"session": [1], "items": [[1, 2]]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it's; DROP", "o'ut"]


BAD = {"uid": ["a", "a", None, "b", "b"], "ts": [1, 2, 3, None, 5], "sku": [1, 2, 3, 4, None]}


def test_events_that_cannot_be_used_are_counted_in_the_error(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", BAD, chunk=2)
    with pytest.raises(DataError) as caught:
        sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid")
    assert str(caught.value) == (
        f"{source}, row group 1, row 0: column `uid` is null; expected a key; 3 of 5 events cannot be used: mend them, "
        "or leave such events out and count them: `--bad-events skip`"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_events_that_cannot_be_used_can_be_left_out(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", BAD, chunk=2)
    summary = sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid", bad_events="skip")
    assert pq.read_table(tmp_path / "out")["items"].to_pylist() == [[1, 2]]
    assert (summary.events, summary.dropped_events) == (5, 3)


def test_a_former_output_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", BAD)
    (tmp_path / "out").write_text("former")
    with pytest.raises(DataError):
        sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid")
    assert (tmp_path / "out").read_text() == "former"
    sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid", bad_events="skip")
    assert pq.read_table(tmp_path / "out").num_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_a_file_damaged_in_the_middle_of_the_sort_is_named(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", log(random_events(100)))
    content = bytearray(source.read_bytes())
    content[4:40] = b"\xff" * 36
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"log, row group 0: is damaged: .*; write or copy it again") as caught:
        sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid")
    assert caught.value.file == str(source)


def test_no_session_long_enough(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", {"sid": [1, 2], "sku": [1, 2]})
    with pytest.raises(DataError) as caught:
        sessionize(str(source), tmp_path / "out", item="sku", session="sid", min_length=2)
    assert str(caught.value) == (
        "no session is left: none of its 2 sessions (2 events) has 2 events or more; lower `--min-length`"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"item": "product", "session": "sid"},
            "there is no column `product` (for item); the columns are `sid`, `sku`, `f`, `ms`: name the right one with "
            "`--item NAME`",
        ),
        (
            {"item": "f", "session": "sid"},
            "column `f` (for item) is double; expected integers, strings or a dictionary of them; convert it, or name "
            "another column with `--item NAME` (of that type: `sid`, `sku`, `ms`)",
        ),
        (
            {"item": "sku", "user": "sid", "time": "sku"},
            "column `sku` (for time) is string; expected a timestamp, a date or a number; convert it, or name another "
            "column with `--time NAME` (of that type: `sid`, `f`, `ms`)",
        ),
    ],
)
def test_a_column_that_cannot_serve_is_told(tmp_path: Path, arguments: dict[str, Any], expected: str) -> None:
    source = write_table(tmp_path / "log", {"sid": [1], "sku": ["a"], "f": [1.5], "ms": [1_700_000_000_000]})
    with pytest.raises(DataError) as caught:
        sessionize(str(source), tmp_path / "out", **arguments)
    assert str(caught.value) == f"{source}: {expected}"


def test_milliseconds_are_not_taken_for_seconds(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", {"uid": [1, 1], "ts": [5, 1_700_000_000_000], "sku": ["a", "b"]})
    with pytest.raises(DataError) as caught:
        sessionize(str(source), tmp_path / "out", item="sku", user="uid", time="ts")
    assert str(caught.value) == (
        f"{source}, row group 0, row 1: column `ts` holds 1700000000000, which is no time in seconds; milliseconds? "
        "Store seconds, or a timestamp"
    )


def test_logs_of_different_types_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "log" / "1", {"sid": [1], "sku": ["a"]})
    second = write_table(tmp_path / "log" / "2", {"sid": ["x"], "sku": ["a"]})
    with pytest.raises(DataError, match="column `sid` holds large_string, but int64 in") as caught:
        sessionize(str(tmp_path / "log"), tmp_path / "out", item="sku", session="sid")
    assert caught.value.file == str(second)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "setting session: name the column of session ids, or `user` and `time` to cut sessions at pauses"),
        (
            {"user": "u"},
            "setting time: sessions of a user are cut at pauses: name the column of times, or of session ids",
        ),
        ({"session": "s", "gap_seconds": 0}, "setting gap_seconds: must be above 0; got 0"),
        ({"session": "s", "min_length": 0}, "setting min_length: must be at least 1; got 0"),
        ({"session": "s", "row_group_sessions": 0}, "setting row_group_sessions: must be at least 1; got 0"),
        (
            {"session": "s", "memory_limit": "lots"},
            "setting memory_limit: must be a size such as 2GB or 500MB; got 'lots'",
        ),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(
    tmp_path: Path, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SettingError) as caught:
        sessionize(str(tmp_path), tmp_path / "out", item="i", **arguments)
    assert str(caught.value) == expected


def test_a_memory_limit_too_small_for_the_sort_is_told(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", log(random_events(5000, users=5000)), chunk=5000)
    with pytest.raises(SettingError, match="setting memory_limit: is too small to sort this log"):
        sessionize(str(source), tmp_path / "out", item="sku", time="ts", user="uid", memory_limit="100KB")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", {"sid": [1], "sku": [1]})
    with pytest.raises(SettingError, match=r"setting output: .*log/out cannot be written"):
        sessionize(str(source), source / "out", item="sku", session="sid")


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path) -> None:
    source = write_table(tmp_path / "log", BAD)
    spill = tmp_path / "spill"
    spill.mkdir()
    arguments: dict[str, Any] = {"item": "sku", "time": "ts", "user": "uid", "temp_folder": spill}
    sessionize(str(source), tmp_path / "out", bad_events="skip", **arguments)
    with pytest.raises(DataError):
        sessionize(str(source), tmp_path / "out", **arguments)
    assert list(spill.iterdir()) == []


def test_the_output_is_no_source_and_no_folder(tmp_path: Path) -> None:
    source = tmp_path / "log.parquet"
    pq.write_table(log([("u", 1, "a")]), source)
    (tmp_path / "link.parquet").symlink_to(source)
    before = source.read_bytes()
    for output in (source, tmp_path / "link.parquet", f"file://{source}"):
        with pytest.raises(SettingError, match="is one of the files that are read; name another"):
            sessionize(str(source), output, item="sku", time="ts", user="uid")
    with pytest.raises(SettingError, match="is a folder; name the Parquet file to write"):
        sessionize(str(source), tmp_path, item="sku", time="ts", user="uid")
    assert source.read_bytes() == before
