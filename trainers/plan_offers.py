"""The smallest changes with which a plan's tables fit: more workers, fp16, rows that keys share, smaller vectors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cluster.config import Config, config_from_dict, config_to_dict
from cluster.errors import SettingError
from embedding_service.shard_plan import Machines
from trainers.model_tables import key_map_of
from trainers.plan import Keys, Plan, make_plan


@dataclass(frozen=True)
class Offer:
    """A change with which the tables fit: settings for `--set`, or another number of workers; and the plan then."""

    change: str
    settings: tuple[str, ...]
    workers: int
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "settings": list(self.settings),
            "workers": self.workers,
            "workers_per_machine": self.plan.machines.workers_per_machine,
            "table_bytes_per_rank": self.plan.largest_rank_bytes,
            "table_limit_bytes_per_rank": self.plan.table_limit_bytes,
        }


def offers(config: Config, keys: Keys, machines: Machines) -> list[Offer]:
    """Changes of one thing each (or of precision and one more) with which the tables fit, the smallest first: fp16,
    more workers, UVM caching, tables on local disk, keys that share rows, smaller vectors.
    """
    found: list[Offer] = []
    half = ("model.precision=fp16",)
    can_halve = config.model.precision == "fp32"
    if can_halve and (offer := _offer("fp16 tables", config, keys, machines, half)) is not None:
        found.append(offer)
    for settings in ((), *([half] if can_halve and not found else [])):
        also = "fp16 tables and " if settings else ""
        for offer in (
            _more_workers(config, keys, machines, settings, also),
            _uvm_caching(config, keys, machines, settings, also),
            _on_disk(config, keys, machines, settings, also),
            _shared_rows(config, keys, machines, settings, also),
            _smaller_dim(config, keys, machines, settings, also),
        ):
            if offer is not None:
                found.append(offer)
    return found


def _offer(change: str, config: Config, keys: Keys, machines: Machines, settings: tuple[str, ...]) -> Offer | None:
    """The offer of `settings` on `machines` if the tables fit then."""
    try:
        plan = make_plan(with_settings(config, settings), keys, machines)
    except SettingError:
        return None
    return Offer(change, settings, machines.workers, plan) if plan.fits else None


def _more_workers(config: Config, keys: Keys, machines: Machines, settings: tuple[str, ...], also: str) -> Offer | None:
    """The fewest workers that hold the tables, found by halving; at most 1000 times as many."""
    if machines.device == "cpu" and machines.num_machines == 1:  # more workers of one machine share its memory
        machines = dataclasses.replace(machines, workers_per_machine=machines.workers)

    def at(workers: int) -> Offer | None:
        more = dataclasses.replace(machines, workers=workers)
        change = f"{also}{workers} workers on {more.num_machines} machine{'s' * (more.num_machines > 1)}"
        return _offer(change, config, keys, more, settings)

    low, high = machines.workers, 2 * machines.workers
    while (best := at(high)) is None:
        low, high = high, 2 * high
        if high > 1000 * machines.workers:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        offer = at(middle)
        if offer is None:
            low = middle
        else:
            high, best = middle, offer
    return best


def _uvm_caching(config: Config, keys: Keys, machines: Machines, settings: tuple[str, ...], also: str) -> Offer | None:
    if machines.device == "cpu" or config.cluster.uvm_caching:
        return None
    change = f"{also}tables in the machine's memory, a cache on the GPU (slower)"
    return _offer(change, config, keys, machines, (*settings, "cluster.uvm_caching=true"))


def _on_disk(config: Config, keys: Keys, machines: Machines, settings: tuple[str, ...], also: str) -> Offer | None:
    """The fewest tables, the largest first, on the machines' own disks, in a folder that is the user's to name."""
    if machines.device != "cpu":
        return None
    sizes: dict[str, int] = {}
    for one in make_plan(with_settings(config, settings), keys, machines).tables:
        if one.map is not None and one.shards.kernel != "disk":
            name = key_map_of(one.spec.name)
            sizes[name] = sizes.get(name, 0) + sum(one.weight_bytes) + sum(one.optimizer_bytes)
    moved: list[str] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        moved.append(name)
        change = f"{also}{', '.join(moved)} on local disk, mapped into memory (slower)"
        on_disk = (*settings, *(f"tables.{one}.disk=FOLDER" for one in moved))
        if (offer := _offer(change, config, keys, machines, on_disk)) is not None:
            return offer
    return None


def _shared_rows(config: Config, keys: Keys, machines: Machines, settings: tuple[str, ...], also: str) -> Offer | None:
    """The largest `keys.budget` that fits: key maps that are `auto` then share rows."""
    changed = with_settings(config, settings)
    if changed.keys.budget:
        return None
    plan = make_plan(changed, keys, machines)
    mib = (plan.table_limit_bytes - sum(one.buffer_bytes for one in plan.tables)) * machines.workers // 2**20
    for percent in (100, 99, 97, 95):  # shards are cut to whole rows, and sharing asks for more rows in a step
        budget = f"{mib * percent // 100}MiB"
        if mib > 0:
            offer = _offer("", config, keys, machines, (*settings, f"keys.budget={budget}"))
            if offer is not None:
                sharing = [
                    f"{one.spec.name} {one.map.ids / one.map.rows:.3g}x"
                    for one in offer.plan.tables
                    if one.map is not None and not one.map.is_exact
                ]
                return dataclasses.replace(offer, change=f"{also}shared rows (fewer rows: {', '.join(sharing)})")
    return None


def _smaller_dim(config: Config, keys: Keys, machines: Machines, settings: tuple[str, ...], also: str) -> Offer | None:
    """The largest dimension, a multiple of 4, that fits."""
    low, high, best = 0, config.model.dim // 4, None
    while high - low > 1:
        middle = (low + high) // 2
        dim = 4 * middle
        offer = _offer(f"{also}vectors of dim {dim}", config, keys, machines, (*settings, f"model.dim={dim}"))
        if offer is None:
            high = middle
        else:
            low, best = middle, offer
    return best


def with_settings(config: Config, settings: tuple[str, ...]) -> Config:
    """`config` with `section.name=value` or `tables.NAME.name=value` changed, as `--set` does. Raises SettingError."""
    tree = config_to_dict(config)
    for setting in settings:
        path, _, value = setting.partition("=")
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = True if value == "true" else int(value) if value.isdecimal() else value
    return config_from_dict(tree)
