"""Work that a thread does every so many seconds, beside what the process is there for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Periodic:
    """Calls `work` every `seconds` in a thread of its own, the first time after that time, until `stop`.

    What fails is logged, once for each kind of error in a row, and tried again next time.
    """

    def __init__(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        self._name, self._seconds, self._work = name, seconds, work
        self._ended = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the work that was begun is done."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._work()
                self._problem = ""
            except Exception as error:  # nobody waits for this thread: else it would end and not say so
                problem = f"{type(error).__name__}: {error}"
                if problem != self._problem:
                    logger.exception("%s failed; it is tried again", self._name)
                self._problem = problem
