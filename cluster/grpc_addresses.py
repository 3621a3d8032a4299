"""Where Ray Serve's gRPC servers listen: on their node's own address, which HAProxy asks, instead of on all.

Serve has no setting for it. Its HTTP servers in replicas and proxies bind the host that Serve is started with, its gRPC
servers `[::]`; HAProxy, which clients ask, binds that host for both. On a Ray of our own (`local_ray`) the node's own
address is 127.0.0.1.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import LaunchError

# For Serve's controller, whose proxies have its environment: a proxy calls it before it starts its servers.
PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:in_proxy"}


def listen_on_node() -> None:
    """Have the gRPC servers that Serve starts in this process from now on listen on the node's address only.

    Raises LaunchError for a Ray with which they would listen on all.
    """
    from ray.serve._private import default_impl

    check_ray()
    vars(default_impl)["add_grpc_address"] = _add_node_address


def check_ray() -> None:
    """Raise LaunchError if `listen_on_node` would do nothing with this Ray."""
    import ray
    from ray.serve._private import default_impl, grpc_util

    used = grpc_util.start_grpc_server.__code__.co_names  # it imports the function each time that it is called
    if not hasattr(default_impl, "add_grpc_address") or "add_grpc_address" not in used:
        raise LaunchError(
            f"Ray {ray.__version__} cannot be told where its gRPC servers listen, which would be on all addresses: set "
            "serve.grpc_port = 0, or install the Ray that deploy/constraints-cpu.txt names"
        )


def in_proxy() -> list[Any]:
    """`listen_on_node` for a proxy, which takes what is returned for further HTTP middlewares."""
    listen_on_node()
    return []


def _add_node_address(server: Any, address: str) -> None:
    """In place of `ray.serve._private.default_impl.add_grpc_address`; of `address` the port is kept."""
    import ray

    get_node_address: Any = ray.util.get_node_ip_address
    node, port = get_node_address(), address.rpartition(":")[2]
    server.add_insecure_port(f"[{node}]:{port}" if ":" in node else f"{node}:{port}")
