"""Where the rows of tables would lie on machines that need not be there: TorchRec's planner on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from embedding_service.sharding import _check_fits_ranks, _Collections, _t, check_kernels, quiet_import
from embedding_service.tables import Optimizer, TableSpec

with quiet_import():
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

_UNLIMITED = 2**60  # bytes


@dataclass(frozen=True)
class Machines:
    """`workers` on machines of `workers_per_machine` each; bytes are of a GPU (0 on CPU) and of a machine's memory."""

    workers: int
    workers_per_machine: int
    device: Literal["cpu", "cuda"]
    hbm_bytes: int
    host_bytes: int

    @property
    def workers_here(self) -> int:
        """Workers that share a machine."""
        return min(self.workers, self.workers_per_machine)

    @property
    def num_machines(self) -> int:
        return -(-self.workers // self.workers_per_machine)


@dataclass(frozen=True)
class TableShards:
    """A table's rows on every rank, and how they are held.

    bytes_by_planner: what TorchRec reckons with per rank: weights, optimiser state and what a step sends and receives;
    with UVM caching those of the cache. uvm_bytes: what then lies in the machine's memory.
    """

    rows: tuple[int, ...]
    sharding: str
    kernel: str
    bytes_by_planner: tuple[int, ...]
    uvm_bytes: tuple[int, ...]


def plan_shards(
    specs: Sequence[TableSpec],
    *,
    optimizer: Optimizer,
    machines: Machines,
    budget_bytes: int | None,
    rows_per_step: Mapping[str, int],
) -> dict[str, TableShards] | None:
    """Table -> its shards, as `ShardedTables` would lay them out; None if a worker would need more than `budget_bytes`
    (None: there is no limit) of GPU memory, or on CPU of memory.

    rows_per_step: table -> distinct rows that a worker asks for in a step. Nothing of a table's size is allocated.
    Raises SettingError where workers are so many that some would hold no row.
    """
    _check_fits_ranks(specs, machines.workers)
    check_kernels(specs, machines.device)
    limit = _UNLIMITED if budget_bytes is None else max(1, budget_bytes)
    with quiet_import():
        collection = _Collections(specs)
        kinds: dict[str, type[torch.optim.Optimizer]] = {
            "rowwise_adagrad": RowWiseAdagrad,
            "adagrad": torch.optim.Adagrad,
            "sgd": torch.optim.SGD,
        }
        apply_optimizer_in_backward(kinds[optimizer], collection.parameters(), {"lr": 1.0})
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=machines.workers,
                local_world_size=machines.workers_here if machines.workers % machines.workers_here == 0 else 1,
                compute_device=machines.device,
                hbm_cap=limit if machines.device == "cuda" else 0,
                ddr_cap=limit if machines.device == "cpu" else _UNLIMITED,
            ),
            constraints={
                _t(spec.name): ParameterConstraints(
                    sharding_types=["row_wise"],
                    compute_kernels=[spec.kernel],
                    batch_sizes=[max(1, rows_per_step[spec.name])],
                )
                for spec in specs
            },
            storage_reservation=FixedPercentageStorageReservation(0.0),  # `budget_bytes` is what is left to tables
            debug=False,
        )
        sharders: list[Any] = [EmbeddingCollectionSharder()]
        try:
            planner.plan(collection, sharders)
        except PlannerError as error:
            if error.error_type != PlannerErrorType.INSUFFICIENT_STORAGE:
                raise
            return None
    name_of = {_t(spec.name): spec.name for spec in specs}
    return {
        name_of[option.name]: TableShards(
            tuple(int(shard.size[0]) for shard in option.shards),
            option.sharding_type,
            option.compute_kernel,
            tuple(shard.storage.hbm if machines.device == "cuda" else shard.storage.ddr for shard in option.shards),
            tuple(shard.storage.ddr if machines.device == "cuda" else 0 for shard in option.shards),
        )
        for option in planner._best_plan
    }
