"""`lexshard versions`: what it asks a service, and what a person reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.console import line_of
from cluster.errors import ArtifactError, LexshardError
from embedding_service import http_client, versions_client
from embedding_service.traffic import Tally, figures
from tests.embedding_service.artifacts import publish

FIGURE = {"gate": "coverage", "value": 0.6, "limit": 0.8, "passed": False, "note": "300 of 500 keys"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests, each answered with the next of `answers`, the list's last entry."""
    requests: list[Any] = []
    monkeypatch.setattr(versions_client.time, "sleep", lambda _: None)

    def answer(service: str, method: str, path: str, body: Any = None, *, token_file: str = "") -> Any:
        requests.append((method, path, body))
        return ANSWERS.pop(0)

    monkeypatch.setattr(versions_client, "ask", answer)
    return requests


ANSWERS: list[Any] = []


def test_a_table_of_versions(asked: list[Any]) -> None:
    tally = Tally()
    tally.note(200, 0.001, recommends=True)
    about = {"num_items": 1000, "gates": [FIGURE], "traffic": figures([tally.counts()])}
    lost = [{"version": "v1", "shard": 1, "reason": "does not answer within 5 s"}]
    here = {"live": "v1", "canary": None, "problem": "disk full", "num_shards": 3, "lost_shards": lost}
    versions = [{"version": "v1", **about}, {"version": "v2", **about, "gates": None}]
    ANSWERS[:] = [{"live": "v1", "canary": "v2", "share": 0.25, "here": here, "versions": versions}]
    _, lines = versions_client.listing("http://service")
    assert lines[1].split()[:5] == ["v1", "live", "1,000", "failed:", "coverage"]
    assert "canary, 25%" in lines[2]
    assert "0.0000 (0.0000-0.7935)" in lines[1]
    assert lines[-2] == "problem: disk full"
    lost_line = "problem: shard 1 of 3, version v1, does not answer within 5 s; it is started again by itself"
    assert lines[-1] == lost_line


def test_activation_waits_until_it_is_decided(asked: list[Any]) -> None:
    checking = {"version": "v2", "state": "checking"}
    ANSWERS[:] = [checking, {"admission": checking}, {"admission": {**checking, "state": "live", "figures": [FIGURE]}}]
    _, lines = versions_client.change("http://service", "activate", "v2", share=None, force=True)
    assert lines == ["live: v2", "  coverage: 0.6000, limit 0.8, forced  300 of 500 keys"]
    assert asked[0] == ("POST", "/v1/versions/activate", {"version": "v2", "force": True, "wait_seconds": 30.0})
    ANSWERS[:] = [checking, {"admission": {**checking, "state": "refused", "reason": "gate coverage"}}]
    with pytest.raises(ArtifactError, match="version v2 was refused: gate coverage"):
        versions_client.change("http://service", "activate", "v2", share=None, force=False)


def test_an_activation_that_some_replicas_do_not_follow(asked: list[Any]) -> None:
    flipping = {"version": "v2", "state": "flipping", "ends": "live", "flipped": 1, "replicas": 3}
    ANSWERS[:] = [flipping, {"admission": flipping}, {"admission": {**flipping, "reason": "out of memory"}}]
    with pytest.raises(LexshardError, match="version v2 is to be live, and is so on 1 of 3 replicas: out of memory"):
        versions_client.change("http://service", "activate", "v2", share=None, force=False)


def test_an_export_is_followed_to_its_end(asked: list[Any]) -> None:
    record = {"id": "0a", "state": "running", "message": "starting", "share": None, "num_shards": None, "version": None}
    record |= {"activation": None}
    halfway = {**record, "share": 0.5, "message": "60 of 120 vectors", "shards_done": 1, "num_shards": 2}
    done = {**halfway, "state": "published", "message": "published as version v2", "share": 1.0, "version": "v2"}
    checking = {**done, "activation": {"state": "checking"}}
    heard: list[Any] = []

    def export(activate: bool) -> list[str]:
        heard.clear()
        return versions_client.export("http://service", "clicks", activate=activate, on_event=heard.append)[1]

    ANSWERS[:] = [record, halfway, halfway, done]
    assert export(False) == ["v2"]
    assert [line_of(event) for event in heard] == ["starting", " 50.0%  shard 1 of 2: 60 of 120 vectors"]
    sent = {"run": "clicks", "which": "best", "activate": False}
    assert asked[:2] == [("POST", "/v1/exports", sent), ("GET", "/v1/exports/0a", None)]
    ANSWERS[:] = [record, checking, {**done, "activation": {"state": "live", "reason": ""}}]
    assert export(True) == ["v2"]
    assert line_of(heard[-1]) == "100.0%  shard 1 of 2: published as version v2; the gates judge it"
    ANSWERS[:] = [record, {**record, "state": "failed", "message": "clicks has no checkpoint yet"}]
    with pytest.raises(LexshardError, match="the export of clicks has failed: clicks has no checkpoint yet"):
        export(False)
    ANSWERS[:] = [{**done, "activation": {"state": "refused", "reason": "gate coverage: 0.6"}}]
    with pytest.raises(ArtifactError, match="version v2 was published, and its activation is refused: gate coverage"):
        export(True)


def test_a_roll_back_names_what_it_leaves(asked: list[Any]) -> None:
    ANSWERS[:] = [{"live": "v2"}, {"live": "v1"}]
    assert versions_client.change("http://service", "rollback", "", share=None, force=False)[1] == ["live: v1"]
    assert asked[1] == ("POST", "/v1/versions/rollback", {"live": "v2"})


def test_publishing_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = publish(tmp_path / "made", version="v7", num_items=60)
    (tmp_path / "root").mkdir()
    assert main(["versions", str(tmp_path / "root"), "publish", str(version)]) == 0
    assert capsys.readouterr().out == "v7\n"
    assert main(["versions", str(tmp_path / "root"), "publish", str(version)]) == 2
    assert "version v7 is here already; versions are never overwritten" in capsys.readouterr().err
    assert main(["versions", "http://127.0.0.1:9", "activate"]) == 2
    assert "setting VERSION: is needed: lexshard versions http://127.0.0.1:9 activate" in capsys.readouterr().err
    assert main(["versions", "http://127.0.0.1:9", "activate", "--share", "0"]) == 2
    assert "setting VERSION: is needed" in capsys.readouterr().err
    assert main(["versions", "http://127.0.0.1:9", "export"]) == 2
    assert "setting RUN: is needed: lexshard versions http://127.0.0.1:9 export" in capsys.readouterr().err
    assert main(["versions", "http://127.0.0.1:9", "remove", "v1", "--activate"]) == 2
    assert "--activate: is for export, not for remove" in capsys.readouterr().err
    for option, meant in ((["--force"], "activate or canary"), (["--share", "0.5"], "canary")):
        assert main(["versions", "http://127.0.0.1:9", "export", "clicks", *option]) == 2
        assert f"{option[0]}: is for {meant}, not for export" in capsys.readouterr().err
    assert main(["versions", "http://127.0.0.1:9", "activate", "v1", "--which", "last"]) == 2
    assert "--which: is for export, not for activate" in capsys.readouterr().err
    assert main(["versions", "http://127.0.0.1:9"]) == 2
    assert "nothing answers at http://127.0.0.1:9: Connection refused; is `lexshard serve`" in capsys.readouterr().err


def test_without_an_action_it_lists(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    here = {"live": "v1", "canary": None, "problem": None}
    ANSWERS[:] = [{"live": "v1", "canary": None, "share": 0.0, "here": here, "versions": []}]
    assert main(["versions", "http://service"]) == 0
    assert asked == [("GET", "/v1/versions", None)]


class TestToken:
    """What a service sees of the client's tokens."""

    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.server.seen.append((self.command, self.path, self.headers["authorization"]))  # type: ignore[attr-defined]
                if self.path.startswith("/moved"):
                    self.send_response(302)
                    self.send_header("location", f"http://localhost:{self.server.server_port}/elsewhere")
                    self.end_headers()
                else:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(b"{}")

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        monkeypatch.setenv("LEXSHARD_TOKEN", "the-token-of-changes")
        monkeypatch.setenv("LEXSHARD_READ_TOKEN", "the-token-of-readers")
        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.seen = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()

    def test_it_goes_nowhere_else(self, server: HTTPServer) -> None:
        service = f"http://127.0.0.1:{server.server_port}"
        for method in ("GET", "POST"):
            with pytest.raises(LexshardError, match=r"redirects to http://localhost:.*the token is not sent there"):
                http_client.ask(service, method, "/moved")
        assert [path for _, path, _ in server.seen] == ["/moved"] * 2  # type: ignore[attr-defined]

    def test_reading_shows_the_reading_token(self, server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
        service = f"http://127.0.0.1:{server.server_port}"
        http_client.ask(service, "GET", "/v1/versions")
        http_client.ask(service, "POST", "/v1/versions", {})
        monkeypatch.delenv("LEXSHARD_READ_TOKEN")
        http_client.ask(service, "GET", "/v1/versions")
        shown = [token for _, _, token in server.seen]  # type: ignore[attr-defined]
        assert shown == ["Bearer the-token-of-readers", *["Bearer the-token-of-changes"] * 2]
