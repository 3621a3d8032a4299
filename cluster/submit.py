"""Hand a lexshard command to a Ray cluster as a job, follow its log, and tell how it ended."""

from __future__ import annotations

import asyncio
import logging
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.errors import LaunchError, SettingError

Status = Literal["SUCCEEDED", "FAILED", "STOPPED"]

# Ray leaves out what .gitignore names; these never belong in a job, whatever the folder's .gitignore says.
_EXCLUDED = ("/.git", "/.venv", "/runs", "/data")
_READY_SECONDS = 60.0  # a cluster that was just started takes jobs a little later than it answers


def submit(
    arguments: Sequence[str],
    *,
    address: str,
    working_dir: str = ".",
    python: str = "python",
    on_log: Callable[[str], None],
) -> Status:
    """Run `lexshard <arguments>` as a job of the cluster whose job server is at `address` (http://host:8265).

    working_dir: the folder that is packed up and becomes the job's; `runs`, `data`, `.venv` and `.git` stay here, so
        the config names sessions by paths or URLs that all machines reach, and as run a folder that they share.
    python: the interpreter to run on the cluster; it has lexshard's dependencies.
    on_log: gets the job's output, piece by piece, as it is written.

    Raises SettingError for an address that is no URL, LaunchError when the job cannot be submitted or followed.
    """
    if not address.startswith(("http://", "https://")):
        raise SettingError("--address", f"must be the URL of the job server, like http://HOST:8265; got {address}")
    folder = Path(working_dir)
    if not folder.is_dir():
        raise LaunchError(f"--working-dir {working_dir}: there is no such folder")
    from ray.exceptions import RayError
    from ray.job_submission import JobStatus, JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every step
    try:
        client = JobSubmissionClient(address)
        job = _submit_when_ready(
            client,
            entrypoint=shlex.join([python, "-m", "cluster.cli", *arguments]),
            runtime_env={"working_dir": str(folder.resolve()), "excludes": list(_EXCLUDED)},
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise LaunchError(f"no job could be submitted to {address}: {error}") from None
    on_log(f"job {job} submitted\n")

    async def follow() -> None:
        async for text in client.tail_job_logs(job):
            on_log(text)

    try:
        asyncio.run(follow())
        info = client.get_job_info(job)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise LaunchError(f"job {job} goes on, but its log was lost ({error}); see `ray job status {job}`") from None
    if not JobStatus(info.status).is_terminal():
        raise LaunchError(f"job {job} goes on, but its log ended; see `ray job status {job}`")
    if info.status == JobStatus.FAILED and info.message:
        on_log(f"{info.message}\n")
    return str(info.status.value)  # type: ignore[return-value]


def _submit_when_ready(client: Any, **job: Any) -> str:
    """Submit, and again as long as the cluster's agents are not up yet. Raises RuntimeError.

    Asked again every second: the job server has nothing else that would tell when the first agent has come up.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        threading.Event().wait(1.0)
