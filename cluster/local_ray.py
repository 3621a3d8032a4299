"""Start a Ray of our own on this machine, which no other machine can reach."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray._private import ray_constants

# What Ray's processes are started with. The first says what `_LOOPBACK` says, to those that ask for their address.
_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo"}
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
