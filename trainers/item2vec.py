"""Item2Vec: skip-gram with negative sampling over sessions (Barkan and Koenigstein 2016; Mikolov et al. 2013).

Two tables are learned and both are kept: 'similar items' compares input vectors, 'recommend' ranks output vectors
against the session's input vectors, which is what the objective trains for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from embedding_service.ragged import Ragged
from embedding_service.sharding import ShardedTables
from embedding_service.tables import Precision, TableSpec, deduplicate
from embedding_service.towers import Given, Tower, TowerInput, TowerSpec, input_rows
from trainers import skipgram
from trainers.examples import TokenBlock, TokenPlan
from trainers.lookups import read_blocks
from trainers.negatives import UnigramSampler, keep_probability
from trainers.prepare import Sessions

_TABLES = {"input": "input", "item": "output"}  # vector set of the artifact -> table


@dataclass(frozen=True)
class _Block:
    """A block of sessions, ready: distinct rows of both tables, and everything else as indices into them."""

    rows: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    negatives: np.ndarray
    seed: int

    @property
    def num_examples(self) -> int:
        return len(self.tokens)


class Item2Vec:
    """Input and output tables under plain SGD, as published."""

    def __init__(
        self,
        counts: np.ndarray,
        *,
        dim: int,
        precision: Precision,
        init_scale: float,
        window: int,
        ordered: bool,
        num_negatives: int,
        negative_exponent: float,
        subsample: float,
        history_decay: float,
        history_length: int,
        block_items: int,
        learning_rate: float,
        seed: int,
        threads: int,
        device: torch.device,
    ) -> None:
        """counts: int64 [rows], how often each item occurs in training."""
        self.num_items, self.counts = len(counts), counts
        self.tables = ShardedTables(
            [
                TableSpec("input", len(counts), dim, init_scale or 0.5 / dim, precision),
                TableSpec("output", len(counts), dim, 0.0, precision),
            ],
            optimizer="sgd",
            learning_rate=1.0,  # the kernel has applied the rate: the table adds the difference as it is
            seed=seed,
            device=device,
        )
        block = TowerInput("history", "history", "input", dim, history_decay, history_length)
        self.query_tower = Tower(TowerSpec((block,), dim))
        self.dense: nn.ModuleDict = nn.ModuleDict()
        self.dense_optimizer: torch.optim.Optimizer | None = None
        self._sampler = UnigramSampler(counts, negative_exponent)
        self._keep = keep_probability(counts, subsample)
        self._window, self._ordered, self._num_negatives = window, ordered, num_negatives
        self._block_items, self._learning_rate, self._threads = block_items, learning_rate, threads

    def plan(self, sessions: Sessions, numbers: tuple[int, ...]) -> TokenPlan:
        """The blocks of a window; numbers: (seed, epoch, window)."""
        return TokenPlan(
            sessions, block_items=self._block_items, ordered=self._ordered, keep=self._keep, numbers=numbers
        )

    def prepare(self, batch: TokenBlock, seed: int) -> _Block:
        """Draw the block's negatives and find its distinct rows; needs no other worker, so it can run ahead."""
        num = max(1, len(batch.items.values) * self._num_negatives // 2) if len(batch.items.values) else 0
        uses = {"tokens": batch.items.values, "negatives": self._sampler.draw(num, seed)}
        rows, index = deduplicate(uses)
        return _Block(rows, index["tokens"], batch.items.offsets, index["negatives"], seed)

    def step(self, block: _Block, rate: float) -> tuple[float, int]:
        """Look the block's rows up, run SGD over its windows, add the difference to the tables.

        rate: factor on the peak learning rate. Returns (summed loss, its number of pairs) of a sample of the targets.
        """
        ids = torch.from_numpy(block.rows)
        found = self.tables.lookup({"input": ids, "output": ids})
        before = [found[name].detach().cpu() for name in ("input", "output")]
        after = [rows.clone() for rows in before]
        loss, pairs = skipgram.run_block(
            after[0].numpy(),
            after[1].numpy(),
            np.ascontiguousarray(block.tokens),
            block.offsets,
            np.ascontiguousarray(block.negatives),
            window=self._window,
            num_negatives=self._num_negatives,
            learning_rate=self._learning_rate * rate,
            seed=block.seed,
            threads=self._threads,
        )
        differences = [(old - new).to(found["input"].device) for old, new in zip(before, after, strict=True)]
        torch.autograd.backward([found["input"], found["output"]], differences)
        if not all(difference.sum().isfinite() for difference in differences):
            loss = float("nan")  # the kernel's sigmoid is clamped, so its own sum would hide it
        return loss, pairs

    def encode_queries(self, history: Ragged, single: Mapping[str, Given]) -> Tensor:
        """Query vectors of n histories: float32 [n, dim]. A collective call."""
        inputs = input_rows(self.query_tower.spec, history=history, single=single)
        with torch.no_grad():
            return self.query_tower(read_blocks(self.tables, inputs, _TABLES))  # type: ignore[no-any-return]

    def encode_items(self, start: int, stop: int) -> Tensor:
        """Candidate vectors of items start..stop - 1: float32 [stop - start, dim]. A collective call."""
        return self.vectors("item", start, stop)

    def vectors(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a vector set of the artifact: float32 [stop - start, dim]. A collective call."""
        with torch.no_grad():
            return self.tables.lookup({_TABLES[name]: torch.arange(start, stop)})[_TABLES[name]]

    def vector_sets(self) -> dict[str, str]:
        """Vector set of the artifact -> key map of its rows."""
        return {"item": "item", "input": "item"}

    def table_rows(self, name: str) -> int:
        """Rows of the table behind a vector set."""
        return self.num_items

    similar_set = "input"
