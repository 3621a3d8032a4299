"""What waits in one turn of the event loop is answered together, and no request bears another's failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from embedding_service.http_turns import Turns


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, "turns") as executor:
        yield executor


class Squares:
    """Squares numbers, refuses negative ones, and notes what it was asked together and in which thread."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, list[int]]] = []
        self.threads: set[str] = set()

    def __call__(self, group: Any, queries: list[int]) -> list[int]:
        self.batches.append((group, queries))
        self.threads.add(threading.current_thread().name)
        for query in queries:
            if query < 0:
                raise ValueError(f"{query} is negative")
        return [query * query for query in queries]


def gather(turns: Turns, *asked: tuple[str, int]) -> list[Any]:
    async def run() -> list[Any]:
        return await asyncio.gather(*(turns.ask(group, query) for group, query in asked), return_exceptions=True)

    return asyncio.run(run())


def test_one_batch_per_group_and_turn(pool: ThreadPoolExecutor) -> None:
    squares = Squares()
    turns = Turns(squares, lambda _: True, pool)
    assert gather(turns, ("a", 1), ("b", 2), ("a", 3)) == [1, 4, 9]
    assert squares.batches == [("a", [1, 3]), ("b", [2])]
    assert squares.threads == {threading.current_thread().name}
    assert gather(turns, ("a", 4)) == [16]
    assert squares.batches[2:] == [("a", [4])]


@pytest.mark.parametrize("quick", [True, False])
def test_a_failure_is_only_its_own(pool: ThreadPoolExecutor, quick: bool) -> None:
    squares = Squares()
    answers = gather(Turns(squares, lambda _: quick, pool), *(("a", query) for query in (1, 2, -3, 4, 5, -6, 7)))
    assert [answers[i] for i in (0, 1, 3, 4, 6)] == [1, 4, 16, 25, 49]
    assert [str(answers[i]) for i in (2, 5)] == ["-3 is negative", "-6 is negative"]
    assert (squares.threads == {threading.current_thread().name}) == quick


def test_long_work_leaves_the_loop(pool: ThreadPoolExecutor) -> None:
    squares = Squares()
    assert gather(Turns(squares, lambda num: num < 2, pool), ("a", 1), ("a", 2)) == [1, 4]
    assert squares.threads == {"turns_0"}


def test_a_pool_that_is_shut_down_fails_the_requests(pool: ThreadPoolExecutor) -> None:
    pool.shutdown()
    (answer,) = gather(Turns(Squares(), lambda _: False, pool), ("a", 1))
    assert isinstance(answer, RuntimeError)


def test_a_client_that_left_holds_up_nobody(pool: ThreadPoolExecutor) -> None:
    turns = Turns(Squares(), lambda _: True, pool)

    async def run() -> int:
        loop = asyncio.get_running_loop()
        gone, stays = (loop.create_task(turns.ask("a", query)) for query in (1, 2))
        loop.call_soon(gone.cancel)  # after both have asked, before they are answered
        return int(await stays)

    assert asyncio.run(run()) == 4


def test_a_loop_that_ended_before_its_turn_holds_up_no_other(pool: ThreadPoolExecutor) -> None:
    turns = Turns(Squares(), lambda _: True, pool)
    ended = asyncio.new_event_loop()
    asking = ended.create_task(turns.ask("a", 2))
    ended.call_soon(ended.stop)  # in the turn in which it asks
    ended.run_forever()
    ended.close()
    assert not asking.done()
    assert gather(turns, ("a", 3)) == [9]


def test_loops_of_two_threads_wait_each_for_its_own_turn(pool: ThreadPoolExecutor) -> None:
    squares, answers = Squares(), []
    turns, both = Turns(squares, lambda _: True, pool), threading.Barrier(2)

    async def ask(query: int) -> int:
        asking = asyncio.get_running_loop().create_task(turns.ask("a", query))
        asyncio.get_running_loop().call_soon(both.wait)  # after both have asked, before either is answered
        return int(await asking)

    threads = [threading.Thread(target=lambda query=query: answers.append(asyncio.run(ask(query)))) for query in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == [4, 9]
    assert sorted(squares.batches) == [("a", [2]), ("a", [3])]
