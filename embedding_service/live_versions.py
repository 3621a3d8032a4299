"""The versions that one process has in memory, and the flip from one to the next under traffic.

A thread looks at the store's state. What it names and is not here is loaded and warmed up in that thread; then one
reference changes, `now`, which every request reads once: a request is answered by one version alone, query tower, keys
and index together, and one that began on the former version ends on it. Replicas flip each on its own, within a
fraction of a second once they have loaded; what they answer meanwhile is whole, and labelled with its version.

The version that was live before stays in memory, so that going back is one flip.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ArtifactError, LexshardError
from embedding_service.http_api import HttpApi
from embedding_service.selective import SelectiveRetriever
from embedding_service.service_logs import log_event
from embedding_service.traffic import Tally
from embedding_service.versions import Serving, VersionStore

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
_POLLS_TO_RETRY = 25
_POLLS_TO_KEEP = 10


@dataclass(eq=False)
class Loaded:
    """A version in memory. `in_flight` requests are answered by it; it is closed when it is `retired` and they end."""

    version: str
    api: HttpApi
    tally: Tally = field(default_factory=Tally)
    in_flight: int = 0
    retired: bool = False

    @property
    def selective(self) -> SelectiveRetriever:
        """Every version that is served has one; tests of the API alone do without."""
        assert self.api.selective is not None
        return self.api.selective

    def leave(self) -> None:
        """One request less; called from the event loop, as is `enter`."""
        self.in_flight -= 1
        if self.retired and not self.in_flight:
            self.api.close()

    def enter(self) -> None:
        self.in_flight += 1


@dataclass(frozen=True)
class Now:
    """What answers: `live`, and `canary` for `share` of the callers."""

    live: Loaded
    canary: Loaded | None = None
    share: float = 0.0
    sequence: int = 0


class LiveVersions:
    """`now` is what requests are answered with. `problem` says why this process is not where the state wants it."""

    def __init__(
        self,
        start: str,
        open_version: Callable[[str, bool], HttpApi],
        store: VersionStore | None,
        *,
        verify: bool = False,
    ) -> None:
        """open_version(version, verify) loads a version and warms it up; `verify`: that of the first. `start` is served
        where the store has no state.

        Without a store the one version is fixed. Raises ArtifactError if the version that is to be live does not load.
        """
        self.start, self._open, self._store = start, open_version, store
        self.problem = ""
        self.tallies: dict[str, Tally] = {}  # of all versions that have been here
        self._loading = threading.Lock()
        self._ended = threading.Event()
        self._process, self._kept = uuid.uuid4().hex, ""
        self._place: int | None = None  # a handle, while others may look at where this one is
        self._stamp = store.stamp() if store is not None else (0, 0)
        self._here: dict[str, Loaded] = {}
        state = self._state()
        self.now = Now(self._load(state.live, verify=verify), sequence=-1)
        self._told: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)
        if store is not None:
            self.refresh()
            self._thread.start()
        self._tell()

    def preload(self, version: str, *, verify: bool) -> Loaded:
        """Have a version in memory, for a flip that follows. Raises ArtifactError if it does not load."""
        with self._loading:
            return self._load(version, verify=verify)

    def refresh(self) -> None:
        """Go where the state is. Problems are noted and logged, and what was served stays."""
        with self._loading:
            try:
                state = self._state()
                live = self._load(state.live, verify=False)
                self._flip(state, live)
                canary = self._load(state.canary, verify=False) if state.canary else None
                self.now = Now(live, canary, state.share, state.sequence)
                self.problem = ""
            except (LexshardError, OSError, MemoryError) as error:
                if str(error) != self.problem:
                    logger.error("stays at version %s: %s", self.now.live.version, error)
                self.problem = str(error) or type(error).__name__
                return
            finally:
                self._keep_place()
            self._retire(keep={state.live, state.canary, *state.previous[-1:]})
            self._tell()

    def _tell(self) -> None:
        now = self.now
        told: dict[str, Any] = {"version": now.live.version}
        if now.canary is not None:
            told |= {"canary": now.canary.version, "share": now.share}
        if told != self._told:
            self._told = told
            log_event(logger, "serving", **told)

    def refresh_overlays(self) -> None:
        """Read what other processes have written; a damaged file is noted, and what was read before stays."""
        for loaded in list(self._here.values()):
            try:
                if loaded.api.selective is not None:
                    loaded.api.selective.overlay.refresh()
            except ArtifactError as error:
                if str(error) != self.problem:
                    logger.error("%s", error)
                self.problem = str(error)

    def tally_of(self, version: str) -> Tally | None:
        """What is counted here of a version, which another process may have answered with; None for an unknown one.

        May look at files.
        """
        if version not in self.tallies and self._store is not None:
            with contextlib.suppress(ArtifactError):
                self._store.folder(version)
                self.tallies.setdefault(version, Tally())
        return self.tallies.get(version)

    def all_counts(self) -> dict[str, list[dict[str, Any]]]:
        """Per version the tallies' counts of all processes, this one's as of now."""
        found = {version: [tally.counts()] for version, tally in list(self.tallies.items())}
        for process, versions in (self._store.counts() if self._store is not None else {}).items():
            if process != self._process:
                for version, counts in versions.items():
                    found.setdefault(version, []).append(counts)
        return found

    def close(self) -> None:
        self._ended.set()
        if self._place is not None:
            os.close(self._place)
            self._place = None
        for loaded in list(self._here.values()):
            loaded.api.close()

    def _flip(self, state: Serving, live: Loaded) -> None:
        """Before a canary is loaded, which may take a while."""
        now = self.now
        if now.live is not live:
            canary = now.canary if now.canary is not None and now.canary.version == state.canary else None
            self.now = Now(live, canary, now.share if canary else 0.0, state.sequence)

    def _state(self) -> Serving:
        state = self._store.serving() if self._store is not None else None
        return state if state is not None else Serving(self.start)

    def _load(self, version: str, *, verify: bool) -> Loaded:
        if version not in self._here:
            tally = self.tallies.setdefault(version, Tally())
            self._here[version] = Loaded(version, self._open(version, verify), tally)
        return self._here[version]

    def _retire(self, keep: set[str]) -> None:
        """Let go of all but `keep`, once their requests are answered."""
        for version in set(self._here) - keep:
            loaded = self._here.pop(version)
            loaded.retired = True
            if not loaded.in_flight:
                loaded.api.close()

    def _watch(self) -> None:
        polls = 0
        while not self._ended.wait(POLL_SECONDS):
            polls += 1
            try:
                self._poll(polls)
            except Exception as error:  # else this replica would stay where it is for ever, and not say so
                problem = f"looking at the versions failed: {type(error).__name__}: {error}"
                if problem != self.problem:
                    logger.exception("looking at the versions failed; it goes on")
                self.problem = problem

    def _poll(self, polls: int) -> None:
        assert self._store is not None
        if polls % _POLLS_TO_KEEP == 0:
            self._forget_tallies()
            self._keep_counts()
        stamp = self._store.stamp()
        self.refresh_overlays()
        if stamp != self._stamp or (self.problem and polls % _POLLS_TO_RETRY == 0):
            self._stamp = stamp
            self.refresh()

    def _forget_tallies(self) -> None:
        """Of versions that were removed."""
        assert self._store is not None
        for version in set(self.tallies) - set(self._store.names()) - set(self._here):
            del self.tallies[version]

    def _keep_place(self) -> None:
        """Where an activation looks whether all replicas have flipped."""
        if self._store is None or self._ended.is_set():
            return
        now = self.now
        canary = now.canary.version if now.canary is not None else ""
        place = {"live": now.live.version, "canary": canary, "sequence": now.sequence, "problem": self.problem}
        with contextlib.suppress(OSError):  # a folder that is read-only: then nothing is activated either
            if self._place is None:
                self._place = self._store.take_place(self._process)
            self._store.note_place(self._process, place)

    def _keep_counts(self) -> None:
        """Where the other processes find them, and those that come after this one."""
        assert self._store is not None
        tallies = list(self.tallies.items())  # another thread may add to them
        counts = {version: tally.counts() for version, tally in tallies if tally.requests or tally.clicks}
        if counts and (text := json.dumps(counts)) != self._kept:
            try:
                self._store.keep_counts(self._process, counts)
                self._kept = text
            except OSError as error:  # a folder that is read-only: this process's counts are its own
                if not self._kept:
                    logger.warning("figures of traffic are not kept: %s", error)
                self._kept = text
