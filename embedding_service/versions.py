"""The versions below one root, and which of them are served: plain files, so that every replica on every node agrees.

    <root>/<version>/                  an artifact (see `artifact`)
    <root>/incoming/<name>/            where a version may be put for `publish`
    <root>/.serving/state.json         `Serving`: live, previous and canary version; flipped atomically
                    admission.json     the activation that runs, or the last one and how it ended
                    verdicts/<version>.json   what the gates measured before the version went live
                    replicas/<process>.json   what each replica serves; it holds a lock beside it as long as it lives
                    exports/          what is known of exports (see `export_records`)

A replica that is started, or started again, reads the state; all look at it several times a second (`LiveVersions`).
Nothing here depends on Ray: the state outlives replicas, the controller and the cluster. Where there is none yet, the
newest version that `lexshard export` has published is served.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import ArtifactError
from cluster.storage import publish_folder, remove_folder, sync_folder, write_atomic, write_json
from embedding_service.artifact import CURRENT, MANIFEST, VERSION_NAME, Artifact
from embedding_service.traffic import figures

logger = logging.getLogger(__name__)

FOLDER = ".serving"
MAX_PREVIOUS = 20  # versions that a roll-back can reach
MAX_STATE_BYTES = 2**20
MAX_PROCESSES = 1000  # whose traffic is added up


@dataclass(frozen=True)
class Serving:
    """What is served. `previous`: the versions that were live before, the last one last; `canary`: "" for none, and
    `share` of the callers in 0..1 are answered by it; `sequence` grows with every change.
    """

    live: str
    previous: tuple[str, ...] = ()
    canary: str = ""
    share: float = 0.0
    sequence: int = 0


class VersionStore:
    """The versions of one root folder. Safe to use from many processes: changes hold a lock on the root."""

    def __init__(self, root: str | Path) -> None:
        """Raises ArtifactError if there is no such folder."""
        self.root = Path(root)
        if not self.root.is_dir():
            raise ArtifactError(f"{self.root}: there is no such artifact folder")
        self._folder = self.root / FOLDER

    def names(self) -> list[str]:
        """All versions here, in the order of their names."""
        found = [
            folder for folder in self.root.iterdir() if VERSION_NAME.fullmatch(folder.name) and not folder.is_symlink()
        ]
        return sorted(folder.name for folder in found if (folder / MANIFEST).is_file())

    def folder(self, version: str) -> Path:
        """The folder of a version. Raises ArtifactError for one that is not here, and for what is no version's name."""
        folder = self.root / version
        if not VERSION_NAME.fullmatch(version) or folder.is_symlink() or not (folder / MANIFEST).is_file():
            raise ArtifactError(
                f"there is no version {version[:100]!r}; there are: {', '.join(self.names()) or 'none'}"
            )
        return folder

    def open(self, version: str, *, verify: bool = True) -> Artifact:
        """The artifact of a version. Raises ArtifactError as `Artifact.open` does, and if it calls itself otherwise."""
        artifact = Artifact.open(self.folder(version), verify=verify)
        check_name(artifact)
        return artifact

    def serving(self) -> Serving | None:
        """The state; None if no version was ever activated. Raises ArtifactError for a damaged one."""
        document = self._read("state.json")
        if document is None:
            return None
        try:
            state = Serving(**{**document, "previous": tuple(document["previous"])})
            if not all(isinstance(name, str) for name in (state.live, state.canary, *state.previous)):
                raise TypeError("versions are named by strings")
            if not 0.0 <= float(state.share) <= 1.0 or not VERSION_NAME.fullmatch(state.live):
                raise ValueError(f"live {state.live!r}, share {state.share!r}")
        except (TypeError, KeyError, ValueError) as error:
            raise ArtifactError(f"{self._folder / 'state.json'}: is damaged ({error}); remove it") from None
        return state

    def stamp(self) -> tuple[int, int]:
        """Changes whenever the state does; (0, 0) without one."""
        try:
            found = (self._folder / "state.json").stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def activate(self, version: str, *, start: str) -> Serving:
        """Make `version` live; a canary of it ends. `start` is what is live where there is no state yet."""
        self.folder(version)
        with self._locked():
            now = self.serving() or Serving(start)
            if version != now.live:
                now = replace(now, live=version, previous=(*now.previous, now.live)[-MAX_PREVIOUS:])
            if now.canary == version:
                now = replace(now, canary="", share=0.0)
            return self._write(now)

    def roll_back(self, live: str = "") -> Serving:
        """Make the version live that was so before; one more call goes further back.

        `live`: only if this version is live, so that asking twice goes back once. Raises ArtifactError.
        """
        with self._locked():
            now = self.serving()
            if live and (now is None or now.live != live):
                raise ArtifactError(f"version {live} is not live{'' if now is None else f': {now.live} is'}")
            past = [name for name in now.previous if (self.root / name / MANIFEST).is_file()] if now else []
            if now is None or not past:
                raise ArtifactError("there is no version to go back to")
            if now.canary == past[-1]:
                now = replace(now, canary="", share=0.0)
            return self._write(replace(now, live=past[-1], previous=tuple(past[:-1])))

    def set_canary(self, version: str, share: float, *, start: str) -> Serving:
        """Have `version` answer `share` of the callers; a share of 0 ends that."""
        if share:
            self.folder(version)
        with self._locked():
            now = self.serving() or Serving(start)
            if share and version == now.live:
                raise ArtifactError(f"version {version} is live: it answers everybody already")
            return self._write(replace(now, canary=version if share else "", share=share))

    def publish(self, source: str, *, served: Collection[str] = ()) -> str:
        """Check the version in `source`, a folder below the root, move it into its place and return its name.

        `served`: versions that answer somewhere though the state does not name them. Raises ArtifactError for a folder
        outside, one that is a version here or lies in one, one that is damaged or holds what its manifest does not
        list, and a version that is here already. The folder is checked where it lies, and moved by one rename: what is
        refused, or interrupted, stays where it was.
        """
        parts = _parts(source)
        folder = self.root.joinpath(*parts)
        if os.path.realpath(folder) != os.path.join(os.path.realpath(self.root), *parts):
            raise ArtifactError(f"{source}: is a link, or below one")
        if not folder.is_dir():
            raise ArtifactError(f"{source}: there is no such folder below the root of the versions")
        self._check_place(source, parts, served)
        self._check_offered(folder, source, verify=True)
        with self._locked():
            self._check_place(source, parts, served)  # it may have gone live meanwhile
            version = self._put(folder, source)
            if folder.parent.is_dir():
                sync_folder(folder.parent)
        return version

    def publish_copy(self, source: str | Path) -> str:
        """As `publish`, of a copy of a folder anywhere."""
        self._check_offered(Path(source), str(source), verify=False)
        with self._private() as private:
            shutil.copytree(source, private, symlinks=True)  # a link is refused, not followed
            self._check_offered(private, str(source), verify=True)
            with self._locked():
                return self._put(private, str(source))

    def remove(self, version: str) -> None:
        """Remove a version for good. Raises ArtifactError for one that is served."""
        folder = self.folder(version)
        with self._locked():
            now = self.serving()
            if now is None or version in (now.live, now.canary):
                raise ArtifactError(f"version {version} is served: activate another one first")
            self._write(replace(now, previous=tuple(name for name in now.previous if name != version)))
            remove_folder(folder)
        for kept in ("verdicts", "overlay"):
            (self._folder / kept / f"{version}.json").unlink(missing_ok=True)

    def verdict(self, version: str) -> dict[str, Any] | None:
        """What was kept with `keep_verdict`."""
        return self._read(f"verdicts/{version}.json")

    def keep_verdict(self, version: str, verdict: Mapping[str, Any]) -> None:
        (self._folder / "verdicts").mkdir(parents=True, exist_ok=True)
        write_json(self._folder / "verdicts" / f"{version}.json", verdict)

    def overlay_file(self, version: str) -> Path:
        """Where the items are kept that were added to, or taken off, a version (see `overlay`)."""
        return self._folder / "overlay" / f"{version}.json"

    def keep_counts(self, process: str, counts: Mapping[str, Any]) -> None:
        """The traffic that a process has seen, per version; replaces what it has said before."""
        (self._folder / "counts").mkdir(parents=True, exist_ok=True)
        file = self._folder / "counts" / f"{process}.json"
        if not file.exists():
            for old in self._counts_files()[: -MAX_PROCESSES + 1]:
                old.unlink(missing_ok=True)
        write_atomic(file, json.dumps(counts, separators=(",", ":")).encode())

    def counts(self) -> dict[str, dict[str, Any]]:
        """process -> version -> counts, of the processes that kept them last; files that are damaged are left out."""
        found = {}
        for file in self._counts_files()[-MAX_PROCESSES:]:
            try:
                versions = self._read(f"counts/{file.name}") or {}
                for counts in versions.values():
                    figures([counts])
                found[file.stem] = versions
            except (ArtifactError, OSError, KeyError, TypeError, ValueError) as error:
                logger.warning("%s: figures of traffic are left out: %s", file, error)
        return found

    def take_place(self, process: str) -> int:
        """A handle to be kept open: as long as it is, what `note_place` said of this replica counts."""
        (self._folder / "replicas").mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder / "replicas" / f"{process}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        return handle

    def note_place(self, process: str, place: Mapping[str, Any]) -> None:
        """What a replica serves: "live", "canary", the "sequence" of the state that it follows, its "problem"."""
        write_atomic(self._folder / "replicas" / f"{process}.json", json.dumps(place).encode())

    def places(self) -> list[dict[str, Any]]:
        """What the replicas that live serve; none where the folder is read-only. What dead ones left is removed."""
        found = []
        for file in (self._folder / "replicas").glob("[0-9a-f]*.json"):
            try:
                with _lock(file.with_suffix(".lock"), wait=False):
                    file.unlink()
                    file.with_suffix(".lock").unlink()
            except BlockingIOError:
                if (place := self._read(f"replicas/{file.name}")) is not None:
                    found.append(place)
            except FileNotFoundError:  # another process has removed it
                continue
        return found

    def flipped(self, sequence: int) -> dict[str, int]:
        """How many of the "replicas" have "flipped" to the state of that sequence, or to a later one."""
        places = self.places()
        return {"flipped": sum(place["sequence"] >= sequence for place in places), "replicas": len(places)}

    def _counts_files(self) -> list[Path]:
        """The oldest first."""
        times = {}
        for file in (self._folder / "counts").glob("[0-9a-f]*.json"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                times[file] = file.stat().st_mtime_ns
        return sorted(times, key=lambda file: times[file])

    def admission(self) -> dict[str, Any] | None:
        """The activation that runs, or the last one; "interrupted" where its process has ended before it did.

        While it is "flipping", or has ended so, it tells how many replicas have flipped by now; when all have, it has
        ended as it was to.
        """
        found = self._read("admission.json")
        if found is not None and found.get("state") == "checking":
            with contextlib.suppress(BlockingIOError), self.admitting():
                return {**found, "state": "interrupted"}
        if found is not None and found.get("state") == "flipping":
            counted = self.flipped(found["sequence"])
            if counted["flipped"] == counted["replicas"]:
                return {**found, **counted, "state": found["ends"], "reason": ""}
            return {**found, **counted}
        return found

    def note_admission(self, document: Mapping[str, Any]) -> None:
        self._folder.mkdir(exist_ok=True)
        write_json(self._folder / "admission.json", document)

    @contextlib.contextmanager
    def admitting(self) -> Iterator[None]:
        """One activation at a time. Raises BlockingIOError if there is one."""
        self._folder.mkdir(exist_ok=True)
        with _lock(self._folder, wait=False):
            yield

    def _check_place(self, source: str, parts: list[str], served: Collection[str]) -> None:
        """Raise ArtifactError for a folder that is a version which is served, or that lies in a version."""
        now = self.serving()
        named = (now.live, now.canary, *now.previous) if now is not None else ()
        if parts[0] in {*named, *served}:
            raise ArtifactError(f"{source}: is, or lies in, version {parts[0]}, which is served; copy it to incoming/")
        if len(parts) > 1 and (self.root / parts[0] / MANIFEST).exists():
            raise ArtifactError(f"{source}: lies in version {parts[0]}; put it in incoming/")

    def _check_offered(self, folder: Path, source: str, *, verify: bool) -> str:
        """The version in `folder`, which holds the manifest and what it lists and nothing else."""
        if not (folder / MANIFEST).is_file():  # else `Artifact.open` would look for a CURRENT
            raise ArtifactError(f"{source}: is not an artifact version: it has no {MANIFEST}")
        artifact = Artifact.open(folder, verify=False)
        _check_entries(folder, source, {MANIFEST, *artifact.manifest["files"]})
        return (Artifact.open(folder) if verify else artifact).version

    def _put(self, folder: Path, source: str) -> str:
        """Give a checked folder in the root the name of its version. The root is locked."""
        version = self._check_offered(folder, source, verify=False)
        if (self.root / version).exists():
            raise ArtifactError(f"version {version} is here already; versions are never overwritten")
        publish_folder(folder, self.root / version)
        if not (self.root / CURRENT).exists():
            write_json(self.root / CURRENT, {"version": version})
        return version

    @contextlib.contextmanager
    def _private(self) -> Iterator[Path]:
        """A name in the root that does not exist, and that no writer removes meanwhile (see `artifact`)."""
        lease = self.root / f".tmp-{uuid.uuid4().hex}"
        with contextlib.ExitStack() as held:
            with self._locked():  # a writer that finds it unlocked would remove it
                lease.mkdir()
                held.enter_context(_lock(lease, wait=True))
            try:
                yield lease / "version"
            finally:
                remove_folder(lease)

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self._folder / name
        try:
            text = file.read_bytes()
            if len(text) > MAX_STATE_BYTES:
                raise ValueError(f"{len(text)} bytes")
            document = json.loads(text)
            if not isinstance(document, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ArtifactError(f"{file}: is damaged ({error}); remove it") from None
        return document

    def _write(self, state: Serving) -> Serving:
        state = replace(state, sequence=state.sequence + 1)
        self._folder.mkdir(exist_ok=True)
        write_json(self._folder / "state.json", asdict(state))
        return state

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with _lock(self.root, wait=True):
            yield


def _parts(source: str) -> list[str]:
    parts = source.split("/")
    if len(parts) > 4 or not all(VERSION_NAME.fullmatch(part) and part.strip(". ") for part in parts):
        raise ArtifactError(f"{source[:200]!r}: name a folder below the root of the versions, like incoming/NAME")
    return parts


def check_name(artifact: Artifact) -> None:
    """Raise ArtifactError for a version whose folder has another name: answers and state would not agree."""
    if artifact.path.name != artifact.version:
        raise ArtifactError(f"{artifact.path}: calls itself version {artifact.version!r}; name the folder so")


def _check_entries(folder: Path, source: str, listed: Collection[str]) -> None:
    """Raise ArtifactError for anything but listed files and folders: opening a pipe would wait for ever."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            entry, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ArtifactError(f"{source}: {entry} is a link; an artifact's files are its own")
            if not stat.S_ISDIR(mode) and not (stat.S_ISREG(mode) and entry in listed):
                raise ArtifactError(f"{source}: holds {entry}, which its manifest does not list; remove it")


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[None]:
    """The kernel gives the lock back when its process ends, however that is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
