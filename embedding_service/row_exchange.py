"""Lookups in tables that lie in the ranks' memory: who holds a row sends it, gets its gradient back and updates it.

On CPU this stands in for TorchRec's exchange and FBGEMM's kernels, on the shards that TorchRec has laid out. It may
take for granted that a rank asks for distinct rows: then a lookup is one message each way between two ranks, without
copies in between, and the update is one pass over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embedding_service.row_kernels import take_rows, update_rows


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a table and the state of their optimiser, both updated in place.

    Rank r of a table of `num_rows` holds `rows_per_rank` rows from r * rows_per_rank on (the last ones fewer).
    weights: float32 or float16 [n, dim]; state: float32 [n, 0] for SGD, [n, 1] for row-wise Adagrad (the sum of the
    mean squares of a row's gradients), [n, dim] for Adagrad (the sum of the squares of a weight's gradients). frozen:
    rows are looked up but never updated. on_disk: they are mapped from a file.
    """

    num_rows: int
    rows_per_rank: int
    weights: Tensor
    state: Tensor
    frozen: bool = False
    on_disk: bool = False

    def take(self, rows: Tensor) -> Tensor:
        """weights[rows], rows: int64 [m] of this shard."""
        if self.on_disk:
            return self.weights.index_select(0, rows)  # in torch's threads, which wait for the disk side by side
        return take_rows(self.weights, rows)

    def update(self, rows: Tensor, order: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """One step of the optimiser; the gradients of equal rows are added up, in place.

        rows: int64 [m], of this shard; order: int64 [m], which sorts them; gradient: float32 [m, dim].
        """
        update_rows(self.weights, self.state, rows, order, gradient, learning_rate)


@dataclass(frozen=True)
class _TableRoute:
    asked: list[int]  # rank -> how many rows this rank asks of it
    place: Tensor | None  # int64: where each id lies among the ids in ascending order; None: they ascend
    wanted: Tensor  # int64: the rows of this rank's shard that the ranks ask for, one rank after the other
    sent: list[int]  # rank -> how many of `wanted` it asks for
    order: Tensor  # int64: sorts `wanted`


@dataclass(frozen=True)
class Route:
    """Which rows of every table go where in one lookup."""

    tables: dict[str, _TableRoute]


class RowExchange:
    """The shards of all ranks of the default process group, looked up and updated together."""

    def __init__(self, shards: Mapping[str, Shard], *, learning_rate: float) -> None:
        """A collective call."""
        self.learning_rate = learning_rate
        self._shards = dict(shards)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # A group of its own: what a background thread exchanges must not meet what the loop does.
        self._ahead = dist.new_group(backend="gloo") if self._world > 1 else None
        self._root = torch.zeros((), requires_grad=True)  # has autograd call `backward`, and gets no gradient itself

    def route(self, ids: Mapping[str, Tensor], *, ahead: bool) -> Route:
        """Tell the ranks which rows this one will look up. A collective call.

        ids: table -> int64 [n], distinct; ahead: the caller is the one thread that works ahead of the loop. Raises
        IndexError for a row that a table does not have.
        """
        asked, places, cuts = [], [], []
        for name, shard in self._shards.items():
            rows, place = _ascending(ids.get(name, torch.empty(0, dtype=torch.int64)))
            if len(rows) and not 0 <= rows[0] <= rows[-1] < shard.num_rows:
                raise IndexError(f"table {name} has rows 0..{shard.num_rows - 1}; got {rows[0]}..{rows[-1]}")
            first_rows = torch.arange(self._world + 1) * shard.rows_per_rank
            cuts.append(torch.searchsorted(rows, first_rows))
            asked.append(rows)
            places.append(place)
        counts = torch.stack(cuts).diff()  # [table, rank]
        wanted = [[rows] for rows in asked]
        if self._world > 1:
            parts = [torch.split(rows, count) for rows, count in zip(asked, counts.tolist(), strict=True)]
            wanted = self._tell(parts, counts, self._ahead if ahead else dist.group.WORLD)
        tables = {}
        for t, (name, shard) in enumerate(self._shards.items()):
            local = torch.cat(wanted[t]) - self._rank * shard.rows_per_rank
            order = torch.from_numpy(np.argsort(local.numpy(), kind="stable"))  # merges what the ranks have sorted
            tables[name] = _TableRoute(counts[t].tolist(), places[t], local, [len(rows) for rows in wanted[t]], order)
        return Route(tables)

    def _tell(
        self, asked: Sequence[Sequence[Tensor]], counts: Tensor, group: dist.ProcessGroup | None
    ) -> list[list[Tensor]]:
        """table -> rank -> int64 rows that the rank asks of this one; asked, counts: the same the other way round."""
        told = counts.T.contiguous()  # [rank, table]
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=group)
        message = torch.cat([rows for parts in zip(*asked, strict=True) for rows in parts])
        received = message.new_empty(int(heard.sum()))
        dist.all_to_all_single(received, message, heard.sum(1).tolist(), told.sum(1).tolist(), group=group)
        parts = torch.split(received, heard.reshape(-1).tolist())
        return [list(parts[t :: len(asked)]) for t in range(len(asked))]

    def lookup(self, route: Route) -> dict[str, Tensor]:
        """table -> float32 [n, dim], in the order of the ids; `backward` updates the shards. Collective calls, both."""
        found = _Lookup.apply(self._root, self, route)  # type: ignore[no-untyped-call]
        return {
            name: rows if table.place is None else rows.index_select(0, table.place)
            for (name, table), rows in zip(route.tables.items(), found, strict=True)
        }

    def fetch(self, route: Route) -> tuple[Tensor, ...]:
        """For every table the rows asked for, ascending: float32 [n, dim]. A collective call."""
        found = [
            self._swap(self._shards[name].take(table.wanted), table.sent, table.asked)
            for name, table in route.tables.items()
        ]
        return tuple(_arrived(swap).float() for swap in found)

    def update(self, route: Route, gradients: Sequence[Tensor]) -> None:
        """For every table the gradients of the rows that `fetch` returned: to the ranks that hold them, and applied.

        gradients: float32 [n, dim] each. A collective call.
        """
        received = [
            (name, table, self._swap(gradient.contiguous(), table.asked, table.sent))
            for (name, table), gradient in zip(route.tables.items(), gradients, strict=True)
            if not self._shards[name].frozen
        ]
        for name, table, swap in received:
            self._shards[name].update(table.wanted, table.order, _arrived(swap), self.learning_rate)

    def _swap(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, dist.Work | None]:
        """The rows that the ranks send this one, once the work is done; sent, received: how many, by rank."""
        if self._world == 1:
            return rows, None
        out = rows.new_empty(sum(received), rows.shape[1])
        return out, dist.all_to_all_single(out, rows, received, sent, async_op=True)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, exchange: RowExchange, route: Route) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.route = exchange, route
        return exchange.fetch(route)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.exchange.update(ctx.route, gradients)
        return None, None, None


def _arrived(swap: tuple[Tensor, dist.Work | None]) -> Tensor:
    rows, work = swap
    if work is not None:
        work.wait()
    return rows


def _ascending(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows sorted, and where each went (None: it stayed)."""
    if bool((rows[1:] >= rows[:-1]).all()):
        return rows, None
    ordered, order = rows.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return ordered, place
