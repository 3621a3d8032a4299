"""Small functions for `launch` to run: module-level, so that Ray workers can import them."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.errors import DataError, SettingError
from cluster.launch import report
from cluster.rank import current_rank


def add_up(settings: dict[str, Any]) -> dict[str, Any]:
    """The sum of `settings["numbers"]`, each worker adding its share, with events and a warning on the way."""
    place = current_rank("cpu")
    share = torch.tensor(settings["numbers"][place.rank :: place.world_size], dtype=torch.float64).sum()
    report({"text": f"{place.world_size} workers", "rank": place.rank})
    warnings.warn(f"rank {place.rank} is only a test", stacklevel=1)
    dist.all_reduce(share)
    for step in range(settings.get("steps", 0)):
        report({"step": step})
    return {"sum": share.item(), "settings": settings, "threads": torch.get_num_threads(), "folder": os.getcwd()}


def refuse(settings: dict[str, Any]) -> None:
    """The last rank meets a bad row while the others wait for it. Counts its calls in `settings["calls"]`."""
    place = current_rank("cpu")
    if place.rank == place.world_size - 1:
        with open(settings["calls"], "a") as calls:
            calls.write(".")
        raise DataError("is null", file="sessions.parquet", row_group=2, row=7)
    dist.barrier()


def die(settings: dict[str, Any]) -> int:
    """Rank 0 is killed the first `settings["times"]` times; then all agree on how often the group was started."""
    calls = Path(settings["calls"])
    if current_rank("cpu").is_first:
        with open(calls, "a") as out:
            out.write(".")
        if len(calls.read_text()) <= settings["times"]:
            os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return len(calls.read_text())


def crash(settings: dict[str, Any]) -> None:
    """The last rank meets a bug of ours while the others wait for it. Counts its calls in `settings["calls"]`."""
    place = current_rank("cpu")
    if place.rank == place.world_size - 1:
        with open(settings["calls"], "a") as calls:
            calls.write(".")
        raise RuntimeError("a bug\nwith details")
    dist.barrier()


def wait_for_ever(settings: dict[str, Any]) -> None:
    """Says that it has begun, and never ends."""
    report({"text": "begun"})
    threading.Event().wait()


def square(settings: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """A task. Its process is killed the first time that `task["dies"]` is met; `task["bad"]` is refused."""
    if task.get("bad"):
        raise SettingError("export.index", f"{task['number']} is refused")
    if task.get("dies"):
        grave = Path(settings["graves"]) / str(task["number"])
        if not grave.exists():
            grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return {"square": task["number"] ** 2, "pair": (1, 2)}
