"""Start a Ray of our own on this machine, which no other machine can reach."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.worker import print_to_stdstream

# What Ray's processes are started with. The first says what `_LOOPBACK` says, to those that ask for their address.
_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo"}
_PRINTER = "ray_print_logs"  # what `ray.init` prints the lines of workers with, and `ray.shutdown` takes away
_ROUNDS = 4  # of looking for what is left: a process that cannot be killed is not waited for for ever
_LOOPBACK = "ENABLE_RAY_CLUSTER"  # false: Ray's address of this machine is 127.0.0.1, the default on a desktop system


def start_local_ray(*, num_cpus: int, **options: Any) -> None:
    """`ray.init` of a new Ray whose processes listen on 127.0.0.1 only; `ray.shutdown` stops it.

    Ray executes what it is sent, without asking who sends it. `_node_ip_address="127.0.0.1"` would not do: Ray
    replaces it by the machine's outer address, and then listens on every one.
    """
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    clusters = getattr(ray_constants, _LOOPBACK)
    setattr(ray_constants, _LOOPBACK, False)
    os.environ.update(_ENVIRONMENT)
    try:
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=False, **{"logging_level": logging.ERROR, **options}
        )
    finally:
        setattr(ray_constants, _LOOPBACK, clusters)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def print_plainly(actors: str) -> None:
    """From now on, print what actors whose name begins with `actors` write as it is, without Ray's prefix and its notes
    of what was repeated; others' lines keep both.

    For a Ray of this machine alone: of a cluster one wants to know which node has written a line.
    """

    def show(data: dict[str, Any]) -> None:
        if not str(data.get("actor_name") or "").startswith(actors):
            print_to_stdstream(data, ignore_prefix=False)
            return
        out = sys.stderr if data["is_err"] else sys.stdout
        out.writelines(f"{line}\n" for line in data["lines"])
        out.flush()

    global_worker_stdstream_dispatcher.remove_handler(_PRINTER)
    global_worker_stdstream_dispatcher.add_handler(_PRINTER, show)


def end_processes(name: str, value: str, *, patience: float = 5.0) -> None:
    """End this user's processes whose environment says `name`=`value`: SIGTERM, and SIGKILL after `patience` seconds.

    Then those that they have started meanwhile.
    """
    for _ in range(_ROUNDS):
        processes = _marked(f"{name}={value}".encode())
        if not processes:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            for handle in processes:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
            processes = _await_end(processes, patience)


def _marked(entry: bytes) -> list[int]:
    """Handles of the processes with that entry in their environment, this one left out."""
    handles = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        with suppress(OSError):  # gone, or another user's
            handle = os.pidfd_open(int(folder.name))
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                handles.append(handle)
            else:
                os.close(handle)
    return handles


def _await_end(handles: list[int], seconds: float) -> list[int]:
    """Wait until the processes have ended, and close their handles; returns those that have not in that time."""
    deadline = time.monotonic() + seconds
    left = list(handles)
    while left and (remaining := deadline - time.monotonic()) > 0:
        ended, _, _ = select.select(left, [], [], remaining)
        for handle in ended:
            os.close(handle)
            left.remove(handle)
    return left
