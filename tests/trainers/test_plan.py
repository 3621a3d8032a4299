from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.config import Config, config_from_dict
from cluster.errors import DataError, SettingError
from embedding_service.shard_plan import Machines
from tests.trainers.runs import small_config, write_sessions
from trainers.plan import GPU_RESERVE, Plan, make_plan, process_bytes
from trainers.plan_keys import keys_of, read_profile
from trainers.plan_offers import offers, with_settings
from trainers.prepare import open_reader, prepare
from trainers.profile import profile

GIB = 2**30
USERS, ITEMS = 10**9, 10**8
TOLD = {"item": ITEMS, "user": USERS}


def _config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "data": {"user": "user"},
        "model": {"kind": "two_tower", "query": ["user", "history"], "dim": 128},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return config_from_dict(tree)


def _gpus(workers: int) -> Machines:
    return Machines(workers, 8, "cuda", 80 * GIB, 1024 * GIB)


def _plan(config: Config, machines: Machines, told: dict[str, int] = TOLD) -> Plan:
    return make_plan(config, keys_of(config, told, None), machines)


def test_a_billion_users_fit_eight_gpus_byte_by_byte() -> None:
    plan = _plan(_config(), _gpus(8))
    found = plan.to_dict()
    assert found["fits"]
    assert found["weight_bytes"] == (USERS + ITEMS) * 128 * 4
    assert found["optimizer_bytes"] == (USERS + ITEMS) * 4  # row-wise Adagrad: a float32 a row
    assert len(found["ranks"]) == 8
    for rank in found["ranks"]:
        assert rank["weight_bytes"] == (USERS + ITEMS) // 8 * 128 * 4
        assert rank["table_bytes"] == rank["weight_bytes"] + rank["optimizer_bytes"] + rank["buffer_bytes"]
        assert rank["buffer_bytes"] < GIB
        assert rank["table_bytes"] <= found["table_limit_bytes_per_rank"] == int(80 * GIB * (1 - GPU_RESERVE))
    user = next(table for table in found["tables"] if table["name"] == "user")
    assert user["rows_per_rank"] == [USERS // 8] * 8
    assert (user["sharding"], user["kernel"], user["collisions"]) == ("row_wise", "fused", None)
    # A step sends 7/8 of its distinct users' ids, and as many rows and gradients of 128 float32.
    rows = user["rows_per_step"]
    assert 0 < rows <= 2048
    assert user["all_to_all_bytes_per_rank_and_step"] == rows * 7 * (8 + 2 * 512) // 8


def test_two_gpus_are_refused_and_every_offer_applied_fits() -> None:
    config, machines = _config(), _gpus(2)
    keys = keys_of(config, TOLD, None)
    plan = make_plan(config, keys, machines)
    assert not plan.fits
    per_rank = (USERS + ITEMS) // 2 * (128 * 4 + 4)
    limit = int(80 * GIB * (1 - GPU_RESERVE))
    assert per_rank - limit <= plan.missing_bytes <= per_rank - limit + GIB
    found = offers(config, keys, machines)
    assert [offer.change.split(" (")[0] for offer in found][:4] == [
        "8 workers on 1 machine",
        "tables in the machine's memory, a cache on the GPU",
        "shared rows",
        "vectors of dim 32",
    ]
    assert any(offer.settings == ("model.precision=fp16",) and offer.workers == 4 for offer in found)
    for offer in found:
        applied = with_settings(config, offer.settings)
        after = make_plan(applied, keys_of(applied, TOLD, None), _gpus(offer.workers))
        assert after.fits, offer.change
        assert after.missing_bytes == 0
        assert after.largest_rank_bytes == offer.plan.largest_rank_bytes
    smaller = dict(found[0].to_dict())
    assert not make_plan(config, keys, _gpus(smaller["workers"] - 1)).fits  # the fewest
    assert not make_plan(with_settings(config, ("model.dim=36",)), keys, machines).fits  # the largest


def test_fp16_alone_comes_first_where_it_is_enough() -> None:
    config = _config()
    found = offers(config, keys_of(config, TOLD, None), _gpus(5))
    assert found[0].settings == ("model.precision=fp16",)
    assert len(found) == 5  # and no offer of two things


def test_the_budgets_plan_is_the_one_that_training_would_hold() -> None:
    config = _config(keys={"budget": "200GiB"})
    plan = _plan(config, _gpus(8))
    assert sum(sum(one.weight_bytes) + sum(one.optimizer_bytes) for one in plan.tables) <= 200 * GIB
    user = next(one for one in plan.tables if one.spec.name == "user")
    assert user.map is not None
    assert user.map.kind == "head_tail"
    assert user.collisions is not None
    tail = USERS - user.map.head
    assert 0 < user.collisions["same_rows"] < user.collisions["all_shared"] <= tail
    assert 0.0 < user.collisions["lookups"] < 0.5  # the head is asked for more often


def test_sharing_candidates_is_warned_of_with_figures() -> None:
    config = _config(tables={"item": {"map": "hashed", "rows": 10**7, "hashes": 2}})
    (warning,) = _plan(config, _gpus(8)).warnings
    assert "10x fewer" in warning
    assert "two hashes kept 90 % of Recall@20 in half the bytes and 68 % in a tenth" in warning
    users = _config(tables={"user": {"map": "hashed", "rows": 10**7, "vocabulary": False}})
    plan = _plan(users, _gpus(8))
    assert plan.warnings == ()
    assert {one.spec.name: one.spec.rows for one in plan.tables} == {"item": ITEMS, "user": 10**7}
    collisions = {one.spec.name: one.collisions for one in plan.tables}
    assert collisions["item"] is None
    assert collisions["user"] is not None
    assert collisions["user"]["all_shared"] == pytest.approx(USERS)  # a hundred users to a row
    unknown = make_plan(users, keys_of(users, {"item": ITEMS}, None), _gpus(8))
    assert [one.collisions for one in unknown.tables] == [None, None]


def test_uvm_caching_needs_a_cache_on_the_gpu_and_the_tables_in_the_machine() -> None:
    config = _config(cluster={"uvm_caching": True})
    plan = _plan(config, _gpus(2))
    tables = (USERS + ITEMS) // 2 * (128 * 4 + 4)
    assert plan.fits
    assert {one.shards.kernel for one in plan.tables} == {"fused_uvm_caching"}
    assert plan.uvm_bytes == pytest.approx(tables, rel=1e-3)
    assert 0.2 * tables < plan.largest_rank_bytes < 0.25 * tables  # a fifth of the rows, and a step's buffers
    small = _plan(config, Machines(2, 8, "cuda", 80 * GIB, 512 * GIB))
    assert not small.fits
    assert "UVM tables take" in small.warnings[0]
    assert "which has 512.0 GiB" in small.warnings[0]
    with pytest.raises(SettingError, match=r"cluster.uvm_caching: is for cuda"):
        _plan(config, Machines(2, 2, "cpu", 0, 1024 * GIB))


def test_on_cpu_workers_share_a_machines_memory() -> None:
    told = {"item": 10**7, "user": 10**7}
    one, two = (Machines(workers, workers, "cpu", 0, 16 * GIB) for workers in (1, 2))
    assert _plan(_config(), one, told).fits
    assert _plan(_config(), two, told).fits
    tables = 2 * 10**7 * (512 + 4)
    small = Machines(2, 2, "cpu", 0, 8 * GIB)
    plan = _plan(_config(), small, told)
    assert not plan.fits
    assert plan.missing_bytes > (tables - 8 * GIB) // 2
    keys = keys_of(_config(), told, None)
    found = offers(_config(), keys, small)
    assert ("tables.item.disk=FOLDER", "tables.user.disk=FOLDER") in [offer.settings for offer in found]
    for offer in found:
        machines = offer.plan.machines
        assert machines.workers_here * (offer.plan.process_bytes + offer.plan.largest_rank_bytes) <= 8 * GIB
        assert machines.num_machines == -(-machines.workers // 2)


def test_tables_on_disk_take_no_memory() -> None:
    told, small = {"item": 10**7, "user": 10**7}, Machines(2, 2, "cpu", 0, 9 * GIB)
    config = _config(tables={"user": {"disk": "/nonexistent"}})  # on the machines that the plan is for it may be
    plan = _plan(config, small, told)
    assert plan.fits
    assert not _plan(_config(), small, told).fits
    tables = {one.spec.name: one for one in plan.tables}
    assert (tables["user"].shards.kernel, tables["item"].shards.kernel) == ("disk", "fused")
    assert tables["user"].shards.rows == (5 * 10**6,) * 2
    assert tables["user"].held_bytes == (tables["user"].buffer_bytes,) * 2
    assert plan.disk_bytes == plan.to_dict()["disk_bytes_per_rank"] == 5 * 10**6 * (512 + 4)
    all_on_disk = _config(tables={name: {"disk": "/nonexistent"} for name in told})
    assert _plan(all_on_disk, small, told).disk_bytes == 10**7 * (512 + 4)
    with pytest.raises(SettingError, match="table user lies on disk"):
        _plan(config, _gpus(2), told)


def test_a_plan_knows_the_keys_of_a_prepared_run_or_of_a_profile(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run",
        write_sessions(tmp_path / "sessions.parquet"),
        data={"user": "user", "query_features": ["user"][:0]},
        model={"kind": "two_tower", "query": ["user", "history"]},
        keys={"min_count": 3, "unknown": "row"},
    )
    figures = profile(config)
    (tmp_path / "profile.json").write_text(json.dumps(figures))
    profiled = keys_of(config, {}, read_profile(str(tmp_path / "profile.json")))
    prepare(config, open_reader(config), is_begun=False)
    prepared = keys_of(config, {}, None)
    assert profiled.num_ids["user"] == prepared.num_ids["user"] == 600
    assert profiled.num_ids["item"] == pytest.approx(prepared.num_ids["item"], abs=3)  # held-out items are not counted
    assert prepared.distributions["item"].source == "prepared run"
    assert profiled.distributions["item"].source == "profile"
    assert profiled.session_items == figures["lengths"]["mean"]
    assert keys_of(config, {"item": 7}, None).num_ids == {"item": 7, "user": 600}
    distinct = [found.distributions["item"].distinct(100) for found in (profiled, prepared)]
    assert distinct[0] == pytest.approx(distinct[1], rel=0.1)


def test_item2vec_draws_negatives() -> None:
    config = config_from_dict({"model": {"dim": 64, "negatives": 10}, "train": {"batch_size": 1000}})
    plan = _plan(config, Machines(2, 2, "cpu", 0, 64 * GIB), {"item": 10**6})
    rows = {one.spec.name: one.rows_per_step for one in plan.tables}
    assert rows["input"] < 1000 < rows["output"] < 6_001
    assert all(sum(one.optimizer_bytes) == 0 for one in plan.tables)
    keys = [keys_of(config, {"item": 2**22 // 3 * times}, None) for times in (1, 2)]
    one, two = (process_bytes(config, one, plan.machines) for one in keys)
    assert (two - one) / (2**22 // 3) == pytest.approx(16 + 8 * 1.5, rel=0.01)  # of the key map alone


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--users N: how many keys user has is not known"):
        keys_of(_config(), {"item": 5}, None)
    with pytest.raises(SettingError, match="this model has no such keys; it has: item, user"):
        keys_of(_config(), {"color": 5}, None)
    with_city = _config(data={"user": "user", "query_features": ["city", "age"]})
    lengths = {"mean": 5.0}
    profiled = {"columns": {}, "numbers": ["query_age"], "lengths": lengths}
    with pytest.raises(
        SettingError, match=r"--keys query_city=N: .* \(the profile has no such column\): say so, N = 0"
    ):
        keys_of(with_city, TOLD, profiled)
    assert keys_of(with_city, {**TOLD, "query_city": 9}, profiled).num_ids == {**TOLD, "query_city": 9}
    featured = _config(data={"user": "user", "query_features": ["city"], "item_features": "side.parquet"})
    with pytest.raises(SettingError, match="item_COLUMN=N"):
        keys_of(featured, {**TOLD, "query_city": 5}, None)
    assert keys_of(featured, {**TOLD, "query_city": 0, "item_tag": 9}, None).num_ids == {**TOLD, "item_tag": 9}
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="is not a profile"):
        read_profile(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="there is no such profile"):
        read_profile(str(tmp_path / "y.json"))


def test_the_command_prints_the_plan_and_answers_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "big.toml"
    path.write_text(
        'run = "nowhere"\n[data]\nuser = "user"\n[model]\nkind = "two_tower"\nquery = ["user"]\ndim = 128\n'
    )
    options = ["plan", str(path), "--items", "100_000_000", "--users", "1000000000", "--hbm", "80GiB"]
    options += ["--host-memory", "1TiB"]
    assert cli.main([*options, "--workers", "8"]) == 0
    shown = capsys.readouterr().out
    assert "476.8 GiB" in shown
    assert "0 to 7" in shown
    assert shown.splitlines()[-1] == "it fits"
    assert cli.main([*options, "--workers", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["offers"][0]["workers"] == 8
    settings = [f"--set={setting}" for setting in found["offers"][2]["settings"]]
    assert cli.main([*options, "--workers", "2", *settings]) == 0
    shown = capsys.readouterr().out
    assert "expected collisions" in shown
    assert "warning" not in shown  # users share rows first
    sharing = ["--set", "tables.item.map=head_tail", "--set", "tables.item.compression=2"]
    assert cli.main([*options, "--workers", "8", *sharing]) == 0
    shown = capsys.readouterr().out
    assert "warning: the candidates of table item share rows" in shown
    assert "kept 93 %" in shown
    assert cli.main([*options, "--workers", "2"]) == 1
    assert "it does not fit: a rank lacks" in capsys.readouterr().out
    assert cli.main(["plan", str(path), "--items", "100", "--users", "9", "--set", "tables.user.disk=/mnt"]) == 0
    assert "row_wise, disk (mapped into memory)" in capsys.readouterr().out
    assert cli.main([*options, "--keys", "item=1__0"]) == 2
    assert "--keys: is written NAME=N" in capsys.readouterr().err
    assert cli.main(["plan", str(path), "--device", "cpu", "--hbm", "1GiB"]) == 2
    assert "--hbm: is of GPUs" in capsys.readouterr().err
