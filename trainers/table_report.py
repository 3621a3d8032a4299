"""What a run says of its tables: sizes, row maps, and collisions expected and measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.sizes import format_bytes
from embedding_service.collisions import count_collisions, expected_collisions
from embedding_service.hashed_keys import NUM_IDS
from embedding_service.row_maps import RowMap
from trainers.model_tables import ModelTables

_COUNTED_IDS = 20_000_000  # counting takes some 24 bytes for each


def table_report(tables: ModelTables, *, measured: bool = True) -> list[dict[str, Any]]:
    """One entry for every table that holds embeddings, its learned weights included: {"table", "map", "keys", "rows",
    "dim", "precision", "weight_bytes", "bytes", "exact_bytes", "expected", "measured"}.

    weight_bytes: of embeddings and learned weights; bytes: with optimiser state. expected, measured: `Collisions` as a
    mapping; None where there are none, or the number of keys is not known, or too large to be counted (or not
    `measured`).
    """
    report = []
    known: dict[RowMap, Any] = {}
    for spec in tables.specs:
        map = tables.maps[spec.name]
        hashed = map.ids == NUM_IDS
        if map not in known:
            without = map.is_exact or hashed
            known[map] = (
                None if without else asdict(expected_collisions(map)),
                None if without or not measured or map.ids > _COUNTED_IDS else asdict(count_collisions(map)),
            )
        expected, found = known[map]
        report.append(
            {
                "table": spec.name,
                "map": map.kind,
                "keys": None if hashed else map.ids,
                "rows": map.rows,
                "head": map.head,
                "hashes": map.hashes,
                "weight_rows": map.weight_rows,
                "eviction": map.eviction if map.is_dynamic else None,
                "admission": map.admission if map.is_dynamic else None,
                "dim": spec.dim,
                "precision": spec.precision,
                "weight_bytes": sum(table.weight_bytes(table.rows) for table in map.tables(spec)),
                "bytes": sum(table.num_bytes(tables.optimizer) for table in map.tables(spec)),
                "exact_bytes": None if hashed else spec.num_bytes(tables.optimizer),
                "expected": expected,
                "measured": found,
            }
        )
    return report


def lines_of(report: list[dict[str, Any]]) -> list[str]:
    """A line of text for every table whose keys share rows."""
    return [_line(one) for one in report if one["map"] != "exact"]


def _line(one: dict[str, Any]) -> str:
    how = {
        "hashed": f"{one['hashes']} hashes",
        "head_tail": f"{one['head']:,} of their own, {one['hashes']} hashes for the others",
        "quotient_remainder": "quotients and remainders",
        "dynamic": f"{one['eviction']}, from {one['admission']} occurrences on",
    }[one["map"]]
    if one["weight_rows"]:
        how += ", learned weights"
    if one["keys"] is None:
        return f"table {one['table']}: any number of keys in {one['rows']:,} rows ({how}), {format_bytes(one['bytes'])}"
    text = (
        f"table {one['table']}: {one['keys']:,} keys in {one['rows']:,} rows ({how}), {format_bytes(one['bytes'])} "
        f"instead of {format_bytes(one['exact_bytes'])}; "
    )
    found = one["measured"] or one["expected"]
    text += f"{_percent(found['same_rows'])} have the same rows as another key"
    if one["measured"]:
        text += f" ({_percent(one['expected']['same_rows'])} expected)"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * np.round(share, 3):.1f} %"
