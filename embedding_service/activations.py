"""Activations: a version is checked, judged by the gates, loaded beside the live one, and then goes live everywhere.

One at a time for all replicas; how it goes is noted where each of them finds it (`VersionStore.admission`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from cluster.errors import ArtifactError, LexshardError
from embedding_service.admission import admit_apart, fingerprint
from embedding_service.gates import Figure, Gates, to_document
from embedding_service.live_versions import LiveVersions
from embedding_service.service_logs import log_event
from embedding_service.versions import VersionStore

logger = logging.getLogger(__name__)

FLIP_SECONDS = 60.0  # within which all replicas should have loaded what one of them has
_LOOK_SECONDS = 0.05


class Activations:
    """`run` one; it waits for another process and for other replicas: not on an event loop."""

    def __init__(self, versions: LiveVersions, store: VersionStore, gates: Gates, *, admit_seconds: float) -> None:
        self.gates = gates
        self._versions, self._store, self._admit_seconds = versions, store, admit_seconds

    def run(
        self,
        version: str,
        *,
        share: float | None = None,
        force: bool = False,
        on_begun: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Make a version live, or with `share` the canary, and return how it ended (`VersionStore.admission`).

        force: although gates say no. on_begun: called as soon as it is noted that it runs.
        Raises BlockingIOError where another one runs, another OSError where it cannot be noted.
        """
        with self._store.admitting():
            self._note(version, "checking")
            on_begun()
            self._admit(version, share, force)
        return self._store.admission() or {}

    def await_flips(self, sequence: int, seconds: float) -> dict[str, Any]:
        """How many replicas have flipped to the state of `sequence`: all of them, or there is a "reason"."""
        give_up = time.monotonic() + seconds
        while (found := self._store.flipped(sequence))["flipped"] < found["replicas"]:
            if time.monotonic() > give_up:
                places = self._store.places()
                problems = {str(place["problem"]) for place in places if place["sequence"] < sequence} - {""}
                return {**found, "reason": "; ".join(sorted(problems)) or f"not loaded within {seconds:g} s"}
            time.sleep(_LOOK_SECONDS)
        return dict(found)

    def _admit(self, version: str, share: float | None, force: bool) -> None:
        store = self._store
        try:
            serving = store.serving()
            live = serving.live if serving is not None else self._versions.start
            measured, known = self._measured(version, live)
            failed = [str(figure) for figure in measured if not figure.passed]
            if failed and not force:
                raise ArtifactError("; ".join(failed) + "; it can be forced")
            former = self._versions.now.live.selective.overlay.now
            loaded = self._versions.preload(version, verify=known)
            lost = loaded.selective.lost(former) if share is None else {}
            if share is None:
                state = store.activate(version, start=self._versions.start)
            else:
                state = store.set_canary(version, share, start=self._versions.start)
            ends = "live" if share is None else "canary"
            told = {
                "forced": failed,
                "figures": to_document(measured),
                "ends": ends,
                "sequence": state.sequence,
                **lost,
            }
            self._note(version, "flipping", **told)
            self._versions.refresh()
            flips = self.await_flips(state.sequence, FLIP_SECONDS)
            self._note(version, "flipping" if "reason" in flips else ends, **told, **flips)
            event = "activated" if share is None else "canary_started"
            log_event(logger, event, version=version, share=share, against=live, forced=failed or None, **flips)
        except (LexshardError, OSError, MemoryError) as error:
            self._refuse(version, str(error) or type(error).__name__)
        except Exception as error:  # a bug of ours must not leave it "checking" for ever
            logger.exception("activating %s failed", version)
            self._refuse(version, f"failed inside the service ({type(error).__name__})")

    def _refuse(self, version: str, reason: str) -> None:
        self._note(version, "refused", reason=reason)
        log_event(logger, "refused", level=logging.WARNING, asked="activate", version=version, reason=reason)

    def _measured(self, version: str, live: str) -> tuple[list[Figure], bool]:
        """The gates' figures of a version against the live one, and whether they were known from an earlier time."""
        store = self._store
        candidate, against = store.folder(version), store.folder(live) if live != version else None
        asked = fingerprint(candidate, against, self.gates)
        kept = store.verdict(version)
        if kept is not None and kept.get("asked") == asked:
            return [Figure(**figure) for figure in kept["figures"]], True
        measured = admit_apart(candidate, against, self.gates, timeout_seconds=self._admit_seconds)
        store.keep_verdict(version, {"asked": asked, "against": live, "figures": to_document(measured)})
        return measured, False

    def _note(self, version: str, state: str, **more: Any) -> None:
        self._store.note_admission({"version": version, "state": state, **more})
