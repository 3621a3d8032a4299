"""The two-tower recipes on test over several seeds: mean and spread, time to 95 % of the quality, and two workers.

    python -m tests.benchmarks.two_tower_quality [--dataset gowalla|diginetica|beauty] [--seeds 3] [--folder DIR]
                                                 [--minutes 60] [--quick]

Every run is a recipe of deploy/recipes/, trained on all of train and scored once on test, in processes of its own, with
`train.seed` choosing order, tables and dropout. Settings and epochs are the recipe's, which validation data chose.

    gowalla_recall20, gowalla_ndcg20, diginetica_p20, diginetica_mrr20 (both %), beauty_hr10    means over the seeds
    <data set>    "mean", "spread" (standard deviation) of each metric, "runs", "seconds" of training (mean),
                  "seconds_to_95" (share of the epochs after which validation data score 95 % of what they do at the
                  end, times "seconds"), "two_workers" (the recipe with --workers 2, one seed), "published"

No run is begun after `--minutes`; with `--folder` runs are kept there, and a further call goes on behind them. The last
line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.recipes import RECIPES, Kept, run_recipe, train_recipe

Json = dict[str, Any]

METRICS = {
    "gowalla": {"recall20": "recall@20", "ndcg20": "ndcg@20"},
    "diginetica": {"p20": "hit_rate@20", "mrr20": "mrr@20"},
    "beauty": {"hr10": "hit_rate@10", "ndcg10": "ndcg@10"},
}
PERCENT = {"diginetica"}
HOLDOUTS = {"gowalla": ["data.holdout=items"], "diginetica": ["data.holdout=last_sessions"], "beauty": []}
PUBLISHED = {
    # BARS, docs/Matching/leaderboard/gowalla_m1.csv, dim 64
    "gowalla": {
        "YoutubeDNN": {"recall20": 0.1754, "ndcg20": 0.1473},
        "LightGCN": {"recall20": 0.1830, "ndcg20": 0.1554},
    },
    "diginetica": {},
    "beauty": {"SASRec": {"hr10": 0.0605, "ndcg10": 0.0318}, "S3-Rec": {"hr10": 0.0647, "ndcg10": 0.0327}},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.two_tower_quality", description=__doc__)
    parser.add_argument("--dataset", choices=list(METRICS), action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where runs are kept from call to call")
    parser.add_argument("--minutes", type=float, default=60.0, help="no run is begun after these")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    arguments = parser.parse_args()
    began = time.monotonic()
    runs = Runs(arguments.folder, deadline=began + 60 * arguments.minutes, quick=arguments.quick)
    result: Json = {}
    for dataset in arguments.dataset or list(METRICS):
        result[dataset] = table(runs, dataset, 1 if arguments.quick else arguments.seeds)
    bars = {
        f"{dataset}_{name}": result[dataset]["mean"][name] if dataset in result and result[dataset]["runs"] else None
        for dataset, names in METRICS.items()
        for name in names
        if name != "ndcg10"
    }
    print(json.dumps(bars | result | {"wall_seconds": round(time.monotonic() - began)}))


class Runs:
    """The recipes' runs; None for those that the time did not suffice for."""

    def __init__(self, folder: Path | None, *, deadline: float, quick: bool) -> None:
        self._kept, self._deadline = Kept(folder, f"two_tower_quality.{'quick' if quick else 'all'}"), deadline
        self._settings = ["train.checkpoint_seconds=3600", *(["train.epochs=1"] if quick else [])]

    def on_test(self, dataset: str, *settings: str) -> Json | None:
        """{metrics of `dataset`, "seconds", "epochs", "peak_rss_bytes"} of the recipe; None where time is over."""
        k = next(iter(METRICS[dataset].values())).partition("@")[2]

        def measure() -> Json:
            run = run_recipe(f"{dataset}_two_tower", k, *self._settings, *settings)
            scale = 100 if dataset in PERCENT else 1
            values = {name: round(scale * run["metrics"][metric], 4) for name, metric in METRICS[dataset].items()}
            return values | {name: run[name] for name in ("seconds", "epochs", "peak_rss_bytes")}

        run: Json | None = self._get(dataset, " ".join(settings), measure)
        return run

    def share_to_95(self, dataset: str) -> float | None:
        """Share of the epochs after which validation data score 95 % of what they do at the end."""
        metric = next(iter(METRICS[dataset].values()))
        settings = ["train.validate_every=1", f"train.metric={metric}", *HOLDOUTS[dataset], *self._settings]

        def measure() -> float:
            curve = [one[metric] for one in train_recipe(f"{dataset}_two_tower", *settings)["validations"]]
            return next(number for number, value in enumerate(curve, 1) if value >= 0.95 * curve[-1]) / len(curve)

        share: float | None = self._get(dataset, "validation", measure)
        return share

    def _get(self, dataset: str, name: str, measure: Callable[[], Any]) -> Any:
        return self._kept.get(f"{dataset}_two_tower", name, measure, deadline=self._deadline)


def table(runs: Runs, dataset: str, num_seeds: int) -> Json:
    found = [run for seed in range(num_seeds) if (run := runs.on_test(dataset, f"train.seed={seed}")) is not None]
    share = runs.share_to_95(dataset)
    names = METRICS[dataset]
    settings = tomllib.loads((RECIPES / f"{dataset}_two_tower.toml").read_text())["model"]
    result: Json = {"published": PUBLISHED[dataset], "query": settings["query"], "runs": len(found)}
    if found:
        seconds = statistics.mean(run["seconds"] for run in found)
        result |= {
            "mean": {name: round(statistics.mean(run[name] for run in found), 4) for name in names},
            "spread": {
                name: round(statistics.stdev(run[name] for run in found), 4) if len(found) > 1 else None
                for name in names
            },
            "seconds": round(seconds, 1),
            "seconds_to_95": None if share is None else round(share * seconds, 1),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in found),
        }
    return result | {"two_workers": runs.on_test(dataset, "train.seed=0", "cluster.workers=2")}


if __name__ == "__main__":
    main()
