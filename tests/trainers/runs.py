"""Small runs for tests: planted sessions, and workers that die at chosen steps or keep a diary of what they trained."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Config, config_from_dict
from trainers import loop
from trainers.checkpoint import CheckpointStore
from trainers.two_tower import TwoTower


def write_sessions(path: Path, *, num_sessions: int = 600, num_groups: int = 12, seed: int = 0) -> Path:
    """Sessions that stay inside one of `num_groups` groups of ten items: what belongs together is known.

    Columns: user (the session's number), items (keys 10 * group + 0..9, plus 1000). Five row groups.
    """
    random = np.random.default_rng(seed)
    group = random.integers(0, num_groups, num_sessions)
    items = [(1000 + 10 * g + random.permutation(10)[: random.integers(3, 9)]).tolist() for g in group]
    table = pa.table({"user": np.arange(num_sessions), "items": pa.array(items, pa.list_(pa.int64()))})
    pq.write_table(table, path, row_group_size=-(-num_sessions // 5))
    return path


def small_config(folder: Path, source: Path, /, **sections: dict[str, Any]) -> Config:
    """A run of a few seconds in `folder` on the sessions of `source`; `sections` override settings."""
    tree: dict[str, Any] = {
        "run": str(folder),
        "data": {"train": str(source), "shuffle_sessions": 200, "holdout": "items", "holdout_fraction": 0.1},
        "model": {"kind": "item2vec", "dim": 8, "history_length": 0},
        "train": {"epochs": 4, "batch_size": 300, "threads": 1, "checkpoint_seconds": 0.0, "report_seconds": 0.0},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    if tree["model"]["kind"] == "item2vec":
        tree["model"].setdefault("negatives", 3)
    return config_from_dict(tree)


def final_tensors(config: Config) -> dict[str, str]:
    """Checksums of the tensor files of the run's last checkpoint, whose bytes are the tables' bytes."""
    name = CheckpointStore(config.run).names()[-1]
    description = json.loads((Path(config.run) / "checkpoints" / name / "checkpoint.json").read_text())
    return {path: entry["checksum"] for path, entry in description["files"].items() if path.endswith(".distcp")}


def mortal_worker(settings: dict[str, Any]) -> Any:
    """`train_worker` whose process is killed (SIGKILL) when it is about to run certain steps, each once.

    settings["deaths"]: [[rank, step number of this run], ...]; settings["graves"]: a folder that remembers them.
    """
    deaths = {(rank, step) for rank, step in settings.pop("deaths")}
    graves = Path(settings.pop("graves"))
    original = loop._Run._count

    def count(self: Any, *arguments: Any) -> None:
        grave = graves / f"{self.place.rank}-{self.progress.step}"
        if (self.place.rank, self.progress.step) in deaths and not grave.exists():
            grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *arguments)

    loop._Run._count = count  # type: ignore[method-assign]
    try:
        return loop.train_worker(settings)
    finally:
        loop._Run._count = original  # type: ignore[method-assign]


def diary_worker(settings: dict[str, Any]) -> Any:
    """`train_worker` that writes down, per step, the users it trained on, and stops by SIGKILL before `last_step`.

    settings["diary"]: a folder; settings["last_step"]: 0 for none. Lines: {"step", "users"}.
    """
    diary, last_step = Path(settings.pop("diary")), settings.pop("last_step")
    prepare, count = TwoTower.prepare, loop._Run._count

    def remember(self: TwoTower, batch: Any, seed: int) -> Any:
        step = prepare(self, batch, seed)
        object.__setattr__(step, "users", batch.user.tolist())
        return step

    original_step = TwoTower.step
    trained: list[Any] = []

    def run_step(self: TwoTower, step: Any, rate: float) -> Any:
        trained.append(step.users)
        return original_step(self, step, rate)

    def write(self: Any, *arguments: Any) -> None:
        with open(diary / f"rank-{self.place.rank}.jsonl", "a") as out:
            out.write(json.dumps({"step": self.progress.step, "users": trained.pop()}) + "\n")
        if last_step and self.progress.step >= last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        count(self, *arguments)

    TwoTower.prepare, TwoTower.step, loop._Run._count = remember, run_step, write  # type: ignore[method-assign]
    try:
        return loop.train_worker(settings)
    finally:
        TwoTower.prepare, TwoTower.step, loop._Run._count = prepare, original_step, count  # type: ignore[method-assign]


def worker_dying_at_a_rename(settings: dict[str, Any]) -> Any:
    """`train_worker` whose process is killed just before its `settings["nth"]`-th rename once training has begun."""
    left, rename, replace, train = settings.pop("nth"), os.rename, os.replace, loop._Run.train

    def counted(change: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return call

    def begin(self: Any) -> None:
        os.rename, os.replace = counted(rename), counted(replace)
        train(self)

    loop._Run.train = begin  # type: ignore[method-assign]
    try:
        return loop.train_worker(settings)
    finally:
        loop._Run.train, os.rename, os.replace = train, rename, replace  # type: ignore[method-assign]
