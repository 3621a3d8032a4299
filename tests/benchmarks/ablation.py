"""What each choice of a two-tower recipe adds: the recipe with one thing changed, on validation data.

    python -m tests.benchmarks.ablation [--dataset gowalla|diginetica] [--seeds 3] [--epochs 2] [--minutes 28]
                                         [--folder DIR] [--quick]

Every run is the recipe of deploy/recipes/ for fewer epochs, with `data.holdout` holding out the validation cases and
`train.seed` choosing these, the order and the tables. Test data are not read. Runs are processes of one thread, one on
each core; all changes with one seed come before the next seed, and none is begun after `--minutes`. With `--folder`
runs are kept there, and a further call goes on behind them.

    base      the recipe: mean and standard deviation of the metric over seeds
    effect    mean over seeds of (changed - base), both with the same seed and so the same validation cases
    spread    standard deviation of that difference over seeds (null for one seed)
    runs      seeds that the time sufficed for
    seconds   mean training time

Effects are of short runs: they say what a choice is worth there, and a longer run may make up for some of it. The last
line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.recipes import RECIPES, Kept, train_recipe

Job = tuple[int, str, str, str]  # seed, data set, group, name
Run = dict[str, float]

METRICS = {"gowalla": "recall@20", "diginetica": "hit_rate@20"}
HOLDOUTS = {"gowalla": "items", "diginetica": "last_sessions"}

# name -> settings on top of the recipe's. A temperature is given as a factor on the recipe's.
CHANGES: dict[str, dict[str, tuple[str, ...]]] = {
    "logq": {
        "no correction": ("model.logq=0",),
        "positive, too": ("model.logq_positive=true",),
        "streaming frequencies": ("model.frequency_slots=65536",),
    },
    "mixed negatives": {
        "1024 uniform": ("model.sampled_negatives=1024",),
        "uniform alone": ("model.in_batch=false", "model.sampled_negatives=2048"),
    },
    "hard negatives": {
        "512 mined": ("model.mined_negatives=512", "model.mined_every=100"),
    },
    "temperature": {
        "x 0.7": ("temperature*0.7",),
        "x 1.4": ("temperature*1.4",),
        "learned": ("model.learn_temperature=true",),
    },
    "history encoder": {
        "mean": ("model.history_decay=1",),
        "recency .7": ("model.history_decay=0.7",),
        "last item": ('model.query=["last_item"]',),
    },
    "objective": {
        "both directions": ("model.objective=nt_xent",),
    },
}
SAME = {"gowalla": {"mean"}, "diginetica": {"recency .7"}}  # what the recipe has already


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", choices=sorted(METRICS), action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=28.0)
    parser.add_argument("--folder", type=Path, help="where runs are kept from call to call")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    arguments = parser.parse_args()
    seeds, epochs = (1, 1) if arguments.quick else (arguments.seeds, arguments.epochs)
    datasets = arguments.dataset or sorted(METRICS)
    jobs = [(seed, *job) for seed in range(seeds) for dataset in datasets for job in variants(dataset)]
    began = time.monotonic()
    kept = Kept(arguments.folder, f"ablation.{epochs}")

    def run(job: Job) -> Run | None:
        seed, dataset, group, name = job
        found: Run | None = kept.get(
            f"{dataset}_two_tower",
            f"{seed} / {group} / {name} {' '.join(changed(group, name))}",
            lambda: measure(*job, epochs),
            deadline=began + 60 * arguments.minutes,
        )
        return found

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = dict(zip(jobs, pool.map(run, jobs), strict=True))
    result: dict[str, Any] = {dataset: table(dataset, seeds, runs) for dataset in datasets}
    print(json.dumps(result | {"epochs": epochs, "wall_seconds": round(time.monotonic() - began)}))


def variants(dataset: str) -> list[tuple[str, str, str]]:
    """(data set, group, name) of the base and of all changes to it."""
    names = [(group, name) for group, changes in CHANGES.items() for name in changes if name not in SAME[dataset]]
    return [(dataset, "base", "recipe"), *((dataset, *name) for name in names)]


def changed(group: str, name: str) -> tuple[str, ...]:
    return () if group == "base" else CHANGES[group][name]


def measure(seed: int, dataset: str, group: str, name: str, epochs: int) -> Run:
    """A run in a process of its own: {"value" of the data set's metric, "seconds" of training}."""
    settings = [
        f"train.seed={seed}",
        f"train.epochs={epochs}",
        f"train.validate_every={epochs}",
        f"train.metric={METRICS[dataset]}",
        "train.threads=1",
        "train.checkpoint_seconds=3600",
        f"data.holdout={HOLDOUTS[dataset]}",
    ]
    recipe = f"{dataset}_two_tower"
    for change in changed(group, name):
        what, times, factor = change.partition("*")
        settings.append(f"model.temperature={temperature_of(recipe) * float(factor):.4g}" if times else what)
    run = train_recipe(recipe, *settings)
    return {"value": run["validations"][-1][METRICS[dataset]], "seconds": run["seconds"]}


def temperature_of(recipe: str) -> float:
    return float(tomllib.loads((RECIPES / f"{recipe}.toml").read_text())["model"]["temperature"])


def table(dataset: str, seeds: int, runs: dict[Job, Run | None]) -> dict[str, Any]:
    result: dict[str, Any] = {"metric": METRICS[dataset]}
    for variant in variants(dataset):
        pairs = [(runs[seed, *variant], runs[seed, dataset, "base", "recipe"]) for seed in range(seeds)]
        both = [(changed, base) for changed, base in pairs if changed is not None and base is not None]
        _, group, name = variant
        if group == "base":
            result["base"] = summary("mean", [base["value"] for base, _ in both], both)
        else:
            effects = [changed["value"] - base["value"] for changed, base in both]
            result.setdefault(group, {})[name] = summary("effect", effects, both)
    return result


def summary(name: str, values: list[float], runs: list[tuple[Run, Run]]) -> dict[str, float | None]:
    if not values:
        return {name: None, "spread": None, "runs": 0, "seconds": None}
    return {
        name: round(statistics.mean(values), 4),
        "spread": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "runs": len(values),
        "seconds": round(statistics.mean(run["seconds"] for run, _ in runs), 1),
    }


if __name__ == "__main__":
    main()
