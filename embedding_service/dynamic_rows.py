"""Ids that come and go: which of a table's rows an id has is learned while training, and rare or old ids lose theirs.

TorchRec's managed collision decides which ids are in the table; this is its only door besides `sharding`. Every worker
runs it over the ids of all workers, window by window and in ascending order: that costs each of them the same few
passes over the table's ids, and in return they agree without a word, whatever their number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service import hash_kernels as kernels
from embedding_service.row_maps import Eviction
from embedding_service.sharding import quiet_import

with quiet_import():
    from torchrec import JaggedTensor
    from torchrec.modules.mc_modules import (
        DistanceLFU_EvictionPolicy,
        LFU_EvictionPolicy,
        LRU_EvictionPolicy,
        MCHManagedCollisionModule,
    )

Int64 = npt.NDArray[np.int64]

NOBODY = np.iinfo(np.int64).max  # the id of a row that nobody has; no key has it
MAX_ADMISSION = 255

_POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}
_WAITING_PER_ROW = 8  # counters, of each of two hashes
_LEAST_WAITING = 4096
_SEEDS = (1, 2)


@dataclass(frozen=True)
class Slots:
    """Which id has which row at one moment: the state of `DynamicRows`, as a checkpoint holds it.

    Of `rows` rows the last one is shared by all ids without a row of their own. `learned`: TorchRec's buffers, among
    them int64 [rows] ids in ascending order (NOBODY behind the last) and int64 [rows] their rows; waiting: uint8
    [2, w], how often ids without a row were seen, by two hashes; clock: int64 [4], see `place`.
    """

    learned: dict[str, Tensor]
    waiting: Tensor
    clock: Tensor  # the epoch and window whose ids were the last to be learned; ids admitted and evicted so far

    @property
    def rows(self) -> int:
        return len(self.learned["_mch_sorted_raw_ids"])

    @property
    def place(self) -> tuple[int, int]:
        """The (epoch, window) whose ids were the last to be learned; (-1, -1): none."""
        return int(self.clock[0]), int(self.clock[1])

    @property
    def num_admitted(self) -> int:
        return int(self.clock[2])

    @property
    def num_evicted(self) -> int:
        return int(self.clock[3])

    @property
    def ids(self) -> Int64:
        """The ids that have a row, ascending: int64 [n]."""
        ids = self.learned["_mch_sorted_raw_ids"].numpy()
        return ids[: np.searchsorted(ids, NOBODY)]

    @property
    def rows_of_ids(self) -> Int64:
        """The row of each of `ids`: int64 [n]."""
        return self.learned["_mch_remapped_ids_mapping"].numpy()[: len(self.ids)]

    def find(self, ids: Int64) -> Int64:
        """The rows of `ids` [n]; the last row for those without one of their own: int64 [n]."""
        known, rows = self.learned["_mch_sorted_raw_ids"].numpy(), self.learned["_mch_remapped_ids_mapping"].numpy()
        place = np.searchsorted(known[:-1], ids)
        found: Int64 = np.where(known[place] == ids, rows[place], self.rows - 1)
        return found

    def owners(self) -> Int64:
        """The id that has each row, NOBODY where none has: int64 [rows]."""
        owners = np.full(self.rows, NOBODY, np.int64)
        owners[self.rows_of_ids] = self.ids
        return owners

    def changes_from(self, before: Slots) -> tuple[Int64, Int64]:
        """(ids that had a row and have none, ascending; rows that went from one id to another, ascending)."""
        old, new = before.owners(), self.owners()
        ids = before.ids
        handed_on = np.flatnonzero((old != new) & (old != NOBODY) & (new != NOBODY))
        return ids[self.find(ids) == self.rows - 1], handed_on

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies."""
        waiting = {"waiting": self.waiting} if self.waiting.numel() else {}
        return {**self.learned, **waiting, "clock": self.clock}

    def copy(self) -> Slots:
        learned = {name: value.clone() for name, value in self.learned.items()}
        return dataclasses.replace(self, learned=learned, waiting=self.waiting.clone(), clock=self.clock.clone())


class DynamicRows:
    """Learns which ids have rows. `trained`: as of the last step; what is learned ahead of it becomes that by `adopt`.

    eviction: who makes room, the least frequent (lfu), the least recently seen (lru), or the least frequent by the
    windows since it was last seen (distance_lfu). admission: how often an id must have been seen before it may have
    a row; occurrences are forgotten after a while, see `_wait`.
    """

    def __init__(self, rows: int, *, eviction: Eviction, admission: int) -> None:
        """Raises ValueError for numbers out of range."""
        if rows < 2:
            raise ValueError(f"a dynamic table has a shared row and one for an id at least; got {rows}")
        if not 1 <= admission <= MAX_ADMISSION:
            raise ValueError(f"admission is in 1..{MAX_ADMISSION}; got {admission}")
        self._admission = admission
        self._module = MCHManagedCollisionModule(
            zch_size=rows, device=torch.device("cpu"), eviction_policy=_POLICIES[eviction](), eviction_interval=1
        )
        learned = {name: value for name, value in self._module.named_buffers() if name in self._module.state_dict()}
        del learned["_output_segments_tensor"]  # of TorchRec's own sharding
        places = max(_LEAST_WAITING, _WAITING_PER_ROW * rows) if admission > 1 else 0
        clock = torch.tensor([-1, -1, 0, 0])
        self._ahead = Slots(learned, torch.zeros(2, places, dtype=torch.uint8), clock)  # the module's own tensors
        self._epoch: int | None = None  # of `_ahead`; None: it is not there yet
        self._is_new = False
        self.trained = self._ahead.copy()

    def learn(self, ids: Int64, place: tuple[int, int]) -> None:
        """See the ids of the window at `place` (epoch, window): int64 [n], in any order, as often as they occur; -1 is
        none.

        A window that `trained` has seen is passed over. The first one of an epoch follows on `trained`.
        """
        if self._epoch != place[0]:
            for name, value in self._ahead.to_dict().items():
                value.copy_(self.trained.to_dict()[name])
            self._epoch = place[0]
        if place <= self._ahead.place:
            return
        self._is_new = True
        self._ahead.clock[:2] = torch.tensor(place)
        ids = ids[ids >= 0]
        if not len(ids):
            return
        distinct, counts = np.unique(ids, return_counts=True)
        shared = self._ahead.rows - 1
        new = self._ahead.find(distinct) == shared
        counts[new], waiting = self._wait(distinct[new], counts[new])
        before = self._ahead.ids.copy()
        self._profile(np.repeat(distinct, counts))
        admitted = self._ahead.find(distinct[new]) != shared
        if len(waiting):
            self._ahead.waiting.numpy()[0, waiting[0, admitted]] = 0  # who loses its row must be seen anew
            self._ahead.waiting.numpy()[1, waiting[1, admitted]] = 0
        self._ahead.clock[2] += int(admitted.sum())
        self._ahead.clock[3] += int((self._ahead.find(before) == shared).sum())

    def _wait(self, ids: Int64, counts: Int64) -> tuple[Int64, Int64]:
        """How often `ids` [n] without a row, seen `counts` [n] times now, may say they were seen: int64 [n], 0 for too
        few; and their places among the waiting: int64 [2, n].

        A count-min sketch (Cormode and Muthukrishnan 2005), which says too much of few ids and too little of none; it
        is halved, as TinyLFU's (Einziger et al. 2017), when its counters reach 1/4 in the mean.
        """
        if self._admission == 1:
            return counts, np.empty((0, 0), np.int64)
        waiting = self._ahead.waiting.numpy()
        places = np.empty((2, len(ids)), np.int64)
        seen = np.full(len(ids), MAX_ADMISSION, np.int64)
        for one, at, seed in zip(waiting, places, _SEEDS, strict=True):
            kernels.hash_places(np.ascontiguousarray(ids), np.uint64(seed), len(one), at)
            total = one.astype(np.int64)
            np.add.at(total, at, counts)
            one[:] = np.minimum(total, MAX_ADMISSION)
            seen = np.minimum(seen, one[at])
        while waiting[0].sum(dtype=np.int64) * 4 >= waiting.shape[1]:
            waiting >>= np.uint8(1)
        return np.where(seen >= self._admission, np.maximum(seen, counts), 0), places

    def _profile(self, ids: Int64) -> None:
        """One round of TorchRec's admission and eviction."""
        self._module._input_history_buffer_size = -1  # or it keeps the size of the first window, and drops what is over
        self._module._current_iter = -1  # read again from the tensor, which a checkpoint may have changed
        values = torch.from_numpy(ids)
        self._module.profile({"ids": JaggedTensor(values, lengths=torch.ones(len(values), dtype=torch.int64))})
        self._module.evict()

    def find_ahead(self, ids: Int64) -> Int64:
        """The rows of `ids` for a step that is prepared now: see `Slots.find`."""
        return (self.trained if self._epoch is None else self._ahead).find(ids)

    def news(self) -> Slots | None:
        """What the next prepared step is to `adopt` before it looks anything up; None where nothing was learned since
        the last call.
        """
        is_new, self._is_new = self._is_new, False
        return self._ahead.copy() if is_new else None

    def take_over(self, slots: Slots) -> None:
        """Begin with what another run has learned: `trained` becomes a copy of `slots`, before the first window.

        Raises ValueError for those of another number of rows, eviction or admission.
        """
        own, given = self.trained.to_dict(), slots.to_dict()
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in given.items()}:
            raise ValueError("these rows were learned by other rules")
        for name, value in own.items():
            value.copy_(given[name])
        self.trained.clock[:2] = -1

    def adopt(self, slots: Slots) -> tuple[Int64, Int64]:
        """Take over what was learned ahead of training. Returns what `Slots.changes_from` says of it."""
        changes = slots.changes_from(self.trained)
        self.trained = slots
        return changes
