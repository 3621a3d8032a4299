"""Sharded tables against plain torch, on 1, 2 and 3 ranks."""

from __future__ import annotations

import functools
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.rank import process_group
from embedding_service.sharding import ShardedTables
from embedding_service.tables import Optimizer, Precision, TableSpec, initial_rows
from tests.ranks import run_on_ranks

SEED = 3
RATES = (0.1, 0.4, 0.05, 0.0)  # one step each
MEANS = ("row_exchange", "torchrec", "disk")  # of lookups and updates; on GPU it is always the second
KINDS = [
    (means, optimizer, precision)
    for means in MEANS
    for optimizer in get_args(Optimizer)
    for precision in get_args(Precision)
]


def specs(precision: Precision) -> list[TableSpec]:
    """Two dimensions, names that nn.ModuleDict has for itself, and fewer rows than ranks."""
    return [
        TableSpec("items", 23, 8, 0.5, precision),
        TableSpec("keys", 7, 4, 0.5, precision),
        TableSpec("values", 2, 8, 0.5, precision),
    ]


def asked(step: int, rank: int) -> dict[str, Tensor]:
    """The distinct rows that a rank asks for in a step: others on each rank, some on all, and sometimes none."""
    random = np.random.default_rng([step, rank])
    ids = {
        "items": random.permutation(23)[: random.integers(5, 20)],
        "keys": random.permutation(7)[: random.integers(1, 7)],
        "values": random.permutation(2)[: random.integers(0, 3)],
    }
    if step == 1 and rank == 1:
        return {}
    if step == 2:
        del ids["keys"]
    return {name: torch.from_numpy(rows) for name, rows in ids.items()}


def loss_of(found: dict[str, Tensor], ids: dict[str, Tensor]) -> Tensor:
    """Some loss whose gradient differs by row, rank and step."""
    total = torch.zeros(())
    for name, rows in found.items():
        target = torch.sin(torch.arange(rows.numel()).reshape(rows.shape) + 1.0)
        total = total + ((rows - target) ** 2).sum() * (1.0 + 0.1 * len(ids.get(name, ())))
    return total


def train_sharded() -> dict[str, Any]:
    """Runs on every rank: all kinds of tables through all steps."""
    found = {
        f"{means} {optimizer} {precision}": train_kind(means, optimizer, precision)
        for means, optimizer, precision in KINDS
    }
    return found | {f"{means} frozen": train_kind(means, "adagrad", "fp32", frozen="items") for means in MEANS}


def train_kind(means: str, optimizer: Optimizer, precision: Precision, frozen: str = "") -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        chosen = [
            replace(spec, folder=folder if means == "disk" else "", frozen=spec.name == frozen)
            for spec in specs(precision)
        ]
        found = train_tables(means, chosen, optimizer)
        assert not os.listdir(folder)  # what lies there has no name
    return found


def train_tables(means: str, chosen: list[TableSpec], optimizer: Optimizer) -> dict[str, Any]:
    tables = ShardedTables(chosen, optimizer=optimizer, learning_rate=9.0, seed=SEED)
    if means == "torchrec":
        tables._exchange = None
    first = read(tables)
    lookups = []
    steps = [asked(step, dist.get_rank()) for step in range(len(RATES))]
    with ThreadPoolExecutor(1) as ahead:
        routes = ahead.map(tables.route, steps[1::2])  # every other step, while the loop does those before it
        for step, (rate, ids) in enumerate(zip(RATES, steps, strict=True)):
            tables.set_learning_rate(rate)
            found = tables.lookup(next(routes) if step % 2 else ids)
            lookups.append({name: rows.detach().clone() for name, rows in found.items()})
            loss_of(found, ids).backward()  # type: ignore[no-untyped-call]
    shards = {name: [(start, rows.clone()) for start, rows in tables.local_shards(name)] for name in tables.specs}
    return {"first": first, "lookups": lookups, "last": read(tables), "shards": shards}


def read(tables: ShardedTables) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name: tables.lookup({name: torch.arange(spec.rows)})[name].clone() for name, spec in tables.specs.items()
        }


@functools.cache
def results(world_size: int) -> list[dict[str, Any]]:
    """One start of processes for all tests: importing TorchRec takes seconds."""
    if world_size == 1:
        with process_group("cpu"):
            return [train_sharded()]
    return run_on_ranks(world_size, train_sharded)


class Plain:
    """The same tables as nn.Embedding, with the optimisers written out."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.tables: dict[str, nn.Embedding] = {}
        self.state: dict[str, Tensor] = {}
        for spec in specs(precision):
            table = nn.Embedding(spec.rows, spec.dim)
            table.weight.data = self.rounded(torch.from_numpy(initial_rows(spec, SEED, 0, spec.rows)))
            self.tables[spec.name] = table
            self.state[spec.name] = torch.zeros(spec.rows, spec.dim)

    def rounded(self, weights: Tensor) -> Tensor:
        return weights.half().float() if self.precision == "fp16" else weights

    def lookup(self, ids: dict[str, Tensor]) -> dict[str, Tensor]:
        none = torch.empty(0, dtype=torch.int64)
        return {name: table(ids.get(name, none)) for name, table in self.tables.items()}

    def update(self, optimizer: Optimizer, rate: float) -> None:
        for name, table in self.tables.items():
            gradient = table.weight.grad
            assert gradient is not None
            if optimizer == "sgd":
                change = gradient
            else:
                square = gradient**2
                self.state[name] += square.mean(1, keepdim=True) if optimizer == "rowwise_adagrad" else square
                change = gradient / (self.state[name].sqrt() + 1e-8)
            table.weight.data = self.rounded(table.weight.data - rate * change)
            table.weight.grad = None


@functools.cache
def expected(world_size: int, optimizer: Optimizer, precision: Precision) -> dict[str, Any]:
    plain = Plain(precision)
    first = {name: table.weight.detach().clone() for name, table in plain.tables.items()}
    lookups = []
    for step, rate in enumerate(RATES):
        found = [plain.lookup(asked(step, rank)) for rank in range(world_size)]
        lookups.append([{name: rows.detach().clone() for name, rows in one.items()} for one in found])
        total = torch.stack([loss_of(one, asked(step, rank)) for rank, one in enumerate(found)]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        plain.update(optimizer, rate)
    last = {name: table.weight.detach().clone() for name, table in plain.tables.items()}
    return {"first": first, "lookups": lookups, "last": last}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], precision: Precision) -> None:
    assert found.keys() == wanted.keys()
    tolerance = 1e-6 if precision == "fp32" else 2e-3  # half an fp16 step of weights below 4 is 1e-3
    for name, rows in found.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, wanted[name], rtol=tolerance, atol=tolerance)


each_kind = pytest.mark.parametrize(("means", "optimizer", "precision"), KINDS)
each_means = pytest.mark.parametrize("means", MEANS)
each_world = pytest.mark.parametrize("world_size", [1, 2, 3])


@each_world
@each_means
@pytest.mark.parametrize("precision", get_args(Precision))
def test_new_tables_hold_the_initial_rows(world_size: int, means: str, precision: Precision) -> None:
    wanted = expected(world_size, "sgd", precision)["first"]
    for rank in results(world_size):
        assert all(torch.equal(rows, wanted[name]) for name, rows in rank[f"{means} sgd {precision}"]["first"].items())


@each_world
@each_kind
def test_lookups_and_trained_tables_are_those_of_plain_torch(
    world_size: int, means: str, optimizer: Optimizer, precision: Precision
) -> None:
    wanted = expected(world_size, optimizer, precision)
    for rank, found in enumerate(results(world_size)):
        one = found[f"{means} {optimizer} {precision}"]
        assert_close(one["last"], wanted["last"], precision)
        for step in range(len(RATES)):
            assert_close(one["lookups"][step], wanted["lookups"][step][rank], precision)
    for name, rows in wanted["last"].items():
        assert (rows - wanted["first"][name]).abs().max() > 0.05, "the test trains next to nothing"


@each_world
@pytest.mark.parametrize("precision", get_args(Precision))
def test_shards_cover_every_row_once_in_the_tables_precision(world_size: int, precision: Precision) -> None:
    for spec in specs(precision):
        parts = [
            part
            for rank in results(world_size)
            for part in rank[f"row_exchange adagrad {precision}"]["shards"][spec.name]
        ]
        parts = sorted((part for part in parts if len(part[1])), key=lambda part: part[0])
        assert [start for start, _ in parts] == np.cumsum([0] + [len(rows) for _, rows in parts[:-1]]).tolist()
        whole = torch.cat([rows for _, rows in parts])
        assert whole.dtype == (torch.float16 if precision == "fp16" else torch.float32)
        assert torch.equal(
            whole.float(), results(world_size)[0][f"row_exchange adagrad {precision}"]["last"][spec.name]
        )


@each_world
@each_means
def test_a_frozen_table_stays_and_the_others_learn(world_size: int, means: str) -> None:
    wanted = expected(world_size, "adagrad", "fp32")
    for found in results(world_size):
        one = found[f"{means} frozen"]
        assert torch.equal(one["last"]["items"], wanted["first"]["items"])
        assert_close(
            *({name: one[name] for name in ("keys", "values")} for one in (one["last"], wanted["last"])), "fp32"
        )


def test_a_full_disk_is_told_before_training(tmp_path: Path) -> None:
    rows = 2**50  # more than any disk holds
    with process_group("cpu"), pytest.raises(OSError, match=r"table items needs [\d,]+ bytes there") as error:
        ShardedTables(
            [TableSpec("items", rows, 4, 0.5, folder=str(tmp_path))], optimizer="sgd", learning_rate=1.0, seed=0
        )
    assert error.value.filename == str(tmp_path)


def test_a_changed_learning_rate_reaches_the_kernel() -> None:
    spec = TableSpec("items", 3, 4, 0.5)
    with process_group("cpu"):
        tables = ShardedTables([spec], optimizer="sgd", learning_rate=1.0, seed=0)
        weights = torch.from_numpy(initial_rows(spec, 0, 0, 3))
        for rate in (None, 0.25, 0.0, 2.0):
            if rate is not None:
                tables.set_learning_rate(rate)
            tables.lookup({"items": torch.tensor([2, 0])})["items"].sum().backward()  # type: ignore[no-untyped-call]
            weights[[0, 2]] -= 1.0 if rate is None else rate
            torch.testing.assert_close(read(tables)["items"], weights, rtol=0, atol=1e-6)


def test_what_is_no_number_reaches_the_rows_it_belongs_to() -> None:
    """The kernel's arithmetic is free in its order only."""
    with process_group("cpu"):
        for optimizer in get_args(Optimizer):
            tables = ShardedTables([TableSpec("items", 5, 4, 0.5)], optimizer=optimizer, learning_rate=1.0, seed=0)
            found = tables.lookup({"items": torch.tensor([1, 3, 4])})["items"]
            found.backward(torch.tensor([[1.0], [float("nan")], [1.0]]).expand(3, 4))
            assert read(tables)["items"].isfinite().all(1).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("rows", [[0, 3], [-1, 2]])
def test_a_row_that_the_table_does_not_have_is_refused(rows: list[int]) -> None:
    with process_group("cpu"):
        tables = ShardedTables([TableSpec("items", 3, 4, 0.5)], optimizer="sgd", learning_rate=1.0, seed=0)
        with pytest.raises(IndexError, match=r"table items has rows 0\.\.2; got"):
            tables.lookup({"items": torch.tensor(rows)})


def test_state_holds_weights_and_optimizer_of_every_table() -> None:
    with process_group("cpu"):
        for optimizer in get_args(Optimizer):
            state = ShardedTables(specs("fp32"), optimizer=optimizer, learning_rate=1.0, seed=0).state_dict()
            names = {f"weight.{spec.name}" for spec in specs("fp32")}
            assert names <= state.keys()
            assert {name.split(".")[1] for name in state.keys() - names} == (
                set() if optimizer == "sgd" else {"items", "keys", "values"}
            )


def test_two_tables_of_one_name_are_refused() -> None:
    with process_group("cpu"), pytest.raises(ValueError, match="must differ"):
        ShardedTables([TableSpec("a", 1, 4, 0.0)] * 2, optimizer="sgd", learning_rate=1.0, seed=0)
