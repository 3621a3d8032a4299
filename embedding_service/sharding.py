"""Tables whose rows are spread over all ranks: the file that speaks to TorchRec's tables and FBGEMM.

A model is written against `ShardedTables.lookup`, which on one rank is a plain gather and on many an exchange; which of
the two, and by whose means, is decided here alone. TorchRec plans and lays out the shards everywhere. On GPU its
exchange and FBGEMM's kernels look rows up and update them; on CPU `row_exchange.py` does, at a fraction of their cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import SettingError
from embedding_service.disk_tables import DiskTable
from embedding_service.huge_pages import zero_in_huge_pages
from embedding_service.row_exchange import Route, RowExchange, Shard
from embedding_service.tables import Optimizer, TableSpec, check_names, initial_rows

_INIT_CHUNK_BYTES = 64 * 2**20

Asked = (
    Mapping[str, Tensor] | Route
)  # the rows that a lookup asks for, as they are or as `ShardedTables.route` returns them


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """TorchRec and FBGEMM announce optional parts they did not find; that is not the user's business."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# TorchRec calls what torch has renamed or replaced since; its users can do nothing about either.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)

with quiet_import():
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed import comm_ops
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
    from torchrec.modules.embedding_configs import DataType
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
}


def check_fits_ranks(specs: Sequence[TableSpec], world_size: int) -> None:
    """FBGEMM cannot make a rank's tables of no rows at all. Raises SettingError."""
    for dim in {spec.dim for spec in specs}:
        rows = max(spec.rows for spec in specs if spec.dim == dim)
        per_rank = -(-rows // world_size)
        if per_rank * (world_size - 1) >= rows:
            raise SettingError(
                "cluster.workers", f"{world_size} workers are too many for tables of {rows} rows: some would hold none"
            )


def check_kernels(specs: Iterable[TableSpec], device: str) -> None:
    """Raises SettingError for tables that such a device cannot hold so."""
    if device == "cpu" and any(spec.kernel != "fused" for spec in specs):
        raise SettingError("cluster.uvm_caching", "is for cuda; on CPU tables lie in the machine's memory anyway")


def _nothing(weights: Tensor) -> None:
    """TorchRec's init_fn: rows are initialised in place, in chunks, after sharding."""


def torchrec_name(name: str) -> str:
    """TorchRec keeps tables in an nn.ModuleDict, so a table may not be called `items` or `keys`: all get a prefix."""
    return f"t_{name}"


class Collections(nn.Module):
    """One EmbeddingCollection per dimension: TorchRec wants a collection's tables to have one dimension."""

    def __init__(self, specs: Sequence[TableSpec]) -> None:
        super().__init__()
        self.by_dim = nn.ModuleDict()
        for dim in sorted({spec.dim for spec in specs}):
            self.by_dim[str(dim)] = EmbeddingCollection(
                device=torch.device("meta"),
                tables=[
                    EmbeddingConfig(
                        name=torchrec_name(spec.name),
                        embedding_dim=dim,
                        num_embeddings=spec.rows,
                        feature_names=[torchrec_name(spec.name)],
                        data_type=DataType.FP16 if spec.precision == "fp16" else DataType.FP32,
                        init_fn=_nothing,
                    )
                    for spec in specs
                    if spec.dim == dim
                ],
            )

    def forward(self, features: Mapping[str, KeyedJaggedTensor]) -> dict[str, Tensor]:
        awaited = [
            self.by_dim[dim](features[dim]) for dim in features
        ]  # all exchanges start before the first is awaited
        return {name: rows.values() for found in awaited for name, rows in found.items()}


class ShardedTables:
    """Embedding tables, row-wise sharded over the ranks of the default process group, with a fused optimiser.

    The optimiser runs inside `backward`. Gradients of one row from several ranks are added, so a loss that is divided
    by the examples of all ranks gives the same update for any number of ranks.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        optimizer: Optimizer,
        learning_rate: float,
        seed: int,
        device: torch.device | None = None,
        initialize: bool = True,
    ) -> None:
        """Raises SettingError for tables that cannot be held so, OSError where a disk has no room for one."""
        check_names(specs)
        self.specs = {spec.name: spec for spec in specs}
        in_memory = [spec for spec in specs if not spec.folder]
        check_fits_ranks(in_memory, dist.get_world_size())
        self._seed = seed
        self.optimizer: Optimizer = optimizer
        self.device = device or torch.device("cpu")
        if self.device.type != "cpu" and len(in_memory) < len(specs):
            raise SettingError(
                "cluster.device", "is not cpu, and tables on disk are for CPU: leave the table in memory"
            )
        comm_ops.set_gradient_division(False)  # add the ranks' gradients; TorchRec's default is their mean
        self._on_disk = {spec.name: DiskTable(spec, optimizer=optimizer) for spec in specs if spec.folder}
        self._module: DistributedModelParallel | None = None
        if in_memory:
            with quiet_import():
                self._module = self._shard(in_memory, learning_rate)
            for spec in in_memory:
                own = self._own_shard(spec.name)
                zero_in_huge_pages(own.weights)
                zero_in_huge_pages(own.state)
        if initialize:
            self._initialize()
        self._exchange: RowExchange | None = None
        self._states: RowExchange | None = None
        if self.device.type == "cpu":
            shards = {name: self._own_shard(name) for name in self.specs}
            self._exchange = RowExchange(shards, learning_rate=learning_rate)

    def _shard(self, specs: Sequence[TableSpec], learning_rate: float) -> DistributedModelParallel:
        """The one place where tables become distributed."""
        check_kernels(specs, self.device.type)
        collection = Collections(specs)
        kind, options = OPTIMIZERS[self.optimizer]
        apply_optimizer_in_backward(kind, collection.parameters(), {"lr": learning_rate, **options})
        constraints = {
            torchrec_name(spec.name): ParameterConstraints(sharding_types=["row_wise"], compute_kernels=[spec.kernel])
            for spec in specs
        }
        world = dist.get_world_size()
        # TorchRec's own idea of a device's memory would refuse what fits: 32 GiB of a GPU, 128 GiB of a machine.
        is_gpu = self.device.type == "cuda"
        hbm = torch.cuda.get_device_properties(self.device).total_memory if is_gpu else 0
        topology = Topology(
            world_size=world, compute_device=self.device.type, local_world_size=world, hbm_cap=hbm, ddr_cap=2**60
        )
        sharders: list[Any] = [EmbeddingCollectionSharder()]
        planner = EmbeddingShardingPlanner(
            topology=topology, constraints=constraints, storage_reservation=FixedPercentageStorageReservation(0.0)
        )
        try:
            plan = planner.collective_plan(collection, sharders, dist.group.WORLD)
        except PlannerError as error:
            if error.error_type != PlannerErrorType.INSUFFICIENT_STORAGE:
                raise
            raise SettingError(
                "cluster.workers",
                f"the GPUs of {world} workers cannot hold the tables; `lexshard plan` says what makes them fit",
            ) from None
        return DistributedModelParallel(
            collection, device=self.device, plan=plan, sharders=sharders, init_data_parallel=False
        )

    def _initialize(self) -> None:
        for name, spec in self.specs.items():
            for first, weights in self.local_shards(name):
                step = max(1, _INIT_CHUNK_BYTES // (4 * spec.dim))
                for start in range(0, len(weights), step):
                    part = weights[start : start + step]
                    new = initial_rows(spec, self._seed, first + start, first + start + len(part))
                    part.copy_(torch.from_numpy(new))

    def reset(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        """Make rows of table `name` what they were before any training, and forget their optimiser's state.

        rows: int64 [n], those of other ranks among them, which see to them.
        """
        shard, spec = self._own_shard(name), self.specs[name]
        first = dist.get_rank() * shard.rows_per_rank
        mine = rows[(rows >= first) & (rows < first + len(shard.weights))]
        if not len(mine):
            return
        places = torch.from_numpy(mine - first).to(self.device)
        new = np.concatenate([initial_rows(spec, self._seed, row, row + 1) for row in mine.tolist()])
        shard.weights[places] = torch.from_numpy(new).to(self.device, shard.weights.dtype)
        shard.state[places] = 0.0

    def route(self, ids: Mapping[str, Tensor]) -> Asked:
        """What `lookup` makes of these ids before it reads a row, done ahead of it; a collective call.

        Other than `lookup` it may run in a background thread (one, in which all ranks make the same calls): the ranks
        tell each other what they will ask for while they still work on the last step.
        """
        return ids if self._exchange is None else self._exchange.route(ids, ahead=True)

    def lookup(self, asked: Asked) -> dict[str, Tensor]:
        """Rows of each table; a collective call, in which every rank may ask for different rows (or none).

        asked: table -> int64 [n], distinct within a rank and best ascending (see `deduplicate`), or what `route` made
        of it; tables left out are asked for nothing. Returns table -> float32 [n, dim]; `backward` through it, also a
        collective call, updates the rows.
        """
        for table in self._on_disk.values():
            table.expect(scan=False)
        if self._exchange is not None:
            route = asked if isinstance(asked, Route) else self._exchange.route(asked, ahead=False)
            return self._exchange.lookup(route)
        assert not isinstance(asked, Route)
        return self._lookup_by_torchrec(asked)

    def _lookup_by_torchrec(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        empty = torch.empty(0, dtype=torch.int64)
        features: dict[str, KeyedJaggedTensor] = {}
        for dim in sorted({spec.dim for spec in self.specs.values()}):
            names = [name for name, spec in self.specs.items() if spec.dim == dim]
            asked = [ids.get(name, empty) for name in names]
            features[str(dim)] = KeyedJaggedTensor(
                keys=[torchrec_name(name) for name in names],
                values=torch.cat(asked).to(self.device),
                lengths=torch.tensor([len(rows) for rows in asked], dtype=torch.int32, device=self.device),
            )
        assert self._module is not None
        found = self._module(features)
        for name, spec in self.specs.items():
            if spec.frozen and found[torchrec_name(name)].requires_grad:
                found[torchrec_name(name)].register_hook(
                    torch.zeros_like
                )  # no optimiser here moves a row by a gradient of zero
        return {name: found[torchrec_name(name)] for name in self.specs}

    def lookup_state(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimiser's state of rows, as `lookup` gives their weights: table -> float32 [n, width of the state].

        On CPU only; a collective call.
        """
        assert self.device.type == "cpu"
        if self._states is None:
            own = {name: self._own_shard(name) for name in self.specs}
            shards = {name: dataclasses.replace(shard, weights=shard.state) for name, shard in own.items()}
            self._states = RowExchange(shards, learning_rate=0.0)
        with torch.no_grad():
            return self._states.lookup(self._states.route(ids, ahead=False))

    def set_learning_rate(self, learning_rate: float) -> None:
        """Takes effect in the next `backward`."""
        if self._exchange is not None:
            self._exchange.learning_rate = learning_rate
            return
        assert self._module is not None
        for group in self._module.fused_optimizer.param_groups:
            group["lr"] = learning_rate
        self._module.fused_optimizer.step()  # FBGEMM's kernel reads the rate only when this hands it over

    def local_shards(self, name: str) -> list[tuple[int, Tensor]]:
        """This rank's part of table `name`: (first row, weights [n, dim] in the table's precision, not a copy)."""
        if name in self._on_disk:
            table = self._on_disk[name]
            table.expect(scan=True)
            return [(table.first_row, table.shard.weights)] if len(table.shard.weights) else []
        assert self._module is not None
        sharded = self._module.state_dict()[self._path(name)]
        return [(shard.metadata.shard_offsets[0], shard.tensor.detach()) for shard in sharded.local_shards()]

    def _own_shard(self, name: str) -> Shard:
        """This rank's part of table `name` and of its optimiser's state, not copies."""
        if name in self._on_disk:
            return self._on_disk[name].shard
        spec = self.specs[name]
        state = self.state_dict()
        found = {
            key: shard.tensor.detach()
            for key in (f"weight.{name}", f"optimizer.{name}.momentum1")
            for shard in (state[key].local_shards() if key in state else ())
        }
        dtype = torch.float16 if spec.precision == "fp16" else torch.float32
        weights = found.get(f"weight.{name}", torch.empty(0, spec.dim, dtype=dtype))
        moment = found.get(f"optimizer.{name}.momentum1", torch.empty(len(weights), 0))
        moment = moment[:, None] if moment.dim() == 1 else moment
        return Shard(spec.rows, -(-spec.rows // dist.get_world_size()), weights, moment, spec.frozen)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser state as sharded tensors, for the distributed checkpoint; no copies."""
        in_memory = [name for name in self.specs if name not in self._on_disk]
        state: dict[str, Any] = {}
        if self._module is not None:
            weights = self._module.state_dict()
            optimizer = self._module.fused_optimizer.state_dict()["state"]
            state = {f"weight.{name}": weights[self._path(name)] for name in in_memory}
            for name in in_memory:
                for slot, value in optimizer[self._path(name)].items():
                    if not isinstance(value, (int, float)):
                        state[f"optimizer.{name}.{slot.rpartition('.')[2]}"] = value
        for table in self._on_disk.values():
            table.expect(scan=True)
            state |= table.state_dict()
        return state

    def _path(self, name: str) -> str:
        return f"by_dim.{self.specs[name].dim}.embeddings.{torchrec_name(name)}.weight"


MakeTables = Callable[
    ..., ShardedTables
]  # or what is like it: of `ShardedTables`' arguments: tables with its `specs`, `route` and `lookup`
