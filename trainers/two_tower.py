"""Two-tower retrieval: a query tower and an item tower, trained by a contrastive loss (Yi et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding_service.mapped_tables import MappedAsked, MappedTables
from embedding_service.ragged import Ragged, take_values
from embedding_service.row_maps import RowMap
from embedding_service.sharding import MakeTables, ShardedTables
from embedding_service.tables import Optimizer, TableSpec
from embedding_service.towers import (
    Encoder,
    Given,
    InputRows,
    Tower,
    TowerInput,
    TowerSpec,
    input_rows,
    row_values,
    says,
)
from trainers.contrast import Contrast, ContrastSpec, Pool
from trainers.examples import PairBatch, PairPlan
from trainers.features import Feature
from trainers.lookups import Lookups, plan_lookups, read_blocks
from trainers.mining import HardNegatives
from trainers.prepare import Sessions
from trainers.row_runs import RowRuns

HistoryEncoder = Literal["recency", "mean", "last", "attention", "gru"]


@dataclass(frozen=True)
class _Step:
    """A batch, ready: its candidates, and what to look up. Without candidates: the queries alone, to mine for."""

    batch: PairBatch
    pool: Pool | None
    lookups: Lookups
    asked: Mapping[str, Tensor] | MappedAsked

    @property
    def num_examples(self) -> int:
        return len(self.batch)


class TwoTower:
    """Towers over sharded tables: `item`, and as asked for `history` (unless shared), `user` and one per feature."""

    def __init__(
        self,
        counts: np.ndarray | RowRuns,
        *,
        tables: Sequence[TableSpec],
        maps: Mapping[str, RowMap],
        item_features: Mapping[str, Feature],
        item_values: Mapping[str, Given],
        query: Sequence[str],
        query_features: Mapping[str, Feature],
        list_pooling: Literal["mean", "sum"],
        share_items: bool,
        id_dropout: float,
        history_encoder: HistoryEncoder,
        hidden: tuple[int, ...],
        dim: int,
        examples: Literal["every_item", "next_item", "last_item"],
        mask: Literal["item", "session"],
        history_decay: float,
        history_length: int,
        training_history_length: int,
        contrast: ContrastSpec,
        normalize: bool,
        batch_size: int,
        chunk_size: int,
        optimizer: Optimizer,
        learning_rate: float,
        dense_learning_rate: float,
        seed: int,
        device: torch.device,
        unknown_row: int = -1,
        make_tables: MakeTables = ShardedTables,
    ) -> None:
        """counts: int64 [items], how often each occurs; tables, maps: see `model_tables`; item_values: item feature ->
        its values of all items; unknown_row: the item row of unknown keys, -1 for none. What the settings mean:
        `lexshard config`.
        """
        self.num_items, self.counts, self._unknown_row = len(counts), RowRuns.of(counts), unknown_row
        self._item_values = dict(item_values)
        known = [says(values) for values in item_values.values()]
        self._described = np.logical_or.reduce(known) if known else None  # items of which a feature is known
        dims = {spec.name: spec.dim for spec in tables}
        self._table_of = {"candidate": "item", "history": "item" if share_items else "history"}
        self._table_of |= {name: name for name in dims if name not in ("item", "history")}
        item_dim = dims["item"]
        history_dim = dims.get(self._table_of["history"], item_dim)
        inputs = [
            history_input(history_encoder, history_dim, history_decay, history_length)
            if source == "history"
            else TowerInput("user", "user", "user", dims["user"])
            if source == "user"
            else TowerInput(source, source, "history", history_dim)
            for source in query
        ]
        candidate = [TowerInput("candidate", "item", "candidate", item_dim)]
        for side, block, features in (("query", inputs, query_features), ("item", candidate, item_features)):
            block += [
                feature_input(side, name, one, dims.get(f"{side}_{name}", dim), list_pooling)
                for name, one in features.items()
            ]
        self.tables = MappedTables(
            tables,
            maps,
            optimizer=optimizer,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            make_tables=make_tables,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query_tower = Tower(TowerSpec(tuple(inputs), dim, hidden, normalize)).to(device)
            self.item_tower = Tower(TowerSpec(tuple(candidate), dim, hidden, normalize)).to(device)
            self.contrast = Contrast(self.counts, contrast, dim=dim, device=device)
        self.dense = nn.ModuleDict(
            {"query_tower": self.query_tower, "item_tower": self.item_tower, "contrast": self.contrast}
        )
        self._towers = {"query": self.query_tower, "item": self.item_tower}
        weights = list(self.dense.parameters())
        self.dense_optimizer: torch.optim.Optimizer | None = None
        if weights:
            self.dense_optimizer = torch.optim.Adam(weights, lr=dense_learning_rate)
        sees_history = [block.source in ("history", "last_item") for block in inputs]
        self._with_history, self._only_history = any(sees_history), all(sees_history)
        self._id_dropout = id_dropout
        self._examples, self._mask, self._history_length = examples, mask, training_history_length
        self._batch_size, self._chunk_size = batch_size, chunk_size
        self._learning_rate, self._dense_learning_rate = learning_rate, dense_learning_rate

    def plan(self, sessions: Sessions, numbers: tuple[int, ...]) -> PairPlan:
        """The examples of a window; numbers: (seed, epoch, window). Dynamic tables learn who is in them."""
        plan = PairPlan(
            sessions,
            batch_size=self._batch_size,
            kind=self._examples,
            with_history=self._with_history,
            only_history=self._only_history,
            history_length=self._history_length,
            mask=self._mask,
            id_dropout=self._id_dropout,
            numbers=numbers,
            gather=self.contrast.spec.gather,
            sampler=self.contrast.sampler,
            num_sampled=self.contrast.spec.sampled_negatives,
        )
        if self.tables.dynamic:
            seen = np.flatnonzero(plan.has_example)
            single = sessions.features if sessions.user is None else sessions.features | {"user": sessions.user}
            ids = {
                block.vectors: row_values(take_values(single[block.source], seen))
                for block in self.query_tower.spec.inputs
                if block.vectors in self.tables.dynamic
            }
            _, epoch, window = numbers
            self.tables.learn(ids, (epoch, window))
        return plan

    def prepare(self, batch: PairBatch, seed: int) -> _Step:
        """Find the batch's candidates and distinct rows, and tell the workers that hold them. A collective call, which
        one thread may make ahead. `seed` is not used: what is drawn is the same on all workers, and was drawn with the
        batch.
        """
        if self.contrast.miner is not None:
            lookups = plan_lookups(self._query_inputs(batch), self._table_of)
            return _Step(batch, None, lookups, self.tables.route(lookups.ids))
        step = self._ready(batch, self.contrast.pool(batch))
        return dataclasses.replace(step, asked=self.tables.route(step.lookups.ids))

    def _ready(self, batch: PairBatch, pool: Pool) -> _Step:
        inputs = self._query_inputs(batch)
        items = np.concatenate([batch.item, pool.extra])
        without_id = np.append(batch.without_id, np.zeros(len(pool.extra), bool))
        for part, chunk in self._chunks(len(items)):
            found = self._item_inputs(items[chunk], without_id[chunk])
            inputs |= {f"item{part}/{name}": rows for name, rows in found.items()}
        lookups = plan_lookups(inputs, self._table_of)
        return _Step(batch, pool, lookups, lookups.ids)

    def _query_inputs(self, batch: PairBatch) -> dict[str, InputRows | np.ndarray]:
        single = batch.features if batch.user is None else batch.features | {"user": batch.user}
        inputs: dict[str, InputRows | np.ndarray] = {}
        for part, chunk in self._chunks(len(batch)):
            examples = np.arange(chunk.start, chunk.stop)
            found = input_rows(
                self.query_tower.spec,
                history=batch.history.slice(chunk.start, chunk.stop),
                single={name: take_values(values, examples) for name, values in single.items()},
            )
            inputs |= {f"query{part}/{name}": rows for name, rows in found.items()}
        return inputs

    def _chunks(self, num: int) -> list[tuple[int, slice]]:
        """Numbered parts of `num` examples, at least one; see train.chunk_size."""
        size = self._chunk_size or max(1, num)
        return [(i, slice(i * size, min(num, (i + 1) * size))) for i in range(max(1, -(-num // size)))]

    def step(self, step: _Step, rate: float) -> tuple[float, int]:
        """One update on the summed loss of the examples of all workers, so that the learning rate is one per example.

        rate: factor on the peak learning rates. Returns (this worker's summed loss, its number of examples).
        """
        self.tables.set_learning_rate(self._learning_rate * rate)
        if self.contrast.miner is not None:
            step = self._mine(step, self.contrast.miner)
        assert step.pool is not None
        rows = self.tables.lookup(step.asked)
        loss = self._backward_in_chunks(step, rows) if self._chunk_size else self._backward(step, rows)
        if self.dense_optimizer is not None:
            self._update_dense(self.dense_optimizer, rate)
        return loss, len(step.batch)

    def _mine(self, step: _Step, miner: HardNegatives) -> _Step:
        """The step with hard negatives for its queries, which are encoded once more for that."""
        miner.begin_step(self.encode_items)
        with torch.no_grad():
            query = self._encode("query", step.lookups, self.tables.lookup(step.asked), len(step.batch))
        return self._ready(step.batch, self.contrast.pool(step.batch, miner.mine(query, step.batch)))

    def _backward(self, step: _Step, rows: Mapping[str, Tensor]) -> float:
        assert step.pool is not None
        num = len(step.batch)
        query = self._encode("query", step.lookups, rows, num)
        item = self._encode("item", step.lookups, rows, num + len(step.pool.extra))
        extra = item[num:]
        return self.contrast.backward(query, item[:num] if len(extra) else item, extra, step.pool, chunk=0)

    def _backward_in_chunks(self, step: _Step, rows: Mapping[str, Tensor]) -> float:
        """`_backward` with the memory of towers and loss bounded by a chunk (gradient caching, Gao et al. 2021).

        Vectors are encoded without a graph, the loss gives their gradients, and chunk by chunk they are encoded again
        to take these further. The looked-up rows collect what the chunks send them and pass it on once, since the
        tables' optimiser runs inside `backward`.
        """
        assert step.pool is not None
        num = len(step.batch)
        leaves = {name: found.detach().requires_grad_() for name, found in rows.items()}
        with torch.no_grad():
            query = self._encode("query", step.lookups, leaves, num)
            item = self._encode("item", step.lookups, leaves, num + len(step.pool.extra))
        query.requires_grad_()
        item.requires_grad_()
        loss = self.contrast.backward(query, item[:num], item[num:], step.pool, chunk=self._chunk_size)
        for side, vectors in (("query", query), ("item", item)):
            assert vectors.grad is not None
            for part, chunk in self._chunks(len(vectors)):
                self._towers[side](step.lookups.blocks(leaves, f"{side}{part}/")).backward(vectors.grad[chunk])
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
        torch.autograd.backward(list(rows.values()), gradients)
        return loss

    def _encode(self, side: str, lookups: Lookups, rows: Mapping[str, Tensor], num: int) -> Tensor:
        """Vectors of the `num` queries or items of a step: float32 [num, dim]."""
        parts = [self._towers[side](lookups.blocks(rows, f"{side}{part}/")) for part, _ in self._chunks(num)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _update_dense(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        for weight in self.dense.parameters():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)
        for group in optimizer.param_groups:
            group["lr"] = self._dense_learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        self.contrast.clamp()

    def _item_inputs(
        self, items: np.ndarray, without_id: np.ndarray | None = None
    ) -> dict[str, InputRows | np.ndarray]:
        """without_id: bool [n], which of the `items` [n] are encoded by their features alone, if they have any; items
        that training never sees always are.
        """
        has_id = self.counts[items] > 0
        if without_id is not None and self._described is not None:
            has_id &= ~(without_id & self._described[items])
        single: dict[str, Given] = {"item": np.where(has_id, items, -1)}
        single |= {name: take_values(values, items) for name, values in self._item_values.items()}
        return input_rows(self.item_tower.spec, history=None, single=single)

    def encode_queries(self, history: Ragged, single: Mapping[str, Given]) -> Tensor:
        """Query vectors of n cases: float32 [n, dim]; items that training never sees are unknown. A collective call."""
        known = self.counts[np.maximum(history.values, 0)] > 0
        rows = np.where(known, history.values, self._unknown_row)
        history = history.with_values(rows).keep(rows >= 0)
        inputs = input_rows(self.query_tower.spec, history=history, single=single)
        with torch.no_grad():
            return self.query_tower(read_blocks(self.tables, inputs, self._table_of))  # type: ignore[no-any-return]

    def encode_items(self, start: int, stop: int) -> Tensor:
        """Candidate vectors of items start..stop - 1: float32 [stop - start, dim]. A collective call."""
        inputs = self._item_inputs(np.arange(start, stop))
        with torch.no_grad():
            return self.item_tower(read_blocks(self.tables, inputs, self._table_of))  # type: ignore[no-any-return]

    def vectors(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a vector set of the artifact: float32 [stop - start, dim]. A collective call."""
        if name == "item":
            return self.encode_items(start, stop)
        table = self._table_of[name]
        with torch.no_grad():
            return self.tables.lookup({table: torch.arange(start, stop)})[table]

    def vector_sets(self) -> dict[str, str]:
        """Vector set of the artifact -> key map of its rows: the item tower's output, and the query tower's inputs."""
        read = {block.vectors for block in self.query_tower.spec.inputs if block.vectors}
        return {"item": "item"} | {name: "item" if name == "history" else name for name in sorted(read)}

    def table_rows(self, name: str) -> int:
        """Ids of the table behind a vector set."""
        return self.num_items if name == "item" else self.tables.ids[self._table_of[name]]

    def table_of(self, name: str) -> str | None:
        """The table that holds a vector set as it is; None for what the item tower makes."""
        return None if name == "item" else self._table_of[name]

    similar_set = "item"


def history_input(encoder: HistoryEncoder, dim: int, decay: float, length: int) -> TowerInput:
    """The query tower's input that is the history."""
    if encoder == "last":
        return TowerInput("history", "last_item", "history", dim)
    if encoder == "mean":
        return TowerInput("history", "history", "history", dim, 1.0, length)
    how = "pool" if encoder == "recency" else encoder
    return TowerInput("history", "history", "history", dim, decay, length, how)


def feature_input(side: str, name: str, feature: Feature, dim: int, list_pooling: Literal["mean", "sum"]) -> TowerInput:
    """The input of a feature column, of the `query` tower or the `item` tower."""
    full = f"{side}_{name}"
    if not feature.has_keys:
        numbers = {"width": feature.width, "center": feature.center, "scale": feature.scale}
        return TowerInput(full, name, "", dim, encoder="project", **numbers)  # type: ignore[arg-type]
    encoders: dict[str, Encoder] = {"list": list_pooling, "weighted": f"weighted_{list_pooling}"}  # type: ignore[dict-item]
    return TowerInput(full, name, full, dim, encoder=encoders.get(feature.kind, "pool"))
