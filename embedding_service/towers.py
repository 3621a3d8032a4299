"""Query and item encoders: plain modules over embeddings that somebody else looked up.

Training feeds them rows of sharded tables, serving feeds them rows of an artifact's vector files; the arithmetic is
this file's alone, so both agree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.errors import ArtifactError
from embedding_service.ragged import Ragged, offsets_of


@dataclass(frozen=True)
class TowerInput:
    """One block of a tower's input: rows of the vector set `vectors`, pooled to one vector per example.

    `source` says which ids are looked up: `user`, `history`, `last_item` (the history's last), `item` (a candidate) or
    the name of a feature column. `decay` is the weight of a history item per step into the past (1: plain mean); only
    the last `length` items of a history are seen (0: all).
    """

    name: str
    source: str
    vectors: str
    dim: int
    decay: float = 1.0
    length: int = 0


@dataclass(frozen=True)
class TowerSpec:
    """What a tower is made of; JSON-able through `to_dict` / `from_dict`.

    Without `hidden` the inputs (all of width `dim`) are summed; with it they are concatenated and go through an MLP
    with ReLU between its layers. `normalize` gives the output unit length.
    """

    inputs: tuple[TowerInput, ...]
    dim: int
    hidden: tuple[int, ...] = ()
    normalize: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TowerSpec:
        """Raises ArtifactError for a mapping that no `to_dict` has written."""
        try:
            inputs = tuple(TowerInput(**entry) for entry in value["inputs"])
            return cls(**{**value, "inputs": inputs, "hidden": tuple(value["hidden"])})
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"query tower: not a tower description ({error})") from None


class Tower(nn.Module):
    """Blocks of embeddings -> one vector per example."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        if not spec.inputs:
            raise ValueError("a tower needs at least one input")
        self.spec = spec
        self.mlp: nn.Sequential | None = None
        if spec.hidden:
            widths = [sum(block.dim for block in spec.inputs), *spec.hidden, spec.dim]
            layers: list[nn.Module] = []
            for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
                layers += [nn.ReLU()] * (i > 0) + [nn.Linear(wide, narrow)]
            self.mlp = nn.Sequential(*layers)
        elif any(block.dim != spec.dim for block in spec.inputs):
            raise ValueError(f"without hidden layers every input must have width {spec.dim}")

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """`blocks`: input name -> float32 [n, input.dim]. Returns float32 [n, spec.dim]."""
        parts = [blocks[block.name] for block in self.spec.inputs]
        if self.mlp is not None:
            out = self.mlp(torch.cat(parts, dim=1))
        else:
            out = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return F.normalize(out, dim=1) if self.spec.normalize else out


@dataclass(frozen=True)
class InputRows:
    """What one tower input looks up: weighted, ragged lists of rows of the vector set `vectors`.

    rows: int64 [m]; offsets: int64 [n + 1]; weights: float32 [m]. A missing value is an empty list.
    """

    vectors: str
    rows: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray


def input_rows(spec: TowerSpec, *, history: Ragged | None, single: Mapping[str, np.ndarray]) -> dict[str, InputRows]:
    """What the inputs of `spec` look up for n examples, by input name.

    history: n lists of int64 rows, oldest first (None: the tower sees no history); single: source -> int64 [n] rows, -1
    where the value is missing or unknown.
    """
    found = {}
    for block in spec.inputs:
        if block.source == "history":
            assert history is not None
            seen = history.tail(block.length) if block.length else history
            weights = recency_weights(seen.offsets, block.decay)
            found[block.name] = InputRows(block.vectors, seen.values, seen.offsets, weights)
            continue
        if block.source == "last_item":
            assert history is not None
            last = history.tail(1)
            rows, offsets = last.values, last.offsets
        else:
            known = single[block.source] >= 0
            rows, offsets = single[block.source][known], offsets_of(known.astype(np.int64))
        found[block.name] = InputRows(block.vectors, rows, offsets, np.ones(len(rows), np.float32))
    return found


def recency_weights(offsets: np.ndarray, decay: float) -> np.ndarray:
    """Weights of ragged histories, oldest item first: decay ** (steps into the past), summing to 1 in each history.

    offsets: int64 [n + 1]. Returns float32 [offsets[-1] - offsets[0]].
    """
    if len(offsets) == 2:
        return _weights_of_one(int(offsets[1] - offsets[0]), decay)
    lengths = np.diff(offsets)
    ends = np.repeat(offsets[1:], lengths)
    age = ends - 1 - np.arange(offsets[0], offsets[-1])
    if decay == 1.0:
        totals = lengths.astype(np.float64)
        weights = np.ones(len(age))
    elif decay == 0.0:
        totals = np.ones(len(lengths))
        weights = (age == 0).astype(np.float64)
    else:
        totals = (1.0 - decay**lengths) / (1.0 - decay)
        weights = decay ** age.astype(np.float64)
    return np.array(weights / np.repeat(totals, lengths), np.float32)  # a copy: torch wants to own what it is given


@functools.lru_cache(maxsize=1024)
def _weights_of_one(length: int, decay: float) -> np.ndarray:
    """The weights of one history; a server asks for few lengths again and again."""
    weights = recency_weights(np.array([0, length, length]), decay)
    weights.flags.writeable = False
    return weights


def pool(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of ragged lists of rows; an empty list gives zeros.

    rows: float32 [u, d], the looked-up (unique) rows; index: int64 [m] into rows; offsets: int64 [n], where each list
    starts; weights: float32 [m]. Returns float32 [n, d]. The gradient reaches `rows` only.
    """
    if index.numel() == 0:
        return rows.new_zeros(len(offsets), rows.shape[1]) + 0.0 * rows.sum()
    return F.embedding_bag(index, rows, offsets, mode="sum", per_sample_weights=weights)
