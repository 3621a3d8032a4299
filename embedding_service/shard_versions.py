"""What the holder of a shard has in memory: of each version that may be asked its rows of every index, and no more.

Vectors are mapped from the files, key maps and query tower are not needed here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import ArtifactError, ShardLost
from embedding_service.artifact import Artifact
from embedding_service.index_shards import AnyCandidates, Found, Question, local, rows_of, shards_of
from embedding_service.service_args import ServiceArgs, store_of

logger = logging.getLogger(__name__)

IDLE_CHECKS = 60  # health checks, one in two seconds, that a version which nothing names is kept without a question


class ShardVersions:
    """Shard `number` of `settings.shards`. Safe to use from many threads.

    It begins with the versions that are served: a process that takes the place of a lost one answers only when it has
    them. Others are loaded when they are named. Those that the state of the versions names stay (live, canary and the
    one that a roll-back leads to); what a request may still be about to ask stays for a while after it.
    """

    def __init__(self, settings: ServiceArgs, number: int) -> None:
        """Raises ArtifactError where the live version does not load."""
        self._settings, self._number = settings, number
        self._store = store_of(settings.artifact)
        self._pool = ThreadPoolExecutor(settings.threads - 1) if settings.threads > 1 else None
        self._here: dict[str, Mapping[str, tuple[range, AnyCandidates]]] = {}
        self._idle: dict[str, int] = {}
        self._loading = threading.Lock()
        state = self._store.serving() if self._store is not None else None
        for version in [settings.start] if state is None else filter(None, (state.live, state.canary)):
            self.load(version)

    def load(self, version: str) -> None:
        """Have a version in memory. Raises ArtifactError for one that is not there, damaged or in too few shards."""
        self._idle[version] = 0
        if version in self._here:
            return
        with self._loading:
            if version not in self._here:
                self._here[version] = self._open(version)

    def search(self, version: str, index: str, question: Question) -> Found:
        """What the rows of this shard have for a question.

        Raises ArtifactError as `load` does, and ShardLost for a question to other rows: who asks was deployed for
        another number of shards.
        """
        self._idle[version] = 0
        held = self._here.get(version)
        if held is None:
            self.load(version)
            held = self._here[version]
        rows, candidates = held[index]
        if question.part != rows:
            raise ShardLost(
                f"holds rows {rows.start}..{rows.stop} of index {index!r} and was asked for {question.part}"
            )
        return question.answer(candidates)

    def let_go(self) -> None:
        """Called at every health check: free the versions that are neither served nor asked for."""
        if self._store is None:
            return
        try:
            state = self._store.serving()
        except ArtifactError as error:
            logger.error("no version is let go of: %s", error)
            return
        kept = {self._settings.start} if state is None else {state.live, state.canary, *state.previous[-1:]}
        for version in set(self._here) - kept:
            self._idle[version] += 1
            if self._idle[version] > IDLE_CHECKS:
                self._here.pop(version, None)  # a search that has begun ends on it

    @property
    def versions(self) -> list[str]:
        return sorted(self._here)

    def _open(self, version: str) -> Mapping[str, tuple[range, AnyCandidates]]:
        verify = self._settings.verify
        artifact = (
            self._store.open(version, verify=False)
            if self._store is not None
            else Artifact.open(self._settings.artifact, verify=False)
        )
        held = {}
        for name in artifact.manifest["indexes"]:
            shards = shards_of(artifact, name, self._number, self._settings.shards)
            for shard in shards if verify else ():
                artifact.check_index(name, shard)
            candidates = local(artifact, name, pool=self._pool, threads=self._settings.threads, shards=shards)
            held[name] = rows_of(artifact, name, shards), candidates
        return held
