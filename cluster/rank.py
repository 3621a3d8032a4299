"""Which worker this process is: rank, world size, device, and the process group it talks through.

The only place that reads or writes RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cluster.errors import SettingError

Device = Literal["auto", "cpu", "cuda"]

# On a CUDA worker tensors of both devices travel: gradients and rows by nccl, counts and checkpoints by gloo.
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


@dataclass(frozen=True)
class Rank:
    """One worker of a run."""

    rank: int
    world_size: int
    local_rank: int  # among the workers of this machine
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this worker speaks for the run: it prints, and writes what is written once."""
        return self.rank == 0

    @property
    def backend(self) -> str:
        return backend_of(self.device.type)


def backend_of(device_type: str) -> str:
    """The process group backend for tensors on `cpu` or `cuda`."""
    return _BACKENDS[device_type]


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """`auto` becomes cuda where there is one. Raises SettingError where cuda is asked for and there is none."""
    if device == "cpu":
        return "cpu"
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise SettingError("cluster.device", "is cuda, but no CUDA device is visible here; use cpu or auto")
    return "cuda" if available else "cpu"


def current_rank(device: Device = "auto") -> Rank:
    """This process's place, from the environment that Ray Train or torchrun set; alone in the world without one.

    In a process group `auto` is the device that the group was made for, whatever this machine has.
    """
    if device == "auto" and dist.is_initialized():
        device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    kind = resolve_device(device)
    return Rank(
        rank=_number("RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        local_rank=_number("LOCAL_RANK", 0),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1),
        device=torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu"),
    )


@contextmanager
def process_group(device: Device = "auto") -> Iterator[Rank]:
    """The Rank of this process, with a process group around the block.

    A group that exists (Ray Train made it) is used and left alone. Otherwise one is made, of one rank and without a
    port unless torchrun's environment says more, and torn down at the end.
    """
    if dist.is_initialized():
        yield current_rank(device)
        return
    kind = resolve_device(device)
    alone = "RANK" not in os.environ
    # TorchRec reads these variables too; set, it neither guesses nor warns.
    with _environment({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} if alone else {}):
        if kind == "cuda":
            torch.cuda.set_device(_number("LOCAL_RANK", 0))
        if alone:
            dist.init_process_group(backend_of(kind), store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend_of(kind))
        try:
            yield current_rank(device)
        finally:
            dist.destroy_process_group()


@contextmanager
def torch_threads(threads: int, *, local_world_size: int = 1) -> Iterator[int]:
    """Give torch `threads` threads inside the block (0: this machine's cores shared by its workers); yields the number.

    The environment of child processes and of libraries loaded inside the block says the same (OMP_NUM_THREADS).
    """
    number = threads or max(1, num_cores() // local_world_size)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with _environment({"OMP_NUM_THREADS": number}):
            yield number
    finally:
        torch.set_num_threads(before)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


@contextmanager
def _environment(variables: Mapping[str, object]) -> Iterator[None]:
    """Set environment variables for the block, and put back what was there before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
