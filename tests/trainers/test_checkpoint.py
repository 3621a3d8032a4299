"""Checkpoints of tables: written and read in pieces, bit-equal on any number of ranks, in memory and on disk."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.config import Config, config_from_dict, config_to_dict
from cluster.errors import CheckpointError
from cluster.rank import process_group
from embedding_service.sharding import ShardedTables
from embedding_service.tables import TableSpec
from tests.ranks import run_on_ranks
from trainers import checkpoint_tensors
from trainers.checkpoint import CheckpointStore, Progress, check_same_run

SPECS = (("items", 1001, 8, "fp32"), ("users", 517, 4, "fp16"), ("few", 2, 8, "fp32"))


def new_model(*, seed: int, folder: str = "") -> Any:
    """Tables of two dimensions with optimiser state that differs by row, and a tensor that all ranks have."""
    specs = [TableSpec(name, rows, dim, 0.5, precision, folder) for name, rows, dim, precision in SPECS]  # type: ignore[arg-type]
    tables = ShardedTables(specs, optimizer="rowwise_adagrad", learning_rate=0.1, seed=seed)
    for name, rows, _, _ in SPECS:
        mine = torch.arange(dist.get_rank(), rows, dist.get_world_size())
        found = tables.lookup({name: mine})[name]
        (found * (mine[:, None] + seed)).sum().backward()  # type: ignore[no-untyped-call]
    dense = nn.ModuleDict({"snapshot": nn.Linear(6, 500, bias=False)})
    nn.init.constant_(dense["snapshot"].weight, float(seed))
    return SimpleNamespace(tables=tables, dense=dense, dense_optimizer=None)


def whole(model: Any) -> dict[str, Tensor]:
    """Every table and every row's optimiser state, as all ranks together hold them."""
    found = {name: value for name, value in model.dense.state_dict().items()}
    for name, value in model.tables.state_dict().items():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            parts, [(shard.metadata.shard_offsets[0], shard.tensor.numpy()) for shard in value.local_shards()]
        )
        ordered = sorted((one for part in parts for one in part), key=lambda one: one[0])
        found[name] = torch.from_numpy(np.concatenate([rows for _, rows in ordered]))
    return found


def save(run: str, folder: str, piece_bytes: int) -> dict[str, Tensor]:
    checkpoint_tensors._PIECE_BYTES = piece_bytes
    model = new_model(seed=1, folder=folder)
    CheckpointStore(run).save(model, Progress(step=1), Config())
    return whole(model)


def load(run: str, folder: str) -> dict[str, Tensor]:
    model = new_model(seed=2, folder=folder)
    CheckpointStore(run).resume(model, Config())
    return whole(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that two ranks wrote, and what they held."""
    run = tmp_path_factory.mktemp("run")
    (run / "prepared").mkdir()
    with tempfile.TemporaryDirectory() as folder:
        return run, run_on_ranks(2, save, str(run), folder, 1000)[0]


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert torch.equal(found[name], rows), name
        assert rows.dtype == found[name].dtype


def test_two_ranks_on_disk_then_three_in_memory(saved: tuple[Path, dict[str, Tensor]]) -> None:
    for found in run_on_ranks(3, load, str(saved[0]), ""):
        assert_equal(found, saved[1])


def test_two_ranks_on_disk_then_one(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    with process_group("cpu"):
        assert_equal(load(str(saved[0]), ""), saved[1])
        assert_equal(load(str(saved[0]), str(tmp_path)), saved[1])


def test_no_piece_is_larger_than_a_piece(saved: tuple[Path, dict[str, Tensor]]) -> None:
    store = CheckpointStore(saved[0])
    description = json.loads((store.folder / store.names()[0] / "tensors.json").read_text())
    for name, tensor in description["tensors"].items():
        bytes_per_value = torch.empty(0, dtype=getattr(torch, tensor["dtype"])).element_size()
        sizes = [int(np.prod(sizes)) * bytes_per_value for _, sizes in tensor["chunks"]]
        assert max(sizes) <= 1000, name
        assert sum(sizes) == saved[1][name.partition(".")[2]].nbytes
    assert len(description["tensors"]["tables.weight.items"]["chunks"]) > 30


def test_without_pieces_it_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of older versions have one piece for each shard."""
    (tmp_path / "prepared").mkdir()
    monkeypatch.setattr(checkpoint_tensors, "_PIECE_BYTES", 1 << 40)
    with process_group("cpu"):
        wanted = save(str(tmp_path), "", 1 << 40)
        assert_equal(load(str(tmp_path), ""), wanted)


def test_what_does_not_fit_is_told_in_a_line(saved: tuple[Path, dict[str, Tensor]]) -> None:
    with process_group("cpu"):
        model = new_model(seed=2)
        model.dense["snapshot"] = nn.Linear(7, 500, bias=False)
        with pytest.raises(CheckpointError, match=r"does not fit the model: rank 0: Size mismatch") as error:
            CheckpointStore(saved[0]).resume(model, Config())
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_moves_freely_unless_a_budget_counts_memory() -> None:
    def config(disk: str, budget: str) -> Config:
        return config_from_dict({"keys": {"budget": budget}, "tables": {"item": {"disk": disk}}})

    for was, now, budget in (("", "/a", ""), ("/a", "", ""), ("/a", "/b", "1GiB")):
        check_same_run(config_to_dict(config(was, budget)), config(now, budget), Path("run"))
    for was, now in (("", "/a"), ("/a", "")):
        with pytest.raises(CheckpointError, match=rf"tables\.item\.disk was '{was}' and is now '{now}'"):
            check_same_run(config_to_dict(config(was, "1GiB")), config(now, "1GiB"), Path("run"))
