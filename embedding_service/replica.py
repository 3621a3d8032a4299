"""What the processes of a service do: a replica answers HTTP and gRPC, a shard's holder answers the replicas.

Serve makes them (`app`); nothing here imports Ray but what metrics are published through.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.grpc_addresses import listen_on_node
from cluster.metrics import RayMetrics, leave_out_request_histograms
from cluster.periodic import Periodic
from embedding_service import http_refusals
from embedding_service.artifact import Artifact
from embedding_service.grpc_service import GrpcService
from embedding_service.haproxy_refusals import MAX_ONGOING, MAX_QUEUED
from embedding_service.http_api import HttpApi
from embedding_service.http_artifact import http_api
from embedding_service.http_management import Management
from embedding_service.http_service import TIMED_ROUTES, HttpService
from embedding_service.index_shards import Found, Question
from embedding_service.instruments import Instruments
from embedding_service.live_versions import LiveVersions
from embedding_service.overlay import Overlay
from embedding_service.recall_probe import RecallProbe
from embedding_service.scatter import Scatter, Send
from embedding_service.service_args import ServiceArgs, store_of
from embedding_service.service_logs import configure_logs
from embedding_service.service_metrics import METRICS, PUBLISH_SECONDS, ServiceMetrics
from embedding_service.shard_versions import ShardVersions

# Objects made between two searches for cyclic garbage, two hundred requests' worth: with Python's 700 they take a tenth
# of a busy replica's time. They find next to nothing, since all that lives long was frozen by Serve
_GC_THRESHOLD = 20_000


class Replica:
    """One process that holds the versions that are served, and answers HTTP and, where Serve has it, gRPC."""

    def __init__(self, args: dict[str, Any], shards: Sequence[Any] = ()) -> None:
        """`shards`: handles of the deployments that hold the index, if this process does not."""
        settings = ServiceArgs.model_validate(args)
        configure_logs(settings.log_format, settings.log_file, settings.log_level)
        instruments = Instruments(TIMED_ROUTES)
        scatter = _scatter_over(shards, settings) if shards else None
        access = settings.access()
        store = store_of(settings.artifact)

        def open_version(version: str, verify: bool) -> HttpApi:
            overlay = Overlay(store.overlay_file(version) if store is not None else None)
            if store is not None:
                artifact = store.open(version, verify=verify)
            else:
                artifact = Artifact.open(Path(settings.artifact), verify=verify)
            if scatter is not None:
                scatter.load(version)
            return http_api(
                artifact,
                settings.limits(),
                threads=settings.threads,
                overlay=overlay,
                instruments=instruments,
                scatter=scatter,
            )

        versions = LiveVersions(settings.start, open_version, store, verify=settings.verify)
        probe = RecallProbe(versions, margin=settings.probe_margin)
        management = Management(
            versions,
            store,
            access,
            settings.gates.gates(),
            admit_seconds=settings.admit_seconds,
            probe=probe,
            scatter=scatter,
            runs=settings.runs,
        )
        self._service = HttpService(versions, management, access, instruments, access_log=settings.access_log)
        self._grpc = GrpcService(self._service)
        self._instruments = instruments
        metrics, published = ServiceMetrics(instruments, versions, store, probe, scatter=scatter), RayMetrics(METRICS)
        self._tasks = [Periodic("metrics", PUBLISH_SECONDS, lambda: published.publish(metrics.samples()))]
        if settings.probe_seconds:
            self._tasks.append(Periodic("recall-probe", settings.probe_seconds, probe.run))

    def __serve_build_asgi_app__(self) -> HttpService:
        """Serve calls it in the replica's process, before it starts the HTTP and gRPC servers there."""
        leave_out_request_histograms()
        http_refusals.install(self._instruments, MAX_ONGOING + MAX_QUEUED)
        gc.set_threshold(_GC_THRESHOLD)
        listen_on_node()
        return self._service

    # the calls of `lexshard.v1.Retrieval`, which Serve finds by their names and passes `grpc_context` to
    async def Similar(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("Similar", request, grpc_context)

    async def Recommend(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("Recommend", request, grpc_context)

    async def Search(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("Search", request, grpc_context)

    async def Embed(self, request: Any, grpc_context: Any) -> Any:
        return await self._grpc.answer("Embed", request, grpc_context)


class ShardReplica:
    """One process that holds shard `number` of every index, and answers the replicas alone."""

    def __init__(self, args: dict[str, Any], number: int) -> None:
        settings = ServiceArgs.model_validate(args)
        configure_logs(settings.log_format, settings.log_file, settings.log_level)
        leave_out_request_histograms()
        self._versions = ShardVersions(settings, number)
        self._searching = ThreadPoolExecutor(max(2, settings.threads), thread_name_prefix="search")

    async def load(self, version: str) -> None:
        await asyncio.to_thread(self._versions.load, version)

    async def search(self, version: str, index: str, question: Question) -> Found:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searching, self._versions.search, version, index, question)

    async def check_health(self) -> None:
        """Serve calls it every few seconds."""
        await asyncio.to_thread(self._versions.let_go)


def _scatter_over(shards: Sequence[Any], settings: ServiceArgs) -> Scatter:
    def send_to(handle: Any) -> Send:
        async def send(method: str, *arguments: Any) -> Any:
            return await handle.options(method_name=method).remote(*arguments)

        return send

    return Scatter(
        [send_to(handle) for handle in shards],
        timeout_seconds=settings.shard_timeout_seconds,
        partial=settings.on_lost_shard == "partial",
        load_seconds=settings.admit_seconds,
    )
