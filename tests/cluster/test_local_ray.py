from __future__ import annotations

import os
import signal
import subprocess
import sys

from cluster.local_ray import end_processes


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
