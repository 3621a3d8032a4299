"""launch(fn, settings): run one function on one process here, or on many Ray Train workers, without it knowing which.

`fn` finds its rank and process group through `cluster.rank`, tells of its progress through `report`, and keeps its own
checkpoints: a worker that dies is started again from the beginning of `fn`, which then resumes from its own storage.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from cluster.errors import SettingError

Json = Any  # None, bool, int, float, str, and lists and string-keyed dicts of them
Worker = Callable[[dict[str, Any]], Json]
Listener = Callable[[dict[str, Any]], None]
Engine = Literal["auto", "inline", "ray"]


def launch(
    fn: Worker,
    settings: dict[str, Any],
    *,
    workers: int,
    engine: Engine = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    address: str = "",
    max_failures: int = 3,
    storage: str,
    name: str = "lexshard",
    threads: int = 0,
    on_event: Listener | None = None,
) -> Json:
    """Run `fn(settings)` on `workers` processes and return what rank 0 returned.

    fn: a module-level function; `settings` and its result are JSON-able, so both engines hand over the same values.
    engine: `inline` is this process with a one-rank group and no Ray; `ray` is Ray Train; `auto` is inline for one
        worker and Ray for more.
    address: the Ray cluster to join; empty: the one RAY_ADDRESS names (as in a submitted job), or else a local one,
        started for this call and stopped after it. A Ray that this process has joined already is used, and left.
    max_failures: times that workers are started again after one has died; -1: no limit. An exception of `fn` ends the
        run at once. Inline nothing is restarted: the process that would do it is the one that died.
    storage: a folder that all workers reach; Ray keeps its notes in `.ray` below it.
    threads: threads per worker; 0: the machine's cores shared by its workers.
    on_event: called in this process with every dict that rank 0 hands to `report`; the default writes one line each.

    Raises what `fn` raised if that is a LexshardError or if it ran inline; LaunchError when `fn` raised anything else
    on a Ray worker, and when the workers cannot be started or die too often.
    """
    listener = on_event or _write_line
    if engine == "inline" and workers != 1:
        raise SettingError("cluster.engine", f"inline runs one worker, not {workers}; use ray or auto")
    settings = json.loads(json.dumps(settings))
    if engine == "inline" or (engine == "auto" and workers == 1):
        return _run_inline(fn, settings, device=device, threads=threads, listener=listener)
    from cluster.ray_train import run_on_ray

    return run_on_ray(
        fn,
        settings,
        workers=workers,
        device=device,
        address=address or os.environ.get("RAY_ADDRESS", ""),
        max_failures=max_failures,
        storage=storage,
        name=name,
        threads=threads,
        listener=listener,
    )


def report(event: Mapping[str, Any]) -> None:
    """Tell the process that called `launch` of progress: a JSON-able mapping, in order, from rank 0 only.

    Outside a launch, and on other ranks, nothing happens.
    """
    if _listener is not None:
        _listener(dict(event))


@contextmanager
def reporting_to(listener: Listener | None) -> Iterator[None]:
    """Let `report` reach `listener` inside the block; engines wrap the worker function in it."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


_listener: Listener | None = None


def _run_inline(fn: Worker, settings: dict[str, Any], *, device: Any, threads: int, listener: Listener) -> Json:
    from cluster.rank import process_group, torch_threads

    with process_group(device), torch_threads(threads), reporting_to(listener):
        return json.loads(json.dumps(fn(settings)))


def _write_line(event: dict[str, Any]) -> None:
    """An event without a listener: its `text`, or all of it, on standard error."""
    sys.stderr.write(f"{event['text'] if 'text' in event else json.dumps(event)}\n")
    sys.stderr.flush()
