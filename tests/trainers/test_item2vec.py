"""What an Item2Vec block asks of the tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.rank import process_group
from embedding_service.ragged import Ragged
from embedding_service.tables import TableSpec
from trainers.examples import TokenBlock
from trainers.item2vec import Item2Vec
from trainers.row_runs import RowRuns

ITEMS = 5000


def new_model(threads: int) -> Item2Vec:
    return Item2Vec(
        RowRuns(np.array([0]), np.array([3]), ITEMS),
        tables=[TableSpec("input", ITEMS, 4, 0.5), TableSpec("output", ITEMS, 4, 0.5)],
        maps={},
        cbow=False,
        window=5,
        ordered=True,
        num_negatives=10,
        negative_exponent=0.5,
        subsample=0.0,
        history_decay=0.8,
        history_length=20,
        block_items=1000,
        learning_rate=0.05,
        seed=0,
        threads=threads,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_a_block_asks_the_input_table_for_the_rows_of_its_tokens_alone(threads: int) -> None:
    random = np.random.default_rng(0)
    items = Ragged(random.integers(0, ITEMS, 300), np.arange(0, 301, 10))
    with process_group("cpu"):
        block = new_model(threads).prepare(TokenBlock(items), 7)
    assert np.array_equal(block.source, np.unique(items.values))
    assert len(block.target) > len(block.source), "the output table is asked for negatives too"
    told = np.concatenate([block.source[part.source][part.tokens] for part in block.parts])
    assert np.array_equal(told, items.values)
    assert np.array_equal(told, np.concatenate([block.target[part.target][part.tokens] for part in block.parts]))
    for part in block.parts:
        assert np.array_equal(block.target[part.target][: len(part.source)], block.source[part.source])
        assert len(np.unique(part.target)) == len(part.target)
