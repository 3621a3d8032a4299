"""Lists of keys pooled from shared tables: values and gradients of `nn.EmbeddingBag`, in one deduplicated lookup."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cluster.rank import process_group
from embedding_service.mapped_tables import MappedTables
from embedding_service.ragged import Ragged
from embedding_service.tables import Precision, TableSpec
from embedding_service.towers import TowerInput, TowerSpec, input_rows, weighted
from trainers.lookups import plan_lookups

ROWS = {"tags": (50, 8), "words": (30, 12)}
# name -> (table, encoder): several features share a table, tables differ in dimension
INPUTS = {
    "mean": ("tags", "mean"),
    "sum": ("tags", "sum"),
    "key": ("tags", "pool"),
    "other sum": ("words", "sum"),
    "weighted sum": ("words", "weighted_sum"),
    "weighted mean": ("words", "weighted_mean"),
}
NUM = 40
RATE = 0.3


def lists(rows: int, seed: int) -> tuple[Ragged, np.ndarray]:
    """Lists of 0 to 5 rows with repeats, some of them empty, and a weight of either sign for each."""
    random = np.random.default_rng(seed)
    values = Ragged.from_lists([random.integers(0, rows, n).tolist() for n in random.integers(0, 6, NUM)])
    assert (values.lengths == 0).any()
    return values, random.normal(size=len(values.values)).astype(np.float32)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_pooled_lists_are_embedding_bags(precision: Precision, tolerance: float) -> None:
    blocks, single = [], {}
    for seed, (name, (table, encoder)) in enumerate(INPUTS.items()):
        blocks.append(TowerInput(name, name, name, ROWS[table][1], encoder=encoder))  # type: ignore[arg-type]
        values, weights = lists(ROWS[table][0], seed)
        single[name] = values
        if encoder.startswith("weighted"):
            single[name] = values.with_values(weighted(values.values, weights))
        if encoder == "pool":
            single[name] = np.random.default_rng(seed).integers(-1, ROWS[table][0], NUM)  # -1: unknown
    specs = [TableSpec(name, rows, dim, 0.5, precision) for name, (rows, dim) in ROWS.items()]
    with process_group("cpu"):
        tables = MappedTables(specs, optimizer="sgd", learning_rate=RATE, seed=1)
        bags = {name: tables.local_shards(name)[0][1].float().clone().requires_grad_() for name in ROWS}
        inputs = input_rows(TowerSpec(tuple(blocks), 8, (4,)), history=None, single=single)
        lookups = plan_lookups(inputs, {name: table for name, (table, _) in INPUTS.items()})
        found = lookups.blocks(tables.lookup(lookups.ids))
        loss, expected = torch.zeros(()), torch.zeros(())
        for name, (table, encoder) in INPUTS.items():
            pooled, bag = found[name], bagged(bags[table], encoder, single[name])
            assert isinstance(pooled, torch.Tensor)
            torch.testing.assert_close(pooled, bag, rtol=tolerance, atol=tolerance)
            goal = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(len(name)))
            loss, expected = loss + (pooled * goal).sum(), expected + (bag * goal).sum()
        loss.backward()
        expected.backward()
        for name, weights in bags.items():
            assert weights.grad is not None
            after = tables.local_shards(name)[0][1].float()
            torch.testing.assert_close(after, (weights - RATE * weights.grad).detach(), rtol=tolerance, atol=tolerance)
            assert (after - weights.detach()).abs().max() > 0.5


def bagged(weights: torch.Tensor, encoder: str, values: np.ndarray | Ragged) -> torch.Tensor:
    """The same by `nn.EmbeddingBag`, one bag for every list."""
    if isinstance(values, np.ndarray):
        known = values >= 0
        values = Ragged(values[known], np.append(0, np.cumsum(known)))
    bag = nn.EmbeddingBag.from_pretrained(weights, freeze=False, mode="mean" if encoder == "mean" else "sum")
    del bag.weight
    bag.weight = weights  # type: ignore[assignment]  # the tensor itself, to have its gradient
    if not encoder.startswith("weighted"):
        pooled: torch.Tensor = bag(torch.from_numpy(values.values), torch.from_numpy(values.offsets[:-1].copy()))
        return pooled
    factors = values.values["weight"].copy()
    if encoder == "weighted_mean":
        for start, stop in zip(values.offsets[:-1], values.offsets[1:], strict=True):
            factors[start:stop] /= max(np.abs(factors[start:stop]).sum(), 1e-30)
    pooled = bag(
        torch.from_numpy(values.values["row"].copy()),
        torch.from_numpy(values.offsets[:-1].copy()),
        torch.from_numpy(factors),
    )
    return pooled


def test_weights_that_add_up_to_nothing_and_empty_lists_give_zeros() -> None:
    values = Ragged(weighted(np.array([1, 2, 3]), np.float32([0, 0, -2])), np.array([0, 2, 2, 3]))
    spec = TowerSpec((TowerInput("x", "x", "x", 4, encoder="weighted_mean"),), 4)
    found = input_rows(spec, history=None, single={"x": values})["x"]
    assert not isinstance(found, np.ndarray)
    assert found.weights is not None
    assert (found.rows.tolist(), found.weights.tolist()) == ([1, 2, 3], [0.0, 0.0, -1.0])
    with process_group("cpu"):
        tables = MappedTables([TableSpec("x", 5, 4, 0.5)], optimizer="sgd", learning_rate=1.0, seed=0)
        lookups = plan_lookups({"x": found}, {"x": "x"})
        pooled = lookups.blocks(tables.lookup(lookups.ids))["x"]
        assert isinstance(pooled, torch.Tensor)
        assert pooled[:2].tolist() == [[0.0] * 4] * 2
        torch.testing.assert_close(pooled[2], -tables.local_shards("x")[0][1][3])
