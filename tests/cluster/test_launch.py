from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError
from torch.distributed import DistBackendError

from cluster.errors import DataError, KeyNotFound, LaunchError, SettingError
from cluster.launch import launch, report
from cluster.local_ray import start_local_ray
from cluster.ray_train import UserError, _error_of_fn
from tests.cluster import work

SETTINGS: dict[str, Any] = {"numbers": [1, 2, 3.5, -4], "steps": 3, "nested": {"names": ["a", "b"]}}


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray that several launches share: starting one takes longer than the tests."""
    start_local_ray(num_cpus=2, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


def test_inline_runs_without_ray(tmp_path: Path) -> None:
    """In an interpreter of its own: an import of Ray would show."""
    script = (
        "import sys; from cluster.launch import launch; from tests.cluster import work;"
        f"print(launch(work.add_up, {SETTINGS!r}, workers=1, storage={str(tmp_path)!r})['sum'], 'ray' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.split() == ["2.5", "False"]
    assert "1 workers" in run.stderr  # without a listener events are lines of standard error


@pytest.mark.filterwarnings("ignore:rank 0 is only a test")
def test_inline_and_ray_give_the_same(tmp_path: Path) -> None:
    """With a local Ray that launch itself starts, and stops."""
    inline_events: list[dict[str, Any]] = []
    ray_events: list[dict[str, Any]] = []
    inline = launch(work.add_up, SETTINGS, workers=1, storage=str(tmp_path), on_event=inline_events.append)
    on_ray = launch(work.add_up, SETTINGS, workers=2, threads=1, storage=str(tmp_path), on_event=ray_events.append)
    assert not ray.is_initialized()
    assert on_ray == {**inline, "threads": 1}
    assert inline["settings"] == SETTINGS
    warnings = [event for event in ray_events if "UserWarning" in str(event)]
    assert sorted(event["text"][:8] for event in warnings) == ["worker 0", "worker 1"]
    assert [e for e in ray_events if e not in warnings] == [
        {"text": "2 workers", "rank": 0},
        *inline_events[1:],  # only rank 0's, in order
    ]
    assert list((tmp_path / ".ray").iterdir()) == []


def test_an_error_of_the_users_arrives_whole_and_is_not_retried(ray_here: None, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    with pytest.raises(DataError, match=r"^sessions\.parquet, row group 2, row 7: is null$") as caught:
        launch(work.refuse, {"calls": str(calls)}, workers=2, storage=str(tmp_path))
    assert (caught.value.file, caught.value.row) == ("sessions.parquet", 7)
    assert calls.read_text() == "."


def test_a_killed_worker_is_started_again(ray_here: None, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    settings = {"calls": str(tmp_path / "calls"), "times": 1}
    starts = launch(work.die, settings, workers=2, storage=str(tmp_path), max_failures=1, on_event=events.append)
    assert starts == 2
    (event,) = events
    expected = (
        r"(a worker|worker 0) died \(killed, out of memory, or crashed\); restart 1 of 1, from the last checkpoint"
    )
    assert re.fullmatch(expected, event["text"])


def test_too_many_deaths_end_the_run_with_the_cause(ray_here: None, tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        launch(
            work.die, {"calls": str(tmp_path / "calls"), "times": 9}, workers=2, storage=str(tmp_path), max_failures=0
        )
    expected = (
        r"(a worker|worker 0) died \(killed, out of memory, or crashed\); the workers failed once and no restart is "
        r"allowed \(cluster\.max_failures\)"
    )
    assert re.fullmatch(expected, str(caught.value))


def test_an_error_of_fn_is_not_retried(ray_here: None, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    with pytest.raises(LaunchError) as caught:
        launch(work.crash, {"calls": str(calls)}, workers=2, storage=str(tmp_path), max_failures=3)
    assert str(caught.value) == "worker 1 failed: RuntimeError: a bug"
    assert calls.read_text() == "."


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        (
            {0: RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer")},
            None,
        ),
        ({0: DistBackendError("NCCL error: remote process exited")}, None),
        ({0: ValueError("a bug")}, "worker 0 failed: ValueError: a bug"),
        ({0: RuntimeError("[gloo] Connection closed"), 1: KeyError("x")}, "worker 1 failed: KeyError: 'x'"),
        ({0: KeyError("x"), 1: WorkerHealthCheckFailedError("gone", failure=ray.exceptions.RayActorError())}, None),
        ({}, None),
    ],
)
def test_only_deaths_and_lost_connections_are_retried(failures: dict[int, Exception], told: str | None) -> None:
    assert _error_of_fn(WorkerGroupError("failed", failures)) == told


def test_a_local_ray_is_not_reachable_from_outside() -> None:
    """In a process of its own; every listening socket of it and its children is looked at."""
    script = (
        "import psutil, ray; from cluster.local_ray import start_local_ray\n"
        "start_local_ray(num_cpus=1, log_to_driver=False, object_store_memory=2**27)\n"
        "ray.get(ray.remote(lambda: 1).remote())\n"
        "me = psutil.Process()\n"
        "for process in [me, *me.children(recursive=True)]:\n"
        "    for one in process.net_connections('tcp'):\n"
        "        if one.status == 'LISTEN': print(one.laddr.ip)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    addresses = run.stdout.split()
    assert len(addresses) > 3
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


def test_ctrl_c_stops_the_workers(tmp_path: Path) -> None:
    script = (
        "from cluster.launch import launch; from tests.cluster import work;"
        f"launch(work.wait_for_ever, {{}}, workers=1, engine='ray', storage={str(tmp_path)!r})"
    )
    root = Path(__file__).parents[2]
    run = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=root)
    assert run.stderr is not None
    try:
        for line in run.stderr:
            if line == "begun\n":
                break
        run.send_signal(signal.SIGINT)
        _, rest = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == -signal.SIGINT, rest  # how Python ends on a KeyboardInterrupt
    assert rest.rstrip().endswith("KeyboardInterrupt")


def test_inline_with_several_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cluster\.engine: inline runs one worker, not 2"):
        launch(work.add_up, SETTINGS, workers=2, engine="inline", storage=str(tmp_path))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:x"])
def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path: Path, address: str) -> None:
    with pytest.raises(LaunchError, match=rf"^the Ray cluster at {address} cannot be joined: "):
        launch(work.add_up, SETTINGS, workers=2, storage=str(tmp_path), address=address)


def test_cuda_on_a_cluster_without_gpus_is_refused(ray_here: None, tmp_path: Path) -> None:
    if ray.cluster_resources().get("GPU"):
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(SettingError, match=r"cluster\.device: is cuda, but the Ray cluster has no GPU"):
        launch(work.add_up, SETTINGS, workers=2, device="cuda", storage=str(tmp_path))


def test_inline_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        launch(work.crash, {"calls": str(tmp_path / "calls")}, workers=1, storage=str(tmp_path))
    assert "RANK" not in os.environ


def test_reporting_outside_a_launch_does_nothing() -> None:
    report({"text": "nobody listens"})


@pytest.mark.parametrize(
    "error", [SettingError("a.b", "is wrong"), DataError("x", file="f", row=3), KeyNotFound("k", "item")]
)
def test_user_errors_survive_the_journey_between_processes(error: Exception) -> None:
    import cloudpickle

    arrived = cloudpickle.loads(cloudpickle.dumps(UserError(type(error), error.args, vars(error)))).rebuild()
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
