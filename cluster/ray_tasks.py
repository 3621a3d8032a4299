"""The Ray engine of `run_tasks`: no process group; a task whose worker dies is done again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import LaunchError, LexshardError
from cluster.launch import Json
from cluster.ray_train import UserError, first_line, ray_cluster

_MAX_RETRIES = 3  # of a task whose worker or machine has died


def ray_tasks(
    fn: Any, settings: Json, tasks: Sequence[Json], *, address: str, threads: int
) -> Iterator[tuple[int, Json]]:
    """`cluster.tasks.run_tasks` on Ray; see there."""
    with ray_cluster(address, num_cpus=threads):
        remote: Any = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(_run_task)
        shared = ray.put(json.dumps(settings))
        running = {remote.remote(fn, shared, json.dumps(task)): i for i, task in enumerate(tasks)}
        try:
            while running:
                done, _ = ray.wait(list(running))
                for reference in done:
                    yield running.pop(reference), json.loads(ray.get(reference))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause.rebuild() from None
            raise LaunchError(f"a task failed: {type(error.cause).__name__}: {first_line(error.cause)}") from error
        except RayError as error:
            raise LaunchError(
                f"a task's worker died (killed, out of memory, or crashed): {first_line(error)}"
            ) from error
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _run_task(fn: Any, settings: str, task: str) -> str:
    """What a Ray task runs: `fn`. Returns its result as JSON."""
    try:
        return json.dumps(fn(json.loads(settings), json.loads(task)))
    except LexshardError as error:
        raise UserError(type(error), error.args, vars(error)) from None
