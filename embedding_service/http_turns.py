"""Single queries that wait in the same turn of the event loop, answered together.

One query costs several times its share of a batch: most of it are calls, not arithmetic. Under load several requests
arrive between two turns of the event loop. They are answered as one batch; a request that comes alone does not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from typing import Any

Answer = Callable[[Any, list[Any]], Sequence[Any]]
_Waiting = list[tuple[Any, asyncio.Future[Any]]]


class Turns:
    """Collects queries by group, and asks for a group's answers once per turn of the event loop that they wait on."""

    def __init__(self, answer: Answer, is_quick: Callable[[int], bool], pool: Executor) -> None:
        """answer(group, queries): one answer per query, in order; it may raise.

        is_quick(n): whether n queries may be answered on the event loop; else they are in a thread of `pool`.
        """
        self._answer, self._is_quick, self._pool = answer, is_quick, pool
        self._waiting: dict[asyncio.AbstractEventLoop, dict[Hashable, _Waiting]] = {}  # of a loop: in its thread

    async def ask(self, group: Hashable, query: Any) -> Any:
        """The answer to `query`, computed with those of its group that are asked for in this turn.

        Raises what `answer` raises for this query, whatever becomes of the others.
        """
        loop = asyncio.get_running_loop()
        groups = self._waiting.get(loop)
        if groups is None:
            groups = self._waiting[loop] = {}
            loop.call_soon(self._flush, loop)
        future: asyncio.Future[Any] = loop.create_future()
        groups.setdefault(group, []).append((query, future))
        return await future

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        for group, waiting in self._waiting.pop(loop).items():
            if self._is_quick(len(waiting)):
                _resolve(waiting, self._outcomes(group, [query for query, _ in waiting]))
            else:
                self._in_thread(loop, group, waiting)

    def _in_thread(self, loop: asyncio.AbstractEventLoop, group: Hashable, waiting: _Waiting) -> None:
        try:
            work = loop.run_in_executor(self._pool, self._outcomes, group, [query for query, _ in waiting])
        except RuntimeError as error:  # the pool was shut down
            _resolve(waiting, [error] * len(waiting))
        else:
            work.add_done_callback(lambda done: _resolve(waiting, done.result()))

    def _outcomes(self, group: Hashable, queries: list[Any]) -> list[Any]:
        """Per query its answer, or the exception that it raises: a batch that fails is halved until one is alone."""
        try:
            return list(self._answer(group, queries))
        except Exception as error:  # whoever asked gets it
            if len(queries) == 1:
                return [error]
        middle = len(queries) // 2
        return self._outcomes(group, queries[:middle]) + self._outcomes(group, queries[middle:])


def _resolve(waiting: _Waiting, outcomes: list[Any]) -> None:
    for (_, future), outcome in zip(waiting, outcomes, strict=True):
        if future.done():  # its client has left
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
