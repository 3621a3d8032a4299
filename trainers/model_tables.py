"""Which tables a model has, and how the ids of each find their rows: what follows from a config and numbers of keys.

Nothing here needs data or allocates anything, so that a plan can be made of it before training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.config import Config, TableSettings
from cluster.errors import SettingError
from cluster.sizes import format_bytes, parse_bytes
from embedding_service.row_maps import MapKind, RowMap, physical_tables
from embedding_service.tables import Kernel, Optimizer, TableSpec

_WEIGHTS_PER_ROW = 4  # of learned weights, at most, for every shared row
# (the items or the query side, times): what `auto` compresses, in this order, and how far; the items' ranking suffers
# most, see tests/benchmarks/hash_quality.py
_STAGES = ((False, 10.0), (True, 2.0), (False, 50.0), (True, 10.0))
_HARMLESS = 2.0  # compression from which the items' ranking loses what is worth a word
# Share of the exact table's Recall@20 that remains where ITEMS share rows: Gowalla's two-tower recipe, on test, after a
# third of its epochs (the maps that were trained to the end kept the same). On Diginetica a tenth of the bytes keeps 6
# to 11 points less, and one hash more. From tests/benchmarks/hash_quality.py.
_MEASURED = {
    "head_tail": "head + tail kept 93 % of Recall@20 in half the bytes and 71 % in a tenth",
    "hashed": "two hashes kept 90 % of Recall@20 in half the bytes and 68 % in a tenth, one hash 46 % and 9 %",
    "quotient_remainder": "it kept 93 % of Recall@20 in half the bytes and 72 % in a tenth",
}
_DEFAULTS = TableSettings()


@dataclass(frozen=True)
class ModelTables:
    """A model's tables. `specs` have a row for every id of their key map; `maps` says how they are held in fewer."""

    specs: tuple[TableSpec, ...]
    maps: dict[str, RowMap]
    optimizer: Optimizer

    @property
    def physical(self) -> list[TableSpec]:
        """The tables in memory."""
        return physical_tables(self.specs, self.maps)

    @property
    def num_bytes(self) -> int:
        """Of weights and optimiser state, over all workers."""
        return sum(spec.num_bytes(self.optimizer) for spec in self.physical)


def model_tables(config: Config, num_ids: Mapping[str, int]) -> ModelTables:
    """The tables of `config`'s model. num_ids: key map (item, user, query_<feature>, item_<feature>) -> its ids, the
    unknown one included; those of features say which features have keys.

    Raises SettingError for a setting of `tables` or `keys.budget` that cannot be honoured.
    """
    check_tables(config)
    model, train = config.model, config.train
    is_item2vec = model.kind == "item2vec"
    optimizer: Optimizer = "sgd" if is_item2vec else train.optimizer
    specs, maps = [], {}
    named = set()
    for table, key_map in _names(config, num_ids):
        chosen = config.tables.get(key_map, _DEFAULTS)
        named.add(key_map)
        dim = chosen.dim or model.dim
        scale = train.init_scale or (0.5 / dim if is_item2vec else dim**-0.5)
        if table == "output":
            scale = 0.0
        kernel: Kernel = "fused_uvm_caching" if config.cluster.uvm_caching else "fused"
        precision = chosen.precision or model.precision
        frozen = chosen.frozen and table != "output"  # item2vec's vectors are its input table
        spec = TableSpec(table, num_ids[key_map], dim, scale, precision, chosen.disk, frozen, kernel)
        specs.append(spec)
        maps[table] = row_map(chosen, spec, f"tables.{key_map}")
    for name in config.tables.keys() - named:
        raise SettingError(f"tables.{name}", f"this model has no such table; it has: {', '.join(sorted(named))}")
    tables = ModelTables(tuple(specs), maps, optimizer)
    if not config.keys.budget:
        return tables
    return _within(config, tables, parse_bytes(config.keys.budget, "keys.budget"))


def _names(config: Config, num_ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(table, its key map)."""
    model = config.model
    if model.kind == "item2vec":
        yield from (("input", "item"), ("output", "item"))
        return
    yield "item", "item"
    if not model.share_items and {"history", "last_item"} & set(model.query):
        yield "history", "item"
    if "user" in model.query:
        yield "user", "user"
    yield from ((name, name) for name in num_ids if name.startswith(("query_", "item_")))


def check_tables(config: Config) -> None:
    """What can be said of `tables` before any data are read. Raises SettingError."""
    if config.keys.budget:
        parse_bytes(config.keys.budget, "keys.budget")
    for name, chosen in config.tables.items():
        _check_name(config, name)
        _check_table(config, name, chosen)


def check_disks(config: Config) -> None:
    """Raises SettingError where a folder of `tables.NAME.disk` is none on this machine, or cannot be written to."""
    for name, chosen in config.tables.items():
        if chosen.disk and not os.path.isdir(chosen.disk):
            raise SettingError(f"tables.{name}.disk", f"{chosen.disk} is not a folder of this machine: create it")
        if chosen.disk and not os.access(chosen.disk, os.W_OK | os.X_OK):
            raise SettingError(f"tables.{name}.disk", f"{chosen.disk} cannot be written to: name another folder")


def _check_name(config: Config, name: str) -> None:
    known = ["item"]
    if config.model.kind == "two_tower":
        known += ["user"] * ("user" in config.model.query)
        known += [f"query_{feature}" for feature in config.data.query_features]
        if name.startswith("item_") and config.data.item_features:
            return  # its columns are known when the side table is read
    if name not in known:
        raise SettingError(f"tables.{name}", f"this model has no such table; it has: {', '.join(known)}")


def _check_table(config: Config, name: str, chosen: TableSettings) -> None:
    path, map = f"tables.{name}", chosen.map
    shares = map not in ("auto", "exact")
    idle = {
        "rows": not shares,
        "compression": not shares or map == "dynamic",
        "head": map != "head_tail",
        "hashes": map not in ("hashed", "head_tail"),
        "learned_weights": map not in ("hashed", "head_tail"),
        "combine": map != "quotient_remainder",
        "admission": map != "dynamic",
        "eviction": map != "dynamic",
    }
    for setting, without_effect in idle.items():
        if without_effect and getattr(chosen, setting) != getattr(_DEFAULTS, setting):
            raise SettingError(f"{path}.{setting}", f"has no effect with map = {map}: leave it out, or change the map")
    if chosen.rows and chosen.compression:
        raise SettingError(f"{path}.compression", "and rows both say how large the table is: leave one out")
    if map == "dynamic":
        _check_dynamic(config, path, name, chosen)
    if shares and not chosen.rows and chosen.compression <= 1.0:
        raise SettingError(f"{path}.compression", f"map = {map} needs rows, or a compression of more than 1")
    if map == "head_tail" and not 0.0 < chosen.head < 1.0:
        raise SettingError(f"{path}.head", "must be between 0 and 1; all rows shared is map = hashed")
    if chosen.learned_weights and chosen.hashes == 1:
        raise SettingError(f"{path}.learned_weights", "weigh a key's rows against each other: take 2 hashes or more")
    if chosen.learned_weights and config.model.kind == "item2vec":
        raise SettingError(
            f"{path}.learned_weights", "is for two_tower: item2vec adds up what its threads have changed of vectors"
        )
    if not chosen.lists_keys and map != "dynamic":
        _check_without_vocabulary(path, name, chosen)
    if chosen.vectors and shares:
        raise SettingError(f"{path}.vectors", f"need a row for every key, and with map = {map} keys share rows")
    if chosen.vectors and config.train.grow:
        raise SettingError(f"{path}.vectors", "and train.grow both say how the table begins: leave one of them out")
    if chosen.frozen and not chosen.vectors and not config.train.grow:
        raise SettingError(f"{path}.frozen", "leaves the table as random as it begins: name `vectors` or train.grow")
    if chosen.disk and config.cluster.device == "cuda":
        raise SettingError(f"{path}.disk", "is for tables on CPU; set cluster.device = cpu")
    if chosen.dim % 4:
        raise SettingError(f"{path}.dim", f"must be divisible by 4, which the table kernels ask for; got {chosen.dim}")
    if chosen.dim not in (0, config.model.dim) and not config.model.hidden:
        raise SettingError(
            f"{path}.dim",
            "without hidden layers a tower adds its inputs up, which then have model.dim: set model.hidden",
        )


def _check_dynamic(config: Config, path: str, name: str, chosen: TableSettings) -> None:
    if name != "user" and not name.startswith("query_"):
        raise SettingError(
            f"{path}.map",
            "dynamic is for user and query features: what is ranked must not change while it is trained. Leave rare "
            "items out by keys.min_count, or let them share rows by map = head_tail",
        )
    if config.cluster.uvm_caching:
        raise SettingError(
            "cluster.uvm_caching",
            f"and {path}.map = dynamic exclude each other: its cache would keep rows of former keys",
        )
    if chosen.frozen:
        raise SettingError(f"{path}.frozen", "and map = dynamic exclude each other: rows change their keys")
    if chosen.rows < 2:
        raise SettingError(
            f"{path}.rows", "is needed: at least 2, one for a key and one that keys without a row of their own share"
        )


def _check_without_vocabulary(path: str, name: str, chosen: TableSettings) -> None:
    if name != "user" and not name.startswith("query_"):
        raise SettingError(
            f"{path}.vocabulary", "false is for user and query features: items must be listed to be ranked"
        )
    if chosen.map != "hashed":
        raise SettingError(
            f"{path}.vocabulary", f"false needs map = hashed: {chosen.map} has to know the keys, or how many there are"
        )
    if not chosen.rows:
        raise SettingError(f"{path}.rows", "is needed: without a vocabulary the number of keys is not known")


def row_map(chosen: TableSettings, spec: TableSpec, path: str) -> RowMap:
    """The map of table `spec`, a row for every id, that `chosen` asks for (auto: exact). Raises SettingError."""
    ids = spec.rows
    if chosen.map in ("auto", "exact"):
        return RowMap.exact(ids)
    if chosen.map == "dynamic":
        return RowMap("dynamic", ids, chosen.rows, eviction=chosen.eviction, admission=chosen.admission)
    setting = f"{path}.rows" if chosen.rows else f"{path}.compression"
    factor = 1.0
    if chosen.learned_weights and not chosen.rows:  # compression counts their bytes, too
        shared = 1.0 - (chosen.head if chosen.map == "head_tail" else 0.0)
        factor += shared * _WEIGHTS_PER_ROW * (-(-chosen.hashes // 4) * 4) / spec.dim
    rows = chosen.rows or int(ids / (chosen.compression * factor))
    if rows >= ids:
        raise SettingError(setting, f"{rows:,} rows are enough for all {ids:,} keys: set map = exact")
    if rows < 2:
        raise SettingError(setting, f"leaves {rows} rows for {ids:,} keys; ask for more")
    if chosen.map == "quotient_remainder":
        try:
            return RowMap.quotient_remainder(ids, rows, product=chosen.combine == "product")
        except ValueError as error:
            raise SettingError(setting, str(error)) from None
    kind: MapKind = "head_tail" if chosen.map == "head_tail" else "hashed"
    head = min(rows - 1, max(1, round(chosen.head * rows))) if kind == "head_tail" else 0
    weight_rows = min(ids - head, _WEIGHTS_PER_ROW * (rows - head)) if chosen.learned_weights else 0
    return RowMap(kind, ids, rows, head=head, hashes=chosen.hashes, weight_rows=weight_rows)


def _within(config: Config, tables: ModelTables, budget: int) -> ModelTables:
    """`tables` with as many `auto` ones as need be turned into head_tail, for them to fit `budget` bytes.

    By the stages of `_STAGES`, each no further than needed, the largest table first. Raises SettingError if that is not
    enough.
    """
    maps = dict(tables.maps)
    optimizer = tables.optimizer

    def total() -> int:
        return sum(one.num_bytes(optimizer) for one in physical_tables(tables.specs, maps) if not one.folder)

    groups: dict[str, list[TableSpec]] = {}
    for spec in tables.specs:
        name = key_map_of(spec.name)
        chosen = config.tables.get(name, _DEFAULTS)
        if chosen.map == "auto" and not chosen.disk and not chosen.vectors:
            groups.setdefault(name, []).append(spec)
    sizes = {name: sum(spec.num_bytes(optimizer) for spec in specs) for name, specs in groups.items()}
    order = sorted(groups, key=lambda name: (-sizes[name], name))
    for items, most in _STAGES:
        for name in (one for one in order if (one == "item") == items):
            excess = total() - budget
            if excess <= 0:
                break
            row_bytes = groups[name][0].num_bytes(optimizer) // groups[name][0].rows
            now = sum(maps[spec.name].rows * row_bytes for spec in groups[name])
            compression = min(most, sizes[name] / max(1, now - excess)) if now > excess else most
            for spec in groups[name]:
                rows = int(spec.rows / compression)
                if 4 <= rows < maps[spec.name].rows:
                    shared = TableSettings(map="head_tail", rows=rows)
                    maps[spec.name] = row_map(shared, spec, f"tables.{name}")
    if total() > budget:
        raise SettingError(
            "keys.budget",
            f"{config.keys.budget} is too little: the tables take {format_bytes(total())} where those with map = auto "
            f"share rows as much as makes sense, and {format_bytes(tables.num_bytes)} where none does. Raise it, lower "
            "model.dim, set model.precision = fp16, or give a table a map of its own under [tables.NAME]",
        )
    return ModelTables(tables.specs, maps, optimizer)


def key_map_of(table: str) -> str:
    return "item" if table in ("input", "output", "history") else table


def table_warnings(tables: ModelTables) -> Iterator[str]:
    """What a user should know of the maps before training, and of a plan."""
    for spec in tables.specs:
        map = tables.maps[spec.name]
        if map.is_exact or spec.name not in ("item", "output"):
            continue
        if map.hashes == 1 and not map.remainders:
            yield (
                "tables.item.hashes = 1: items that share their only row have one vector and cannot be ranked among "
                "each other, which leaves little of recall; take 2 or more"
            )
        times = map.ids / map.rows
        if times >= _HARMLESS:
            yield (
                f"the candidates of table {spec.name} share rows, {map.ids:,} keys in {map.rows:,} ({times:.3g}x "
                f"fewer), and ranking suffers from that: on Gowalla {_MEASURED[map.kind]}; share the rows of users and "
                "features first, take fp16 (which cost nothing) and a smaller dim, or raise keys.budget"
            )
