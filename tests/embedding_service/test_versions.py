"""The versions of a service: state, gates, canary, feedback, tokens; a replica without Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import ArtifactError, SettingError
from embedding_service import activations, admission, version_listing, versions
from embedding_service.artifact import Artifact
from embedding_service.gates import Gates, judge
from embedding_service.http_access import find_access
from embedding_service.http_api import HttpApi
from embedding_service.http_service import _take_caller
from embedding_service.manifest import parse_manifest
from embedding_service.retrieval import Retriever
from embedding_service.traffic import Tally, takes_canary
from embedding_service.versions import VersionStore
from tests.embedding_service.artifacts import NUM_ITEMS, publish
from tests.embedding_service.services import TOKEN, LocalService


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for version, items in (("a", NUM_ITEMS), ("b", 450), ("c", 300)):
        publish(root, version=version, num_items=items)
    publish(root, version="d", integer_keys=True)
    return root


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """Links would be refused; hard links are the files themselves."""
    return Path(shutil.copytree(published, tmp_path / "root", copy_function=lambda a, b: Path(b).hardlink_to(a)))


@pytest.fixture
def service(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    def admit_here(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> object:
        return admission.admit(candidate, live, gates)

    monkeypatch.setattr(activations, "admit_apart", admit_here)
    running = LocalService(root, "a")
    yield running
    running.close()


class TestStore:
    def test_activations_and_roll_backs(self, root: Path) -> None:
        store = VersionStore(root)
        assert store.serving() is None
        assert store.names() == ["a", "b", "c", "d"]
        for version in ("b", "c", "c", "b"):
            store.activate(version, start="a")
        assert [store.roll_back().live for _ in range(3)] == ["c", "b", "a"]
        with pytest.raises(ArtifactError, match="there is no version to go back to"):
            store.roll_back()

    def test_asking_twice_goes_back_once(self, root: Path) -> None:
        store = VersionStore(root)
        store.activate("b", start="a")
        store.activate("c", start="a")
        assert store.roll_back("c").live == "b"
        with pytest.raises(ArtifactError, match="version c is not live: b is"):
            store.roll_back("c")

    def test_the_stamp_changes_with_every_change(self, root: Path) -> None:
        store = VersionStore(root)
        stamps = [store.stamp()]
        for version in ("b", "c"):
            store.activate(version, start="a")
            stamps.append(store.stamp())
        assert len(set(stamps)) == 3

    def test_a_removed_version_is_passed_over(self, root: Path) -> None:
        store = VersionStore(root)
        store.activate("b", start="a")
        store.activate("c", start="a")
        store.remove("b")
        with pytest.raises(ArtifactError, match="version c is served"):
            store.remove("c")
        assert store.roll_back().live == "a"

    @pytest.mark.parametrize("name", ["", "..", "../a", "a/../a", "/etc", ".serving", "nope", "a\0"])
    def test_names_that_are_no_version(self, root: Path, name: str) -> None:
        with pytest.raises(ArtifactError, match="there is no version"):
            VersionStore(root).folder(name)

    def test_a_damaged_state_is_named(self, root: Path) -> None:
        store = VersionStore(root)
        store.activate("b", start="a")
        for text in ("{", "[]", '{"live": 3, "previous": []}', '{"live": "../x", "previous": []}'):
            (root / ".serving" / "state.json").write_text(text)
            with pytest.raises(ArtifactError, match=r"state\.json: is damaged"):
                store.serving()

    def test_a_copy_from_elsewhere(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "new").mkdir()
        store = VersionStore(tmp_path / "new")
        assert store.publish_copy(root / "b") == "b"
        assert Artifact.open(tmp_path / "new").version == "b"  # the first one is the current one
        with pytest.raises(ArtifactError, match="version b is here already"):
            store.publish_copy(root / "b")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["CURRENT", "b"]

    def test_an_activation_whose_process_has_ended(self, root: Path) -> None:
        store = VersionStore(root)
        with store.admitting():
            store.note_admission({"version": "b", "state": "checking"})
            assert store.admission() == {"version": "b", "state": "checking"}
            with pytest.raises(BlockingIOError), store.admitting():
                pass
        assert store.admission() == {"version": "b", "state": "interrupted"}


class TestPublish:
    @pytest.fixture
    def offered(self, root: Path) -> Path:
        (root / "incoming").mkdir()
        (root / "b").rename(root / "incoming" / "new")
        return root / "incoming" / "new"

    def test_a_pipe_that_is_not_listed_is_refused_before_it_is_opened(self, root: Path, offered: Path) -> None:
        os.mkfifo(offered / "keys" / "pipe")
        with pytest.raises(ArtifactError, match="incoming/new: holds keys/pipe, which its manifest does not list"):
            VersionStore(root).publish("incoming/new")
        with pytest.raises(ArtifactError, match="holds keys/pipe"):
            VersionStore(root).publish_copy(offered)
        assert offered.is_dir()

    @pytest.mark.parametrize("name", ["notes.txt", "vectors/more.npy"])
    def test_files_that_are_not_listed(self, root: Path, offered: Path, name: str) -> None:
        (offered / name).write_text("x")
        with pytest.raises(ArtifactError, match=f"holds {name}, which its manifest does not list; remove it"):
            VersionStore(root).publish("incoming/new")

    def test_links_that_are_not_listed(self, root: Path, offered: Path) -> None:
        (offered / "more").symlink_to("/etc")
        with pytest.raises(ArtifactError, match="more is a link"):
            VersionStore(root).publish("incoming/new")

    def test_it_never_leaves_its_place_until_it_is_checked(
        self, root: Path, offered: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that a kill at any time leaves the only copy where it was."""
        seen = []

        def killed(temporary: Path, final: Path) -> None:
            seen.append((temporary, final))
            raise SystemExit(9)

        monkeypatch.setattr(versions, "publish_folder", killed)
        with pytest.raises(SystemExit):
            VersionStore(root).publish("incoming/new")
        assert seen == [(offered, root / "b")]
        assert Artifact.open(offered).version == "b"

    def test_what_is_served_is_no_source(self, root: Path) -> None:
        store = VersionStore(root)
        store.activate("b", start="a")
        (root / "b").rename(root / "b2")
        store.set_canary("c", 0.5, start="a")
        for source in ("c", "c/vectors", "a"):
            with pytest.raises(ArtifactError, match="which is served"):
                store.publish(source)
        with pytest.raises(ArtifactError, match="d: is, or lies in, version d, which is served"):
            store.publish("d", served=["d"])
        with pytest.raises(ArtifactError, match="d/vectors: lies in version d"):
            store.publish("d/vectors")
        with pytest.raises(ArtifactError, match="version d is here already"):
            store.publish("d")

    def test_a_root_folder_is_no_source(self, root: Path, tmp_path: Path) -> None:
        """Its CURRENT would be followed, and the root be moved."""
        shutil.copytree(root, tmp_path / "other")
        (tmp_path / "other").rename(root / "incoming")
        with pytest.raises(ArtifactError, match=r"incoming: is not an artifact version: it has no manifest\.json"):
            VersionStore(root).publish("incoming")

    def test_a_lease_is_locked_before_a_writer_can_find_it(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        held: list[bool] = []
        mkdir = Path.mkdir

        def watched(self: Path, *args: object, **kwargs: object) -> None:
            if self.name.startswith(".tmp-"):
                try:
                    with versions._lock(root, wait=False):
                        held.append(False)
                except BlockingIOError:
                    held.append(True)
            mkdir(self, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "mkdir", watched)
        with VersionStore(root)._private() as private:
            assert not private.exists()
        assert held == [True]

    def test_a_folder_of_another_name_than_its_version(self, service: LocalService) -> None:
        (service.root / "b").rename(service.root / "e")
        with pytest.raises(ArtifactError, match="e: calls itself version 'b'; name the folder so"):
            service.store.open("e")
        reply = service.ask("POST", "/v1/versions/activate", {"version": "e", "force": True, "wait_seconds": 60})
        assert reply.status == 409
        assert "calls itself version 'b'" in reply.error[2]


class TestGates:
    def judged(self, root: Path, candidate: str, live: str, gates: Gates) -> dict[str, tuple[float | None, bool]]:
        figures = judge(Retriever(Artifact.open(root / candidate)), Retriever(Artifact.open(root / live)), gates)
        return {figure.gate: (figure.value, figure.passed) for figure in figures}

    def test_coverage_and_drift(self, published: Path) -> None:
        found = self.judged(published, "c", "a", Gates())
        assert found["coverage"] == (300 / NUM_ITEMS, False)
        assert found["overlap"] == (1.0, True)
        assert found["alignment"][0] == pytest.approx(1.0)
        assert self.judged(published, "a", "c", Gates())["coverage"] == (1.0, True)

    def test_keys_of_another_kind_are_not_compatible(self, published: Path) -> None:
        found = self.judged(published, "d", "a", Gates())
        assert found["compatible"] == (0.0, False)
        assert "coverage" not in found

    @pytest.mark.parametrize("held_out", [True, False])
    def test_recall_of_the_indexes_is_measured_whatever_the_manifest_says(
        self, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool
    ) -> None:
        file = tmp_path / "cases.parquet"
        pq.write_table(pa.table({"history": [["i0001"], ["i0002", "i0003"], ["?"]], "items": [["i0021"]] * 3}), file)
        gates = Gates(cases=str(file)) if held_out else Gates()
        candidate = Retriever(Artifact.open(published / "a"))
        (good,) = judge(candidate, None, gates)
        assert (good.value, good.passed) == (1.0, True)
        search = candidate.candidates("recommend").search

        def worse(queries: np.ndarray, k: int) -> object:
            scores, rows = search(queries, 2 * k)
            return scores[:, ::2], rows[:, ::2]

        monkeypatch.setattr(candidate.candidates("recommend"), "search", worse)
        (bad,) = judge(candidate, None, gates)
        assert (bad.value, bad.passed) == (0.5, False)
        k = candidate.artifact.manifest["indexes"]["recommend"]["recall"]["k"]
        told = "2 held-out sessions" if held_out else f"{NUM_ITEMS} stored vectors"
        assert bad.note == f"index recommend, @{k}, {told}"

    def test_recall_on_held_out_sessions(self, published: Path, tmp_path: Path) -> None:
        """Item i is followed by those of its cluster: sessions of items that `c` lacks are answered by `a` alone."""
        retriever = Retriever(Artifact.open(published / "a"))
        histories = [[f"i{row:04d}"] for row in range(0, NUM_ITEMS, 5)]
        truth = [keys[:2] for keys in retriever.recommend(histories, 5).keys]
        file = tmp_path / "cases.parquet"
        pq.write_table(pa.table({"history": histories, "items": truth}), file)
        gates = Gates(cases=str(file), recall_k=5)
        assert self.judged(published, "a", "a", gates)["recall_ratio"] == (1.0, True)
        ratio, passed = self.judged(published, "c", "a", gates)["recall_ratio"]
        known = [set(want) & {f"i{row:04d}" for row in range(300)} for want in truth]
        asked = Retriever(Artifact.open(published / "c")).recommend(histories, 5).keys
        expected = np.mean([len(want & set(got)) / 2 for want, got in zip(known, asked, strict=True)])
        assert (ratio, passed) == (pytest.approx(expected), False)

    def test_cases_that_cannot_be_read_refuse(self, service: LocalService, tmp_path: Path) -> None:
        service.management.activations.gates = Gates(cases=str(tmp_path / "none.parquet"))
        reply = service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 60})
        assert reply.status == 409
        assert "none.parquet: needs list columns `history` and `items`" in reply.error[2]


class TestService:
    def test_a_gate_refuses_with_figure_and_limit(self, service: LocalService) -> None:
        reply = service.ask("POST", "/v1/versions/activate", {"version": "c", "wait_seconds": 60})
        message = "version c was refused: gate coverage: 0.6000, limit 0.8 (300 of 500 keys); it can be forced"
        assert reply.error == (409, "refused", message)
        listed = service.ask("GET", "/v1/versions").json
        assert (listed["live"], listed["here"]["live"]) == ("a", "a")
        told = next(one for one in listed["versions"] if one["version"] == "c")
        assert {figure["gate"]: figure["passed"] for figure in told["gates"]}["coverage"] is False
        assert told["against"] == "a"

    def test_activation_and_roll_back(self, service: LocalService) -> None:
        reply = service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 60})
        assert (reply.status, reply.json["state"]) == (200, "live")
        assert service.ask("GET", "/v1/health").json["version"] == "b"
        service.restart()
        assert service.ask("GET", "/v1/health").json["version"] == "b"
        assert service.ask("POST", "/v1/versions/rollback", {}).json["live"] == "a"
        assert service.ask("GET", "/v1/health").json["version"] == "a"

    def test_a_version_that_does_not_load_later_leaves_what_is_served(self, service: LocalService) -> None:
        """As on a node that does not see the files."""
        service.store.activate("b", start="a")
        (service.root / "b" / "manifest.json").unlink()
        service.versions.refresh()
        assert service.ask("GET", "/v1/health").json["version"] == "a"
        assert "there is no version 'b'" in service.ask("GET", "/v1/versions").json["here"]["problem"]

    def test_the_files_are_read_again_if_the_figures_are_known(self, service: LocalService) -> None:
        body = {"version": "b", "wait_seconds": 60}
        assert service.ask("POST", "/v1/versions/activate", body).status == 200
        service.ask("POST", "/v1/versions/rollback", {})
        service.restart()
        file = service.root / "b" / "vectors" / "item.npy"
        data = bytearray(file.read_bytes())
        file.unlink()
        data[-1] ^= 1
        file.write_bytes(data)
        assert "item.npy: is damaged" in service.ask("POST", "/v1/versions/activate", body).error[2]
        assert service.ask("GET", "/v1/health").json["version"] == "a"

    def test_a_canary_answers_its_callers(self, service: LocalService) -> None:
        body = {"version": "b", "share": 0.3, "wait_seconds": 60}
        assert service.ask("POST", "/v1/versions/canary", body).json["state"] == "canary"
        callers = [f"caller {number}" for number in range(50)]
        for caller in callers:
            expected = "b" if takes_canary(caller.encode(), "b", 0.3) else "a"
            by_header = service.ask("GET", "/v1/similar?key=i0001", x_caller_id=caller).json
            by_field = service.ask("GET", f"/v1/similar?key=i0001&caller={caller.replace(' ', '+')}").json
            assert (by_header["version"], by_field["version"]) == (expected, expected)
        assert service.ask("GET", "/v1/similar?key=i0001").json["version"] == "a"
        listed = {one["version"]: one["traffic"] for one in service.ask("GET", "/v1/versions").json["versions"]}
        assert listed["a"]["answered"] + listed["b"]["answered"] == 101
        assert service.ask("POST", "/v1/versions/canary", {**body, "share": 0.0}).json == {"state": "ended"}
        assert {service.ask("GET", "/v1/health", x_caller_id=one).json["version"] for one in callers} == {"a"}

    def test_feedback_counts_for_its_version(self, service: LocalService) -> None:
        for _ in range(4):
            service.ask("GET", "/v1/recommend?items=i0001")
        click = {"version": "a", "request_id": "r1", "key": "i0002"}
        told = [service.ask("POST", "/v1/feedback", body) for body in (click, click, {**click, "key": "i0003"}, click)]
        assert {one.status for one in told} == {200}
        assert [one.json["counted"] for one in told] == [True, False, True, False]  # a click that is told twice
        for version in ("zz", "../a", "incoming"):
            reply = service.ask("POST", "/v1/feedback", {**click, "version": version})
            assert reply.error[:2] == (404, "unknown_version")
        assert service.ask("POST", "/v1/feedback", {**click, "version": "b"}).json["counted"]  # of another replica, say
        traffic = service.ask("GET", "/v1/versions").json["versions"][0]["traffic"]
        assert (traffic["ctr"], traffic["clicks"], traffic["answered"]) == (0.25, 2, 4)

    def test_a_version_is_live_when_all_replicas_have_flipped(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other, may_load = LocalService(service.root, "a"), threading.Event()
        load = other.versions._open

        def late(version: str, verify: bool) -> HttpApi:
            assert may_load.wait(60)
            return load(version, verify)

        monkeypatch.setattr(other.versions, "_open", late)
        reply = service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 1})
        assert (reply.status, reply.json["state"]) == (202, "flipping")
        told = service.ask("GET", "/v1/versions").json
        assert (told["live"], told["here"]["live"]) == ("b", "b")
        assert (told["admission"]["flipped"], told["admission"]["replicas"]) == (1, 2)
        assert other.ask("GET", "/v1/health").json["version"] == "a"
        may_load.set()
        while (told := service.ask("GET", "/v1/versions").json["admission"])["state"] == "flipping":
            pass
        assert (told["state"], told["flipped"], told["replicas"]) == ("live", 2, 2)
        assert other.ask("GET", "/v1/health").json["version"] == "b"
        other.close()
        assert service.ask("POST", "/v1/versions/rollback", {}).json["replicas"] == 1

    def test_a_replica_that_does_not_flip_is_told_with_its_reason(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(activations, "FLIP_SECONDS", 0.1)
        behind = {"live": "a", "canary": "", "sequence": 0, "problem": "out of memory"}
        handle = service.store.take_place("0a")
        service.store.note_place("0a", behind)
        os.close(service.store.take_place("0b"))
        service.store.note_place("0b", {**behind, "problem": "of one that has ended"})
        file = service.root / ".serving" / "replicas" / "0b.json"
        reply = service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 60})
        assert (reply.status, reply.json["state"], reply.json["reason"]) == (202, "flipping", "out of memory")
        assert (reply.json["flipped"], reply.json["replicas"], file.exists()) == (1, 2, False)
        os.close(handle)
        assert service.ask("GET", "/v1/versions").json["admission"]["state"] == "live"

    def test_a_listing_reads_only_manifests_that_have_changed(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []

        def parse(text: bytes, version: str) -> object:
            read.append(version)
            return parse_manifest(text, version)

        monkeypatch.setattr(version_listing, "parse_manifest", parse)
        first = service.ask("GET", "/v1/versions").json["versions"]
        assert read == ["a", "b", "c", "d"]
        file = service.root / "b" / "manifest.json"
        text = file.read_text()
        file.unlink()  # it is a hard link
        manifest = json.loads(text)
        file.write_text(json.dumps({**manifest, "figures": {**manifest["figures"], "new": 0.5}}))
        second = service.ask("GET", "/v1/versions").json["versions"]
        assert read == ["a", "b", "c", "d", "b"]
        assert (first[0], second[1]["figures"]) == (second[0], {**first[1]["figures"], "new": 0.5})

    @pytest.mark.parametrize(
        ("query", "caller", "rest"),
        [
            ("key=1&caller=a%20b+c&k=2", b"a b c", b"key=1&k=2"),
            ("caller=&key=%C3%A4", b"", b"key=%C3%A4"),
            ("key=1&xcaller=2", b"", b"key=1&xcaller=2"),
            ("caller=a&caller=b", b"a", b""),
        ],
    )
    def test_the_caller_is_taken_out_of_the_query(self, query: str, caller: bytes, rest: bytes) -> None:
        scope = {"query_string": query.encode()}
        assert (_take_caller(scope), scope["query_string"]) == (caller, rest)

    def test_counts_outlive_the_process(self, service: LocalService) -> None:
        service.ask("GET", "/v1/recommend?items=i0001")
        service.versions._keep_counts()
        service.restart()
        service.ask("GET", "/v1/recommend?items=i0001")
        assert service.ask("GET", "/v1/versions").json["versions"][0]["traffic"]["requests"] == 2

    def test_figures_of_traffic_that_are_damaged_are_left_out(self, service: LocalService) -> None:
        service.ask("GET", "/v1/recommend?items=i0001")
        service.store.keep_counts("0a", {"a": Tally().counts() | {"requests": 5}})
        for name, text in (("0b", "{"), ("0c", '{"a": {"requests": 1}}'), ("0d", '{"a": 7}')):
            (service.root / ".serving" / "counts" / f"{name}.json").write_text(text)
        reply = service.ask("GET", "/v1/versions")
        assert (reply.status, reply.json["versions"][0]["traffic"]["requests"]) == (200, 6)

    def test_figures_of_traffic_do_not_grow_for_ever(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(versions, "MAX_PROCESSES", 3)
        for process in range(6):
            service.store.keep_counts(f"{process}", {"a": Tally().counts()})
        assert len(list((service.root / ".serving" / "counts").iterdir())) == 3
        service.versions.tallies["gone"] = Tally()
        service.versions._forget_tallies()
        assert list(service.versions.tallies) == ["a"]

    def test_the_watch_goes_on_after_an_error(self, service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
        failed, again = threading.Event(), threading.Event()

        def stamp() -> tuple[int, int]:
            if failed.is_set():
                again.set()
                return 0, 0
            failed.set()
            raise OSError("stale file handle")

        monkeypatch.setattr(service.store, "stamp", stamp)
        assert again.wait(30)
        assert service.versions.problem == "looking at the versions failed: OSError: stale file handle"
        service.versions.refresh()
        assert service.versions.problem == ""

    def test_an_activation_that_cannot_be_noted_is_answered(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_only(_: object) -> None:
            raise OSError(30, "Read-only file system")

        with monkeypatch.context() as patched:
            patched.setattr(service.store, "note_admission", read_only)
            reply = service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 60})
            message = "the folder of versions cannot be changed: Read-only file system"
            assert reply.error == (409, "read_only", message)
        assert service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 60}).status == 200

    def test_a_version_that_is_let_go_of_after_it_was_chosen(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.ask("POST", "/v1/versions/activate", {"version": "b", "wait_seconds": 60})
        service.store.activate("c", start="a")
        choose, chosen = service.app._choose, []

        def late(caller: bytes) -> object:
            found = choose(caller)
            chosen.append(found.version)
            if len(chosen) == 1:
                service.versions.refresh()
                service.versions._retire(keep={"c"})
            return found

        monkeypatch.setattr(service.app, "_choose", late)
        reply = service.ask("GET", "/v1/similar?key=i0001")
        assert (reply.status, reply.json["version"], chosen) == (200, "c", ["b", "c"])

    def test_wrong_bodies_and_methods(self, service: LocalService) -> None:
        assert service.ask("POST", "/v1/versions/activate", {"version": "zz"}).error[:2] == (404, "unknown_version")
        assert service.ask("POST", "/v1/versions/activate", {"versoin": "b"}).error[:2] == (400, "unknown_field")
        assert service.ask("DELETE", "/v1/versions").error[:2] == (405, "method_not_allowed")
        assert service.ask("POST", "/v1/versions", b" " * 70_000).error[:2] == (413, "body_too_large")


class TestAccess:
    CHANGES = ("", "/activate", "/canary", "/rollback", "/remove")

    @pytest.mark.parametrize("path", CHANGES)
    @pytest.mark.parametrize("token", [b"", b"wrong", TOKEN + b"x", TOKEN[:-1], b"\xff\xfe"])
    def test_changes_need_the_token(self, service: LocalService, path: str, token: bytes) -> None:
        reply = service.ask("POST", f"/v1/versions{path}", {"version": "b", "source": "x"}, token=token)
        assert reply.error[:2] == (401, "token_required")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in reply.body

    def test_reading_is_open_without_a_reading_token_and_closed_with_one(self, root: Path) -> None:
        service = LocalService(root, "a", read_token=b"the-token-of-readers")
        for path in ("/v1/similar?key=i0001", "/v1/versions", "/openapi.json"):
            assert service.ask("GET", path, token=b"").error[:2] == (401, "token_required")
            assert service.ask("GET", path, token=b"the-token-of-readers").status == 200
            assert service.ask("GET", path).status == 200
        assert service.ask("GET", "/v1/health", token=b"").status == 200
        assert service.ask("GET", "/page", token=b"").status == 200  # files of the package; what they show is asked for
        for path in ("/pages", "/page-of-mine", "/v1/map", "/v1/keys?prefix=i", "/v1/figures"):
            assert service.ask("GET", path, token=b"").error[:2] == (401, "token_required")
        changed = service.ask("POST", "/v1/versions/rollback", {}, token=b"the-token-of-readers")
        assert changed.error[:2] == (401, "token_required")
        service.close()

    def test_feedback_with_a_token_of_its_own(self, root: Path) -> None:
        service = LocalService(root, "a", read_token=b"the-token-of-readers")
        click = {"version": "a", "request_id": "r1", "key": "i0002"}
        assert service.ask("POST", "/v1/feedback", click, token=b"the-token-of-readers").status == 200
        access = service.management._access
        service.management._access = dataclasses.replace(access, feedback=b"the-token-of-clicks")
        assert service.ask("POST", "/v1/feedback", click, token=b"the-token-of-readers").error[:2] == (
            401,
            "token_required",
        )
        for token in (b"the-token-of-clicks", TOKEN):
            assert service.ask("POST", "/v1/feedback", click, token=token).status == 200
        assert service.ask("GET", "/v1/versions", token=b"the-token-of-clicks").status == 401
        service.close()

    def test_tokens_are_found_and_never_shown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LEXSHARD_TOKEN", raising=False)
        assert find_access().change is None
        file = tmp_path / "token"
        file.write_text("secret-secret-secret\n")
        access = find_access(str(file))
        assert access.change == b"secret-secret-secret"
        assert "secret" not in repr(access)
        assert find_access("", "", str(file)).feedback == b"secret-secret-secret"
        monkeypatch.setenv("LEXSHARD_TOKEN", "short")
        with pytest.raises(SettingError, match="LEXSHARD_TOKEN: the environment variable must hold") as caught:
            find_access()
        assert "short" not in str(caught.value)
        with pytest.raises(SettingError, match=r"serve\.token_file: .*none cannot be read"):
            find_access(str(tmp_path / "none"))

    def test_without_a_token_nothing_can_be_changed(self, root: Path) -> None:
        service = LocalService(root, "a")
        service.management._access = type(service.management._access)()
        reply = service.ask("POST", "/v1/versions/rollback", {})
        assert reply.error[:2] == (403, "changes_off")
        assert json.loads(reply.body)["error"]["message"].startswith("changes are switched off")
        service.close()
