"""From what towers ask for to embeddings: one deduplicated lookup per table, then pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedding_service.sharding import ShardedTables
from embedding_service.tables import deduplicate
from embedding_service.towers import InputRows, pool


@dataclass(frozen=True)
class _Use:
    table: str
    index: Tensor  # int64 [m] into the table's distinct rows
    offsets: Tensor  # int64 [n + 1]
    weights: Tensor  # float32 [m]
    single: bool  # every list has one row of weight 1


@dataclass(frozen=True)
class Lookups:
    """What one step asks the tables: `ids` table -> int64 [u] distinct rows, and how every input is made of them."""

    ids: dict[str, Tensor]
    uses: dict[str, _Use]

    def blocks(self, rows: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Input name -> float32 [n, dim], from `ShardedTables.lookup(self.ids)`; `prefix`: only of the inputs whose
        names begin with it, which is taken off.
        """
        asked = {name: use for name, use in self.uses.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): self._block(rows[use.table], use) for name, use in asked.items()}

    @staticmethod
    def _block(rows: Tensor, use: _Use) -> Tensor:
        if use.single:
            return rows.index_select(0, use.index.to(rows.device))
        device = rows.device
        return pool(rows, use.index.to(device), use.offsets[:-1].to(device), use.weights.to(device))


def plan_lookups(inputs: Mapping[str, InputRows], table_of: Mapping[str, str]) -> Lookups:
    """inputs: name -> rows of a vector set; table_of: vector set -> the table that holds it in training."""
    by_table: dict[str, dict[str, np.ndarray]] = {}
    for name, found in inputs.items():
        by_table.setdefault(table_of[found.vectors], {})[name] = found.rows
    ids: dict[str, Tensor] = {}
    uses: dict[str, _Use] = {}
    for table, rows in by_table.items():
        distinct, index = deduplicate(rows)
        ids[table] = torch.from_numpy(distinct)
        for name in rows:
            found = inputs[name]
            plain = len(found.rows) == len(found.offsets) - 1
            single = plain and bool((found.weights == 1.0).all()) and bool((np.diff(found.offsets) == 1).all())
            uses[name] = _Use(
                table,
                torch.from_numpy(np.ascontiguousarray(index[name])),
                torch.from_numpy(np.ascontiguousarray(found.offsets)),
                torch.from_numpy(np.require(found.weights, requirements="W")),
                single,
            )
    return Lookups(ids, uses)


@torch.no_grad()
def read_blocks(
    tables: ShardedTables, inputs: Mapping[str, InputRows], table_of: Mapping[str, str]
) -> dict[str, Tensor]:
    """Input name -> float32 [n, dim], without a gradient. A collective call."""
    lookups = plan_lookups(inputs, table_of)
    return lookups.blocks(tables.lookup(lookups.ids))
