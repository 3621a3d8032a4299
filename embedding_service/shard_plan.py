"""Where the rows of tables would lie on machines that need not be there: TorchRec's planner on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import SettingError
from embedding_service.sharding import (
    OPTIMIZERS,
    Collections,
    check_fits_ranks,
    check_kernels,
    quiet_import,
    torchrec_name,
)
from embedding_service.tables import Optimizer, TableSpec

with quiet_import():
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

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
    with UVM caching those of the cache. uvm_bytes: what then lies in the machine's memory. A table on local disk has
    kernel `disk`, and 0 for both.
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

    Tables with a `folder` lie on disk, and count nothing. rows_per_step: table -> distinct rows that a worker asks for
    in a step. Nothing of a table's size is allocated.
    Raises SettingError where workers are so many that some would hold no row.
    """
    on_disk = {spec.name: _disk_shards(spec, machines) for spec in specs if spec.folder}
    specs = [spec for spec in specs if not spec.folder]
    if not specs:
        return on_disk
    check_fits_ranks(specs, machines.workers)
    check_kernels(specs, machines.device)
    limit = _UNLIMITED if budget_bytes is None else max(1, budget_bytes)
    with quiet_import():
        collection = Collections(specs)
        apply_optimizer_in_backward(OPTIMIZERS[optimizer][0], collection.parameters(), {"lr": 1.0})
        planner = EmbeddingShardingPlanner(
            topology=Topology(
                world_size=machines.workers,
                local_world_size=machines.workers_here if machines.workers % machines.workers_here == 0 else 1,
                compute_device=machines.device,
                hbm_cap=limit if machines.device == "cuda" else 0,
                ddr_cap=limit if machines.device == "cpu" else _UNLIMITED,
            ),
            constraints={
                torchrec_name(spec.name): ParameterConstraints(
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
    name_of = {torchrec_name(spec.name): spec.name for spec in specs}
    return on_disk | {
        name_of[option.name]: TableShards(
            tuple(int(shard.size[0]) for shard in option.shards),
            option.sharding_type,
            option.compute_kernel,
            tuple(shard.storage.hbm if machines.device == "cuda" else shard.storage.ddr for shard in option.shards),
            tuple(shard.storage.ddr if machines.device == "cuda" else 0 for shard in option.shards),
        )
        for option in planner._best_plan
    }


def _disk_shards(spec: TableSpec, machines: Machines) -> TableShards:
    """As `DiskTable` cuts its rows. Raises SettingError for GPUs, which cannot use such a table."""
    if machines.device != "cpu":
        raise SettingError("cluster.device", f"is not cpu, and table {spec.name} lies on disk: leave it in memory")
    per_rank = -(-spec.rows // machines.workers)
    starts = [min(spec.rows, per_rank * rank) for rank in range(machines.workers + 1)]
    rows = tuple(stop - start for start, stop in itertools.pairwise(starts))
    none = (0,) * machines.workers
    return TableShards(rows, "row_wise", "disk", none, none)
