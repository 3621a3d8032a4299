"""Exports of runs by the service itself: one at a time, each by `lexshard export` in a process of its own.

No training code is imported: the command does the work, on threads or, where the run's config or RAY_ADDRESS names a
Ray cluster, as Ray tasks, and tells line by line how far it is. It is given no token, runs at low priority, and ends
with the replica that was asked. What it has done by then is kept, and the next export of the same run goes on with it.

The version appears beside the others and nothing else changes: what is current stays so, and what is live too, unless
the export was asked to activate it, which the gates decide.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from cluster.child import child_command, child_environment
from cluster.errors import ArtifactError, LexshardError
from embedding_service.artifact import VERSION_NAME
from embedding_service.export_records import INTERRUPTED, ExportRecords
from embedding_service.http_access import VARIABLES
from embedding_service.service_logs import log_event
from embedding_service.versions import FOLDER, VersionStore

logger = logging.getLogger(__name__)

Which = Literal["best", "last"]
Record = dict[str, Any]
_MAX_DEPTH = 4  # folders below the root of the runs
_NOTE_SECONDS = 0.5  # between two times that progress is written down
_STOP_SECONDS = 5.0
_LAST_LINES = 5  # of what a command said that are told if it failed without a word
_MAX_MESSAGE = 2000
_MAX_CONFIG_BYTES = 2**20
_ERROR = "lexshard: error: "
_NOT_GIVEN = VARIABLES | {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}  # which are set for the replica's questions


class Exports:
    """`begin` and `records`: the exports of one service, into `store`. Files are read and written: not on a loop."""

    def __init__(self, store: VersionStore, runs: Path, activate: Callable[[str], Record]) -> None:
        """runs: the folder that all runs lie below. activate(version): make it live if the gates say so, and return how
        that ended: {"state", "reason"...}.
        """
        self.records = ExportRecords(store.root / FOLDER / "exports")
        self._store, self._runs, self._activate = store, runs, activate
        self._changing = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def begin(self, run: str, *, which: Which = "best", activate: bool = False) -> Record:
        """Begin to export a run, named below the root of the runs, and return the record, which `records` follows.

        Raises ArtifactError for what is no run there, BlockingIOError where an export runs, OSError where it cannot be
        noted.
        """
        folder = self._run_folder(run)
        handle = self.records.claim()
        try:
            self.records.end_those_left()
            record: Record = {
                "id": self.records.new_id(),
                "run": run,
                "which": which,
                "activate": activate,
                "state": "running",
                "began": time.time(),
                "seconds": 0.0,
                "message": "starting",
                "share": None,
                "shards_done": None,
                "num_shards": None,
                "version": None,
                "activation": None,
            }
            self.records.write(record)
            thread = threading.Thread(
                target=self._work, args=(handle, folder, dict(record)), name="export", daemon=True
            )
            with self._changing:
                self._thread = thread
            thread.start()
        except BaseException:
            os.close(handle)
            raise
        log_event(logger, "export_began", run=run, export=record["id"])
        return record

    def close(self) -> None:
        """End the export that runs, if any, and its process; what it has done is kept."""
        with self._changing:
            self._closing = True
            process, thread = self._process, self._thread
            if process is not None:
                process.kill()
        if thread is not None:
            thread.join(_STOP_SECONDS)

    def _run_folder(self, run: str) -> Path:
        """Raises ArtifactError for a path that leaves the root of the runs, is or goes through a link, or is no run."""
        parts = run.split("/")
        if len(parts) > _MAX_DEPTH or not all(VERSION_NAME.fullmatch(part) and part.strip(". ") for part in parts):
            raise ArtifactError(f"{run[:200]!r}: name a run by its folder below serve.runs, without .. and the like")
        root = Path(os.path.realpath(self._runs))
        folder = root.joinpath(*parts)
        if os.path.realpath(folder) != str(folder):
            raise ArtifactError(f"{run}: is a link, or below one; a run's folder lies below serve.runs itself")
        if not (folder / "config.toml").is_file():
            raise ArtifactError(f"there is no run '{run}' below serve.runs: no folder of that name has a config.toml")
        return folder

    def _work(self, handle: int, folder: Path, record: Record) -> None:
        """In a thread of its own, to the end of the export; `handle` is given back with it."""
        try:
            self._export(folder, record)
            record["seconds"] = round(time.time() - record["began"], 1)
            if record["state"] == "published" and record["activate"]:
                record["activation"] = self._activated(record)
        except (LexshardError, OSError) as error:
            record |= {"state": "failed", "message": str(error)[:_MAX_MESSAGE]}
        except Exception as error:  # a bug of ours must not leave it "running" for ever
            logger.exception("exporting %s failed", record["run"])
            record |= {"state": "failed", "message": f"failed inside the service ({type(error).__name__})"}
        finally:
            self._end(handle, record)

    def _end(self, handle: int, record: Record) -> None:
        level = logging.INFO if record["state"] == "published" else logging.WARNING
        told = {"version": record["version"], "reason": None if record["version"] else record["message"]}
        log_event(logger, f"export_{record['state']}", level=level, run=record["run"], export=record["id"], **told)
        try:
            self.records.write(record)
        except OSError:
            logger.exception("how the export %s ended cannot be noted", record["id"])
        finally:
            os.close(handle)

    def _export(self, folder: Path, record: Record) -> None:
        """Run the command and note what it tells; `record` ends as published, failed or interrupted."""
        process = self._started(folder, record["which"])
        if process is None:
            record |= {"state": "interrupted", "message": INTERRUPTED}
            return
        said: deque[str] = deque(maxlen=_LAST_LINES)
        try:
            published = self._follow(process, said, record)
        finally:  # whatever happens here, it is not left alone
            process.kill()
            status = process.wait()
            with self._changing:
                self._process, stopped = None, self._closing
        if status == 0 and published:
            told = {"state": "published", "message": f"published as version {published}", "share": 1.0}
            record |= told | {"version": self._store.folder(published).name}
        elif stopped:
            record |= {"state": "interrupted", "message": INTERRUPTED}
        else:
            record |= {"state": "failed", "message": _reason(status, said)[:_MAX_MESSAGE]}

    def _follow(self, process: subprocess.Popen[str], said: deque[str], record: Record) -> str:
        """Read what the command tells until it ends; returns the version that it has published, "" if none."""
        published, noted = "", time.monotonic()
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                event = _event_of(line)
                if event is None:
                    said.append(line.strip())
                    continue
                if event["kind"] == "published":
                    published = str(event["version"])
                    continue
                record |= {name: event[name] for name in ("share", "shards_done", "num_shards") if name in event}
                record["message"] = str(event.get("text", record["message"]))[:_MAX_MESSAGE]
                if time.monotonic() - noted > _NOTE_SECONDS:
                    noted = time.monotonic()
                    self._note_progress(record)
        process.wait()
        return published

    def _note_progress(self, record: Record) -> None:
        try:
            self.records.write(record)
        except OSError as error:  # the export is worth more than the news of it
            logger.warning("how far the export %s is cannot be noted: %s", record["id"], error)

    def _started(self, folder: Path, which: Which) -> subprocess.Popen[str] | None:
        """The command's process; None if the service is about to end."""
        arguments = ["export", str(folder), "--out", os.path.realpath(self._store.root), "--which", which]
        command = child_command("cluster.cli", *arguments, "--keep-current", "--json")
        with self._changing:
            if self._closing:
                return None
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=_began_in(folder),
                env=child_environment(without=_NOT_GIVEN),
            )
            return self._process

    def _activated(self, record: Record) -> Record:
        """How the activation of what was published ends; whatever happens to it, published it stays."""
        try:
            self.records.write({**record, "activation": {"state": "checking"}})
            told = self._activate(record["version"])
        except BlockingIOError:
            reason = "another activation runs; activate the version when it has ended"
            return {"state": "refused", "reason": reason}
        except OSError as error:
            return {"state": "refused", "reason": f"it cannot be noted: {error.strerror or error}"}
        except LexshardError as error:
            return {"state": "refused", "reason": str(error)[:_MAX_MESSAGE]}
        except Exception as error:  # a bug of ours
            logger.exception("activating %s failed", record["version"])
            return {"state": "refused", "reason": f"failed inside the service ({type(error).__name__})"}
        return {"state": told.get("state", "refused"), "reason": told.get("reason", "")}


def _began_in(folder: Path) -> Path | None:
    """Where `lexshard train` was called, whose config's paths are relative to it; None where that cannot be told.

    The config is not loaded here, where its `${NAME}` would stand for variables of the service, and what is wrong with
    it is the command's to tell.
    """
    try:
        with open(folder / "config.toml", "rb") as handle:
            named = tomllib.loads(handle.read(_MAX_CONFIG_BYTES).decode())["run"]
        parts = Path(named).parts
    except (ValueError, KeyError, TypeError):  # damaged
        return None
    if Path(named).is_absolute() or not parts or folder.parts[-len(parts) :] != parts:
        return None
    return Path(*folder.parts[: -len(parts)])


def _event_of(line: str) -> dict[str, Any] | None:
    """What the command tells with --json; None for a line of another kind."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None


def _reason(status: int, said: deque[str]) -> str:
    """The command's own message; where it had none, how its process ended, and its last words."""
    for line in reversed(said):
        if line.startswith(_ERROR):
            return re.sub(r"\s+", " ", line.removeprefix(_ERROR))
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"the export's process {how}: {(' | '.join(filter(None, said))) or 'it said nothing'}"
