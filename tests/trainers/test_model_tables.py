"""Which tables a config asks for, what is refused, and what a budget makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.config import Config, config_from_dict
from cluster.errors import SettingError
from embedding_service.row_maps import RowMap
from trainers.item2vec import own_part
from trainers.model_tables import ModelTables, check_tables, model_tables, table_warnings
from trainers.table_report import lines_of, table_report

IDS = {"item": 10_000, "user": 1_000_000, "query_country": 200, "item_tags": 500}
TWO_TOWER: dict[str, Any] = {"kind": "two_tower", "query": ["history", "user"], "dim": 64}


def config(model: dict[str, Any] | None = None, /, **sections: Any) -> Config:
    data = {"user": "user", "query_features": ["country"], "item_features": "side.parquet"}
    tree = {"model": TWO_TOWER | (model or {}), "data": data, "train": {"optimizer": "rowwise_adagrad"}}
    return config_from_dict(tree | sections)


def tables(**sections: Any) -> ModelTables:
    return model_tables(config(**sections), IDS)


def test_without_settings_every_key_has_its_row() -> None:
    found = tables()
    assert {spec.name: spec.rows for spec in found.physical} == IDS
    assert found.num_bytes == sum(IDS.values()) * (64 * 4 + 4)
    assert all(map.is_exact for map in found.maps.values())
    assert list(table_warnings(found)) == []


def test_item2vecs_two_tables_share_the_items_map() -> None:
    settings = {"item": {"map": "head_tail", "compression": 4, "head": 0.25}}
    found = model_tables(config_from_dict({"model": {"kind": "item2vec"}, "tables": settings}), {"item": 10_000})
    assert found.maps == dict.fromkeys(("input", "output"), RowMap("head_tail", 10_000, 2500, head=625, hashes=2))
    assert [spec.rows for spec in found.physical] == [2500, 2500]


def test_a_history_of_its_own_has_the_items_map() -> None:
    settings = {"item": {"map": "hashed", "rows": 900, "precision": "fp16"}}
    found = model_tables(config({"share_items": False}, tables=settings), IDS)
    assert found.maps["history"] == found.maps["item"] == RowMap("hashed", 10_000, 900, hashes=2)
    assert {spec.name: spec.precision for spec in found.physical}["history"] == "fp16"


@pytest.mark.parametrize("hashes", [2, 5])
@pytest.mark.parametrize("kind", ["hashed", "head_tail"])
@pytest.mark.parametrize("learned", [False, True])
def test_compression_counts_bytes(kind: str, hashes: int, learned: bool) -> None:
    settings = {"map": kind, "compression": 10, "hashes": hashes, "learned_weights": learned}
    found = tables(tables={"item": settings})
    weights = sum(spec.rows * spec.dim * 4 for spec in found.physical if spec.name in ("item", "weights_item"))
    assert 0.98 < weights / (10_000 * 64 * 4 / 10) <= 1.0


def test_tables_of_their_own_dimension_and_precision() -> None:
    settings = {"user": {"dim": 16, "precision": "fp16"}}
    found = model_tables(config({"hidden": [32]}, tables=settings), IDS)
    assert {spec.name: (spec.dim, spec.precision) for spec in found.physical} == {
        "item": (64, "fp32"), "user": (16, "fp16"), "query_country": (64, "fp32"), "item_tags": (64, "fp32"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "table", "problem"),
    [
        ("usr", {"map": "exact"}, "this model has no such table; it has: item, user, query_country"),
        ("user.rows", {"rows": 7}, "has no effect with map = auto"),
        ("user.compression", {"map": "exact", "compression": 2}, "has no effect with map = exact"),
        ("user.head", {"map": "hashed", "rows": 7, "head": 0.1}, "has no effect with map = hashed"),
        ("user.hashes", {"map": "quotient_remainder", "rows": 7, "hashes": 3}, "has no effect"),
        ("user.combine", {"map": "hashed", "rows": 7, "combine": "sum"}, "has no effect"),
        ("user.learned_weights", {"map": "quotient_remainder", "rows": 7, "learned_weights": True}, "has no effect"),
        ("user.compression", {"map": "hashed", "rows": 7, "compression": 2}, "leave one out"),
        ("user.compression", {"map": "hashed"}, "needs rows, or a compression of more than 1"),
        ("user.compression", {"map": "hashed", "compression": 1}, "needs rows, or a compression of more than 1"),
        ("user.head", {"map": "head_tail", "compression": 2, "head": 0.0}, "must be between 0 and 1"),
        ("user.learned_weights", {"map": "hashed", "rows": 9, "hashes": 1, "learned_weights": True}, "2 hashes or"),
        ("item.vocabulary", {"map": "hashed", "rows": 9, "vocabulary": False}, "items must be listed to be ranked"),
        ("user.vocabulary", {"map": "head_tail", "rows": 9, "vocabulary": False}, "false needs map = hashed"),
        ("user.vocabulary", {"vocabulary": False}, "false needs map = hashed"),
        ("user.rows", {"map": "hashed", "compression": 9, "vocabulary": False}, "the number of keys is not known"),
        ("user.dim", {"dim": 30}, "must be divisible by 4"),
        ("user.dim", {"dim": 32}, "set model.hidden"),
    ],
)
def test_a_setting_without_effect_or_impossible_is_refused(path: str, table: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem) as caught:
        check_tables(config(tables={path.partition(".")[0]: table}))
    assert caught.value.path == f"tables.{path}"


@pytest.mark.parametrize(
    ("path", "table", "problem"),
    [
        ("user.rows", {"map": "hashed", "rows": 1_000_000}, "rows are enough for all 1,000,000 keys: set map = exact"),
        ("item.compression", {"map": "hashed", "compression": 9_999}, "leaves 1 rows for 10,000 keys"),
        ("item.rows", {"map": "quotient_remainder", "rows": 50}, "have no quotients and remainders in 50 rows"),
        ("item_colour", {"map": "exact"}, "it has: item, item_tags, query_country, user"),
    ],
)
def test_what_does_not_fit_the_number_of_keys_is_refused(path: str, table: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem) as caught:
        tables(tables={path.partition(".")[0]: table})
    assert caught.value.path == f"tables.{path}"


def test_learned_weights_are_not_for_item2vec() -> None:
    table = {"map": "hashed", "compression": 2, "learned_weights": True}
    with pytest.raises(SettingError, match=r"tables\.item\.learned_weights: is for two_tower"):
        check_tables(config_from_dict({"model": {"kind": "item2vec"}, "tables": {"item": table}}))


def test_two_ways_to_begin_are_refused() -> None:
    with pytest.raises(SettingError, match="both say how the table begins") as caught:
        check_tables(config(tables={"user": {"vectors": "users.vec"}}, train={"grow": "runs/old"}))
    assert caught.value.path == "tables.user.vectors"


def test_keys_without_a_vocabulary_have_a_table_all_the_same() -> None:
    settings = {"user": {"map": "hashed", "rows": 5000, "vocabulary": False, "learned_weights": True}}
    found = model_tables(config(tables=settings), IDS | {"user": 2**62})
    assert {spec.name: (spec.rows, spec.dim) for spec in found.physical if "user" in spec.name} == {
        "user": (5000, 64), "weights_user": (20_000, 4),
    }  # fmt: skip
    (line,) = lines_of(table_report(found))
    assert line == "table user: any number of keys in 5,000 rows (2 hashes, learned weights), 1.6 MiB"


def test_what_ids_that_share_rows_give_to_them() -> None:
    """1 / mean of sqrt(how many of the block's ids have a row), over an id's rows."""
    map = RowMap("hashed", 1000, 20, hashes=2)
    ids = np.array([3, 17, 500, 999, 12, 44])
    lists = map.lists(ids).to_lists()
    flat = [row for rows in lists for row in rows]
    wanted = [2 / sum(flat.count(row) ** 0.5 for row in rows) for rows in lists]
    assert min(wanted) < 0.9
    np.testing.assert_allclose(own_part(map, ids), wanted, rtol=1e-6)
    assert own_part(RowMap("head_tail", 1000, 500, head=499), np.array([7, 3])).tolist() == [1.0, 1.0]
    assert own_part(map, np.empty(0, np.int64)).shape == (0,)


class TestBudget:
    ROW = 64 * 4 + 4

    @pytest.mark.parametrize("megabytes", [300, 260, 200, 140, 60, 20, 8, 6])
    def test_the_tables_fit_it(self, megabytes: int) -> None:
        found = tables(keys={"budget": f"{megabytes}MB"})
        assert found.num_bytes <= megabytes * 10**6
        if megabytes >= 60:  # what does not harm the ranking comes first
            assert found.maps["item"].is_exact
        if megabytes > 262:
            assert found == tables()
        else:
            assert found.maps["user"].kind == "head_tail"
            assert found.num_bytes > 0.98 * megabytes * 10**6

    def test_it_is_used_up(self) -> None:
        found = tables(keys={"budget": "140MB"})
        assert found.num_bytes > 0.99 * 140e6
        assert found.maps["query_country"].is_exact

    def test_one_that_is_too_small_says_what_would_do(self) -> None:
        with pytest.raises(SettingError, match=r"keys\.budget: 3MB is too little: the tables take .* MiB where those"):
            tables(keys={"budget": "3MB"})

    def test_chosen_maps_stay(self) -> None:
        settings = {"user": {"map": "hashed", "rows": 100_000}, "item": {"map": "exact"}}
        found = tables(keys={"budget": "30MB"}, tables=settings)
        assert found == tables(tables=settings)
        with pytest.raises(SettingError, match=r"keys\.budget: 20MB is too little"):
            tables(keys={"budget": "20MB"}, tables=settings)

    def test_it_must_be_a_size(self) -> None:
        with pytest.raises(SettingError, match=r"keys\.budget: must be a size like 2GiB"):
            check_tables(config(keys={"budget": "lots"}))


def test_a_report_has_sizes_and_collisions_of_every_table() -> None:
    settings = {
        "item": {"map": "head_tail", "rows": 200, "head": 0.5},
        "user": {"map": "quotient_remainder", "rows": 9000},
    }
    found = tables(tables=settings)
    report = {one["table"]: one for one in table_report(found)}
    assert sum(one["bytes"] for one in report.values()) == found.num_bytes
    assert report["item"]["weight_bytes"] == 200 * 64 * 4 == report["item"]["bytes"] - 200 * 4
    assert report["query_country"]["measured"] is None
    item = report["item"]
    assert (item["keys"], item["rows"], item["head"], item["hashes"]) == (10_000, 200, 100, 2)
    assert item["measured"]["same_rows"] == pytest.approx(item["expected"]["same_rows"], rel=0.05)
    assert item["expected"]["same_rows"] > 0.5
    assert report["user"]["measured"] == {"same_rows": 0.0, "all_shared": 1.0}
    assert lines_of(list(report.values()))[0].startswith(
        "table item: 10,000 keys in 200 rows (100 of their own, 2 hashes for the others), 50.8 KiB instead of 2.5 MiB; "
    )
    (warning,) = table_warnings(found)
    assert "the candidates of table item share rows, 10,000 keys in 200 (50x fewer)" in warning


@pytest.mark.parametrize("kind", ["hashed", "head_tail"])
def test_one_hash_of_the_items_is_warned_of(kind: str) -> None:
    one, two = (tables(tables={"item": {"map": kind, "compression": 1.5, "hashes": hashes}}) for hashes in (1, 2))
    (warning,) = table_warnings(one)
    assert "cannot be ranked among each other" in warning
    assert list(table_warnings(two)) == []
