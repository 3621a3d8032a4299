"""A run that begins with another one's tables: keys that both know keep what was learned of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.config import Config, load_config
from cluster.errors import CheckpointError, DataError, SettingError
from cluster.rank import Rank
from embedding_service.hashed_keys import HashedKeys, KeyMap
from embedding_service.keys import Vocabulary
from embedding_service.row_maps import RowMap, weight_table
from embedding_service.sharding import ShardedTables
from embedding_service.tables import TableSpec, deduplicate
from trainers.checkpoint import CheckpointStore
from trainers.model_tables import key_map_of
from trainers.models import Model, build_model, tables_of
from trainers.prepare import Prepared, load_prepared
from trainers.start import Start

_CHUNK_ROWS = 262_144
_SPARE = 4  # columns of a sum behind the vector's: its weight, and the optimiser's state


def check_grow(config: Config) -> None:
    """Raises SettingError where `train.grow` names no other run."""
    run = config.train.grow
    if run and not (Path(run) / "config.toml").exists():
        raise SettingError("train.grow", f"{run} is not a run of `lexshard train`: it has no config.toml")
    if run and Path(run).resolve() == Path(config.run).resolve():
        raise SettingError("train.grow", f"{run} is this run itself; give the new one a folder of its own: run")


def grow(config: Config, prepared: Prepared, model: Model, place: Rank) -> list[Start]:
    """Give the new `model` what the last checkpoint of the run `train.grow` knows of its keys. A collective call.

    A key keeps its vector, bit by bit where it has a row of its own in both runs, and its optimiser's state (on CPU).
    One that shared rows and now has its own begins with its shared vector; rows that are shared now begin with the
    mean, weighted by frequency, of what the keys that share them were. Towers and their optimiser are taken over whole.
    The old tables lie on disk meanwhile, mapped into memory (on GPU: beside the new ones).

    Raises SettingError where the two runs do not fit each other.
    """
    check_grow(config)
    with tempfile.TemporaryDirectory(dir=config.run) as folder:
        old, old_prepared = _load(config, place, folder if place.device.type == "cpu" else "")
        starts = []
        for name in model.tables.ids:
            if name in old.tables.ids:
                starts.append(_Growth(config, old, model, name, folder, place).run(old_prepared, prepared))
        _take_over_towers(old, model)
    return starts


def _load(config: Config, place: Rank, folder: str) -> tuple[Model, Prepared]:
    """The old run's model, with its tables in `folder` (empty: in memory)."""
    run = Path(config.train.grow)
    before = load_config(run / "config.toml", [f"run={run}"])
    if before.model.kind != config.model.kind:
        raise SettingError(
            "train.grow", f"{run} is a model of kind {before.model.kind}, this one is {config.model.kind}"
        )
    prepared = load_prepared(run)
    store = CheckpointStore(run)
    if not store.names():
        raise CheckpointError(f"{run} has no checkpoint yet, and train.grow names it")
    tables = tables_of(before, prepared)  # its maps are those that it was trained with, wherever the tables lie now
    tables = replace(tables, specs=tuple(replace(spec, folder=folder, kernel="fused") for spec in tables.specs))
    model = build_model(before, prepared, device=place.device, threads=1, tables=tables)
    store.resume(model, before)
    return model, prepared


class _Growth:
    """One table's."""

    def __init__(self, config: Config, old: Model, new: Model, name: str, folder: str, place: Rank) -> None:
        self.name, self.source = name, config.train.grow
        self.setting = f"tables.{key_map_of(name)}"
        self.old, self.new = old.tables, new.tables
        self.old_map, self.new_map = self.old.maps.get(name), self.new.maps.get(name)
        self.spec, self.before = self.new.specs[name], self.old.specs[name]
        self.folder = folder if place.device.type == "cpu" else ""
        same = self.old.optimizer == self.new.optimizer and place.device.type == "cpu"
        self.state_key = f"optimizer.{name}.momentum1" if same and self.new.optimizer != "sgd" else ""
        if self.before.dim != self.spec.dim:
            raise SettingError(
                "train.grow",
                f"{self.source} has {self.before.dim} dimensions in table {name}, this run {self.spec.dim}",
            )

    def run(self, before: Prepared, after: Prepared) -> Start:
        """Fill the table; what it has of the old one."""
        old_keys, new_keys = (one.key_maps[key_map_of(self.name)] for one in (before, after))
        if old_keys.key_type != new_keys.key_type:
            raise DataError(
                f"keys of table {self.name} are {new_keys.key_type}, those of {self.source} {old_keys.key_type}"
            )
        if _equal_keys(old_keys, new_keys) and self.old_map == self.new_map:
            self._copy_rows(self.name)
            if self.new_map is not None and self.new_map.weight_rows:
                self._copy_rows(weight_table(self.name))
            num = 0 if isinstance(new_keys, HashedKeys) else new_keys.num_keys
            if self.name in self.new.dynamic:
                learned = self.old.dynamic[self.name].trained
                self.new.dynamic[self.name].take_over(learned)
                num = len(learned.ids)
            return Start(self.name, self.source, num, 0, 0)
        if not isinstance(old_keys, Vocabulary) or not isinstance(new_keys, Vocabulary):
            raise SettingError(
                self.setting, f"has keys without a vocabulary: its map and rows must be those of {self.source}"
            )
        if self.new_map is not None and self.new_map.kind == "quotient_remainder":
            raise SettingError(f"{self.setting}.map", "quotient_remainder cannot take over vectors of other rows")
        self.old_keys, self.new_keys = old_keys, new_keys
        self._fill_own_rows(self.new_map.head if self.new_map is not None else self.spec.rows)
        if self.new_map is not None:
            self._fill_shared_rows(self.new_map)
        known = sum(
            int((self._old_ids(start, min(new_keys.num_keys, start + _CHUNK_ROWS)) >= 0).sum())
            for start in range(0, new_keys.num_keys, _CHUNK_ROWS)
        )
        return Start(self.name, self.source, known, new_keys.num_keys - known, old_keys.num_keys - known)

    def _old_ids(self, start: int, stop: int) -> np.ndarray:
        """The ids that the new ids start..stop - 1 had: int64 [stop - start], -1 for none."""
        num = self.new_keys.num_keys
        keys = self.new_keys.keys.slice(start, max(0, min(stop, num) - start))
        ids = self.old_keys.rows(keys)
        ids[ids >= self.old_keys.num_keys] = -1
        if stop > num >= start:  # the row of unknown keys
            ids = np.append(ids, self.old_keys.num_keys if self.old_keys.unknown == "row" else -1)
        return ids

    def _learned(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """What the old run knows of distinct old ids: vectors float32 [n, dim], state [n, width]. A collective call."""
        with torch.no_grad():
            vectors = self.old.lookup({self.name: torch.from_numpy(ids)})[self.name].cpu()
        if not self.state_key:
            return vectors, torch.empty(len(ids), 0)
        rows, offsets = ids, np.arange(len(ids) + 1)
        if self.old_map is not None:
            lists = self.old_map.lists(ids)
            rows, offsets = lists.values, lists.offsets
        distinct, places = deduplicate({"": rows})
        found = self.old.physical.lookup_state({self.name: torch.from_numpy(distinct)})[self.name].numpy()
        if not len(ids):
            return vectors, torch.from_numpy(found)
        mean = np.add.reduceat(found[places[""]], offsets[:-1]) / np.diff(offsets)[:, None]
        return vectors, torch.from_numpy(mean.astype(np.float32))

    def _fill_own_rows(self, num: int) -> None:
        """Rows 0..num - 1, each of which is its id's alone."""
        for shard, rows in self._chunks(0, num):
            ids = self._old_ids(rows.start, rows.stop)
            has = ids >= 0
            vectors, state = self._learned(ids[has])
            shard.put(np.arange(rows.start, rows.stop)[has], vectors, state)

    def _fill_shared_rows(self, map: RowMap) -> None:
        """The rows behind the head, whose ids are summed up into a scratch table first.

        v(i) = sum of its k rows / sqrt(k), so rows that all are v(i) / sqrt(k) give v(i) back.
        """
        head, dim = map.head, self.spec.dim
        carries_state = bool(self.state_key) and self.new.optimizer == "rowwise_adagrad"
        sums = ShardedTables(
            [TableSpec("sums", map.rows - head, dim + _SPARE, 0.0, "fp32", self.folder)],
            optimizer="sgd",
            learning_rate=1.0,
            seed=0,
            device=self.new.physical.device,
        )
        for start, stop in _shares(head, map.ids):
            old_ids = self._old_ids(start, stop)
            ids, old_ids = np.arange(start, stop)[old_ids >= 0], old_ids[old_ids >= 0]
            vectors, state = self._learned(old_ids)
            lists = map.lists(ids)
            distinct, places = deduplicate({"": lists.values - head})
            counts = self.new_keys.counts[np.minimum(ids, self.new_keys.num_keys - 1)]
            weight = torch.from_numpy(np.maximum(counts, 1).astype(np.float32))[:, None]
            each = torch.zeros(len(ids), dim + _SPARE)
            each[:, :dim] = vectors * weight * map.hashes**-0.5
            each[:, dim : dim + 1] = weight
            if carries_state:
                each[:, dim + 1 : dim + 2] = state * weight
            owners = torch.from_numpy(np.repeat(np.arange(len(ids)), lists.lengths))
            total = torch.zeros(len(distinct), dim + _SPARE)
            total.index_add_(0, torch.from_numpy(places[""]), each[owners])
            found = sums.lookup({"sums": torch.from_numpy(distinct)})["sums"]
            found.backward(-total.to(found.device))  # type: ignore[no-untyped-call]
        for shard, rows in self._chunks(head, map.rows):
            with torch.no_grad():
                total = sums.lookup({"sums": torch.arange(rows.start, rows.stop) - head})["sums"].cpu()
            weight = total[:, dim : dim + 1]
            has = (weight > 0.0)[:, 0]
            mean = total[has] / weight[has]
            state = mean[:, dim + 1 : dim + 2] if carries_state else torch.empty(len(mean), 0)
            shard.put(np.arange(rows.start, rows.stop)[has.numpy()], mean[:, :dim], state)

    def _copy_rows(self, name: str) -> None:
        """All rows as they are, of a table that is the same in both runs."""
        state_key = f"optimizer.{name}.momentum1" if self.state_key else ""
        for shard, rows in self._chunks(0, self.new.specs[name].rows, name):
            asked = {name: torch.arange(rows.start, rows.stop)}
            with torch.no_grad():
                vectors = self.old.physical.lookup(asked)[name].cpu()
            state = self.old.physical.lookup_state(asked)[name] if state_key else torch.empty(len(vectors), 0)
            shard.put(np.arange(rows.start, rows.stop), vectors, state)

    def _chunks(self, begin: int, end: int, name: str = "") -> Iterator[tuple[_Target, range]]:
        """This rank's rows among begin..end - 1 in chunks: as many on every rank, the last ones maybe empty."""
        name = name or self.name
        target = _Target(self.new.physical, name, has_state=bool(self.state_key))
        per_rank = -(-self.new.specs[name].rows // dist.get_world_size())
        for chunk in range(-(-per_rank // _CHUNK_ROWS)):
            start = target.first + chunk * _CHUNK_ROWS
            stop = min(start + _CHUNK_ROWS, target.first + len(target.weights))
            start, stop = max(begin, start), min(end, stop)
            yield target, range(start, max(start, stop))


class _Target:
    """This rank's rows of a new table, and of its optimiser's state."""

    def __init__(self, tables: ShardedTables, name: str, *, has_state: bool) -> None:
        shards = tables.local_shards(name)
        self.first, self.weights = shards[0] if shards else (0, torch.empty(0, tables.specs[name].dim))
        self.state = torch.empty(len(self.weights), 0)
        if has_state and shards:
            self.state = tables.state_dict()[f"optimizer.{name}.momentum1"].local_shards()[0].tensor.detach()

    def put(self, rows: np.ndarray, vectors: Tensor, state: Tensor) -> None:
        """rows: int64 [n], of this rank; vectors: float32 [n, dim]; state: float32 [n, width], width 0 for none."""
        local = torch.from_numpy(rows - self.first).to(self.weights.device)
        self.weights[local] = vectors.to(self.weights)
        if state.shape[1] and self.state.numel():
            self.state[local] = state[:, 0] if self.state.dim() == 1 else state


def _shares(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """This rank's share of begin..end - 1 in chunks: as many on every rank."""
    world = dist.get_world_size()
    per_rank = -(-(end - begin) // world)
    first = begin + per_rank * dist.get_rank()
    last = min(end, first + per_rank)
    for chunk in range(-(-per_rank // _CHUNK_ROWS)):
        start = min(last, first + chunk * _CHUNK_ROWS)
        yield start, max(start, min(last, start + _CHUNK_ROWS))


def _equal_keys(old: KeyMap, new: KeyMap) -> bool:
    if isinstance(old, Vocabulary) and isinstance(new, Vocabulary):
        return old.unknown == new.unknown and old.keys.equals(new.keys)
    return isinstance(old, HashedKeys) and isinstance(new, HashedKeys)


def _take_over_towers(old: Model, new: Model) -> None:
    """The weights of the towers and their optimiser's moments. Raises SettingError for towers of another shape."""
    before = dict(old.dense.named_parameters())
    if left_over := sorted(before.keys() - dict(new.dense.named_parameters()).keys()):
        raise SettingError(
            "train.grow", f"names a run whose towers are others: this model has no {', '.join(left_over)}"
        )
    for name, weight in new.dense.named_parameters():
        if name not in before or before[name].shape != weight.shape:
            raise SettingError("train.grow", f"names a run whose towers are others: {name} does not fit this model")
        weight.data.copy_(before[name].data)
        if old.dense_optimizer is not None and new.dense_optimizer is not None:
            moments = old.dense_optimizer.state[before[name]]
            new.dense_optimizer.state[weight] = {slot: value.clone() for slot, value in moments.items()}
