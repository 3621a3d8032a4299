"""Gowalla (NGCF / LightGCN split), all items ranked, training items masked: both recipes beside published figures.

python -m tests.benchmarks.gowalla
"""

from __future__ import annotations

import json

from tests.benchmarks.recipes import progress, run_recipe

# BARS, docs/Matching/leaderboard/gowalla_m1.csv, dim 64
PUBLISHED = {"item2vec": {"recall20": 0.1326, "ndcg20": 0.1057}, "two_tower": {"recall20": 0.1754, "ndcg20": 0.1473}}


def main() -> None:
    result: dict[str, object] = {"published": PUBLISHED}
    seconds, peak = 0.0, 0
    for kind in ("item2vec", "two_tower"):
        run = run_recipe(f"gowalla_{kind}", "20")
        result |= {
            f"{kind}_recall20": round(run["metrics"]["recall@20"], 4),
            f"{kind}_ndcg20": round(run["metrics"]["ndcg@20"], 4),
            f"{kind}_train_seconds": run["seconds"],
            f"{kind}_epochs": run["epochs"],
            "num_cases": run["num_cases"],
        }
        seconds, peak = seconds + run["wall_seconds"], max(peak, run["peak_rss_bytes"])
        progress(json.dumps({kind: run}))
    print(json.dumps(result | {"wall_seconds": round(seconds, 1), "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
