from __future__ import annotations

import json
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster import cli
from cluster.arguments import build_parser
from cluster.doctor import Facts
from cluster.errors import DataError

ROOT = Path(__file__).parents[2]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from cluster.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'numpy', 'pyarrow', 'rich', 'trainers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    for command in ("doctor", "sessions", "train", "export", "evaluate", "serve", "query", "submit", "demo", "config"):
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
    assert cli.main(["config", "--show", str(file), "--set", "train.epochs=3"]) == 0
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

    def do_GET(self) -> None:
        self.asked.append(self.path)
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


def test_query_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", "http://127.0.0.1:1", "similar", "a"]) == 2
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().err


def test_train_passes_the_settings_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def train(config: Any, *, fresh: bool, on_event: Any) -> dict[str, Any]:
        seen.update(workers=config.cluster.workers, dim=config.model.dim, fresh=fresh)
        on_event({"text": "going on"})
        return {"run": config.run, "epochs": 2, "seconds": 61.0, "best": {"recall@20": 0.25}, "best_epoch": 2}

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


def test_user_errors_of_commands_reach_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sessionize(*_: Any, **__: Any) -> None:
        raise DataError("has no column `when`", file="log.parquet")

    monkeypatch.setattr("trainers.event_log.sessionize", sessionize)
    assert cli.main(["sessions", "log.parquet", "out.parquet", "--item", "i", "--user", "u", "--time", "when"]) == 2
    assert capsys.readouterr().err == "lexshard: error: log.parquet: has no column `when`\n"
