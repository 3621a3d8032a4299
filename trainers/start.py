"""Where a new run's tables begin other than at random: with vectors of a file, or with those of another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.config import Config, TableSettings
from cluster.errors import DataError, SettingError
from embedding_service.keys import Vocabulary
from embedding_service.sharding import ShardedTables
from embedding_service.vector_files import VectorFile
from trainers.model_tables import key_map_of
from trainers.models import Model
from trainers.prepare import Prepared


@dataclass(frozen=True)
class Start:
    """How a table begins: `known` of its keys have vectors of `source`, `new` ones do not, and `unused` keys of the
    source are not in the table.
    """

    table: str
    source: str
    known: int
    new: int
    unused: int

    def text(self) -> str:
        """The same for people."""
        total = self.known + self.new
        begin = f"table {self.table}: {self.known:,} of {total:,} keys begin with their vectors of {self.source}"
        return f"{begin}; {self.new:,} are not in it and begin at random; {self.unused:,} of it are not in the data"


def start_from_files(config: Config, prepared: Prepared, model: Model) -> list[Start]:
    """Give the new tables of `model` the vectors that `tables.NAME.vectors` name. A collective call.

    Every worker reads the whole file in chunks and keeps what belongs to its rows. Raises SettingError for vectors of
    another dimension, DataError where no key fits.
    """
    starts = []
    for name in model.tables.ids:
        chosen = config.tables.get(key_map_of(name), TableSettings())
        if chosen.vectors and name != "output":  # item2vec's vectors are its input table
            starts.append(_start_from_file(chosen.vectors, name, prepared.keys[key_map_of(name)], model))
    return starts


def _start_from_file(path: str, name: str, keys: Vocabulary, model: Model) -> Start:
    setting = f"tables.{key_map_of(name)}.vectors"
    file, spec = VectorFile.open(path), model.tables.specs[name]
    if file.dim != spec.dim:
        raise SettingError(setting, f"{path} holds vectors of {file.dim} numbers, table {name} of {spec.dim}")
    if name in model.tables.maps:
        raise SettingError(setting, f"need a row for every key, which table {name} has not within keys.budget")
    rows = Rows(model.tables.physical, name)
    unused = 0
    for found, vectors, left_out in file.chunks(keys.key_type):
        places = keys.rows(found)
        is_known = (places >= 0) & (places < len(keys.keys))
        unused += int((~is_known).sum()) + left_out
        rows.put(places[is_known], vectors[is_known])
    known = rows.num_put()
    if not known:
        raise DataError(f"has none of the {len(keys.keys):,} keys of table {name} ({keys.key_type})", file=path)
    return Start(name, path, known, len(keys.keys) - known, unused)


class Rows:
    """This rank's rows of one table, each of which is set at most once: what comes first stays."""

    def __init__(self, tables: ShardedTables, name: str) -> None:
        self._name = name
        self._parts = [(first, weights, np.zeros(len(weights), bool)) for first, weights in tables.local_shards(name)]

    def put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Set those of `rows` (int64 [n]) that lie here to `vectors` (float32 [n, dim]).

        Raises DataError for numbers that the table's precision cannot hold.
        """
        for first, weights, is_put in self._parts:
            places = np.flatnonzero((rows >= first) & (rows < first + len(weights)))
            local, where = np.unique(rows[places] - first, return_index=True)
            is_new = ~is_put[local]
            local, places = local[is_new], places[where[is_new]]
            values = torch.from_numpy(np.ascontiguousarray(vectors[places])).to(weights.dtype)
            if not values.isfinite().all():
                raise DataError(f"table {self._name} has precision fp16, which does not reach beyond 65504: set fp32")
            weights[torch.from_numpy(local)] = values.to(weights.device)
            is_put[local] = True

    def num_put(self) -> int:
        """How many rows were set, on all ranks. A collective call."""
        count = torch.tensor([sum(int(is_put.sum()) for _, _, is_put in self._parts)], dtype=torch.int64)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, count.item())
        return int(sum(parts))
