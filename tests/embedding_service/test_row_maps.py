"""Row maps: rows never change; vectors of training, serving and the slow formulas agree, and so do gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.rank import process_group
from embedding_service.hashing import stable_hash
from embedding_service.mapped_tables import MappedTables
from embedding_service.mapped_vectors import MappedVectors
from embedding_service.row_maps import Composition, RowMap, physical_tables
from embedding_service.tables import Optimizer, Precision, TableSpec
from embedding_service.vectors import VectorSet
from tests.ranks import run_on_ranks

IDS = 1000
MAPS = {
    "one hash": RowMap("hashed", IDS, 100),
    "three hashes": RowMap("hashed", IDS, 100, hashes=3),
    "head and tail": RowMap("head_tail", IDS, 100, head=40, hashes=2),
    "quotient and remainder": RowMap.quotient_remainder(IDS, 100),
    "their product": RowMap.quotient_remainder(IDS, 100, product=True),
    "weights": RowMap("hashed", IDS, 100, hashes=5, weight_rows=IDS),
    "weights of the tail": RowMap("head_tail", IDS, 100, head=40, hashes=2, weight_rows=IDS - 40),
    "shared weights": RowMap("head_tail", IDS, 100, head=40, hashes=2, weight_rows=77),
    "more than can be counted": RowMap("hashed", 2**62, 100, hashes=2),
}
DIM = 8


def asked(rank: int) -> np.ndarray:
    """Different ids on every rank, some of them the same."""
    return np.unique(np.random.default_rng(rank).integers(0, IDS, 60 + 20 * rank))


def slow_vector(map: RowMap, i: int, rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The formulas of `row_maps`, one id at a time."""
    if map.kind == "quotient_remainder":
        remainder, quotient = rows[i % map.remainders], rows[map.remainders + i // map.remainders]
        return remainder * (1 + quotient) if map.product else (remainder + quotient) / 2**0.5
    if i < map.head:
        return rows[i]
    one = np.array([i])
    shared = map.rows - map.head
    places = [map.head + int(stable_hash(one, seed=j + 1)[0] % shared) for j in range(map.hashes)]
    factors = torch.ones(map.hashes)
    if weights is not None:
        place = i - map.head
        if map.ids - map.head > map.weight_rows:
            place = int(stable_hash(one, seed=2**32)[0] % map.weight_rows)
        factors = 1 + weights[place, : map.hashes]
    return sum(factor * rows[place] for factor, place in zip(factors, places, strict=True)) / map.hashes**0.5  # type: ignore[return-value]


def whole(tables: MappedTables) -> dict[str, torch.Tensor]:
    """Every table in memory, of a process group of one rank."""
    return {name: tables.local_shards(name)[0][1].float().clone() for name in tables.specs}


def trained(maps: dict[str, RowMap], optimizer: Optimizer, precision: Precision, steps: int) -> dict[str, torch.Tensor]:
    """Vectors of all maps after some steps on the ids of this rank, whose loss is that of all ranks together."""
    specs = [TableSpec(f"t{i}", map.ids, DIM, 0.5, precision) for i, map in enumerate(maps.values())]
    specs.append(TableSpec("exact", IDS, DIM, 0.5, precision))
    by_table = {f"t{i}": map for i, map in enumerate(maps.values())}
    tables = MappedTables(specs, by_table, optimizer=optimizer, learning_rate=0.02, seed=3)
    for name in tables.specs:
        if name.startswith("weights_"):
            for first, weights in tables.local_shards(name):
                values = np.arange(first * weights.shape[1], (first + len(weights)) * weights.shape[1])
                weights.copy_(torch.from_numpy(np.sin(values)).reshape(weights.shape))
    for _ in range(steps):
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mine = np.concatenate([np.empty(0, np.int64), *(asked(one) for one in range(rank, 3, world))])
        ids, counts = np.unique(mine, return_counts=True)
        found = tables.lookup(tables.route({spec.name: torch.from_numpy(ids) for spec in specs}))
        times = torch.from_numpy(counts)[:, None]
        sum((times * (rows - 1.0).square()).sum() for rows in found.values()).backward()  # type: ignore[union-attr]
    every = torch.from_numpy(np.unique(np.concatenate([asked(rank) for rank in range(3)])))
    with torch.no_grad():
        return tables.lookup({spec.name: every for spec in specs})


def test_rows_never_change() -> None:
    ids = np.array([0, 39, 40, 41, 999])
    assert MAPS["head and tail"].lists(ids).to_lists() == [[0], [39], [82, 91], [47, 41], [74, 79]]
    large = RowMap("hashed", 2**62, 10**9, hashes=2).lists(np.array([0, 2**61]))
    assert large.to_lists() == [[241227815, 900296834], [857656744, 754301144]]
    assert MAPS["quotient and remainder"].lists(ids).to_lists() == [[0, 88], [39, 88], [40, 88], [41, 88], [31, 99]]
    assert MAPS["shared weights"].weight_ids(ids).tolist() == [-1, -1, 75, 28, 2]


@pytest.mark.parametrize("name", MAPS)
def test_vectors_are_those_of_the_formula_and_of_serving(name: str) -> None:
    map = MAPS[name]
    with process_group("cpu"):
        tables = MappedTables([TableSpec("t", map.ids, DIM, 0.5)], {"t": map}, optimizer="sgd", learning_rate=1, seed=3)
        memory = whole(tables)
        weights = memory.get("weights_t")
        if weights is not None:
            weights.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
            tables.local_shards("weights_t")[0][1].copy_(weights)
        ids = asked(0)
        found = tables.lookup({"t": torch.from_numpy(ids)})["t"].detach()
        assert tables.lookup({})["t"].shape == (0, DIM)
    assert [spec.rows for spec in physical_tables([TableSpec("t", map.ids, DIM, 0.5)], {"t": map})] == [
        len(rows) for rows in memory.values()
    ]
    slow = torch.stack([slow_vector(map, i, memory["t"], weights) for i in ids.tolist()])
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-6)
    stored = [VectorSet(rows.numpy(), None, "fp32") for rows in memory.values()]
    served = MappedVectors(map, *stored).take(ids.reshape(1, -1))
    np.testing.assert_allclose(served[0], slow.numpy(), rtol=1e-5, atol=1e-6)


def test_gradients_are_autograds() -> None:
    """One step of SGD against dense tables in plain torch."""
    ids = asked(1)
    for map in MAPS.values():
        with process_group("cpu"):
            tables = MappedTables(
                [TableSpec("t", map.ids, DIM, 0.5)], {"t": map}, optimizer="sgd", learning_rate=0.1, seed=3
            )
            plain = {name: rows.requires_grad_() for name, rows in whole(tables).items()}
            goal = torch.randn(len(ids), DIM, generator=torch.Generator().manual_seed(1))
            (tables.lookup({"t": torch.from_numpy(ids)})["t"] - goal).square().sum().backward()
            after = whole(tables)
        vectors = [slow_vector(map, i, plain["t"], plain.get("weights_t")) for i in ids.tolist()]
        (torch.stack(vectors) - goal).square().sum().backward()
        for name, rows in plain.items():
            assert rows.grad is not None
            assert rows.grad.abs().max() > 0.1
            torch.testing.assert_close(after[name], (rows - 0.1 * rows.grad).detach(), rtol=1e-4, atol=1e-5)


def test_vectors_begin_with_the_variance_of_an_exact_table_and_move_as_far() -> None:
    """That of every map, before and after a step: sum maps are scaled by 1 / sqrt(k)."""
    ids = torch.tensor([3, 500, 998])
    with process_group("cpu"):
        for map in (RowMap("hashed", IDS, 900, hashes=4), RowMap("head_tail", IDS, 900, head=40, hashes=2)):
            tables = MappedTables([TableSpec("t", IDS, 64, 0.5)], {"t": map}, optimizer="sgd", learning_rate=1, seed=3)
            with torch.no_grad():
                every = tables.lookup({"t": torch.arange(IDS)})["t"]
            assert every.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)
            before = tables.lookup({"t": ids})["t"]
            before.sum().backward()
            torch.testing.assert_close(tables.lookup({"t": ids})["t"], before - 1.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "exact", "ids": 5, "rows": 4},
        {"kind": "hashed", "ids": 5, "rows": 4, "hashes": 9},
        {"kind": "head_tail", "ids": 5, "rows": 4, "head": 4},
        {"kind": "quotient_remainder", "ids": 5, "rows": 4, "remainders": 3},
    ],
)
def test_numbers_that_do_not_fit_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="row"):
        RowMap.from_dict(bad)


@pytest.mark.parametrize(("ids", "rows"), [(1000, 64), (1000, 500), (7, 6), (10**9, 10**6)])
def test_quotients_and_remainders_are_a_pair_of_its_own_for_every_id(ids: int, rows: int) -> None:
    map = RowMap.quotient_remainder(ids, rows)
    assert map.rows <= rows
    some = np.unique(np.linspace(0, ids - 1, 1000).astype(np.int64))
    pairs = map.lists(some).values.reshape(-1, 2)
    assert len(np.unique(pairs, axis=0)) == len(some)
    assert pairs.max() < map.rows
    with pytest.raises(ValueError, match="have no quotients and remainders in 3 rows"):
        RowMap.quotient_remainder(1000, 3)


def trained_all(steps: int) -> dict[str, torch.Tensor]:
    maps = {name: map for name, map in MAPS.items() if map.ids == IDS}
    runs: tuple[tuple[Optimizer, Precision], ...] = (("sgd", "fp32"), ("rowwise_adagrad", "fp16"))
    return {
        f"{name} {precision}": vectors
        for optimizer, precision in runs
        for name, vectors in trained(maps, optimizer, precision, steps).items()
    }


def test_three_ranks_train_the_vectors_of_one() -> None:
    with process_group("cpu"):
        one, untrained = trained_all(2), trained_all(0)
    for name, vectors in one.items():
        assert (vectors - untrained[name]).abs().max() > 0.05, name
    for rank in run_on_ranks(3, trained_all, 2):
        for name, vectors in rank.items():
            tolerance = 5e-3 if name.endswith("fp16") else 1e-5
            torch.testing.assert_close(vectors, one[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "magic"},
        {"weight_rows": -1},
        {"eviction": "never"},
        {"rows": "100"},
        {"rows": 100.0},
        {"product": 1},
        {"kind": "quotient_remainder", "rows": 1000, "remainders": 0, "weight_rows": 5},
    ],
)
def test_what_no_map_was_written_as_is_refused(bad: dict[str, object]) -> None:
    known = MAPS["head and tail"].to_dict()
    assert RowMap.from_dict(known) == MAPS["head and tail"]
    with pytest.raises((TypeError, ValueError), match=r"row map|learned weights"):
        RowMap.from_dict(known | bad)


def test_a_rank_that_asks_for_nothing_has_gradients_of_both_tables() -> None:
    """The other ranks wait for them: without one their exchange would never end."""
    none = torch.zeros(0, dtype=torch.int64)
    rows = torch.zeros(0, DIM, requires_grad=True)
    weights = torch.zeros(0, 4, requires_grad=True)
    composition = Composition(MAPS["weights"], none, torch.zeros(1, dtype=torch.int64), torch.zeros(0), none)
    composition.vectors(rows, weights).sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    assert weights.grad is not None
