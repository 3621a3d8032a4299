"""The whole service without Ray: `HttpService` over a folder of versions, as a replica has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embedding_service.gates import Gates
from embedding_service.http_access import Access
from embedding_service.http_api import HttpApi
from embedding_service.http_artifact import http_api
from embedding_service.http_management import Management
from embedding_service.http_schema import Limits
from embedding_service.http_service import TIMED_ROUTES, HttpService
from embedding_service.instruments import Instruments
from embedding_service.live_versions import LiveVersions
from embedding_service.overlay import Overlay
from embedding_service.versions import VersionStore
from tests.embedding_service.test_http_api import Reply, ask

TOKEN = b"a-token-of-the-tests"
LIMITS = Limits(max_k=50, max_batch=100)


class LocalService:
    """One replica's part of a service; `restart` is what another replica, or a later one, would be."""

    def __init__(
        self,
        root: Path,
        start: str,
        *,
        read_token: bytes | None = None,
        gates: Gates = Gates(),  # noqa: B008 (frozen)
        access_log: bool = False,
        runs: Path | None = None,
    ) -> None:
        self._access_log, self._runs = access_log, "" if runs is None else str(runs)
        self.root, self.store = root, VersionStore(root)
        self._start, self._access, self._gates = start, Access(TOKEN, read_token), gates
        self.restart()

    def restart(self) -> None:
        self.instruments = Instruments(TIMED_ROUTES)

        def open_version(version: str, verify: bool) -> HttpApi:
            artifact = self.store.open(version, verify=verify)
            overlay = Overlay(self.store.overlay_file(version))
            return http_api(artifact, LIMITS, overlay=overlay, instruments=self.instruments)

        self.versions = LiveVersions(self._start, open_version, self.store)
        self.management = Management(
            self.versions, self.store, self._access, self._gates, admit_seconds=60.0, runs=self._runs
        )
        self.app = HttpService(
            self.versions, self.management, self._access, self.instruments, access_log=self._access_log
        )

    def ask(self, method: str, path: str, body: Any = b"", *, token: bytes = TOKEN, **headers: str) -> Reply:
        sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        if token:
            sent.append((b"authorization", b"Bearer " + token))
        return ask(self.app, method, path, body, headers=sent)  # type: ignore[arg-type]

    def close(self) -> None:
        self.management.close()
        self.versions.close()
