from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.config import Config, config_from_dict
from cluster.errors import DataError, SettingError
from tests.trainers.session_data import write_table
from trainers.profile import PartProfile, profile
from trainers.sessions import Columns, SessionReader


def _sessions(folder: Path, num: int = 4_000) -> Path:
    """Two files: session i has user i // 2, one of 4 cities, a tag list, a price, and 0..4 of 500 items."""
    random = np.random.default_rng(1)
    rows = {
        "items": pa.array([random.zipf(1.5, i % 5).clip(max=500).tolist() for i in range(num)], pa.list_(pa.int64())),
        "who": pa.array([f"user {i // 2}" for i in range(num)]),
        "city": pa.array([None if i % 4 == 0 else i % 4 for i in range(num)]),
        "tags": pa.array([["a"] * (i % 3) for i in range(num)]),
        "price": pa.array(random.random(num)),
        "mood": pa.array([[("calm", 0.5), (str(i % 7), 0.1)] for i in range(num)], pa.map_(pa.string(), pa.float32())),
    }
    table = pa.table(rows)
    write_table(folder / "0.parquet", table.slice(0, num // 3), chunk=500)
    write_table(folder / "1.parquet", table.slice(num // 3), chunk=700)
    return folder


def _config(source: Path | str, **sections: dict[str, Any]) -> Config:
    features = ["city", "tags", "price", "mood"]
    tree: dict[str, Any] = {
        "data": {"train": str(source), "user": "who", "query_features": features, "shuffle_sessions": 300},
        "model": {"kind": "two_tower"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return config_from_dict(tree)


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("seconds", "keys_per_second", "workers")}


def test_a_profile_tells_what_is_there(tmp_path: Path) -> None:
    found = profile(_config(_sessions(tmp_path / "data")))
    items = pa.concat_arrays(
        [batch.items.values for batch in SessionReader(str(tmp_path / "data"), Columns()).stream()]
    ).to_numpy()
    keys, counts = np.unique(items, return_counts=True)
    counts = np.sort(counts)[::-1]
    item = found["columns"]["item"]
    assert (found["sessions"], found["bad_rows"]) == (4_000, 0)
    assert item["distinct"] == {"value": len(keys), "low": len(keys), "high": len(keys)}
    assert item["occurrences"] == len(items) == 8_000
    coverage = {one["top"]: one["value"] for one in item["coverage"]}
    assert coverage[10] == pytest.approx(counts[:10].sum() / len(items))
    assert item["frequent"][0] == {"key": 1, "low": counts[0], "high": counts[0]}
    assert {one["min_count"]: one["value"] for one in item["min_count"]}[2] == (counts >= 2).sum()
    assert found["lengths"]["mean"] == 2.0
    assert found["lengths"]["max"] == 4
    assert found["lengths"]["quantiles"]["0.5"] == 2
    columns = found["columns"]
    assert columns.keys() == {"item", "user", "query_city", "query_tags", "query_mood"}  # a price has no keys
    assert found["numbers"] == ["query_price"]
    assert columns["user"]["distinct"]["value"] == 2_000
    assert (columns["query_city"]["distinct"]["value"], columns["query_city"]["occurrences"]) == (3, 3_000)
    assert columns["query_mood"]["distinct"]["value"] == 8
    assert columns["query_mood"]["frequent"][0] == {"key": "calm", "low": 4_000, "high": 4_000}
    assert columns["query_tags"]["per_session"] == pytest.approx(1.0, abs=1e-3)


def test_parts_cover_every_session_once_and_merge_to_the_whole(tmp_path: Path) -> None:
    source = str(_sessions(tmp_path / "data"))
    reader = SessionReader(source, Columns(user="who"), window_sessions=300)
    whole = np.concatenate([batch.row_ids for batch in reader.stream()])
    for num_parts in (1, 2, 3, 11, 30):
        parts = [[b.row_ids for b in reader.stream(part=i, num_parts=num_parts)] for i in range(num_parts)]
        sizes = [sum(map(len, part)) for part in parts]
        np.testing.assert_array_equal(np.concatenate([rows for part in parts for rows in part]), whole)
        assert max(sizes) <= len(whole) / num_parts + 700  # and a chunk
    merged, single = PartProfile(), PartProfile()
    for i in (2, 0, 1):
        part = PartProfile()
        for batch in reader.stream(part=i, num_parts=3):
            part.add(batch)
        merged.merge(PartProfile.from_state(part.state()))
    for batch in reader.stream():
        single.add(batch)
    assert merged.to_dict() == single.to_dict()


def test_ray_tasks_give_the_same_and_carry_errors_home(tmp_path: Path) -> None:
    import ray

    from cluster.local_ray import start_local_ray

    source = _sessions(tmp_path / "data")
    told: list[dict[str, Any]] = []
    start_local_ray(num_cpus=2, log_to_driver=False, object_store_memory=2**27)
    try:
        on_ray = profile(_config(source, cluster={"workers": 2}), on_event=told.append)
        write_table(source / "2.parquet", _with_null_list())
        with pytest.raises(DataError, match="row group 1, row 2: column `items` is null") as error:
            profile(_config(source, cluster={"workers": 2}))
        skipped = profile(_config(source, cluster={"workers": 2}, data={"bad_rows": "skip"}))
    finally:
        ray.shutdown()
    assert error.value.file == str(source / "2.parquet")
    assert (skipped["sessions"], skipped["bad_rows"]) == (4_019, 1)
    (source / "2.parquet").unlink()
    assert _figures(on_ray) == _figures(profile(_config(source)))
    assert [event["text"] for event in told] == ["1 of 2 parts read", "2 of 2 parts read"]


def _with_null_list() -> pa.Table:
    return pa.table(
        {
            "items": pa.array([[1]] * 12 + [None] + [[1]] * 7, pa.list_(pa.int64())),
            "who": pa.array(["x"] * 20),
            "city": pa.array([1] * 20),
            "tags": pa.array([["a"]] * 20),
            "price": pa.array([1.0] * 20),
            "mood": pa.array([[]] * 20, pa.map_(pa.string(), pa.float32())),
        }
    )


def test_what_cannot_be_profiled_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"data.train: is empty"):
        profile(_config(""))
    with pytest.raises(DataError, match="no such file or folder"):
        profile(_config(tmp_path / "nowhere"))
    empty = write_table(tmp_path / "empty.parquet", {"items": pa.array([[], []], pa.list_(pa.int64()))})
    with pytest.raises(DataError, match="no keys: every session is empty"):
        profile(config_from_dict({"data": {"train": str(empty)}}))
