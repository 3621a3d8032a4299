"""What there is and what is live, with the figures of each version: the document of GET /v1/versions."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from cluster.errors import ArtifactError
from embedding_service.live_versions import LiveVersions, Loaded
from embedding_service.manifest import MAX_MANIFEST_BYTES, parse_manifest
from embedding_service.recall_probe import RecallProbe
from embedding_service.scatter import Scatter
from embedding_service.traffic import figures
from embedding_service.versions import VersionStore

MAX_LISTED = 100


class VersionListing:
    """`document` reads files: not on an event loop."""

    def __init__(
        self,
        versions: LiveVersions,
        store: VersionStore | None,
        probe: RecallProbe | None = None,
        scatter: Scatter | None = None,
    ) -> None:
        """scatter: the processes that hold the indexes, if this one does not."""
        self._versions, self._store, self._probe, self._scatter = versions, store, probe, scatter
        self._facts: OrderedDict[str, tuple[tuple[int, int, int], dict[str, Any]]] = OrderedDict()  # of manifests

    def document(self) -> dict[str, Any]:
        """ "here" is what the process that answers knows of itself; the rest is the same for all."""
        now, store = self._versions.now, self._store
        state = store.serving() if store is not None else None
        names = store.names() if store is not None else [now.live.version]
        traffic = self._versions.all_counts()
        return {
            "live": state.live if state is not None else now.live.version,
            "previous": list(state.previous) if state is not None else [],
            "canary": (state.canary or None) if state is not None else None,
            "share": state.share if state is not None else 0.0,
            "sequence": state.sequence if state is not None else 0,
            "here": {
                "live": now.live.version,
                "canary": now.canary.version if now.canary is not None else None,
                "problem": self._versions.problem or None,
                "num_shards": self._scatter.num_shards if self._scatter is not None else 0,
                "lost_shards": self._lost_shards([now.live, *([now.canary] if now.canary is not None else [])]),
                "recall": [
                    {"version": version, "index": index, **probed.to_document()}
                    for (version, index), probed in (self._probe.found if self._probe is not None else {}).items()
                ],
            },
            "admission": store.admission() if store is not None else None,
            "num_versions": len(names),
            "versions": [self._about(name, traffic.get(name, [])) for name in names[-MAX_LISTED:]],
        }

    def _lost_shards(self, here: list[Loaded]) -> list[dict[str, Any]]:
        lost = {one.version: self._scatter.lost_of(one.version) for one in here} if self._scatter is not None else {}
        return [
            {"version": version, "shard": number, "reason": reason}
            for version, shards in lost.items()
            for number, reason in shards.items()
        ]

    def _about(self, version: str, counts: list[dict[str, Any]]) -> dict[str, Any]:
        told: dict[str, Any] = {"version": version, "traffic": figures(counts)}
        if self._store is None:
            return told
        try:
            fixed = self._manifest_facts(self._store.folder(version) / "manifest.json", version)
            verdict = self._store.verdict(version) or {}
        except (ArtifactError, OSError) as error:
            return {**told, "problem": str(error)}
        return {**told, **fixed, "gates": verdict.get("figures"), "against": verdict.get("against")}

    def _manifest_facts(self, file: Path, version: str) -> dict[str, Any]:
        """What the manifest says; read again only when the file is another one. Raises ArtifactError, OSError."""
        found = file.stat()
        stamp = found.st_ino, found.st_mtime_ns, found.st_size
        known = self._facts.get(version)
        if known is not None and known[0] == stamp:
            return known[1]
        with open(file, "rb") as handle:
            manifest = parse_manifest(handle.read(MAX_MANIFEST_BYTES + 1), version)
        recommend = manifest.indexes.get("recommend")
        facts = {
            "created": manifest.created,
            "num_items": recommend.rows if recommend is not None else None,
            "dim": recommend.dim if recommend is not None else None,
            "figures": manifest.figures,
        }
        self._facts[version] = stamp, facts
        if len(self._facts) > 2 * MAX_LISTED:
            self._facts.popitem(last=False)
        return facts
