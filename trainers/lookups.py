"""From what towers ask for to embeddings: one deduplicated lookup per table, then pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedding_service.mapped_tables import MappedTables
from embedding_service.tables import deduplicate
from embedding_service.towers import InputRows, Sequences, pool


@dataclass(frozen=True)
class _Use:
    table: str
    index: Tensor  # int64 [m] into the table's distinct ids
    offsets: Tensor  # int64 [n + 1]
    weights: Tensor | None  # float32 [m]; None: a sequence
    single: bool  # every list has one row of weight 1


@dataclass(frozen=True)
class Lookups:
    """What one step asks the tables: `ids` table -> int64 [u] distinct ids, and what every input makes of them.

    `numbers`: name -> float32 [n, width] of the inputs that are given and not looked up.
    """

    ids: dict[str, Tensor]
    uses: dict[str, _Use]
    numbers: dict[str, Tensor]

    def blocks(self, rows: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor | Sequences]:
        """Input name -> what its tower takes, from `MappedTables.lookup(self.ids)`; `prefix`: only of the inputs whose
        names begin with it, which is taken off.
        """
        device = next(iter(rows.values())).device
        found: dict[str, Tensor | Sequences] = {}
        for name in filter(lambda name: name.startswith(prefix), (*self.numbers, *self.uses)):
            use = self.uses.get(name)
            block = self.numbers[name].to(device) if use is None else self._block(rows[use.table], use)
            found[name.removeprefix(prefix)] = block
        return found

    @staticmethod
    def _block(rows: Tensor, use: _Use) -> Tensor | Sequences:
        device = rows.device
        if use.single:
            return rows.index_select(0, use.index.to(device))
        if use.weights is None:
            return Sequences(rows.index_select(0, use.index.to(device)), use.offsets.to(device))
        return pool(rows, use.index.to(device), use.offsets[:-1].to(device), use.weights.to(device))


def plan_lookups(inputs: Mapping[str, InputRows | np.ndarray], table_of: Mapping[str, str]) -> Lookups:
    """inputs: as `input_rows` gives them; table_of: vector set -> the table that holds it in training."""
    looked_up = {name: found for name, found in inputs.items() if isinstance(found, InputRows)}
    by_table: dict[str, dict[str, np.ndarray]] = {}
    for name, found in looked_up.items():
        by_table.setdefault(table_of[found.vectors], {})[name] = found.rows
    ids: dict[str, Tensor] = {}
    uses: dict[str, _Use] = {}
    for table, rows in by_table.items():
        distinct, index = deduplicate(rows)
        ids[table] = torch.from_numpy(distinct)
        for name in rows:
            uses[name] = _use(table, np.ascontiguousarray(index[name]), looked_up[name])
    numbers = {name: torch.from_numpy(found) for name, found in inputs.items() if isinstance(found, np.ndarray)}
    return Lookups(ids, uses, numbers)


def _use(table: str, index: np.ndarray, found: InputRows) -> _Use:
    offsets, weights = torch.from_numpy(np.ascontiguousarray(found.offsets)), found.weights
    if weights is None:
        return _Use(table, torch.from_numpy(index), offsets, None, False)
    plain = len(found.rows) == len(found.offsets) - 1
    single = plain and bool((weights == 1.0).all()) and bool((np.diff(found.offsets) == 1).all())
    return _Use(
        table, torch.from_numpy(index), offsets, torch.from_numpy(np.require(weights, requirements="W")), single
    )


@torch.no_grad()
def read_blocks(
    tables: MappedTables, inputs: Mapping[str, InputRows | np.ndarray], table_of: Mapping[str, str]
) -> dict[str, Tensor | Sequences]:
    """Input name -> what its tower takes, without a gradient. A collective call."""
    lookups = plan_lookups(inputs, table_of)
    return lookups.blocks(tables.lookup(lookups.ids))
