"""run_tasks(fn, settings, tasks): independent pieces of work, on this machine's threads or as Ray tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from cluster.launch import Json

Task = Callable[[Json, Json], Json]


def run_tasks(
    fn: Task, settings: Json, tasks: Sequence[Json], *, threads: int, engine: str = "auto", address: str = ""
) -> Iterator[tuple[int, Json]]:
    """(number of a task, `fn(settings, task)`) as each of `tasks` is done, in any order.

    fn: a module-level function that may be called in many threads, and again for a task whose machine has died;
        `settings`, a task and what it returns are JSON-able.
    threads: of this process; where a local Ray has to be started, its cores.
    engine: `ray` runs Ray tasks of one core each; `inline` this process's `threads`; `auto` Ray where `address` or
        RAY_ADDRESS names a cluster, and else threads.

    Raises what `fn` raised if that is a LexshardError or if it ran in a thread; LaunchError where it raised anything
    else in a Ray task, or the task's workers died too often. Tasks that have not begun are then left out.
    """
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not tasks:
        return
    if engine == "ray" or (engine == "auto" and address):
        from cluster.ray_tasks import ray_tasks

        yield from ray_tasks(fn, settings, tasks, address=address, threads=threads)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="task") as pool:
        running: dict[Future[Json], int] = {pool.submit(_call, fn, settings, task): i for i, task in enumerate(tasks)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def _call(fn: Task, settings: Json, task: Json) -> Json:
    """Through JSON, so that both engines hand over the same values."""
    return json.loads(json.dumps(fn(json.loads(json.dumps(settings)), json.loads(json.dumps(task)))))
