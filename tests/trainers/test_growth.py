"""A run that begins with another one's tables: every key's vector is where it should be, on one rank and on three."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from cluster.config import Config, config_from_dict, config_to_dict, load_config, to_toml
from cluster.errors import CheckpointError, SettingError
from cluster.rank import current_rank, process_group
from embedding_service.row_maps import RowMap
from embedding_service.sharding import ShardedTables
from embedding_service.tables import TableSpec
from tests.ranks import run_on_ranks
from tests.trainers.runs import small_config, write_sessions
from trainers.evaluate import load_trained
from trainers.growth import grow
from trainers.loop import train
from trainers.model_tables import model_tables
from trainers.models import build_model
from trainers.prepare import load_prepared, open_reader, prepare
from trainers.start import Rows, Start

TWO_TOWER: dict[str, Any] = {"kind": "two_tower", "hidden": [8], "query": ["history", "user"]}
HEAD_TAIL = {"item": {"map": "head_tail", "rows": 60, "head": 0.5}}


def silent(event: dict[str, Any]) -> None:
    """A listener that lets every event pass."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sessions of 12 groups of items as `all`, and as `some` those of the first 8, without half of the users."""
    folder = tmp_path_factory.mktemp("sessions")
    path = write_sessions(folder / "all.parquet")
    table = pq.read_table(path)
    groups = np.array([(items[0] - 1000) // 10 for items in table["items"].to_pylist()])
    pq.write_table(table.filter(pa.array((groups < 8) & (np.arange(len(groups)) % 2 == 0))), folder / "some.parquet")
    return {"all": path, "some": folder / "some.parquet"}


def run_config(
    run: Path, source: Path, model: dict[str, Any], tables: dict[str, Any], *, budget: str = "", **train: Any
) -> Config:
    data = {"user": "user", "holdout": "none"} if model.get("kind") == "two_tower" else {"holdout": "none"}
    keys = {"keys": {"budget": budget}} if budget else {}
    return small_config(run, source, data=data, model=model, tables=tables, train={"epochs": 2, **train}, **keys)


def by_key(config: Config, model: Any) -> dict[str, dict[Any, list[float]]]:
    """Table -> key -> its vector, and then its row's optimiser state where it has a row of its own."""
    prepared = load_prepared(config.run)
    found = {}
    for name in model.tables.ids:
        keys = prepared.keys["user" if name == "user" else "item"]
        ids = torch.arange(len(keys.keys))
        with torch.no_grad():
            rows = model.tables.lookup({name: ids})[name]
        if name not in model.tables.maps:
            rows = torch.cat([rows, model.tables.physical.lookup_state({name: ids})[name]], 1)
        found[name] = dict(zip(keys.keys.to_pylist(), rows.tolist(), strict=True))
    return found


def old_vectors(config: Config) -> dict[str, dict[Any, list[float]]]:
    with process_group("cpu"):
        prepared = load_prepared(config.run)
        return by_key(config, load_trained(config, prepared, current_rank("cpu"), which="last")[0])


def grown(settings: dict[str, Any]) -> dict[str, Any]:
    """The new run's tables before and after growing, on any rank."""
    config = config_from_dict(settings)
    place = current_rank("cpu")
    if place.is_first:
        Path(config.run).mkdir(exist_ok=True)
        prepare(config, open_reader(config), is_begun=False)
    dist.barrier()
    prepared = load_prepared(config.run)
    model = build_model(config, prepared, device=place.device, threads=1)
    before = by_key(config, model)
    starts = grow(config, prepared, model, place)
    towers = {name: weight.detach().flatten().tolist() for name, weight in model.dense.named_parameters()}
    return {
        "before": before,
        "after": by_key(config, model),
        "starts": [vars(one) for one in starts],
        "towers": towers,
        "put": put_rows(),
    }


def put_rows() -> list[Any]:
    """What every rank finds, and counts, of rows that all ranks were given in two chunks; see `trainers.start`."""
    tables = ShardedTables([TableSpec("items", 10, 4, 0.5)], optimizer="sgd", learning_rate=1.0, seed=0)
    rows = Rows(tables, "items")
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    rows.put(np.array([9, 0, 3, 3]), values[[9, 0, 3, 4]])
    rows.put(np.array([0, 5]), values[[1, 5]])  # what came first stays
    with torch.no_grad():
        return [rows.num_put(), tables.lookup({"items": torch.tensor([0, 3, 5, 9])})["items"]]


def model_map(config: Config) -> RowMap:
    num_ids = {name: keys.num_rows for name, keys in load_prepared(config.run).keys.items()}
    return model_tables(config, num_ids).maps["item"]


def grown_on(world_size: int, config: Config) -> list[dict[str, Any]]:
    if world_size == 1:
        with process_group("cpu"):
            return [grown(config_to_dict(config))]
    return run_on_ranks(world_size, grown, config_to_dict(config))


@pytest.fixture(scope="module")
def old(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Trained runs on the smaller data."""
    folder = tmp_path_factory.mktemp("old")
    configs = {
        "two_tower": run_config(folder / "two_tower", data["some"], TWO_TOWER, {}),
        "item2vec": run_config(folder / "item2vec", data["some"], {}, {}),
        "shared": run_config(folder / "shared", data["some"], TWO_TOWER, HEAD_TAIL),
        "budget": run_config(folder / "budget", data["some"], TWO_TOWER, {}, budget="8KB"),
    }
    for config in configs.values():
        train(config, on_event=silent)
    return configs


@pytest.mark.parametrize(("kind", "world_size"), [("two_tower", 1), ("two_tower", 3), ("item2vec", 1)])
def test_known_keys_keep_their_vectors_and_new_ones_are_new(
    data: dict[str, Path], old: dict[str, Config], tmp_path: Path, kind: str, world_size: int
) -> None:
    model = TWO_TOWER if kind == "two_tower" else {}
    config = run_config(tmp_path / "new", data["all"], model, {}, grow=old[kind].run)
    wanted = old_vectors(old[kind])
    for found in grown_on(world_size, config):
        num, rows = found["put"]
        assert num == 4
        assert torch.equal(rows, torch.arange(40.0).reshape(10, 4)[[0, 3, 5, 9]])
        assert len(found["starts"]) == 2
        for start in found["starts"]:
            name = start["table"]
            after, known = found["after"][name], wanted[name].keys() & found["after"][name].keys()
            assert (start["known"], start["new"]) == (len(known), len(after) - len(known))
            assert start["unused"] == 0
            assert known
            assert after.keys() - known, "the new data has keys of its own"
            assert all(after[key] == wanted[name][key] for key in known)
            assert all(after[key] == found["before"][name][key] for key in after.keys() - known)
            assert any(wanted[name][key][-1] > 0.0 for key in known), "what is taken over was trained"


def test_what_shared_rows_gets_its_own_with_its_shared_vector(
    data: dict[str, Path], old: dict[str, Config], tmp_path: Path
) -> None:
    """And the rows of a head stay bit-equal."""
    config = run_config(tmp_path / "new", data["all"], TWO_TOWER, {}, grow=old["shared"].run)
    wanted = old_vectors(old["shared"])
    (found,) = grown_on(1, config)
    for key, vector in wanted["item"].items():
        assert found["after"]["item"][key][:8] == vector


def test_a_run_within_a_budget_is_grown_with_the_maps_that_it_was_trained_with(
    data: dict[str, Path], old: dict[str, Config], tmp_path: Path
) -> None:
    run = tmp_path / "of-a-gpu"  # whose config and checkpoint say so: it is grown on CPU all the same
    shutil.copytree(old["budget"].run, run)
    before = load_config(run / "config.toml")
    on_gpu = replace(before, cluster=replace(before.cluster, device="cuda", uvm_caching=True))
    (run / "config.toml").write_text(to_toml(on_gpu))
    wanted = old_vectors(old["budget"])
    assert {len(vector) for vector in wanted["user"].values()} == {8}, "the users share rows"
    (found,) = grown_on(1, run_config(tmp_path / "new", data["all"], TWO_TOWER, {}, grow=str(run)))
    assert all(found["after"]["user"][key][:8] == vector for key, vector in wanted["user"].items())


def test_rows_shared_anew_begin_close_to_what_their_keys_were(
    data: dict[str, Path], old: dict[str, Config], tmp_path: Path
) -> None:
    roomy = {"item": {"map": "head_tail", "rows": 110, "head": 0.5}}  # of 120 keys, so that few of the tail collide
    config = run_config(tmp_path / "new", data["all"], TWO_TOWER, roomy, grow=old["two_tower"].run)
    wanted, (found,) = old_vectors(old["two_tower"])["item"], grown_on(1, config)
    keys = load_prepared(config.run).keys["item"].keys.to_pylist()
    chosen = model_map(config)
    lists = [chosen.lists(np.array([i])).values.tolist() for i in range(len(keys))]
    sharing = Counter(row for i, rows in enumerate(lists) if keys[i] in wanted for row in set(rows))
    alone = [i for i, rows in enumerate(lists) if keys[i] in wanted and all(sharing[row] == 1 for row in rows)]
    assert {i < chosen.head for i in alone} == {True, False}
    for i in alone:  # nobody else's vector is in their rows
        if len(set(lists[i])) == len(lists[i]):
            assert found["after"]["item"][keys[i]] == pytest.approx(wanted[keys[i]][:8], abs=1e-6)
    tail = [keys[i] for i in range(chosen.head, len(keys)) if keys[i] in wanted]
    cosines = {"before": 0.0, "after": 0.0}
    for when in cosines:
        for key in tail:
            one, other = np.array(found[when]["item"][key]), np.array(wanted[key][:8])
            cosines[when] += one @ other / np.linalg.norm(one) / np.linalg.norm(other) / len(tail)
    assert abs(cosines["before"]) < 0.3
    assert cosines["after"] > 0.6


def test_nothing_changes_where_nothing_is_new(data: dict[str, Path], old: dict[str, Config], tmp_path: Path) -> None:
    config = run_config(tmp_path / "new", data["some"], TWO_TOWER, HEAD_TAIL, grow=old["shared"].run)
    (found,) = grown_on(1, config)
    assert found["after"] == old_vectors(old["shared"])


def test_a_grown_run_trains_on_and_tells_where_it_began(
    data: dict[str, Path], old: dict[str, Config], tmp_path: Path
) -> None:
    run = str(tmp_path / "old")
    shutil.copytree(old["two_tower"].run, run)
    config = run_config(tmp_path / "new", data["all"], TWO_TOWER, {"item": {"frozen": True}}, grow=run)
    notes: list[str] = []
    train(config, on_event=lambda event: notes.append(event.get("text", "")))
    begun = [Start(**one) for one in json.loads((tmp_path / "new" / "start.json").read_text())]
    assert [one.table for one in begun] == ["item", "user"]
    assert all(one.text() in notes for one in begun)
    assert "80 of 120 keys begin with their vectors" in begun[0].text()
    assert "warning: table item is frozen, and 40 of its keys stay as random as they begin" in notes
    before = (tmp_path / "new" / "start.json").stat().st_mtime_ns
    Path(run).rename(tmp_path / "gone")
    train(
        run_config(tmp_path / "new", data["all"], TWO_TOWER, {"item": {"frozen": True}}, grow=run, epochs=3),
        on_event=silent,
    )
    assert (tmp_path / "new" / "start.json").stat().st_mtime_ns == before  # it goes on from its own checkpoint


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": {**TWO_TOWER, "dim": 12}}, "has 8 dimensions in table item, this run 12"),
        ({"model": {}}, "is a model of kind two_tower, this one is item2vec"),
        ({"model": {**TWO_TOWER, "hidden": [12]}}, "towers are others"),
        ({"model": {**TWO_TOWER, "hidden": []}}, "towers are others: this model has no"),
        ({"grow": "nowhere"}, "nowhere is not a run"),
        ({"tables": {"item": {"map": "quotient_remainder", "compression": 2.0}}}, "quotient_remainder cannot"),
    ],
)
def test_what_does_not_fit_is_refused(
    data: dict[str, Path], old: dict[str, Config], tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    chosen = {"model": TWO_TOWER, "tables": {}, "grow": old["two_tower"].run} | change
    with pytest.raises(SettingError, match=problem):
        grown_on(1, run_config(tmp_path / "new", data["all"], **chosen))


def test_a_run_without_checkpoints_is_refused(data: dict[str, Path], old: dict[str, Config], tmp_path: Path) -> None:
    shutil.copytree(old["item2vec"].run, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        grown_on(1, run_config(tmp_path / "new", data["all"], {}, {}, grow=str(tmp_path / "bare")))
