"""Admission: whether a version may be served at all, and what the gates say. Done in a process of its own.

    python -m embedding_service.admission < request.json     {"candidate", "live", "gates"} -> {"figures"} or {"error"}

A process of its own keeps the service's event loop free, and it is the one that ends if a damaged or hostile file makes
FAISS or another reader crash or eat all memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cluster.child import child_command, child_environment
from cluster.errors import ArtifactError, LexshardError
from cluster.storage import checksum
from embedding_service.artifact import MANIFEST, Artifact
from embedding_service.attributes import FILE as ATTRIBUTES
from embedding_service.attributes import Attributes
from embedding_service.gates import Figure, Gates, judge, to_document
from embedding_service.http_access import VARIABLES
from embedding_service.http_artifact import check_servable
from embedding_service.manifest import MAX_MANIFEST_BYTES, parse_manifest
from embedding_service.ragged import Ragged
from embedding_service.retrieval import RECOMMEND, SIMILAR, Retriever
from embedding_service.versions import check_name

MEMORY_FACTOR = 4  # address space beyond what is there after the imports: so many times the artifacts' files
MEMORY_FLOOR_BYTES = 8 * 2**30
_LENGTH_ERROR = 0.02  # of vectors that are said to be of unit length: int8 rounds by less


def admit(candidate: Path, live: Path | None, gates: Gates) -> list[Figure]:
    """Read all of a version, ask it, and judge it against the live one. Raises ArtifactError, and DataError for the
    cases of the gates.
    """
    artifact = Artifact.open(candidate)
    check_name(artifact)
    check_servable(artifact)
    for name in artifact.manifest["vectors"]:
        _check_vectors(artifact, name)
    for name in artifact.manifest["indexes"]:
        shards = len(artifact.index_ranges(name))
        for shard in range(shards):
            artifact.index(name, shard, mapped=shards > 1).check_rows()
    retriever = Retriever(artifact, threads=1)
    if ATTRIBUTES in artifact.manifest["files"]:
        Attributes.read(artifact.path / ATTRIBUTES, retriever.catalogue(RECOMMEND))
    _ask(retriever)
    return judge(retriever, None if live is None else Retriever(Artifact.open(live, verify=False), threads=1), gates)


def _check_vectors(artifact: Artifact, name: str) -> None:
    """Finite numbers, and of unit (or no) length where the manifest says so. Raises ArtifactError."""
    normalized = artifact.manifest["vectors"][name]["normalized"]
    for start, chunk in artifact.vectors(name).chunks():
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise ArtifactError(
                f"{artifact.path}: row {start + int(np.argmin(finite))} of vectors {name!r} is not finite"
            )
        lengths = np.linalg.norm(chunk, axis=1)
        if normalized and (off := (np.abs(lengths - 1) > _LENGTH_ERROR) & (lengths > 0)).any():
            row = int(np.argmax(off))
            raise ArtifactError(
                f"{artifact.path}: vectors {name!r} are said to be normalised; row {start + row} has length "
                f"{lengths[row]:.3f}"
            )


def _ask(retriever: Retriever) -> None:
    """A few queries to every part: what only crashes or fails when it is used does so here."""
    keys = retriever.catalogue(SIMILAR).keys
    few = [keys[row].as_py() for row in {0, len(keys) // 2, len(keys) - 1}]
    retriever.similar(few, 10)
    sessions = retriever.catalogue(RECOMMEND).keys[: len(few)].to_pylist()
    retriever.recommend([sessions, sessions[:1], []], 10)
    history = Ragged(np.arange(len(few)), np.array([0, 1, len(few)]))
    if not np.isfinite(retriever.encode_rows(history, None, {})).all():
        raise ArtifactError(f"{retriever.artifact.path}: its query tower answers with nan or an infinity")


def admit_apart(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> list[Figure]:
    """`admit` in another process, at low priority and with bounded memory. Raises ArtifactError for whatever it meets,
    a crash and too long a time included.
    """
    request = {"candidate": str(candidate), "live": live and str(live), "gates": asdict(gates)}
    command = child_command("embedding_service.admission")
    environment = child_environment(without=VARIABLES) | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout_seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(f"{candidate.name}: was not read and judged within {timeout_seconds:g} s") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"failed with status {done.returncode}"
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise ArtifactError(f"{candidate.name}: the process that read it {how}: {last}") from None
    if "error" in answer:
        raise ArtifactError(answer["error"])
    return [Figure(**figure) for figure in answer["figures"]]


def fingerprint(candidate: Path, live: Path | None, gates: Gates) -> str:
    """Equal for equal questions to `admit`, as far as the manifests tell, which list every file's checksum."""
    manifests = [checksum(folder / MANIFEST) if folder is not None else "" for folder in (candidate, live)]
    return json.dumps([*manifests, asdict(gates)], sort_keys=True)


def main() -> None:
    request = json.loads(sys.stdin.read())
    candidate, live = Path(request["candidate"]), request["live"] and Path(request["live"])
    try:
        _bound_memory([folder for folder in (candidate, live) if folder])
        answer: Mapping[str, Any] = {"figures": to_document(admit(candidate, live, Gates(**request["gates"])))}
    except (LexshardError, OSError, MemoryError, ValueError) as error:
        answer = {"error": str(error) or type(error).__name__}
    print(json.dumps(answer))


def _listed_bytes(folder: Path) -> int:
    """Of the files that the manifest lists, as far as they are there; what lies beside them is never read."""
    with open(folder / MANIFEST, "rb") as handle:
        manifest = parse_manifest(handle.read(MAX_MANIFEST_BYTES + 1), str(folder / MANIFEST))
    return sum(
        min(entry.bytes, file.stat().st_size)
        for name, entry in manifest.files.items()
        if (file := folder / name).is_file()
    )


def _bound_memory(folders: list[Path]) -> None:
    files = sum(_listed_bytes(folder) for folder in folders)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + max(MEMORY_FACTOR * files, MEMORY_FLOOR_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
