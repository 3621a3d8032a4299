from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch.distributed as dist

from cluster.errors import SettingError
from embedding_service.shard_plan import Machines, plan_shards
from embedding_service.sharding import ShardedTables
from embedding_service.tables import TableSpec
from tests.ranks import run_on_ranks

GIB = 2**30
SPECS = [TableSpec("item", 1_001, 8, 0.1), TableSpec("user", 50, 8, 0.1, "fp16"), TableSpec("tag", 17, 4, 0.1)]
CPU = Machines(2, 2, "cpu", 0, 4 * GIB)


def test_training_lays_rows_out_as_planned() -> None:
    asked = dict.fromkeys(_names(), 9)
    plan = plan_shards(SPECS, optimizer="sgd", machines=CPU, budget_bytes=None, rows_per_step=asked)
    assert plan is not None
    found = run_on_ranks(2, _held)
    for name in _names():
        assert list(plan[name].rows) == [rank[name] for rank in found]
        assert (plan[name].sharding, plan[name].kernel) == ("row_wise", "fused")


def _held() -> dict[str, int]:
    tables = ShardedTables(SPECS, optimizer="sgd", learning_rate=0.1, seed=0)
    assert dist.get_world_size() == 2
    return {name: sum(len(rows) for _, rows in tables.local_shards(name)) for name in _names()}


def _names() -> list[str]:
    return [spec.name for spec in SPECS]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_planner_counts_weights_and_optimiser_and_refuses_what_is_too_much(device: Any) -> None:
    specs = [TableSpec("user", 10**9, 128, 0.1)]
    machines = Machines(64, 8, device, 80 * GIB * (device == "cuda"), 1024 * GIB)
    options: dict[str, Any] = {"optimizer": "rowwise_adagrad", "machines": machines, "rows_per_step": {"user": 0}}
    per_rank = 10**9 // 64 * (128 * 4 + 4)
    plan = plan_shards(specs, budget_bytes=per_rank + 2**20, **options)
    assert plan is not None
    assert plan["user"].rows == (10**9 // 64,) * 64
    for planned in plan["user"].bytes_by_planner:
        assert planned == pytest.approx(per_rank, rel=1e-4)
    assert plan_shards(specs, budget_bytes=per_rank - 1, **options) is None


def test_workers_without_a_row_are_refused() -> None:
    with pytest.raises(SettingError, match="20 workers are too many for tables of 17 rows"):
        plan_shards(
            SPECS[2:],
            optimizer="sgd",
            machines=dataclasses.replace(CPU, workers=20),
            budget_bytes=None,
            rows_per_step={"tag": 1},
        )


def test_workers_share_machines() -> None:
    assert (Machines(20, 8, "cuda", 1, 1).num_machines, Machines(20, 8, "cuda", 1, 1).workers_here) == (3, 8)
    assert (Machines(2, 8, "cuda", 1, 1).num_machines, Machines(2, 8, "cuda", 1, 1).workers_here) == (1, 2)
