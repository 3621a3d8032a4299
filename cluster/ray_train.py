"""The Ray Train engine of `launch`: start or join a cluster, run the workers, restart them, bring their news home.

Ray's own chatter stays in its session logs; what a user must see comes home through `cluster.mailbox`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train.torch
from pyarrow import fs
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from torch.distributed import DistError

from cluster.errors import LaunchError, LexshardError, SettingError
from cluster.launch import Json, Listener, Worker, reporting_to
from cluster.local_ray import start_local_ray
from cluster.mailbox import Sender, open_mailbox
from cluster.rank import backend_of, current_rank, num_cores, torch_threads
from cluster.storage import open_filesystem

_TRAIN: Any = ray.train  # Ray's annotations describe its first Train, not the one that runs

_START_ATTEMPTS = 10  # of a minute each: time for an autoscaler to bring machines
_RAY_SETTINGS = {  # read by Ray when it is started, or a trainer is; the user's own values come first
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay in our folder: relative paths mean the same everywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",  # a hung group is given up, not waited for
}
_LOCAL_RAY_SETTINGS = {  # a Ray of our own serves one run on one machine
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Of a collective call. Rank 0 prepares the data while the others wait for it, maybe for hours. It need not be short,
# because a worker that dies closes its connections and fails Ray's health check, both within seconds.
_GROUP_TIMEOUT_SECONDS = 24 * 3600
_OBJECT_STORE_BYTES = 256 * 2**20  # of a local Ray: only functions and events pass through it


def run_on_ray(
    fn: Worker,
    settings: dict[str, Any],
    *,
    workers: int,
    device: Any,
    address: str,
    max_failures: int,
    storage: str,
    name: str,
    threads: int,
    listener: Listener,
) -> Json:
    """`launch` on Ray Train workers; see there."""
    with ray_cluster(address, num_cpus=max(num_cores(), workers)), open_mailbox(listener) as mailbox:
        kind = _device_of(device, workers)
        _announce_shortage(workers, kind, listener)
        job = {"fn": fn, "settings": settings, "device": kind, "threads": threads, "mailbox": mailbox}
        failures = 0
        while True:
            try:
                return _run_once(job, workers=workers, kind=kind, storage=storage, name=name)
            except ray.train.TrainingFailedError as error:
                if not _had_started(error):
                    raise LaunchError(f"the workers could not be started: {_reason(error)}") from error
                if (bug := _error_of_fn(error)) is not None:
                    raise LaunchError(bug) from error
                failures += 1
                reason = _reason(error)
                if failures > max_failures >= 0:
                    raise LaunchError(_too_often(failures, max_failures, reason)) from error
                limit = "" if max_failures < 0 else f" of {max_failures}"
                listener({"text": f"{reason}; restart {failures}{limit}, from the last checkpoint"})


def _run_once(job: dict[str, Any], *, workers: int, kind: str, storage: str, name: str) -> Json:
    """One life of the worker group. Raises TrainingFailedError when a worker died or `fn` raised."""
    notes = f"{storage.rstrip('/')}/.ray"
    if "://" not in notes:
        notes = os.path.abspath(os.path.expanduser(notes))
    attempt = f"{name}-{uuid.uuid4().hex[:8]}"  # never a former name: Ray would take up its own checkpoints there
    trainer = _TRAIN.torch.TorchTrainer(
        _work,
        train_loop_config=job,
        scaling_config=_TRAIN.ScalingConfig(
            num_workers=workers, use_gpu=kind == "cuda", resources_per_worker={"CPU": 1} | _gpus(kind)
        ),
        torch_config=_TRAIN.torch.TorchConfig(backend=backend_of(kind), timeout_s=_GROUP_TIMEOUT_SECONDS),
        run_config=_TRAIN.RunConfig(
            name=attempt,
            storage_path=notes,
            failure_config=_TRAIN.FailureConfig(max_failures=0, controller_failure_limit=_START_ATTEMPTS),
            logging_config=_TRAIN.LoggingConfig(log_level="WARNING"),
        ),
    )
    before = _placement_groups()
    try:
        with _interruptible():
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, UserError):
                raise failure.rebuild() from None
        raise
    except RayError as error:  # not a worker: Ray's own controller, or the cluster under it
        raise LaunchError(f"Ray Train failed: {_last_line(error)}") from error
    finally:
        _release(_placement_groups() - before)
        _remove(notes, attempt)
    return json.loads(result.return_value)


def _work(job: dict[str, Any]) -> str:
    """What every worker runs: `fn` in its surroundings. Returns its result as JSON."""
    place = current_rank(job["device"])
    letters = Sender(job["mailbox"], place.rank)
    try:
        with (
            torch_threads(job["threads"], local_world_size=place.local_world_size),
            letters.sending_warnings(),
            reporting_to(letters.send if place.is_first else None),
        ):
            return json.dumps(job["fn"](job["settings"]))
    except LexshardError as error:
        raise UserError(type(error), error.args, vars(error)) from None
    finally:
        letters.flush()


class UserError(Exception):
    """A LexshardError on its way to the launching process, whatever its constructor looks like."""

    def __init__(self, kind: type[LexshardError], values: tuple[Any, ...], attributes: dict[str, Any]) -> None:
        super().__init__(kind, values, attributes)

    def rebuild(self) -> LexshardError:
        kind, values, attributes = self.args
        error: LexshardError = kind.__new__(kind, *values)
        vars(error).update(attributes)
        return error


# ---------------------------------------------------------------- the cluster


@contextmanager
def ray_cluster(address: str, *, num_cpus: int) -> Iterator[None]:
    """A connection to Ray; whatever was started or joined here is stopped or left with the block, and nothing else."""
    own = not address and not ray.is_initialized()
    for variable, value in (_RAY_SETTINGS | (_LOCAL_RAY_SETTINGS if own else {})).items():
        os.environ.setdefault(variable, value)
    if address:
        _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    where = f"the Ray cluster at {address} cannot be joined" if address else "a local Ray cannot be started"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            start_local_ray(num_cpus=num_cpus, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise LaunchError(f"{where}: {first_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises LaunchError if nothing listens at `address` (host:port, ray://host:port): Ray would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        return  # `auto`: Ray looks on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise LaunchError(f"the Ray cluster at {address} cannot be joined: {error}") from None


def _device_of(device: Any, workers: int) -> str:
    """cpu or cuda for the workers, which may have devices that this process lacks. Raises SettingError."""
    gpus = _resource("GPU")
    if device == "cuda" and gpus == 0:
        raise SettingError("cluster.device", "is cuda, but the Ray cluster has no GPU; use cpu or auto")
    return "cuda" if device == "cuda" or (device == "auto" and gpus >= workers) else "cpu"


def _resource(name: str) -> int:
    return int(ray.cluster_resources().get(name, 0))  # type: ignore[no-untyped-call]


def _announce_shortage(workers: int, kind: str, listener: Listener) -> None:
    """Say so when the cluster is too small as it stands: only an autoscaler or a person can end the wait."""
    resource = "GPU" if kind == "cuda" else "CPU"
    there = _resource(resource)
    if there < workers:
        text = f"{workers} workers need {workers} {resource}s and the Ray cluster has {there}: waiting for more"
        listener({"text": f"{text}, at most {_START_ATTEMPTS} minutes"})


def _placement_groups() -> set[str]:
    """Ids of the placement groups that this job holds; an id ends with its job's."""
    job = ray.get_runtime_context().get_job_id()
    entries = placement_group_table()
    return {name for name, entry in entries.items() if name.endswith(job) and entry["state"] != "REMOVED"}


def _release(groups: set[str]) -> None:
    """Remove what a controller that failed has left: its CPUs would be missing, and its workers could still write."""
    for name in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stops the workers (Ray Train's handler does) and is then a KeyboardInterrupt, as everywhere else."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if on_main_thread else None
    try:
        yield
    except SystemExit:  # how Ray's handlers of SIGINT and SIGTERM end the process
        raise KeyboardInterrupt from None
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, before)


def _gpus(kind: str) -> dict[str, float]:
    return {"GPU": 1} if kind == "cuda" else {}


def _remove(notes: str, attempt: str) -> None:
    """Remove Ray's notes of one attempt: nothing reads them."""
    filesystem, path = open_filesystem(notes)
    if filesystem.get_file_info(f"{path}/{attempt}").type != fs.FileType.NotFound:
        filesystem.delete_dir(f"{path}/{attempt}")


# ---------------------------------------------------------------- what went wrong


def _had_started(error: ray.train.TrainingFailedError) -> bool:
    """Whether workers failed, and not their placement."""
    # A worker that dies while others still start takes Ray's controller with it; so its own policy would not retry.
    cause = getattr(error, "controller_failure", None)
    return cause is None or isinstance(cause, RayError)


def _error_of_fn(error: ray.train.TrainingFailedError) -> str | None:
    """What `fn` itself raised, in one line; None if a worker died, or has lost another: only that may end better."""
    failures = getattr(error, "worker_failures", {})
    if any(_is_death(failure) for failure in failures.values()):
        return None
    for rank, failure in sorted(failures.items()):
        if not _is_lost_connection(failure):
            return f"worker {rank} failed: {type(failure).__name__}: {first_line(failure)}"
    return None


def _is_death(failure: BaseException) -> bool:
    if isinstance(failure, WorkerHealthCheckFailedError):
        return isinstance(failure.health_check_failure, RayError)
    return isinstance(failure, WorkerHealthCheckTimeoutError)


def _is_lost_connection(failure: BaseException) -> bool:
    """Whether a collective call failed because another worker was gone; gloo has no class of its own for that."""
    if isinstance(failure, DistError):
        return True
    told = str(failure)
    return isinstance(failure, RuntimeError) and ("gloo" in told or "Connection" in told or "Broken pipe" in told)


def _reason(error: ray.train.TrainingFailedError) -> str:
    """The root cause in one line: a dead process before the errors of the workers that missed it."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        if _is_death(failure):
            return f"worker {rank} died (killed, out of memory, or crashed)"
    for rank, failure in sorted(failures.items()):
        return f"worker {rank} failed: {type(failure).__name__}: {first_line(failure)}"
    cause: BaseException = getattr(error, "controller_failure", error)
    return "a worker died (killed, out of memory, or crashed)" if isinstance(cause, RayError) else first_line(cause)


def _too_often(failures: int, max_failures: int, reason: str) -> str:
    allowed = {0: "no restart is", 1: "1 restart is"}.get(max_failures, f"{max_failures} restarts are")
    times = "once" if failures == 1 else f"{failures} times"
    return f"{reason}; the workers failed {times} and {allowed} allowed (cluster.max_failures)"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _last_line(error: BaseException) -> str:
    """Of an error that carries a remote traceback: what was raised, not where."""
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
