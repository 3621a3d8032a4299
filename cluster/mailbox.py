"""How news of Ray workers reaches the process that launched them: an actor with a queue, and a thread that empties it.

Rank 0 sends the events of `report`, every worker its warnings. Light to import: the actor starts as fast as Ray can.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class _Mailbox:
    """Actor: letters from the workers, in order, until `None` closes it."""

    def __init__(self) -> None:
        self._letters: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def put(self, letter: dict[str, Any] | None) -> None:
        self._letters.put_nowait(letter)

    async def take(self) -> list[dict[str, Any] | None]:
        """All letters that are there; waits for the first."""
        letters = [await self._letters.get()]
        while not self._letters.empty():
            letters.append(self._letters.get_nowait())
        return letters


class Sender:
    """A worker's end of the mailbox.

    An asyncio actor may run two calls of one caller in either order, so one letter at a time is on its way.
    """

    def __init__(self, mailbox: Any, rank: int) -> None:
        self._mailbox = mailbox
        self._rank = rank
        self._last: Any = None
        self._sending = threading.RLock()  # waiting for a letter may itself warn

    def send(self, letter: dict[str, Any]) -> None:
        """Post a JSON-able letter; returns at once unless the one before it is still on its way."""
        with self._sending:
            self.flush()
            self._last = self._mailbox.put.remote(letter)

    def flush(self) -> None:
        """Wait until the last letter has arrived: the process may end right after."""
        if self._last is not None:
            ray.get(self._last)

    @contextmanager
    def sending_warnings(self) -> Iterator[None]:
        """Inside the block, post Python warnings and log records from WARNING up, of everything but Ray itself."""
        handler = _Forwarder(self._warn)
        show = warnings.showwarning
        logging.getLogger().addHandler(handler)
        warnings.showwarning = lambda message, category, *_: self._warn(f"{category.__name__}: {message}")
        try:
            yield
        finally:
            warnings.showwarning = show
            logging.getLogger().removeHandler(handler)

    def _warn(self, text: str) -> None:
        self.send({"text": f"worker {self._rank}: {text}"})


class _Forwarder(logging.Handler):
    def __init__(self, forward: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._forward = forward
        self.addFilter(lambda record: record.name.split(".")[0] != "ray")

    def createLock(self) -> None:
        """None of its own: held around the sender's, it could be asked for in the other order."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self._forward(self.format(record))


@contextmanager
def open_mailbox(listener: Callable[[dict[str, Any]], None]) -> Iterator[Any]:
    """An actor on this machine to make a `Sender` of; `listener` gets every letter, on a thread of its own.

    When the block ends all that was sent before has been listened to.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(_Mailbox)
    mailbox = remote.options(num_cpus=0, scheduling_strategy=here).remote()

    def read() -> None:
        while True:
            try:
                letters = ray.get(mailbox.take.remote())
            except RayError:
                return  # the cluster is gone, and with it whatever was still to be read
            for letter in letters:
                if letter is None:
                    return
                listener(letter)

    reader = threading.Thread(target=read, name="lexshard-mailbox", daemon=True)
    reader.start()
    try:
        yield mailbox
    finally:
        mailbox.put.remote(None)
        reader.join(timeout=10)
        ray.kill(mailbox)
