"""A child process: it becomes its command, and is nothing without its parent (killed ones: test_exports.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.child import child_command, child_environment


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_it_becomes_the_command_at_low_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, with the environment but for what is left out; nothing is imported from that folder."""
    modules, elsewhere = tmp_path / "modules", tmp_path / "elsewhere"
    modules.mkdir()
    (elsewhere / "cluster").mkdir(parents=True)
    for decoy in ("json.py", "told.py", "cluster/__init__.py", "cluster/child.py"):
        (elsewhere / decoy).write_text("raise SystemExit('a decoy was imported')\n")
    (modules / "told.py").write_text(
        "import cluster.child, json, os, sys\n"
        "print(os.getppid(), os.nice(0), sys.argv[1:], 'SECRET' in os.environ, 'OTHER' in os.environ)\n"
        "sys.exit(7)\n"
    )
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("OTHER", "x")
    monkeypatch.setenv("PYTHONPATH", "modules")
    monkeypatch.chdir(tmp_path)
    done = run(child_command("told", "a b", "--c"), cwd=elsewhere, env=child_environment(without={"SECRET"}))
    niceness = min(19, os.nice(0) + 10)
    assert (done.returncode, done.stdout) == (7, f"{os.getpid()} {niceness} ['a b', '--c'] False True\n"), done.stderr


def test_it_does_not_begin_when_its_parent_is_gone() -> None:
    command = [sys.executable, "-m", "cluster.child", str(os.getppid()), sys.executable, "-c", "print('ran')"]
    done = run(command, env=child_environment(without=()))
    assert (done.returncode, done.stdout) == (1, "")
