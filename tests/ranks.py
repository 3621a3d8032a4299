"""Run a function on several ranks of one process group, for tests of what is sharded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = timedelta(seconds=120)


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any, pin: bool = False) -> list[Any]:
    """What `fn(*args)` returns on each of `world_size` gloo ranks, in rank order.

    fn: a module-level function; it finds its rank through `torch.distributed` or `cluster.rank.current_rank`, and
    returns tensors, numbers, text, and lists and dicts of them. Every rank is a new process with one torch thread;
    pin: each on a core of its own. Raises torch's ProcessRaisedException with the traceback of the rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(_rank_main, (world_size, folder, pin, fn, args), nprocs=world_size)  # type: ignore[attr-defined, no-untyped-call]
        finally:  # Python's helper process for spawned ones would stay until this process ends
            resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
        return [torch.load(_result_path(folder, rank)) for rank in range(world_size)]


def _rank_main(
    rank: int, world_size: int, folder: str, pin: bool, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    if pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    store = dist.FileStore(str(Path(folder) / "store"), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        torch.save(fn(*args), _result_path(folder, rank))
        dist.barrier()  # a rank that leaves early would take its connections with it
    finally:
        dist.destroy_process_group()


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
