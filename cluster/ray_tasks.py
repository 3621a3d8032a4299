"""Independent pieces of work on a Ray cluster: no process group; a piece whose worker dies is done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.errors import LaunchError, LexshardError
from cluster.launch import Json
from cluster.rank import num_cores
from cluster.ray_train import UserError, ray_cluster


def run_tasks(
    fn: Callable[[dict[str, Any]], Json],
    pieces: Sequence[dict[str, Any]],
    *,
    address: str = "",
    on_done: Callable[[int], None] = lambda number: None,
) -> list[Json]:
    """`fn(piece)` for every piece, each a Ray task on one CPU; the results in the order of the pieces.

    fn: a module-level function from and to JSON types, which may be called again for the same piece. address: as in
    `launch`. on_done: called with how many pieces are done.

    Raises what `fn` raised if that is a LexshardError; LaunchError where it raised anything else, or Ray failed.
    """
    texts = [json.dumps(piece) for piece in pieces]
    with ray_cluster(address, num_cpus=max(num_cores(), len(texts))):
        task = ray.remote(num_cpus=1)(_run)
        waiting = [task.remote(fn, text) for text in texts]
        numbers = {handle: number for number, handle in enumerate(waiting)}
        results: dict[int, Json] = {}
        try:
            while waiting:
                (done,), waiting = ray.wait(waiting)
                results[numbers[done]] = json.loads(ray.get(done))
                on_done(len(results))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause.rebuild() from None
            raise LaunchError(f"a task failed: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            raise LaunchError(f"a task's worker died (killed, out of memory, or crashed): {error}") from error
        finally:
            for handle in waiting:
                ray.cancel(handle, force=True)
    return [results[number] for number in range(len(texts))]


def _run(fn: Callable[[dict[str, Any]], Json], piece: str) -> str:
    try:
        return json.dumps(fn(json.loads(piece)))
    except LexshardError as error:
        raise UserError(type(error), error.args, vars(error)) from None
