"""Gowalla trained on 80 % of its items and then grown to all of them, beside all of them trained at once.

    python -m tests.benchmarks.growth [--kind item2vec] [--share 0.5]

A fifth of the items, chosen by a hash of their keys, is taken out of the training sessions; the recipe trains on the
rest, and a second run on all sessions begins with its tables (`train.grow`). Recall@20 is that of the test split over
all items, as in `gowalla`.

    kept            recall of the grown run / of the run trained at once
    share           epochs of the grown run as a share of the recipe's; not searched for
    ..._seconds     of training alone
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import load_config
from embedding_service.hashing import stable_hash
from embedding_service.ragged import Ragged
from tests.benchmarks.recipes import RECIPES, data_folder, lexshard, progress

NEW_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("item2vec", "two_tower"), default="item2vec")
    parser.add_argument("--share", type=float, default=0.5, help="epochs of the grown run / the recipe's")
    options = parser.parse_args()
    recipe = RECIPES / f"gowalla_{options.kind}.toml"
    os.environ["LEXSHARD_DATA"] = str(data_folder())
    epochs = load_config(recipe).train.epochs
    with tempfile.TemporaryDirectory(prefix="lexshard-") as name:
        folder = Path(name)
        known = without_new_items(data_folder() / "gowalla" / "train.parquet", folder / "known.parquet")
        once = trained(recipe, folder / "once")
        old = trained(recipe, folder / "old", f"data.train={folder / 'known.parquet'}", score=False)
        grown = trained(
            recipe,
            folder / "grown",
            f"train.grow={folder / 'old'}",
            f"train.epochs={max(1, round(options.share * epochs))}",
        )
        starts = json.loads((folder / "grown" / "start.json").read_text())
    result = {
        "kept": round(grown["recall20"] / once["recall20"], 4),
        "recall20_at_once": round(once["recall20"], 4),
        "recall20_grown": round(grown["recall20"], 4),
        "share": options.share,
        "at_once_seconds": once["seconds"],
        "old_seconds": old["seconds"],
        "grown_seconds": grown["seconds"],
        "known_events": known,
        "known_items": starts[0]["known"],
        "new_items": starts[0]["new"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in (once, old, grown)),
    }
    print(json.dumps(result))


def without_new_items(source: Path, target: Path) -> float:
    """The sessions without a fifth of the items; the share of events that is left."""
    table = pq.read_table(source)
    column = table.column("items").combine_chunks()
    lists = Ragged.from_arrow(column)
    keys = np.asarray(lists.values)
    known = lists.keep(stable_hash(keys, seed=17) % np.uint64(1000) >= np.uint64(1000 * NEW_SHARE))
    items = pa.LargeListArray.from_arrays(pa.array(known.offsets), pa.array(np.asarray(known.values)))
    table = table.set_column(table.schema.get_field_index("items"), "items", items)
    pq.write_table(table.filter(pa.array(known.lengths > 0)), target)
    return round(len(known.values) / len(keys), 4)


def trained(recipe: Path, run: Path, *settings: str, score: bool = True) -> dict[str, Any]:
    """The recipe trained in `run`, and scored."""
    flags = [part for setting in (f"run={run}", *settings) for part in ("--set", setting)]
    result = lexshard(["train", str(recipe), "--json", *flags], dict(os.environ))
    found = {"seconds": round(result["seconds"], 1), "peak_rss_bytes": result["peak_rss_bytes"], "recall20": 0.0}
    if score:
        command = ["evaluate", str(run), "--which", "last", "--json", "--k", "20"]
        found["recall20"] = lexshard(command, dict(os.environ))["results"][0]["recall@20"]
    progress(json.dumps({run.name: found}))
    return found


if __name__ == "__main__":
    main()
