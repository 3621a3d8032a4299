"""The two sides of the comparison with plain PyTorch are the same model, trained alike."""

from __future__ import annotations

import pytest
import torch

from cluster.rank import process_group
from embedding_service.tables import Optimizer
from tests.benchmarks.two_tower_speed import BATCH, BLOCK_STEPS, PlainLoop, new_model, train, zipf_sessions


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
@pytest.mark.parametrize("history", [False, True])
def test_plain_pytorch_learns_the_same(optimizer: Optimizer, history: bool) -> None:
    with process_group("cpu"):
        sessions = zipf_sessions(300, BATCH * BLOCK_STEPS)
        model = new_model(sessions, 300, history, optimizer)
        plan = model.plan(sessions, (0, 0, 0))
        plain = PlainLoop(model, sessions, optimizer)
        before = plain.tables["item"].weight.detach().clone()
        assert train(model, plan, 0) == pytest.approx(plain.train(plan, 0), rel=1e-4)
        for name, table in plain.tables.items():
            ((_, weights),) = model.tables.local_shards(name)
            torch.testing.assert_close(table.weight.detach(), weights, rtol=0, atol=2e-3)
        assert (plain.tables["item"].weight - before).abs().max() > 0.05, "the test trains next to nothing"
