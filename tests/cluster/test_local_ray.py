from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from cluster.local_ray import end_processes, print_plainly


def _sleeper(mark: str, code: str = "pass") -> subprocess.Popen[str]:
    script = f"import signal, threading; {code}; print('up', flush=True); threading.Event().wait()"
    environment = {**os.environ, "LEXSHARD_TEST": mark}
    run = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    return run


def test_only_processes_with_the_mark_are_ended() -> None:
    ours = _sleeper("ours")
    deaf = _sleeper("ours", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    other = _sleeper("ours too")
    runs = (ours, deaf, other)
    try:
        end_processes("LEXSHARD_TEST", "ours", patience=0.2)
        assert ours.wait(10) == -signal.SIGTERM
        assert deaf.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for run in runs:
            run.kill()
            run.communicate()


def test_nothing_to_end() -> None:
    end_processes("LEXSHARD_TEST", "nobody")


def test_lines_of_chosen_actors_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix and the notes of repetitions stay with the others; one line is printed once."""
    monkeypatch.setattr(dispatcher, "handlers", [("ray_print_logs", lambda data: print("by Ray itself"))])
    monkeypatch.setenv("RAY_COLOR_PREFIX", "0")
    print_plainly("ServeReplica:")
    about = {"pid": 17, "ip": "127.0.0.1", "localhost": "127.0.0.1", "is_err": True, "job": "01"}
    for pid in (17, 18):
        dispatcher.emit({**about, "pid": pid, "actor_name": "ServeReplica:a:b", "lines": ["serving version=1"]})
    dispatcher.emit({**about, "actor_name": "Other", "lines": ["of another kind"]})
    dispatcher.emit({**about, "actor_name": "ServeReplica:a:b", "is_err": False, "lines": ["printed"]})
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["serving version=1", "serving version=1", "(Other pid=17) of another kind"]
    assert printed.out == "printed\n"
