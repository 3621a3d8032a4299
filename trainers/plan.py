"""`lexshard plan`: what a config's tables take on given machines before anything is allocated, and what makes them fit.

Bytes of weights and optimiser state are exact; those of buffers and of the rest of a process are expected ones, of
which every figure's formula is here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import Config
from cluster.sizes import format_bytes
from embedding_service.collisions import expected_collisions
from embedding_service.hashed_keys import NUM_IDS
from embedding_service.row_maps import RowMap, weight_table
from embedding_service.shard_plan import Machines, TableShards, plan_shards
from embedding_service.tables import TableSpec
from trainers.item2vec import NEGATIVE_REUSE
from trainers.key_distribution import KeyDistribution, rows_of_step
from trainers.model_tables import key_map_of, model_tables, table_warnings
from trainers.models import check_model

GPU_RESERVE = 0.15  # of GPU memory: CUDA's context, towers, activations, fragmentation (TorchRec's own default)
HOST_RESERVE = 0.05  # of a machine's memory, for the operating system
PROCESS_BYTES = 750 * 2**20  # of a worker with its libraries, before it has read anything: see benchmark plan_memory
DYNAMIC_ROW_BYTES = 340  # of ids and counts, copied as training reads ahead, and for sorting them; measured
RAY_BYTES = 100 * 2**20  # more, of a worker that Ray has started
_SESSION_ITEMS = 20.0  # of a session, where no profile says how many


@dataclass(frozen=True)
class Keys:
    """How many ids every key map (item, user, query_<feature>, item_<feature>) has, and how they are asked for."""

    num_ids: dict[str, int]
    distributions: dict[str, KeyDistribution]
    session_items: float = _SESSION_ITEMS
    per_session: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of query features that are lists


@dataclass(frozen=True)
class TablePlan:
    """One table: its shards, and per worker the bytes of its buffers and of what a step exchanges."""

    spec: TableSpec
    map: RowMap | None  # None: exact, or a table of learned weights
    shards: TableShards
    weight_bytes: tuple[int, ...]  # by rank
    optimizer_bytes: tuple[int, ...]
    rows_per_step: int
    buffer_bytes: int
    held_bytes: tuple[
        int, ...
    ]  # by rank, of what the limit is for: all of these, the cache on the GPU, or on disk none
    exchange_bytes: int
    collisions: dict[str, float] | None
    distribution: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "map": None if self.map is None else self.map.to_dict(),
            "rows": self.spec.rows,
            "dim": self.spec.dim,
            "precision": self.spec.precision,
            "sharding": self.shards.sharding,
            "kernel": self.shards.kernel,
            "rows_per_rank": list(self.shards.rows),
            "weight_bytes": sum(self.weight_bytes),
            "optimizer_bytes": sum(self.optimizer_bytes),
            "rows_per_step": self.rows_per_step,
            "buffer_bytes_per_rank": self.buffer_bytes,
            "all_to_all_bytes_per_rank_and_step": self.exchange_bytes,
            "bytes_per_rank_by_torchrec": list(self.shards.bytes_by_planner),
            "collisions": self.collisions,
            "distribution": self.distribution,
        }


@dataclass(frozen=True)
class Plan:
    """What a config's tables take on `machines`."""

    machines: Machines
    tables: tuple[TablePlan, ...]
    process_bytes: int  # of a worker, in its machine's memory, without the tables
    table_limit_bytes: int  # what a worker may give to tables and their buffers
    fits: bool
    warnings: tuple[str, ...]

    def rank_bytes(self, rank: int) -> int:
        """Of a rank's weights, optimiser state and buffers, where the limit is for; of UVM caching the cache."""
        return sum(one.held_bytes[rank] for one in self.tables)

    @property
    def uvm_bytes(self) -> int:
        """Of the fullest rank's tables, in its machine's memory because of UVM caching."""
        return max(sum(one.shards.uvm_bytes[rank] for one in self.tables) for rank in range(self.machines.workers))

    @property
    def disk_bytes(self) -> int:
        """Of the fullest rank's tables, on its machine's disk because of `tables.NAME.disk`."""
        on_disk = [one for one in self.tables if one.shards.kernel == "disk"]
        return max(
            sum(one.weight_bytes[rank] + one.optimizer_bytes[rank] for one in on_disk)
            for rank in range(self.machines.workers)
        )

    @property
    def largest_rank_bytes(self) -> int:
        return max(self.rank_bytes(rank) for rank in range(self.machines.workers))

    @property
    def missing_bytes(self) -> int:
        """What the fullest rank lacks; 0 if it lacks none."""
        return max(0, self.largest_rank_bytes - self.table_limit_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        ranks = [
            {
                "rank": rank,
                "weight_bytes": sum(one.weight_bytes[rank] for one in self.tables),
                "optimizer_bytes": sum(one.optimizer_bytes[rank] for one in self.tables),
                "buffer_bytes": sum(one.buffer_bytes for one in self.tables),
                "table_bytes": self.rank_bytes(rank),
            }
            for rank in range(self.machines.workers)
        ]
        return {
            "fits": self.fits,
            "missing_bytes_per_rank": self.missing_bytes,
            "machines": {**dataclasses.asdict(self.machines), "num_machines": self.machines.num_machines},
            "table_limit_bytes_per_rank": self.table_limit_bytes,
            "process_bytes_per_rank": self.process_bytes,
            "uvm_bytes_per_rank": self.uvm_bytes,
            "disk_bytes_per_rank": self.disk_bytes,
            "resident_bytes_per_rank": self.process_bytes
            + (self.largest_rank_bytes if self.machines.device == "cpu" else 0),
            "weight_bytes": sum(sum(one.weight_bytes) for one in self.tables),
            "optimizer_bytes": sum(sum(one.optimizer_bytes) for one in self.tables),
            "all_to_all_bytes_per_rank_and_step": sum(one.exchange_bytes for one in self.tables),
            "tables": [one.to_dict() for one in self.tables],
            "ranks": ranks,
            "warnings": list(self.warnings),
        }


def make_plan(config: Config, keys: Keys, machines: Machines) -> Plan:
    """The plan of `config` on `machines`.

    Raises SettingError for a config that cannot be trained, or workers so many that some would hold no row.
    """
    check_model(config)
    tables = model_tables(config, keys.num_ids)
    draws = _draws_of_step(config, keys)
    specs = tables.physical
    known = {spec.name: keys.distributions[key_map_of(spec.name)] for spec in tables.specs}
    asked: dict[str, int] = {}
    for spec in tables.specs:
        map = tables.maps[spec.name]
        rows = sum(rows_of_step(map, found, number) for found, number in draws[spec.name])
        asked[spec.name] = min(math.ceil(rows), map.rows)
        if map.weight_rows:
            asked[weight_table(spec.name)] = min(asked[spec.name], map.weight_rows)
    process = process_bytes(config, keys, machines)
    if machines.device == "cuda":
        limit = int(machines.hbm_bytes * (1.0 - GPU_RESERVE))
    else:
        limit = int(machines.host_bytes * (1.0 - HOST_RESERVE)) // machines.workers_here - process
    buffers = {spec.name: _buffer_bytes(spec, asked[spec.name], machines) for spec in specs}
    # On GPU TorchRec exchanges the rows and reckons with its own buffers; on CPU they are those of `row_exchange`.
    budget = limit if machines.device == "cuda" else limit - sum(buffers.values())
    options: dict[str, Any] = {
        "optimizer": tables.optimizer,
        "machines": machines,
        "rows_per_step": asked if machines.device == "cuda" else dict.fromkeys(asked, 0),
    }
    shards = plan_shards(specs, budget_bytes=max(1, budget), **options)
    fits = shards is not None
    found = shards or plan_shards(specs, budget_bytes=None, **options)
    assert found is not None
    plans = []
    for spec in specs:
        one, shared = found[spec.name], tables.maps.get(spec.name)
        weights = tuple(spec.weight_bytes(rows) for rows in one.rows)
        state = tuple(spec.state_bytes(tables.optimizer, rows) for rows in one.rows)
        buffer = buffers[spec.name]
        if one.kernel == "disk":
            held = (buffer,) * machines.workers
        elif spec.kernel != "fused":
            held = one.bytes_by_planner
        elif machines.device == "cuda":
            buffer = max(buffer, *(b - w - o for b, w, o in zip(one.bytes_by_planner, weights, state, strict=True)))
        if one.kernel == "fused":
            held = tuple(w + o + buffer for w, o in zip(weights, state, strict=True))
        plans.append(
            TablePlan(
                spec,
                shared,
                one,
                weights,
                state,
                asked[spec.name],
                buffer,
                held,
                _exchange_bytes(spec, asked[spec.name], machines),
                _collisions(shared, known[spec.name]) if shared is not None else None,
                known[spec.name].source if shared is not None else "",
            )
        )
    plan = Plan(machines, tuple(plans), process, limit, fits, ())
    on_host = machines.workers_here * (process + plan.uvm_bytes)
    host_fits = machines.device == "cpu" or on_host <= machines.host_bytes * (1.0 - HOST_RESERVE)
    warnings = list(table_warnings(tables))
    if not host_fits:
        warnings.append(
            f"key maps, sessions and UVM tables take {format_bytes(on_host)} of a machine's memory, which has "
            f"{format_bytes(machines.host_bytes)}: hash the keys of users and features as they come "
            "(tables.NAME.vocabulary = false), or put fewer workers on a machine"
        )
    return dataclasses.replace(plan, fits=fits and plan.missing_bytes == 0 and host_fits, warnings=tuple(warnings))


def _draws_of_step(config: Config, keys: Keys) -> dict[str, list[tuple[KeyDistribution, float]]]:
    """Table -> from which distributions, and how often, a worker's step draws ids of it."""
    model, batch = config.model, float(config.train.batch_size)
    item = keys.distributions["item"]
    if model.kind == "item2vec":
        negatives = -(-batch * model.negatives // NEGATIVE_REUSE)
        return {"input": [(item, batch)], "output": [(item, batch), (item.power(model.negative_exponent), negatives)]}
    length = min(float(model.history_length or 10**9), keys.session_items)
    history = batch * (length if "history" in model.query else 1.0 if "last_item" in model.query else 0.0)
    found = {"item": [(item, batch)], "history": [(item, history)]}
    if model.share_items:
        found["item"] = [(item, batch + history)]
    if model.sampled_negatives:
        found["item"].append((item.power(model.sampled_exponent), float(model.sampled_negatives)))
    found |= {
        name: [(distribution, batch * keys.per_session.get(name, 1.0))]
        for name, distribution in keys.distributions.items()
        if name != "item"
    }
    return found


def _collisions(map: RowMap, keys: KeyDistribution) -> dict[str, float] | None:
    """Expected figures (see `embedding_service.collisions`); None where keys have rows of their own, or where nobody
    knows how many keys a table without a vocabulary will meet.

    all_shared: keys none of whose rows is theirs alone. same_rows: keys with the rows, and so the vector, of another.
    lookups: share of the lookups that ask for keys that share rows.
    """
    ids = round(float(keys.sizes.sum()))
    if map.is_exact or map.is_dynamic or ids >= NUM_IDS:
        return None
    found = expected_collisions(dataclasses.replace(map, ids=ids) if map.remainders == 0 else map)
    return {
        "all_shared": ids * found.all_shared,
        "same_rows": ids * found.same_rows,
        "lookups": 1.0 - keys.coverage(map.head),
    }


def _buffer_bytes(spec: TableSpec, rows: int, machines: Machines) -> int:
    """Memory of a step's lookups in a table, per worker, one step read ahead: ids, places and routes (six int64 a row),
    rows as they are sent and as they arrive, their gradients likewise (float32).
    """
    sent = 2 if machines.workers > 1 else 1
    return rows * (2 * 6 * 8 + sent * 2 * 4 * spec.dim)


def _exchange_bytes(spec: TableSpec, rows: int, machines: Machines) -> int:
    """What a worker sends in a step, if ids are spread evenly: ids to those that hold them (int64), as many rows back,
    gradients to where they belong (float32). On CPU rows travel in the table's precision, on GPU as float32.
    """
    row = spec.weight_bytes(1) if machines.device == "cpu" else 4 * spec.dim
    return rows * (machines.workers - 1) * (8 + row + 4 * spec.dim) // machines.workers


def process_bytes(config: Config, keys: Keys, machines: Machines) -> int:
    """Memory of a worker besides the tables: the program, key maps, arrays with an entry per item, sessions read ahead.

    A vocabulary has a key and a count of 8 bytes each (of text: 24 and 8), mapped from a file, and a hash table of a
    power of two slots of 8 bytes, at most 2/3 full. Which key has which row of a dynamic table every worker knows.
    """
    maps = 0
    for name, ids in keys.num_ids.items():
        chosen = config.tables.get(name)
        if chosen is None or chosen.lists_keys:
            maps += 16 * ids + 8 * (1 << int(1.5 * ids).bit_length())
        elif chosen.map == "dynamic":
            maps += DYNAMIC_ROW_BYTES * chosen.rows
    items = keys.num_ids["item"]
    # of two_tower: flags; counts and what follows from them are runs, of which even a billion items have few
    arrays = items * (config.model.kind == "two_tower")
    copies = 2 * items * config.model.dim * 4 if config.model.mined_negatives else 0
    sessions = int(3 * config.data.shuffle_sessions * (16 + 8 * keys.session_items))
    on_ray = machines.workers > 1 or config.cluster.engine == "ray"
    return PROCESS_BYTES + RAY_BYTES * on_ray + maps + arrays + copies + sessions
