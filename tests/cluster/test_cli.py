from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import cli
from cluster.arguments import build_parser
from cluster.doctor import Facts
from cluster.errors import DataError
from embedding_service import http_client
from tests.embedding_service.artifacts import publish

ROOT = Path(__file__).parents[2]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from cluster.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'numpy', 'pyarrow', 'rich', 'trainers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    for command in (
        "doctor",
        "sessions",
        "profile",
        "plan",
        "train",
        "tune",
        "export",
        "evaluate",
        "serve",
        "query",
        "submit",
        "demo",
        "config",
    ):
        assert f"    {command} " in run.stdout
    assert run.stdout.splitlines()[-1] == "[]"


def test_every_command_has_a_function_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli._COMMANDS:
        with pytest.raises(SystemExit) as end:
            build_parser().parse_args([command, "--help"])
        assert end.value.code == 0
    assert capsys.readouterr().out.count("usage: lexshard ") == len(cli._COMMANDS) >= 10


def test_the_version_is_the_projects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"lexshard {version}\n"


def test_config_shows_what_is_in_force(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\ndim = 32\n")
    assert cli.main(["config", str(file), "--set", "train.epochs=3"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert (shown["model"]["dim"], shown["train"]["epochs"]) == (32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "none.toml: there is no such config file"),
        (["config", "--set", "train.epoch=1"], "train.epoch: there is no such setting; did you mean `epochs`?"),
        (["export", "nowhere"], "nowhere: there is no such folder"),
        (["export", "."], ".: is not a run (it has no config.toml)"),
        (["export", ".", "--to", "parquet"], "--out: is needed with --to parquet"),
        (
            ["export", ".", "--to", "parquet", "--out", "x", "--which", "best"],
            "--which: has no effect with --to parquet",
        ),
        (["export", ".", "--to", "parquet", "--out", "x", "--precision", "fp16"], "--precision: has no effect"),
        (["export", ".", "--to", "parquet", "--out", "x", "--index", "Flat"], "--index: has no effect with --to"),
        (["export", ".", "--to", "parquet", "--out", "x", "--set", "export.index=Flat"], "--set: has no effect with"),
        (["export", "run", "--vectors", "item"], "--vectors: is for --to"),
        (["export", ".", "--to", "parquet", "--out", "x", "--keep-current"], "--keep-current: has no effect with --to"),
        (["serve", "published", "--port", "0"], "serve.port: must be in [1, 65535]; got 0"),
        (["demo", "--port", "0"], "serve.port: must be in [1, 65535]; got 0"),
        (["serve", "published", "--replicas", "0"], "serve.replicas: must be at least 1; got 0"),
        (
            ["train", "run/config.toml", "--set", "run=run/config.toml/x", "--set", "data.train=t.parquet"],
            "run/config.toml/x: Not a directory",
        ),
        (
            ["train", "run/config.toml", "--set", "run=/proc/nowhere", "--set", "data.train=t.parquet"],
            "/proc/nowhere: No such file or directory",
        ),
        (["submit", "--address", "127.0.0.1:1", "--", "config"], "--address: must be the URL of the job server"),
        (["serve", "nowhere"], "nowhere: there is no such folder"),
        (["serve", "."], ".: is neither a run nor an artifact"),
        (["serve", "run"], "run: nothing was published from this run yet; run `lexshard export run`"),
        (["query", "nowhere", "similar", "a"], "nowhere: there is no such folder"),
        (["submit", "--address", "http://127.0.0.1:1"], "nothing to submit"),
        (["submit", "--address", "http://127.0.0.1:1", "--working-dir", "nowhere", "--", "config"], "no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    pq.write_table(pa.table({"items": [[1, 2]]}), tmp_path / "t.parquet")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "CURRENT").write_text("v1")
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lexshard: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_debugging_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEXSHARD_DEBUG", "1")
    with pytest.raises(ValueError, match="no such config file"):
        cli.main(["train", "none.toml"])


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "lexshard: interrupted\n"


def test_bad_cut_offs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "a", "10,,20", ""):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["evaluate", "run", "--k", text])
    assert "must be whole numbers above 0 like 10,20" in capsys.readouterr().err
    assert build_parser().parse_args(["evaluate", "run", "--k", "5,50"]).k == (5, 50)


def test_doctor_prints_the_problem_and_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "cluster.doctor.gather", lambda: Facts((3, 11, 0), {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"})
    )
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "both installed" in text
    assert "  torchrec: python -m pip install --no-deps torchrec==1.8.0\n" in text
    assert text.endswith("this installation is broken\n")
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


class _Service(BaseHTTPRequestHandler):
    """Answers as the HTTP service does, and remembers what it was asked."""

    asked: ClassVar[list[str]] = []
    other: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "key=other" in self.path:  # some other service
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + self.other)
            return
        if "key=closed" in self.path:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"error": {"code": "token_required", "message": "show the reading token"}}')
            return
        known = "key=nobody" not in self.path
        answer = {"version": "v1", "items": [{"key": "os.path", "score": 0.5}, {"key": 7, "score": -1}]}
        body = json.dumps(answer if known else {"error": {"code": "key_not_found", "message": "no 'nobody'"}}).encode()
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    _Service.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_query_asks_a_service(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", service, "similar", "a b", "--k", "2"]) == 0
    assert capsys.readouterr().out == "   1     0.5000  os.path\n   2    -1.0000  7\n"
    assert cli.main(["query", f"{service}/", "recommend", "x", "y", "--user", "u", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "v1"
    assert _Service.asked == ["/v1/similar?key=a+b&k=2", "/v1/recommend?items=x&items=y&k=10&user=u"]


def test_query_passes_the_services_reason_on(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", service, "similar", "nobody"]) == 2
    assert capsys.readouterr().err == f"lexshard: error: {service} answered 404: no 'nobody'\n"


def test_query_says_where_a_token_is_taken_from(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", service, "similar", "closed"]) == 2
    told = capsys.readouterr().err
    assert "answered 401: show the reading token; this command shows the one in the environment's LEXSHARD_READ" in told


@pytest.mark.parametrize("body", [b"[]", b'{"items": 3}', b"{}", b"<html>", b"\xff"])
def test_query_wants_an_answer_of_ours(
    service: str, body: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Service, "other", body)
    assert cli.main(["query", service, "similar", "other"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lexshard: error: {service} does not answer as a lexshard service: ")
    assert error.count("\n") == 1


def test_query_meets_a_server_that_speaks_no_http(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert cli.main(["query", f"http://127.0.0.1:{server.getsockname()[1]}", "similar", "a"]) == 2
        thread.join()
    assert "does not answer as a lexshard service: SSH-2.0" in capsys.readouterr().err


def test_query_asks_no_proxy_for_this_machine(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert cli.main(["query", service, "similar", "a"]) == 0
    assert http_client.is_loopback("http://localhost:80")
    assert http_client.is_loopback("http://[::1]:80")
    assert not http_client.is_loopback("http://example.org")


def test_query_for_a_user_of_a_model_without_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish(tmp_path)
    assert cli.main(["query", str(folder), "recommend", "i0001", "--user", "u"]) == 2
    assert (
        capsys.readouterr().err == "lexshard: error: --user: the model of this artifact sees no users; leave it out\n"
    )


def test_query_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", "http://127.0.0.1:1", "similar", "a"]) == 2
    assert "nothing answers at http://127.0.0.1:1: Connection refused; is `lexshard serve`" in capsys.readouterr().err


def test_train_passes_the_settings_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def train(config: Any, *, fresh: bool, on_event: Any) -> dict[str, Any]:
        seen.update(workers=config.cluster.workers, dim=config.model.dim, fresh=fresh)
        on_event({"text": "going on"})
        return {"run": config.run, "epochs": 2, "seconds": 61.0, "best": {"recall@20": 0.25}, "best_epoch": 2} | {
            "bad_rows": 0
        }

    monkeypatch.setattr("trainers.loop.train", train)
    (tmp_path / "run.toml").write_text('run = "runs/x"\n')
    arguments = ["train", str(tmp_path / "run.toml"), "--workers", "3", "--set", "model.dim=8", "--fresh"]
    assert cli.main(arguments) == 0
    assert seen == {"workers": 3, "dim": 8, "fresh": True}
    printed = capsys.readouterr()
    assert printed.err == "going on\n"
    assert printed.out.splitlines() == [
        "trained 2 epochs in 1:01: runs/x",
        "best recall@20 0.2500, after epoch 2",
        "next: lexshard export runs/x",
    ]


def test_an_export_for_programs_is_a_json_object_per_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def export_run(run: str, *, on_event: Any, **options: Any) -> Path:
        seen.update(options)
        on_event({"kind": "progress", "share": 0.5, "text": "half", "shards_done": 1, "num_shards": 2})
        return tmp_path / "versions" / "v1"

    monkeypatch.setattr("trainers.export.export_run", export_run)
    (tmp_path / "config.toml").write_text("")
    assert cli.main(["export", str(tmp_path), "--json", "--keep-current", "--which", "last"]) == 0
    assert seen == {"out": "", "which": "last", "overrides": [], "current": False}
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[0]["shards_done"] == 1
    assert told[1:] == [{"kind": "published", "version": "v1", "path": str(tmp_path / "versions" / "v1")}]


def test_train_tells_of_rows_that_were_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"run": "r", "epochs": 1, "seconds": 1.0, "best": {}, "best_epoch": None, "bad_rows": 1234}
    monkeypatch.setattr("trainers.loop.train", lambda *_, **__: result)
    (tmp_path / "run.toml").write_text("")
    assert cli.main(["train", str(tmp_path / "run.toml")]) == 0
    assert "left out: 1,234 bad rows\n" in capsys.readouterr().out


def test_a_path_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(tmp_path)
    for kind in ("parquet", "word2vec"):
        assert cli.main(["export", str(folder), "--to", kind, "--out", f"{tmp_path}/none/x"]) == 2
        assert capsys.readouterr().err == f"lexshard: error: {tmp_path}/none: there is no such folder\n"
    monkeypatch.setenv("LEXSHARD_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["export", str(folder), "--to", "parquet", "--out", f"{tmp_path}/none/x"])


def test_sessions_over_their_own_log_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "log.parquet")
    pq.write_table(pa.table({"u": ["a"], "i": ["x"], "t": [1]}), file)
    assert cli.main(["sessions", file, file, "--item", "i", "--user", "u", "--time", "t"]) == 2
    assert "is one of the files that are read" in capsys.readouterr().err
    assert pq.read_table(file).num_rows == 1


def test_user_errors_of_commands_reach_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sessionize(*_: Any, **__: Any) -> None:
        raise DataError("has no column `when`", file="log.parquet")

    monkeypatch.setattr("trainers.event_log.sessionize", sessionize)
    assert cli.main(["sessions", "log.parquet", "out.parquet", "--item", "i", "--user", "u", "--time", "when"]) == 2
    assert capsys.readouterr().err == "lexshard: error: log.parquet: has no column `when`\n"


def test_profile_of_paths_and_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "sessions.parquet"
    pq.write_table(pa.table({"clicks": [[1, 2, 2], [2]], "city": ["x", "y"]}), source)
    columns = ["--set", "data.items=clicks", "--set", "data.query_features=city"]
    assert cli.main(["profile", str(source), *columns, "--output", str(tmp_path / "profile.json")]) == 0
    shown = capsys.readouterr()
    assert "2 sessions" in shown.out
    rows = {line.split()[0]: line.split()[1:4] for line in shown.out.splitlines()[2:5]}
    assert rows == {
        "keys": ["occurrences", "distinct", "within"],
        "item": ["4", "2", "exact"],
        "query_city": ["2", "2", "exact"],
    }
    assert "lexshard plan CONFIG --profile" in shown.err
    (tmp_path / "run.toml").write_text(f'[data]\ntrain = "{source}"\nitems = "clicks"\n')
    assert cli.main(["profile", str(tmp_path / "run.toml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "profile.json").read_text())
    assert found["columns"]["item"] == kept["columns"]["item"]
    assert cli.main(["profile", str(source)]) == 2
    assert "there is no column `items`" in capsys.readouterr().err
