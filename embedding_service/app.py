"""Ray Serve around the service's processes (`replica`): the one file that knows both Ray and the service.

`serve_artifact` runs a service from Python or the command line; `build` is what a Serve config file imports
(deploy/serve.yaml). Both use Serve's high-throughput mode: HAProxy in front, one hop to the replica's own event loop.
On two cores it answers about ten times as many requests as Serve's default Python proxy does.

An index too large for one machine is held by deployments of its own, one for each shard (`shards`), which the replicas
ask (`scatter`); Serve starts a shard that is lost again.

Ray is imported inside functions: `lexshard serve` checks the artifact and the port before it waits for Ray.
"""

from __future__ import annotations

import http.client
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.errors import LaunchError, SettingError
from cluster.grpc_addresses import PROXY_ENVIRONMENT, check_ray
from cluster.metrics import node_metrics_addresses
from embedding_service import http_unwatched
from embedding_service.artifact import Artifact
from embedding_service.grpc_service import SERVICER
from embedding_service.haproxy_refusals import MAX_ONGOING, MAX_QUEUED
from embedding_service.http_ports import check_haproxy, check_port, high_throughput_environment
from embedding_service.http_schema import Limits
from embedding_service.replica import Replica, ShardReplica
from embedding_service.service_args import ServiceArgs, begin_with, checked_args

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

APP_NAME = "lexshard"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # an access log costs a fifth of the throughput
MARK = "LEXSHARD_SERVICE"
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0  # twice what a replica takes at most
_CHECK_SECONDS = 0.5
_POLL_SECONDS = 0.05
_LEAST_MESSAGE_BYTES = 4 * 2**20  # gRPC's own limit of a message
_SHARD_CHECK_SECONDS = 2.0  # within which Serve notices that a shard has ended


def build(args: Mapping[str, Any]) -> Application:
    """The Serve application of a config file's `args`, see `ServiceArgs`.

    Raises SettingError for an argument that is unknown or wrong. The version that it begins with is fixed here: all
    replicas serve the same one, and one that is started later too, whatever CURRENT says by then, until another one is
    activated.
    """
    from ray import serve

    settings = begin_with(checked_args(args))
    settings.access()
    dumped = settings.model_dump()
    options = deployment_options(
        replicas=settings.replicas,
        threads=settings.threads,
        gpus=0.0 if settings.shards else settings.gpus,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.target_ongoing_requests,
        max_body_bytes=settings.max_body_bytes,
    )
    held = deployment_options(threads=settings.threads, gpus=settings.gpus)
    shards = []
    for number in range(settings.shards):
        named = {"name": f"shard-{number}", "max_queued_requests": -1, "health_check_period_s": _SHARD_CHECK_SECONDS}
        shard: Any = serve.deployment(**held | named)
        shards.append(shard(ShardReplica).bind(dumped, number))
    deployment: Any = serve.deployment(**options)  # typed as if it were called on the class itself
    application: Application = deployment(serve.ingress()(Replica)).bind(dumped, shards)
    return application


def deployment_options(
    *,
    replicas: int = 1,
    threads: int = 1,
    gpus: float = 0.0,
    max_replicas: int = 0,
    target_ongoing_requests: float = ServiceArgs.model_fields["target_ongoing_requests"].default,
    max_body_bytes: int = Limits.max_body_bytes,
) -> dict[str, Any]:
    """Options of `serve.deployment` for replicas in high-throughput mode, with that many threads in each.

    With `max_replicas` there are as many, from `replicas` on, as bring each near `target_ongoing_requests`. A gRPC
    message or answer of more than `max_body_bytes`, and 4 MiB, is refused before it is parsed or sent.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's others spin for a while after each product, on cores that HAProxy needs
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LOG_TO_STDERR": "1",  # warnings and errors only, see _QUIET
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(max_body_bytes + 1024, _LEAST_MESSAGE_BYTES)),
        **http_unwatched.ENVIRONMENT,
    }
    resources = {"num_cpus": threads, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
    number: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas:
        target = {"target_ongoing_requests": target_ongoing_requests}
        number = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": max_replicas, **target}}
    return {
        "name": "retrieval",
        **number,
        "ray_actor_options": resources,
        # more than these would only wait: they are told to come back, by HAProxy (`haproxy_refusals`); where several
        # of them, each within its limits, pass on more together, by `http_refusals`, and of the rest by Serve. All
        # requests that arrive in one turn of the event loop are queued for a moment, so that the queue cannot be short
        "max_ongoing_requests": MAX_ONGOING,
        "max_queued_requests": MAX_QUEUED,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "max_constructor_retry_count": 1,
        "graceful_shutdown_timeout_s": 10.0,
        "logging_config": _QUIET,
    }


def serve_artifact(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    threads: int = 0,
    address: str = "",
    metrics_port: int = 0,
    grpc_port: int = 0,
    **options: Any,
) -> Service:
    """Serve an artifact over HTTP and return once it answers; `Service.wait` then blocks until Ctrl-C or SIGTERM.

    `address` is a Ray cluster to join; without it, and if this process has not joined one, a local Ray is started,
    and stopped with the service. `threads` per process: 0 shares this machine's cores among replicas and shards.
    `options` are further `ServiceArgs`: tokens, gates, autoscaling, shards, probe, logs. `metrics_port`: where a Ray
    that is started here answers Prometheus, see `Service.metrics_addresses`; 0 is any free one. `grpc_port`: where
    `lexshard.v1.Retrieval` (retrieval.proto) is answered on `host`; 0: nowhere.

    On the main thread SIGTERM is a KeyboardInterrupt from here until the service has stopped, and so never leaves
    HAProxy behind.

    Raises ArtifactError for an artifact that cannot be served, SettingError (serve.port, serve.host,
    serve.metrics_port, serve.grpc_port) for an address that cannot be bound, LaunchError if Ray or the service does not
    come up.
    """
    service = Service(host, port, metrics_port, grpc_port)
    service.catch_sigterm()
    try:
        Artifact.open(path)
        service.start(_args_of(path, threads, replicas=replicas, **vars(limits), **options), address)
    except BaseException:
        service.stop()
        raise
    return service


def _args_of(path: str | Path, threads: int, **options: Any) -> dict[str, Any]:
    """`args` of `build`. Raises SettingError."""
    args = {"artifact": str(path), "verify": False, **options}  # verified just now
    return {**args, "threads": threads or max(1, (os.cpu_count() or 1) // checked_args(args, "serve").most_processes)}


class Service:
    """A running service; leaving its context stops it."""

    def __init__(self, host: str, port: int, metrics_port: int = 0, grpc_port: int = 0) -> None:
        reachable = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        self.address = f"http://{reachable}:{port}"
        self._host, self._port, self._reachable = host, port, reachable
        self._metrics_port, self._grpc_port = metrics_port, grpc_port
        self.grpc_address = f"{reachable}:{grpc_port}" if grpc_port else ""
        self._owns_ray = self._own_cluster = self._deployed = False
        self._mark = uuid.uuid4().hex  # in the environment of Serve's processes
        self._former_sigterm: Any = None

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def catch_sigterm(self) -> None:
        """Make SIGTERM a KeyboardInterrupt until `stop`, if this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._former_sigterm = signal.signal(signal.SIGTERM, _interrupt)

    def start(self, args: Mapping[str, Any], address: str = "") -> None:
        """Deploy with the `args` of `build` and wait until the service answers. Raises SettingError, LaunchError."""
        settings = checked_args(args)
        if not address:
            check_port(self._host, self._port)
        grpc_options = self._checked_grpc(local=not address)
        import ray
        from ray import serve

        from cluster.local_ray import print_plainly, start_local_ray

        if self._metrics_port:
            if address or ray.is_initialized():
                message = "is that of a Ray started here; of one that runs `ray start --metrics-export-port` has set it"
                raise SettingError("serve.metrics_port", message)
            check_port("127.0.0.1", self._metrics_port, "serve.metrics_port")
        if not ray.is_initialized():
            needed = settings.most_processes * settings.threads
            self._owns_ray, self._own_cluster = True, not address
            try:
                if address:
                    ray.init(address=address, logging_level=logging.WARNING)
                else:
                    start_local_ray(
                        num_cpus=max(os.cpu_count() or 1, needed),
                        logging_level=logging.WARNING,
                        _metrics_export_port=self._metrics_port or None,
                        _system_config={"worker_niceness": 0},  # Ray's default of 15 is meant for batch work
                    )
                    print_plainly("ServeReplica:")
            except Exception as error:  # also what Ray raises where its processes do not come up in time
                raise LaunchError(
                    f"Ray could not be {'reached at ' + address if address else 'started'}: {error}"
                ) from error
        if self._former_sigterm is not None:
            signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own in place
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._deployed = True
        environment = high_throughput_environment(local=not address) | {MARK: self._mark}
        if grpc_options:
            environment |= PROXY_ENVIRONMENT
        try:
            serve.start(
                http_options={"host": self._host, "port": self._port},
                grpc_options=grpc_options,
                logging_config=_QUIET,
                controller_options={"runtime_env": {"env_vars": environment}},
            )
            serve.run(build(args), name=APP_NAME, route_prefix="/")
        except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            raise LaunchError(f"the service did not start: {_reason(error)}") from error
        self._await_answer(time.monotonic() + _START_SECONDS)
        if self.grpc_address:
            self._await_grpc(time.monotonic() + _START_SECONDS)

    def _checked_grpc(self, *, local: bool) -> dict[str, Any]:
        """`grpc_options` of Serve. Raises SettingError, and LaunchError for a Ray that cannot do it."""
        if not self._grpc_port:
            return {}
        if self._grpc_port == self._port:
            raise SettingError("serve.grpc_port", f"{self._grpc_port} is serve.port: take another, HTTP has that one")
        check_haproxy("serve.grpc_port")
        check_ray()
        if local:
            check_port(self._host, self._grpc_port, "serve.grpc_port")
        return {"port": self._grpc_port, "grpc_servicer_functions": [SERVICER]}

    @property
    def metrics_addresses(self) -> list[str]:
        """What Prometheus scrapes, one for each node; while the service runs."""
        return node_metrics_addresses()

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
        """Finish the requests that run, then stop the service, and Ray where this service has started it.

        SIGTERM is ignored meanwhile. What is left of a Serve of our own is ended, HAProxy first of all: it outlives
        the process that has started it.
        """
        if self._former_sigterm is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self._stop_ray()
        finally:
            if self._former_sigterm is not None:
                signal.signal(signal.SIGTERM, self._former_sigterm)
            self._former_sigterm = None
            self._owns_ray = self._own_cluster = self._deployed = False

    def _stop_ray(self) -> None:
        if not (self._deployed or self._owns_ray):
            return
        import ray

        from cluster.local_ray import end_processes

        in_order = not self._deployed or not ray.is_initialized() or _delete_application()
        if self._owns_ray:
            if self._own_cluster and not in_order:  # `ray.shutdown` of a Ray that is gone may end this process
                end_processes(MARK, self._mark)
            ray.shutdown()
            if self._own_cluster:
                end_processes(MARK, self._mark)

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

    def _await_grpc(self, deadline: float) -> None:
        import grpc

        pause, status = threading.Event(), None
        with grpc.insecure_channel(self.grpc_address) as channel:
            healthy = channel.unary_unary("/ray.serve.RayServeAPIService/Healthz")  # which HAProxy answers
            while time.monotonic() < deadline:
                try:
                    healthy(b"", timeout=5.0)
                    return
                except grpc.RpcError as error:
                    status = error.code()
                pause.wait(_POLL_SECONDS)
        raise LaunchError(
            f"gRPC is not answered at {self.grpc_address} after {_START_SECONDS:.0f} s ({status}); a Serve that ran "
            "before without it must be stopped first: `serve shutdown`"
        )


def _delete_application() -> bool:
    """Take the application down once its requests are answered; false if Ray is gone, or does not do so in time.

    A SIGTERM to the process group ends Ray's processes too, and calls to a Ray that is gone do not return.
    """
    import ray
    from ray import serve

    ray_address = ray.get_runtime_context().gcs_address
    problems: list[Exception] = []
    done = threading.Event()

    def delete() -> None:
        try:
            serve.delete(APP_NAME)
            done.set()
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=delete, name="lexshard-stop", daemon=True)
    give_up = time.monotonic() + _STOP_SECONDS
    if _listens(ray_address):
        thread.start()
    while thread.is_alive() and time.monotonic() < give_up and _listens(ray_address):
        thread.join(_CHECK_SECONDS)
    if problems:
        logger.warning("the service was not taken down in order: %s", problems[0])
    return done.is_set()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _reason(error: BaseException) -> str:
    """The last line of what Serve knows of a failed start: replicas' tracebacks, else the error itself."""
    from ray import serve

    application = serve.status().applications.get(APP_NAME)
    told = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line.strip() for text in (str(error), *told) for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
