"""Item2Vec and two-tower steps on tables of a million to a billion rows: step time, peak memory, checkpoints.

    python -m tests.benchmarks.table_scale [--quick] [--kinds item2vec two_tower] [--rows 1000000 ...] [--dim 4]

Every size is a process of its own with one torch thread, which makes the model (fp16 tables, half of the rows in each
of two tables), trains, writes a checkpoint, trains on, loads the checkpoint back, compares a sample of rows bit by bit,
and streams the item vectors into an artifact's file. Keys are generated: Zipf's law with exponent 1 over the items of
the size, frequent items first, as a key map orders them; users too, but scattered over their table. A step is the
loop's (prepared ahead in a background thread) on 1024 sessions of 20 items (Item2Vec) or 2048 examples with a history
of 19 items (two-tower).

    step_1b_over_1m     median step of 1 B rows / of 1 M rows, dim 4; the larger of the two models
    rss_over_table      (peak RSS of the process - 1 GiB) / bytes of tables and optimiser state; the largest of the runs
    runs                every run's figures. Seconds are wall; write and load include checksums and fsync

Without --rows: 1 M, 10 M, 100 M and 1 B rows of dim 4, 1 M to 100 M rows of dim 64, and 1 B rows of dim 8 (tried: it
wants 20 GiB of memory). Checkpoints go to a temporary folder (TMPDIR), which needs as much disk as the largest tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config import Config
from cluster.rank import process_group
from embedding_service.ragged import Ragged
from embedding_service.tables import TableSpec
from embedding_service.vectors import VectorSink
from trainers.checkpoint import CheckpointStore, Progress
from trainers.contrast import ContrastSpec
from trainers.item2vec import Item2Vec
from trainers.loop import peak_rss_bytes
from trainers.prepare import Sessions
from trainers.row_runs import RowRuns
from trainers.sessions import read_ahead
from trainers.two_tower import TwoTower

KINDS = ("item2vec", "two_tower")
SIZES = [*((rows, 4) for rows in (10**6, 10**7, 10**8, 10**9)), *((rows, 64) for rows in (10**6, 10**7, 10**8))]
TRIED = [(10**9, 8)]
SESSION_ITEMS = 20
STEPS = 40
EVENTS_PER_ITEM = 100
GIB = 2**30


def main() -> None:
    options = parse_arguments()
    if options.one:
        print(json.dumps(measure(options.kinds[0], options.rows[0], options.dim, options.disk)))
        return
    sizes = [(rows, options.dim) for rows in options.rows] if options.rows else SIZES + TRIED
    if options.quick:
        sizes = [(10**6, options.dim), (10**7, options.dim)]
    runs = [run_alone(kind, *size, options.disk) for size in sizes for kind in options.kinds]
    done = [run for run in runs if "failed" not in run]
    steps = {(run["kind"], run["rows"]): run["step_seconds"] for run in done if run["dim"] == 4}
    ratios = {
        kind: round(steps[kind, 10**9] / steps[kind, 10**6], 3)
        for kind in options.kinds
        if {(kind, 10**9), (kind, 10**6)} <= steps.keys()
    }
    whole = set(KINDS) <= ratios.keys()  # smaller runs say nothing of a billion rows
    result = {
        "step_1b_over_1m": max(ratios.values()) if whole else None,
        "step_1b_over_1m_by_kind": ratios,
        "rss_over_table": max(run["rss_over_table"] for run in done) if whole else None,
        "peak_rss_bytes": max((run["peak_rss_bytes"] for run in done), default=None),
        "keys": "generated: Zipf, exponent 1",
        "runs": runs,
    }
    print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="1 M and 10 M rows only")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[])
    parser.add_argument("--dim", type=int, default=4)
    parser.add_argument("--disk", action="store_true", help="tables in files on local disk, mapped into memory")
    parser.add_argument("--one", action="store_true", help="measure one size in this process")
    return parser.parse_args()


def run_alone(kind: str, rows: int, dim: int, disk: bool) -> dict[str, Any]:
    """`measure` in a process of its own; {"failed": why} where it does not fit."""
    say(f"{kind}, {rows:,} rows of dim {dim}")
    what: dict[str, Any] = {"kind": kind, "rows": rows, "dim": dim, "disk": disk}
    wanted = GIB + (0 if disk else rows * (dim * 2 + 4 * (kind == "two_tower")))
    if wanted > available_bytes():
        return what | {"failed": f"wants {wanted / GIB:.1f} GiB, {available_bytes() / GIB:.1f} GiB are available"}
    command = [sys.executable, "-m", "tests.benchmarks.table_scale", "--one"]
    command += ["--kinds", kind, "--rows", str(rows), "--dim", str(dim), *["--disk"] * disk]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return what | {"failed": f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    say(json.dumps(found))
    return found


def measure(kind: str, rows: int, dim: int, disk: bool) -> dict[str, Any]:
    """Everything about one size, in this process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    figures: dict[str, Any] = {"kind": kind, "rows": rows, "dim": dim, "disk": disk}
    with process_group("cpu"), tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        items = rows // 2
        began = time.perf_counter()
        where = folder if disk else ""
        model = new_item2vec(items, dim, where) if kind == "item2vec" else new_two_tower(items, dim, where)
        figures["init_seconds"] = lap = seconds_since(began)
        table_bytes = sum(spec.num_bytes(model.tables.optimizer) for spec in model.tables.specs.values())
        figures |= {"table_bytes": table_bytes, "init_peak_rss_bytes": peak_rss_bytes()}
        say(f"  made in {lap} s")

        plan = model.plan(zipf_sessions(items, STEPS + 10), (0, 0, 0))
        times = train(model, plan, STEPS)
        figures["step_seconds"] = round(statistics.median(times[5:]), 5)
        figures["train_peak_rss_bytes"] = peak_rss_bytes()

        run = Path(folder) / "run"
        (run / "prepared").mkdir(parents=True)
        store = CheckpointStore(run, keep=1)
        before = sample_rows(model)
        began = time.perf_counter()
        store.save(model, Progress(step=STEPS), Config())
        figures["write_seconds"] = seconds_since(began)
        figures["checkpoint_bytes"] = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        say(f"  written in {figures['write_seconds']} s")
        train(model, plan, 5)
        assert not same_rows(before, sample_rows(model)), "a step changes rows"
        began = time.perf_counter()
        store.resume(model, Config())
        figures["load_seconds"] = seconds_since(began)
        assert same_rows(before, sample_rows(model)), "a checkpoint gives the rows back bit by bit"
        shutil.rmtree(run)

        began = time.perf_counter()
        sink = VectorSink(
            Path(folder) / "item.npy", None, rows=items, dim=dim, precision="fp16", normalized=kind == "two_tower"
        )
        for start in range(0, items, 65_536):
            stop = min(items, start + 65_536)
            sink.write(start, model.vectors("item", start, stop).numpy())
        sink.close()
        figures["export_vectors_seconds"] = seconds_since(began)
    peak = peak_rss_bytes()
    return figures | {"peak_rss_bytes": peak, "rss_over_table": round((peak - GIB) / table_bytes, 4)}


def train(model: Any, plan: Any, steps: int) -> list[float]:
    """Seconds of every step, of which each is prepared while the one before runs."""

    def prepared() -> Iterator[Any]:
        offset = 0
        for number in range(steps):
            stop = plan.stop_after(offset, 1)
            yield model.prepare(plan.batch(offset, stop), number)
            offset = stop

    times = []
    last = time.perf_counter()
    for step in read_ahead(prepared()):
        loss, _ = model.step(step, 1.0)
        assert math.isfinite(loss)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    assert len(times) == steps
    return times


def sample_rows(model: Any) -> dict[str, torch.Tensor]:
    """The first rows of every table, which every step changes, and ten thousand spread over it."""
    found = {}
    with torch.no_grad():
        for name, spec in model.tables.specs.items():
            spread = np.linspace(0, spec.rows - 1, 10_000).astype(np.int64)
            rows = torch.from_numpy(np.unique(np.concatenate([np.arange(1000), spread])))
            found[name] = model.tables.lookup({name: rows})[name].clone()
    return found


def same_rows(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def zipf_rows(random: np.random.Generator, items: int, num: int) -> np.ndarray:
    """Rows with probability proportional to log((r + 2) / (r + 1)), which is Zipf's 1 / r but for the first few."""
    rows = np.exp(random.random(num) * math.log(items + 1)).astype(np.int64) - 1
    return np.minimum(rows, items - 1)


def zipf_counts(items: int) -> RowRuns:
    """What a key map would count: floor(k / (row + 1)) events, as its runs of equal counts."""
    k = EVENTS_PER_ITEM * items / math.log(items + 1)
    root = math.isqrt(int(k))
    starts = np.unique(np.concatenate([np.arange(root), np.floor(k / np.arange(1, root + 2)).astype(np.int64)]))
    starts = starts[starts < items]
    return RowRuns(starts, np.floor(k / (starts + 1)).astype(np.int64), items)


def zipf_sessions(items: int, steps: int) -> Sessions:
    """Sessions for so many steps of either model: Zipf items, and a Zipf user each, scattered over the table."""
    random = np.random.default_rng(0)
    num = steps * 1024
    offsets = np.arange(num + 1, dtype=np.int64) * SESSION_ITEMS
    users = (zipf_rows(random, items, num).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) % np.uint64(items)
    return Sessions(Ragged(zipf_rows(random, items, num * SESSION_ITEMS), offsets), users.astype(np.int64), {})


def new_item2vec(items: int, dim: int, folder: str = "") -> Item2Vec:
    return Item2Vec(
        zipf_counts(items),
        tables=[
            TableSpec("input", items, dim, 0.5 / dim, "fp16", folder),
            TableSpec("output", items, dim, 0.0, "fp16", folder),
        ],
        maps={},
        cbow=False,
        window=5,
        ordered=True,
        num_negatives=10,
        negative_exponent=0.5,
        subsample=0.0,
        history_decay=0.8,
        history_length=20,
        block_items=1024 * SESSION_ITEMS,
        learning_rate=0.05,
        seed=0,
        threads=1,
        device=torch.device("cpu"),
    )


def new_two_tower(items: int, dim: int, folder: str = "") -> TwoTower:
    return TwoTower(
        zipf_counts(items),
        tables=[TableSpec(name, items, dim, dim**-0.5, "fp16", folder) for name in ("item", "user")],
        maps={},
        item_features={},
        item_values={},
        query=("user", "history"),
        query_features={},
        list_pooling="mean",
        share_items=True,
        id_dropout=0.0,
        history_encoder="mean",
        hidden=(),
        dim=dim,
        examples="every_item",
        mask="session",
        history_decay=1.0,
        history_length=SESSION_ITEMS - 1,
        training_history_length=SESSION_ITEMS - 1,
        contrast=ContrastSpec(),
        normalize=True,
        batch_size=2048,
        chunk_size=0,
        optimizer="rowwise_adagrad",
        learning_rate=0.05,
        dense_learning_rate=1e-3,
        seed=0,
        device=torch.device("cpu"),
    )


def available_bytes() -> int:
    """Memory that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def seconds_since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
