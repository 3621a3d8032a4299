"""What it costs a ranking that items share rows: recall against bytes of the item table, for every row map.

    python -m tests.benchmarks.hash_quality [--dataset gowalla|diginetica] [--folder DIR] [--minutes 60] [--quick]
                                            [--validation] [--only REGEX] [--epochs N]

Every point is the two-tower recipe of deploy/recipes/ with another item table, trained and scored on test in processes
of its own, as a user would. Compression is of bytes of embeddings (and learned weights), against 64 float32 numbers for
every item; the map that `best_10x_kept` speaks of was chosen on validation data (`--validation`, fewer `--epochs`).
Points that the time does not suffice for are left out. With `--folder` the points are kept there, and a further call
goes on behind them.

    head_tail_2x_kept    recall@20 of head + tail at half the bytes over that of the exact map (Gowalla)
    best_10x_kept        the same at a tenth of the bytes, of the map that validation found the best
    <data set>           variant -> {"recall" (Diginetica: hit rate), "kept", "weight_bytes", "compression",
                         "seconds"}
    query_side           the same for the users' table of towers that see users and history: there a vector need not
                         tell a user from all others

hash_quality.svg, in `--folder` or the current one, shows recall over bytes. The last line on standard output is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.hash_quality_plot import plot
from tests.benchmarks.recipes import Kept, run_recipe, train_recipe

METRICS = {"gowalla": "recall@20", "diginetica": "hit_rate@20"}
HOLDOUTS = {"gowalla": "items", "diginetica": "last_sessions"}


def _item(**table: Any) -> list[str]:
    return [f"tables.item.{name}={value}" for name, value in table.items()]


def _shared(times: int) -> dict[str, list[str]]:
    """The maps at `times` fewer bytes, by name."""
    found = {
        f"head_tail {times}x": _item(map="head_tail", compression=times),
        f"2 hashes {times}x": _item(map="hashed", compression=times),
        f"quotient_remainder {times}x": _item(map="quotient_remainder", compression=times),
        f"1 hash {times}x": _item(map="hashed", compression=times, hashes=1),
        f"3 hashes {times}x": _item(map="hashed", compression=times, hashes=3),
    }
    if times > 4:  # numbers of half the size, and half as many of them
        quarter = {"compression": times / 4, "precision": "fp16"}
        found |= {
            f"head_tail fp16 {times}x": _item(map="head_tail", compression=times / 2, precision="fp16"),
            f"head_tail fp16 dim 32 {times}x": ["model.dim=32", *_item(map="head_tail", **quarter)],
            f"quotient_remainder fp16 dim 32 {times}x": ["model.dim=32", *_item(map="quotient_remainder", **quarter)],
        }
    return found


BEST_10X = "quotient_remainder fp16 dim 32 10x"
USERS = "user "  # variants of the users' table begin so
VARIANTS: dict[str, list[str]] = {"exact": [], **_shared(10), **_shared(2), **_shared(5), **_shared(50)}
VARIANTS |= {
    "exact fp16 2x": _item(precision="fp16"),
    "exact fp16 dim 32 4x": ["model.dim=32", *_item(precision="fp16")],
    "exact fp16 dim 12 11x": ["model.dim=12", *_item(precision="fp16")],
}
VARIANTS |= {
    f"{USERS}exact": [],
    f"{USERS}hashed 10x": ["tables.user.map=hashed", "tables.user.compression=10"],
    f"{USERS}head_tail 10x": ["tables.user.map=head_tail", "tables.user.compression=10"],
}
FIRST = ("exact", "head_tail 2x", BEST_10X)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hash_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=sorted(METRICS), action="append", help="default: all")
    parser.add_argument("--folder", type=Path, help="where points are kept from call to call")
    parser.add_argument("--minutes", type=float, default=60.0, help="no point is begun after these")
    parser.add_argument("--epochs", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--validation", action="store_true", help="score held-out training data; test is not read")
    parser.add_argument("--only", default="", help="variants whose names match this regular expression")
    parser.add_argument("--quick", action="store_true", help="Gowalla, one epoch, the first three variants")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.dataset, arguments.epochs, arguments.only = ["gowalla"], 1, "|".join(f"^{name}$" for name in FIRST)
    began = time.monotonic()
    points = Points(arguments.folder, arguments.epochs, arguments.validation)
    datasets = arguments.dataset or ["gowalla", "diginetica"]
    for dataset in datasets:
        for name in order(re.compile(arguments.only)):
            if name.startswith(USERS) and dataset != "gowalla":
                continue
            points.measure(dataset, name, deadline=began + 60 * arguments.minutes)
    found = {dataset: points.table(dataset) for dataset in datasets}
    plot({name: table for name, table in found.items() if table}, (arguments.folder or Path()) / "hash_quality.svg")
    gowalla = found.get("gowalla", {})
    result = {
        "head_tail_2x_kept": gowalla.get("head_tail 2x", {}).get("kept"),
        "best_10x_kept": gowalla.get(BEST_10X, {}).get("kept"),
        "best_10x": BEST_10X,
        "scored_on": "validation" if arguments.validation else "test",
        **{
            name: {one: row for one, row in table.items() if not one.startswith(USERS)} for name, table in found.items()
        },
        "query_side": {one: row for one, row in gowalla.items() if one.startswith(USERS)},
    }
    print(json.dumps(result | {"wall_seconds": round(time.monotonic() - began)}))


def order(only: re.Pattern[str]) -> Iterable[str]:
    """The variants asked for, those that bars are about first."""
    names = (*FIRST, *(name for name in VARIANTS if name not in FIRST))
    return [name for name in names if only.search(name)]


def recipe_of(dataset: str) -> str:
    return f"{dataset}_two_tower"


def key_of(variant: str) -> str:
    return f"{variant} {' '.join(VARIANTS[variant])}"


class Points:
    """What each variant keeps, on test or on validation data, after `epochs` (0: the recipe's)."""

    def __init__(self, folder: Path | None, epochs: int, validation: bool) -> None:
        self._epochs, self._validation = epochs, validation
        self._kept = Kept(folder, f"hash_quality.{'validation' if validation else 'test'}.{epochs or 'all'}")

    def measure(self, dataset: str, name: str, *, deadline: float) -> None:
        self._kept.get(recipe_of(dataset), key_of(name), lambda: self._measured(dataset, name), deadline=deadline)

    def table(self, dataset: str) -> dict[str, Any]:
        """Variant -> its point with the share of the exact map's recall that it keeps."""
        found = {name: self._kept.find(recipe_of(dataset), key_of(name)) for name in VARIANTS}
        known = {name: point for name, point in found.items() if point is not None}
        table = {}
        for name, point in known.items():
            exact = known.get(f"{USERS}exact" if name.startswith(USERS) else "exact")
            kept = None if exact is None else round(point["recall"] / exact["recall"], 4)
            times = None if exact is None else round(exact["weight_bytes"] / point["weight_bytes"], 2)
            table[name] = {**point, "kept": kept, "compression": times}
        return table

    def _measured(self, dataset: str, name: str) -> dict[str, Any]:
        settings = [*VARIANTS[name], f"train.metric={METRICS[dataset]}", "train.checkpoint_seconds=3600"]
        if name.startswith(USERS):
            settings.append('model.query=["user", "history"]')
        if self._epochs:
            settings.append(f"train.epochs={self._epochs}")
        if self._validation:
            settings += [f"data.holdout={HOLDOUTS[dataset]}", "train.validate_every=1000"]
            run = train_recipe(recipe_of(dataset), *settings)
            value = run["validations"][-1][METRICS[dataset]]
        else:
            run = run_recipe(recipe_of(dataset), "20", *settings)
            value = run["metrics"][METRICS[dataset]]
        table = "user" if name.startswith(USERS) else "item"
        num_bytes = next(one["weight_bytes"] for one in run["tables"] if one["table"] == table)
        return {"recall": round(value, 4), "weight_bytes": num_bytes, "seconds": round(run["seconds"])}


if __name__ == "__main__":
    main()
