"""`python -m tests.benchmarks.plan_memory`: resident memory of training's workers against what `lexshard plan` said.

Two-tower on generated sessions with a user each, users' table above 1 GiB, one worker and two: profile, plan, train by
the command line. `rss_error`: largest |planned / measured - 1|, measured being the peak of rank 0's process until the
checkpoint at the end is written; the peak with that is told beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEMS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=560_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, report = Path(folder) / "sessions.parquet", str(Path(folder) / "profile.json")
        write_sessions(source, args.users)
        config = Path(folder) / "run.toml"
        config.write_text(_config(folder, source))
        lexshard("profile", str(config), "--output", report, "--json")
        runs = []
        for workers in args.workers:
            plan = lexshard("plan", str(config), "--profile", report, "--workers", str(workers), "--json")
            result = lexshard("train", str(config), "--workers", str(workers), "--fresh", "--json")
            planned, measured = plan["resident_bytes_per_rank"], _peak_before_checkpoint(Path(folder) / "run")
            runs.append(
                {
                    "workers": workers,
                    "table_bytes": plan["weight_bytes"] + plan["optimizer_bytes"],
                    "planned_bytes": planned,
                    "measured_bytes": measured,
                    "error": planned / measured - 1.0,
                    "peak_with_checkpoint_bytes": result["peak_rss_bytes"],
                }
            )
            print(runs[-1], file=sys.stderr)
    print(json.dumps({"runs": runs, "rss_error": max(abs(run["error"]) for run in runs)}))


def _peak_before_checkpoint(run: Path) -> int:
    """Of rank 0, up to the last line of progress; the run writes its only checkpoint after it."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(int(event["peak_rss_bytes"]) for event in events if event["kind"] == "progress")


def write_sessions(path: Path, num: int) -> None:
    """`num` sessions of three items, each with a user of its own."""
    random = np.random.default_rng(0)
    schema = pa.schema([("user", pa.int64()), ("items", pa.list_(pa.int64()))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num, 65_536):
            users = np.arange(start, min(num, start + 65_536))
            items = random.integers(0, ITEMS, 3 * len(users))
            lists = pa.ListArray.from_arrays(np.arange(len(users) + 1, dtype=np.int32) * 3, items)
            writer.write_table(pa.table([pa.array(users), lists], schema=schema))


def _config(folder: str, source: Path) -> str:
    return f"""
run = "{folder}/run"
[data]
train = "{source}"
user = "user"
[model]
kind = "two_tower"
dim = 512
query = ["user", "history"]
examples = "last_item"
[train]
epochs = 1
batch_size = 2048
report_seconds = 1
threads = 1
checkpoint_seconds = 100000
"""


def lexshard(*arguments: str) -> dict[str, Any]:
    """The JSON of a command, run in a process of its own."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}{done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
