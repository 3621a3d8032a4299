"""What every test may rely on: no Ray address from outside, and nothing left running at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
for _name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LEXSHARD_DEBUG"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    """Processes that the tests started are gone when they are done; what is left is ended, named, and a failure."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    _, left = psutil.wait_procs(left, timeout=10)  # Ray's processes end a moment after `ray.shutdown`
    names = [f"{process.pid} {' '.join(process.cmdline())[:100]}" for process in left if process.is_running()]
    for process in left:
        process.kill()
    assert not names, f"the tests left running: {names}"
