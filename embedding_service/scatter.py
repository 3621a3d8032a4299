"""Questions to an index whose shards are held by other processes: all are asked at once, and what they find is merged.

Every question names its version, and a shard answers with that one or not at all: an answer never mixes versions. A
version is loaded by all shards before anything is asked of it (`Scatter.load`), so that what goes live is there.

A shard that fails, or does not answer in time, is lost: it is not waited for again until it has loaded the version and
says so, which a task of this process keeps asking for. Meanwhile answers are without its rows, and say so
(`noting_lost_shards`), or are refused with ShardLost. To start it again is Serve's business (`app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from cluster.errors import ArtifactError, LexshardError, ShardLost
from embedding_service.artifact import Artifact
from embedding_service.index_shards import Found, Question, ShardedCandidates, rows_of, shards_of

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.2  # before a lost shard is asked again
_RETURN_SECONDS = 30.0  # that it may take to load a version before it is asked anew
_partial_here: ContextVar[dict[str, Any] | None] = ContextVar("partial", default=None)


class Send(Protocol):
    """Asks one shard: the method of `ShardVersions` and its arguments, and what it returns or raises."""

    def __call__(self, method: str, *arguments: Any) -> Awaitable[Any]: ...


@contextlib.contextmanager
def noting_lost_shards() -> Iterator[dict[str, Any]]:
    """What is missing in what this thread answers inside: {"lost_shards": [...], "num_shards"}, or nothing."""
    partial: dict[str, Any] = {}
    token = _partial_here.set(partial)
    try:
        yield partial
    finally:
        _partial_here.reset(token)


def partial_now() -> dict[str, Any]:
    """What is missing so far."""
    return _partial_here.get() or {}


class Scatter:
    """The shards of a service, numbered as `sends`. Safe to use from many threads; it waits: not on an event loop.

    A thread of its own runs the event loop that asks; it ends with the process.
    """

    def __init__(self, sends: Sequence[Send], *, timeout_seconds: float, partial: bool, load_seconds: float) -> None:
        """timeout_seconds: within which a shard answers a question, and `load_seconds` within which it loads a version;
        partial: whether answers may do without lost shards, as long as one is left and somebody notes it.
        """
        self._sends = sends
        self._timeout, self._load_seconds, self._partial = timeout_seconds, load_seconds, partial
        self.lost: dict[tuple[int, str], str] = {}  # (shard, version) -> why
        self._watches: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="scatter", daemon=True).start()

    @property
    def num_shards(self) -> int:
        return len(self._sends)

    def lost_of(self, version: str) -> dict[int, str]:
        """The shards that do not answer for a version now, and why."""
        return {number: reason for (number, of), reason in sorted(self.lost.copy().items()) if of == version}

    def load(self, version: str) -> None:
        """Have all shards load a version. Raises ArtifactError, naming the shard, where one cannot."""
        self._wait(self._load_all(version))

    def forget(self, version: str) -> None:
        """Nothing will be asked of a version any more."""
        self._loop.call_soon_threadsafe(self._forget, version)

    def candidates(self, artifact: Artifact, index: str) -> ShardedCandidates:
        """What an index of a version chooses from. Raises ArtifactError for one of too few shards."""
        held = [shards_of(artifact, index, number, self.num_shards) for number in range(self.num_shards)]
        ranges = [rows_of(artifact, index, shards) for shards in held]
        vectors = artifact.vectors(artifact.manifest["indexes"][index]["vectors"]).head(ranges[-1].stop)
        version = artifact.path.name

        def ask(questions: Sequence[Question]) -> list[Found | None]:
            return self._ask(version, index, questions)

        return ShardedCandidates(vectors, ranges, ask)

    def _ask(self, version: str, index: str, questions: Sequence[Question]) -> list[Found | None]:
        """What each shard has found, None for a lost one. Raises ShardLost; also where nobody notes what is missing."""
        found = self._wait(self._ask_all(version, index, questions))
        reasons = {number: one for number, one in enumerate(found) if isinstance(one, str)}
        if not reasons:
            return [one for one in found if not isinstance(one, str)]
        noted = _partial_here.get()
        if noted is None or not self._partial or len(reasons) == self.num_shards:
            told = "; ".join(f"shard {number} of {self.num_shards} {reason}" for number, reason in reasons.items())
            raise ShardLost(f"{told}: it is started again by itself; ask again in a moment")
        lost = sorted({*noted.get("lost_shards", ()), *reasons})
        noted.update({"lost_shards": lost, "num_shards": self.num_shards})
        return [None if isinstance(one, str) else one for one in found]

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _ask_all(self, version: str, index: str, questions: Sequence[Question]) -> list[Found | str]:
        asked = [self._ask_one(number, version, index, question) for number, question in enumerate(questions)]
        return await asyncio.gather(*asked)

    async def _ask_one(self, number: int, version: str, index: str, question: Question) -> Found | str:
        """What it has found, or why it has not."""
        if reason := self.lost.get((number, version)):
            return reason
        try:
            async with asyncio.timeout(self._timeout):
                found: Found = await self._sends[number]("search", version, index, question)
                return found
        except TimeoutError:
            reason = f"does not answer within {self._timeout:g} s"
        except Exception as error:  # whatever goes wrong in another process: it is told, and logged
            reason = f"failed ({_told(error)})"
        if (number, version) not in self.lost:
            logger.error("shard %d of %d, version %s, %s", number, self.num_shards, version, reason)
            self.lost[number, version] = reason
            watch = asyncio.create_task(self._await_return(number, version))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        return reason

    async def _await_return(self, number: int, version: str) -> None:
        """Until the shard has the version, which takes a new process that has started and loaded it."""
        while (number, version) in self.lost:
            try:
                async with asyncio.timeout(_RETURN_SECONDS):
                    await self._sends[number]("load", version)
                logger.warning("shard %d of %d, version %s, is back", number, self.num_shards, version)
                break
            except Exception as error:  # it stays lost, for this reason now
                if (number, version) in self.lost and not isinstance(error, TimeoutError):
                    self.lost[number, version] = f"failed ({_told(error)})"
                await asyncio.sleep(_PAUSE_SECONDS)
        self.lost.pop((number, version), None)

    async def _load_all(self, version: str) -> None:
        async def load(number: int) -> None:
            try:
                async with asyncio.timeout(self._load_seconds):
                    await self._sends[number]("load", version)
            except TimeoutError:
                raise ArtifactError(
                    f"shard {number} of {self.num_shards} has not loaded version {version} within "
                    f"{self._load_seconds:g} s"
                ) from None
            except Exception as error:  # of another process
                raise ArtifactError(
                    f"shard {number} of {self.num_shards} cannot load version {version}: {_told(error)}"
                ) from error

        await asyncio.gather(*(load(number) for number in range(self.num_shards)))

    def _forget(self, version: str) -> None:
        for known in [known for known in self.lost if known[1] == version]:
            del self.lost[known]


def _told(error: Exception) -> str:
    """An error of another process in one line: of ours the message, of others what they are as well."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    cause = getattr(error, "cause", None)  # what Ray wraps
    if isinstance(cause, LexshardError) or isinstance(error, LexshardError):
        return str(cause if isinstance(cause, LexshardError) else error)[:500]
    return f"{type(error).__name__}: {lines[-1]}"[:500]
