"""Exports that a service is asked for: a run over HTTP to a version, what fails, and that no process is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import child
from cluster.config import Config, to_toml
from embedding_service import activations, admission, export_records, exports
from embedding_service.artifact import Artifact
from embedding_service.export_records import ExportRecords
from embedding_service.gates import Gates
from tests.embedding_service.artifacts import publish
from tests.embedding_service.services import LocalService
from tests.trainers.runs import small_config, write_sessions

GIVE_UP_SECONDS = 300


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run runs/clicks, trained where its config's paths are relative to, and sessions beside it."""
    from trainers.loop import train

    folder = tmp_path_factory.mktemp("project")
    write_sessions(folder / "sessions.parquet", num_sessions=200)
    before = os.getcwd()
    os.chdir(folder)
    try:
        config: Config = small_config(
            Path("runs/clicks"),
            Path("sessions.parquet"),
            train={"epochs": 1},
            export={"index": "Flat"},
        )
        train(config, on_event=lambda event: None)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def service(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    """It serves a version of the same keys; the runs are its own copy."""

    def admit_here(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> object:
        return admission.admit(candidate, live, gates)

    monkeypatch.setattr(activations, "admit_apart", admit_here)
    shutil.copytree(trained, tmp_path / "project")
    root = tmp_path / "artifacts"
    publish(root, version="a", num_items=60)
    running = LocalService(root, "a", runs=tmp_path / "project" / "runs")
    yield running
    running.close()


def has_ended(record: Any) -> bool:
    return record["state"] != "running" and (record["activation"] or {}).get("state") != "checking"


def ended(service: LocalService, id: str, *, until: Callable[[Any], bool] = has_ended) -> Any:
    give_up = time.monotonic() + GIVE_UP_SECONDS
    while not until(told := service.ask("GET", f"/v1/exports/{id}").json):
        assert time.monotonic() < give_up, told
        time.sleep(0.05)
    return told


def begin(service: LocalService, run: str = "clicks", **more: Any) -> Any:
    reply = service.ask("POST", "/v1/exports", {"run": run, **more})
    assert reply.status == 202, reply.body
    return reply.json


def children() -> list[psutil.Process]:
    """The processes of exports."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "export" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Slow:
    """The command waits, after its first line, until the file `go` is there; `seen` is its environment."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self._seen = folder / "go", folder / "seen.json"
        script = (
            "import json, os, pathlib, sys, time\n"
            "told = {'kind': 'progress', 'share': 0.5, 'text': '1 of 2', 'shards_done': 1, 'num_shards': 2}\n"
            "print(json.dumps(told))\n"
            "print('a warning of some library', file=sys.stderr, flush=True)\n"
            f"pathlib.Path({str(self._seen)!r}).write_text(json.dumps(dict(os.environ)))\n"
            "sys.stdout.flush()\n"
            f"while not os.path.exists({str(self.go)!r}): time.sleep(0.02)\n"
            f"sys.exit(json.loads(pathlib.Path({str(self.go)!r}).read_text()))\n"
        )
        (folder / "slow_export.py").write_text(script)

        self.commands: list[tuple[str, ...]] = []

        def command(module: str, *arguments: str) -> list[str]:
            self.commands.append((module, *arguments))
            return [*child.child_command("slow_export"), *arguments]

        monkeypatch.setattr(exports, "child_command", command)
        monkeypatch.setattr(exports, "_NOTE_SECONDS", -1.0)
        monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{folder}")

    def environment(self) -> dict[str, str]:
        give_up = time.monotonic() + GIVE_UP_SECONDS
        while not self._seen.exists() or not self._seen.read_text():
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return dict(json.loads(self._seen.read_text()))


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(tmp_path, monkeypatch)


def test_a_run_becomes_a_version_which_the_gates_keep_from_going_live(service: LocalService) -> None:
    """Its keys are whole numbers, those of the live version are texts. The paths of its config are relative to a folder
    that the service does not work in.
    """
    current = (service.root / "CURRENT").read_text()
    begun = begin(service, activate=True)
    assert (begun["state"], begun["run"], begun["version"]) == ("running", "clicks", None)
    told = ended(service, begun["id"])
    assert told["state"] == "published", told["message"]
    assert (told["shards_done"], told["num_shards"], told["share"]) == (2, 2, 1.0)
    assert told["seconds"] > 0.0
    assert told["activation"]["state"] == "refused"
    assert "gate compatible: 0.0000" in told["activation"]["reason"]
    listed = service.ask("GET", "/v1/versions").json
    assert {one["version"] for one in listed["versions"]} == {"a", told["version"]}
    assert (listed["live"], (service.root / "CURRENT").read_text()) == ("a", current)
    lineage = Artifact.open(service.root / told["version"]).manifest["lineage"]
    assert lineage["run"] == "clicks"
    assert not list(service.root.glob(".export-*"))
    assert service.ask("GET", "/v1/exports").json == {"exports": [told]}
    service.restart()
    assert service.ask("GET", f"/v1/exports/{begun['id']}").json == told


def test_a_damaged_run_fails_with_the_commands_words(service: LocalService, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "project" / "runs" / "clicks" / "checkpoints")
    told = ended(service, begin(service)["id"])
    assert told["state"] == "failed"
    assert told["message"].endswith("has no checkpoint yet; run `lexshard train` first")
    assert service.ask("GET", "/v1/versions").json["num_versions"] == 1


def test_a_config_does_not_bring_a_token_to_light(
    service: LocalService, slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message about a setting quotes its value, in which `${NAME}` stands for a variable of the environment."""
    monkeypatch.setenv("LEXSHARD_TOKEN", "a-secret-of-the-tests")
    slow.go.write_text("2")
    config = tmp_path / "project" / "runs" / "clicks" / "config.toml"
    for text in ('run = "x"\n[model]\nkind = "${LEXSHARD_TOKEN}"', 'run = "${LEXSHARD_TOKEN}"', "run = 3", "["):
        config.write_text(text)
        told = ended(service, begin(service)["id"])
        assert told["state"] == "failed"
        assert "secret" not in json.dumps(told)


def test_what_is_no_run_below_the_root(service: LocalService, tmp_path: Path) -> None:
    runs = tmp_path / "project" / "runs"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.toml").write_text(to_toml(small_config(outside, outside / "x")))
    (runs / "link").symlink_to(outside)
    (runs / "empty").mkdir()
    for name in ("../outside", str(outside), "..", ".", "", "clicks/../clicks", "clicks/", "a/b/c/d/e", "~", "x\0y"):
        reply = service.ask("POST", "/v1/exports", {"run": name})
        assert reply.error[:2] == (404, "unknown_run"), name
        assert "name a run by its folder below serve.runs" in reply.error[2]
    problems = {"link": "is a link, or below one", "empty": "no run 'empty' below serve.runs", "no": "no run 'no'"}
    for name, problem in problems.items():
        assert problem in service.ask("POST", "/v1/exports", {"run": name}).error[2]
    assert service.ask("GET", "/v1/exports").json == {"exports": []}


def test_the_token_and_the_setting_are_needed(service: LocalService) -> None:
    assert service.ask("POST", "/v1/exports", {"run": "clicks"}, token=b"").error[:2] == (401, "token_required")
    for path in ("/v1/exports", "/v1/exports/0123456789abcdef"):  # why one has failed may quote the environment
        assert service.ask("GET", path, token=b"").error[:2] == (401, "token_required")
    described = json.loads(service.ask("GET", "/openapi.json").body)["paths"]
    for path in ("/v1/exports", "/v1/exports/{id}"):
        assert described[path]["get"]["security"] == [{"token": []}]
    assert service.ask("POST", "/v1/exports", {"run": "clicks", "what": 1}).error[:2] == (400, "unknown_field")
    assert service.ask("POST", "/v1/exports/0123456789abcdef").error[:2] == (405, "method_not_allowed")
    assert service.ask("GET", "/v1/exports/0123456789abcdef").error[:2] == (404, "unknown_export")
    assert service.ask("GET", "/v1/exports/../clicks").error[:2] == (400, "invalid_request")
    without = LocalService(service.root, "a")
    reply = without.ask("POST", "/v1/exports", {"run": "clicks"})
    assert reply.error[:2] == (403, "exports_off")
    assert "without serve.runs" in reply.error[2]
    assert without.ask("GET", "/v1/exports").json == {"exports": []}
    without.close()


def test_one_at_a_time_with_progress_and_without_tokens(
    service: LocalService, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a-secret-of-the-tests"
    for name in ("LEXSHARD_TOKEN", "LEXSHARD_READ_TOKEN", "LEXSHARD_FEEDBACK_TOKEN", "LEXSHARD_OTHER"):
        monkeypatch.setenv(name, secret)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    begun = begin(service)
    given = slow.environment()
    assert not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} & given.keys(), "those of the replica"
    assert given["CUDA_VISIBLE_DEVICES"] == "1"
    assert [name for name, value in given.items() if value == secret] == ["LEXSHARD_OTHER"]
    told = ended(service, begun["id"], until=lambda one: one["shards_done"] == 1)
    assert (told["state"], told["share"], told["num_shards"], told["message"]) == ("running", 0.5, 2, "1 of 2")
    other = LocalService(service.root, "a", runs=service.root.parent / "project" / "runs")
    for asked in (service, other):
        reply = asked.ask("POST", "/v1/exports", {"run": "clicks"})
        where = f"GET /v1/exports/{begun['id']} tells how it goes"
        assert reply.error == (409, "busy", f"the export of clicks runs, and one is done at a time: {where}")
        assert asked.ask("GET", f"/v1/exports/{begun['id']}").json["state"] == "running"
    other.close()
    slow.go.write_text("3")
    told = ended(service, begun["id"])
    assert told["state"] == "failed"
    assert told["message"] == "the export's process ended with status 3: a warning of some library"
    assert begin(service)["state"] == "running"


def test_a_service_that_stops_leaves_no_process(service: LocalService, slow: Slow) -> None:
    begun = begin(service)
    slow.environment()
    (process,) = children()
    service.close()
    psutil.wait_procs([process], timeout=GIVE_UP_SECONDS)
    assert children() == []
    service.restart()
    told = service.ask("GET", f"/v1/exports/{begun['id']}").json
    assert (told["state"], told["message"]) == ("interrupted", export_records.INTERRUPTED)
    slow.go.write_text("0")
    told = ended(service, begin(service)["id"])
    assert (told["id"] != begun["id"], told["state"]) == (True, "failed")  # it has published nothing
    assert slow.commands[0] == slow.commands[1], "the command finds what it has done by its folders and settings"


def test_a_service_that_is_killed_takes_the_process_along(trained: Path, slow: Slow, tmp_path: Path) -> None:
    """The kernel ends it; the lock is gone with the process that held it, and the record is read as interrupted."""
    publish(tmp_path / "root", version="a", num_items=60)
    replica = tmp_path / "replica.py"  # what a replica has of an export, in a process that can be killed
    replica.write_text(
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from cluster import child\n"
        "from embedding_service import exports\n"
        "from embedding_service.versions import VersionStore\n"
        "exports.child_command = lambda _, *arguments: [*child.child_command('slow_export'), *arguments]\n"
        "root, runs = map(Path, sys.argv[1:])\n"
        "exports.Exports(VersionStore(root), runs, lambda version: {}).begin('clicks')\n"
        "signal.pause()\n"
    )
    command = [sys.executable, str(replica), str(tmp_path / "root"), str(trained / "runs")]
    parent = subprocess.Popen(command, env=child.child_environment(without=()))
    try:
        slow.environment()
        (process,) = children()
    finally:
        parent.kill()
        parent.wait(GIVE_UP_SECONDS)
    psutil.wait_procs([process], timeout=GIVE_UP_SECONDS)
    assert not process.is_running()
    (told,) = ExportRecords(tmp_path / "root" / ".serving" / "exports").all()
    assert told["state"] == "interrupted"


def test_what_a_killed_replica_left_does_not_go_on_with_the_next_export(service: LocalService, slow: Slow) -> None:
    records = ExportRecords(service.root / ".serving" / "exports")
    os.close(records.claim())
    left = {"run": "clicks", "began": 0.0, "version": None, "activation": None}
    records.write({**left, "id": f"{1:016x}", "state": "running"})
    records.write({**left, "id": f"{2:016x}", "state": "published", "activation": {"state": "checking"}})
    records.write({**left, "id": f"{3:016x}", "state": "failed"})
    begun = begin(service)
    slow.environment()
    told = {one["id"]: one for one in service.ask("GET", "/v1/exports").json["exports"]}
    assert told[begun["id"]]["state"] == "running"
    assert told[f"{1:016x}"]["state"] == "interrupted"
    assert told[f"{2:016x}"]["state"] == "published"
    assert told[f"{2:016x}"]["activation"]["state"] == "interrupted"
    assert told[f"{3:016x}"]["state"] == "failed"


def test_an_export_goes_on_where_its_progress_cannot_be_noted(
    service: LocalService, slow: Slow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, begun = ExportRecords.write, begin(service)

    def full(self: ExportRecords, record: Any) -> None:
        if record["state"] == "running":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, record)

    monkeypatch.setattr(ExportRecords, "write", full)
    slow.environment()
    slow.go.write_text("3")
    told = ended(service, begun["id"])
    assert told["message"] == "the export's process ended with status 3: a warning of some library"
    assert "cannot be noted: [Errno 28]" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "it cannot be noted: No space left on device"),
        (RuntimeError("a bug"), "failed inside the service (RuntimeError)"),
    ],
)
def test_a_published_version_stays_so_whatever_happens_to_its_activation(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    write = ExportRecords.write

    def fails(self: ExportRecords, record: Any) -> None:
        if record["activation"] == {"state": "checking"}:
            raise error
        write(self, record)

    def published(self: exports.Exports, folder: Path, record: Any) -> None:
        record |= {"state": "published", "message": "published as version a", "version": "a"}

    monkeypatch.setattr(ExportRecords, "write", fails)
    monkeypatch.setattr(exports.Exports, "_export", published)
    told = ended(service, begin(service, activate=True)["id"])
    assert (told["state"], told["version"]) == ("published", "a")
    assert told["activation"] == {"state": "refused", "reason": reason}


class TestRecords:
    def test_old_ones_go_and_damaged_ones_are_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export_records, "MAX_KEPT", 3)
        records = ExportRecords(tmp_path / "exports")
        assert records.all() == []
        os.close(records.claim())
        for number in range(5):
            records.write({"id": f"{number:016x}", "state": "failed", "began": 0.0})
        assert [one["id"][-1] for one in records.all()] == ["4", "3", "2"]
        wrong = ('{"state": 3, "began": 0}', '{"state": "failed"}', '{"state": "failed", "began": 0, "activation": 1}')
        for text in ("{", "[]", *wrong):
            (tmp_path / "exports" / "0000000000000004.json").write_text(text)
            assert [one["id"][-1] for one in records.all()] == ["3", "2"]
        (tmp_path / "exports" / "notes.json").write_text("{}")
        assert len(records.all()) == 2

    def test_one_claim_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export_records, "_TRIES", 1)
        records = ExportRecords(tmp_path)
        handle = records.claim()
        with pytest.raises(BlockingIOError):
            records.claim()
        os.close(handle)
        os.close(records.claim())
