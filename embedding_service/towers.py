"""Query and item encoders: plain modules over embeddings that somebody else looked up.

Training feeds them rows of sharded tables, serving feeds them rows of an artifact's vector files; the arithmetic is
this file's alone, so both agree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from cluster.errors import ArtifactError
from embedding_service.ragged import Ragged, offsets_of

Encoder = Literal["pool", "mean", "sum", "weighted_mean", "weighted_sum", "attention", "gru", "project"]
# int64 [n] rows (-1: unknown), n lists of int64 rows or of WEIGHTED ones, or float [n, width] numbers (nan: missing)
Given = np.ndarray | Ragged
WEIGHTED = np.dtype([("row", np.int64), ("weight", np.float32)])
LISTS = ("mean", "sum", "weighted_mean", "weighted_sum")  # encoders of lists that are no history


@dataclass(frozen=True)
class TowerInput:
    """One input of a tower: what is looked up or given, and the encoder that makes one vector per example of it.

    `source` says which ids are looked up: `user`, `history`, `last_item` (the history's last), `item` (a candidate) or
    the name of a feature column. They are rows of the vector set `vectors`; numbers have none ("").

    encoder `pool`: the row of the one id, or a history's rows weighted by `decay` per step into the past (1: plain
    mean); `mean`, `sum`: of the rows of a list; `weighted_mean`, `weighted_sum`: of rows times their weights, the mean
    divided by the sum of the weights' absolute values (zeros where that is 0); `attention`, `gru`: over a history's
    rows, see `HistoryAttention` and `HistoryGru`; `project`: a learned projection of `width` numbers, standardised as
    (x - center) * scale. An empty list gives zeros. Only the last `length` items of a history are seen (0: all).
    """

    name: str
    source: str
    vectors: str
    dim: int
    decay: float = 1.0
    length: int = 0
    encoder: Encoder = "pool"
    width: int = 0
    center: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class TowerSpec:
    """What a tower is made of; JSON-able through `to_dict` / `from_dict`.

    Without `hidden` the encoded inputs (all of width `dim`) are summed; with it they are concatenated and go through an
    MLP with ReLU between its layers. `normalize` gives the output unit length.
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


class Sequences(NamedTuple):
    """n histories as one block: float [m, dim] rows, oldest first, and int64 [n + 1], where each history starts."""

    rows: Tensor
    offsets: Tensor


class Tower(nn.Module):
    """Blocks of looked-up embeddings and given numbers -> one vector per example."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        if not spec.inputs:
            raise ValueError("a tower needs at least one input")
        self.spec = spec
        self.encoders = nn.ModuleList([_encoder(block) for block in spec.inputs])
        self.mlp: nn.Sequential | None = None
        if spec.hidden:
            widths = [sum(block.dim for block in spec.inputs), *spec.hidden, spec.dim]
            layers: list[nn.Module] = []
            for i, (wide, narrow) in enumerate(itertools.pairwise(widths)):
                layers += [nn.ReLU()] * (i > 0) + [nn.Linear(wide, narrow)]
            self.mlp = nn.Sequential(*layers)
        elif any(block.dim != spec.dim for block in spec.inputs):
            raise ValueError(f"without hidden layers every input must have width {spec.dim}")

    def forward(self, blocks: Mapping[str, Tensor | Sequences]) -> Tensor:
        """`blocks`: input name -> float [n, input.dim] of pooled rows, Sequences of an `attention` or `gru`, or
        float [n, input.width] numbers. Returns float [n, spec.dim].
        """
        parts = [encode(blocks[block.name]) for encode, block in zip(self.encoders, self.spec.inputs, strict=True)]
        if self.mlp is not None:
            out = self.mlp(torch.cat(parts, dim=1))
        else:
            out = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return F.normalize(out, dim=1) if self.spec.normalize else out


def _encoder(block: TowerInput) -> nn.Module:
    if block.encoder == "attention":
        return HistoryAttention(block.dim, block.length, block.decay)
    if block.encoder == "gru":
        return HistoryGru(block.dim)
    if block.encoder == "project":
        return _Projection(block.width, block.dim)
    return nn.Identity()  # pooled when it was looked up


class HistoryAttention(nn.Module):
    """One attention whose query is the last item, over learned positions (as the last layer of SASRec, Kang and McAuley
    2018); its values are the items' embeddings themselves, so that the session stays in the items' space (CORE, Hou et
    al. 2022):

        sum_j a_j x_j,  a = softmax_j(b_t(j) + (Q x_last + q) . K (x_j + p_t(j)) / sqrt(dim)),  t(j) = steps back

    It begins as the recency-weighted mean: b_t = t log(decay), K = 0. An empty history gives zeros.
    """

    def __init__(self, dim: int, length: int, decay: float) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.position = nn.Parameter(torch.zeros(length, dim))
        self.bias = nn.Parameter(torch.arange(length, dtype=torch.float32) * math.log(max(decay, 1e-3)))
        nn.init.zeros_(self.key.weight)

    def forward(self, history: Sequences) -> Tensor:
        """history: at most `length` items each. Returns float [n, dim]."""
        rows, offsets = history
        lengths = offsets.diff()
        owner = torch.repeat_interleave(lengths)
        age = offsets[1:][owner] - 1 - torch.arange(len(rows), device=rows.device)
        query = self.query(rows[(offsets[1:] - 1)[lengths > 0]])[(lengths > 0).cumsum(0)[owner] - 1]
        keys = self.key(rows) + self.key(self.position)[age]
        scores = self.bias[age] + (keys * query).sum(1) * rows.shape[1] ** -0.5
        weights = _softmax(scores, owner, len(lengths))
        return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, owner, weights[:, None] * rows)


def _softmax(scores: Tensor, owner: Tensor, num: int) -> Tensor:
    """The softmax of `scores` [m] among those of one owner (int64 [m], in 0..num - 1)."""
    highest = scores.new_zeros(num).scatter_reduce(0, owner, scores.detach(), "amax", include_self=False)
    weights = (scores - highest[owner]).exp()
    return weights / weights.new_zeros(num).index_add(0, owner, weights)[owner]


class HistoryGru(nn.Module):
    """The last state of a GRU over the history (GRU4Rec, Hidasi et al. 2016), projected into the items' space.

    An empty history gives zeros.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, history: Sequences) -> Tensor:
        """Returns float [n, dim]."""
        rows, offsets = history
        lengths = offsets.diff()
        out = rows.new_zeros(len(lengths), rows.shape[1])
        if not len(rows):
            return out + 0.0 * rows.sum()
        seen = lengths.nonzero().squeeze(1)
        state: Tensor = self.gru(_packed(rows, lengths[seen]))[1][0]
        return out.index_add(0, seen, self.out(state))


def _packed(rows: Tensor, lengths: Tensor) -> PackedSequence:
    """Ragged rows [m, dim], in lists of `lengths` [n] (all at least 1), without the padding of `pack_padded_sequence`:
    the first row of every list, longest list first, then the second of every list that has one...
    """
    order = lengths.argsort(descending=True, stable=True)
    place = order.argsort()
    owner = torch.repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    step = torch.arange(len(rows), device=rows.device) - starts[owner]
    by_step = (step * len(lengths) + place[owner]).argsort()
    return PackedSequence(rows.index_select(0, by_step), torch.bincount(step).cpu(), order, place)


class _Projection(nn.Linear):
    """Standardised numbers in the space of the embeddings, and at first as long as these are."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(width, dim, bias=False)

    def reset_parameters(self) -> None:
        bound = (self.in_features * self.out_features) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


@dataclass(frozen=True)
class InputRows:
    """What one tower input looks up: ragged lists of rows of the vector set `vectors`.

    rows: int64 [m]; offsets: int64 [n + 1]; weights: float32 [m] to pool them with, None where they stay a sequence. A
    missing value is an empty list.
    """

    vectors: str
    rows: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None


def input_rows(
    spec: TowerSpec, *, history: Ragged | None, single: Mapping[str, Given]
) -> dict[str, InputRows | np.ndarray]:
    """What the inputs of `spec` look up for n examples, or the float32 [n, width] numbers they are given, by name.

    history: n lists of int64 rows, oldest first (None: the tower sees no history); single: source -> its values.
    """
    found: dict[str, InputRows | np.ndarray] = {}
    for block in spec.inputs:
        if block.source == "history":
            assert history is not None
            seen = history.tail(block.length) if block.length else history
            weights = recency_weights(seen.offsets, block.decay) if block.encoder == "pool" else None
            found[block.name] = InputRows(block.vectors, seen.values, seen.offsets, weights)
            continue
        if block.source == "last_item":
            assert history is not None
            found[block.name] = _one_each(block, history.tail(1))
            continue
        values = single[block.source]
        if block.encoder == "project":
            found[block.name] = _standardised(block, np.asarray(values))
        elif isinstance(values, Ragged):
            rows = values.values["row"] if values.values.dtype == WEIGHTED else values.values
            weights = list_weights(values, mean=block.encoder in ("mean", "weighted_mean"))
            found[block.name] = InputRows(block.vectors, np.ascontiguousarray(rows), values.offsets, weights)
        else:
            known = values >= 0
            found[block.name] = _one_each(block, Ragged(values[known], offsets_of(known.astype(np.int64))))
    return found


def weighted(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rows int64 [m] and their weights as one array, WEIGHTED [m]."""
    values = np.empty(len(rows), WEIGHTED)
    values["row"], values["weight"] = rows, weights
    return values


def row_values(values: Given) -> np.ndarray:
    """The rows among `values`, which are no numbers: int64 [m], for lists one list after the other."""
    flat = values.values if isinstance(values, Ragged) else values
    return np.ascontiguousarray(flat["row"]) if flat.dtype == WEIGHTED else flat


def with_rows(values: Given, rows: np.ndarray) -> Given:
    """`values` with `rows`, int64 [m], in the place of `row_values`."""
    if not isinstance(values, Ragged):
        return rows
    is_weighted = values.values.dtype == WEIGHTED
    return values.with_values(weighted(rows, values.values["weight"]) if is_weighted else rows)


def list_weights(lists: Ragged, *, mean: bool) -> np.ndarray:
    """What rows of lists are multiplied by to be pooled: float32 [m]. lists: of int64 or WEIGHTED values."""
    if lists.values.dtype != WEIGHTED:
        lengths = lists.lengths if mean else np.ones(len(lists), np.int64)
        return np.repeat(np.float32(1.0) / np.maximum(lengths, 1).astype(np.float32), lists.lengths)
    weights = np.ascontiguousarray(lists.values["weight"])
    if not mean:
        return weights
    totals = np.zeros(len(lists))
    np.add.at(totals, lists.owners(), np.abs(weights.astype(np.float64)))
    totals[totals == 0.0] = 1.0
    return (weights / totals[lists.owners()]).astype(np.float32)


def _one_each(block: TowerInput, rows: Ragged) -> InputRows:
    return InputRows(block.vectors, rows.values, rows.offsets, np.ones(len(rows.values), np.float32))


def _standardised(block: TowerInput, values: np.ndarray) -> np.ndarray:
    """(x - center) * scale, within +-100; a missing number is as the mean: float32 [n, width]."""
    standard = np.clip((values - block.center) * block.scale, -100.0, 100.0)
    return np.nan_to_num(standard, nan=0.0).astype(np.float32, copy=False)


def missing(block: TowerInput, num: int) -> Given:
    """The values of `num` examples that say nothing, for an input that is not the history."""
    if block.encoder == "project":
        return np.full((num, block.width), np.nan)
    if block.encoder in LISTS:
        dtype = WEIGHTED if block.encoder.startswith("weighted") else np.dtype(np.int64)
        return Ragged(np.empty(0, dtype), np.zeros(num + 1, np.int64))
    return np.full(num, -1, np.int64)


def says(values: Given, num_keys: int | None = None) -> np.ndarray:
    """bool [n]: in which examples there is a number, or a row below `num_keys` (None: any)."""
    if isinstance(values, Ragged):
        known = np.zeros(len(values), np.bool_)
        known[values.owners()[says(values.values, num_keys)]] = True
        return known
    if values.dtype == WEIGHTED:
        return says(values["row"], num_keys)
    if values.ndim == 2:
        return np.asarray(~np.isnan(values).all(axis=1))
    rows: np.ndarray = np.asarray(values >= 0)
    if num_keys is not None:
        rows &= values < num_keys
    return rows


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
