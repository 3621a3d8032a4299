"""Independent tasks: the same on threads and as Ray tasks, and a dead worker's are run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.errors import SettingError
from cluster.local_ray import start_local_ray
from cluster.tasks import run_tasks
from tests.cluster import work

TASKS: list[dict[str, Any]] = [{"number": i} for i in range(5)]
EXPECTED = {i: {"square": i * i, "pair": [1, 2]} for i in range(5)}


def test_threads_give_results_by_number(tmp_path: Path) -> None:
    assert dict(run_tasks(work.square, {}, TASKS, threads=2)) == EXPECTED
    assert dict(run_tasks(work.square, {}, [], threads=2)) == {}


def test_an_error_ends_the_rest() -> None:
    with pytest.raises(SettingError, match=r"^setting export\.index: 7 is refused$"):
        list(run_tasks(work.square, {}, [{"number": 7, "bad": True}, *TASKS], threads=1))


def test_ray_gives_the_same_also_after_a_death(tmp_path: Path) -> None:
    start_local_ray(num_cpus=2, log_to_driver=False, object_store_memory=2**27)
    try:
        settings = {"graves": str(tmp_path)}
        tasks = [{**task, "dies": task["number"] == 3} for task in TASKS]
        assert dict(run_tasks(work.square, settings, tasks, threads=2, engine="ray")) == EXPECTED
        assert (tmp_path / "3").exists()
        with pytest.raises(SettingError, match=r"^setting export\.index: 7 is refused$") as caught:
            list(run_tasks(work.square, settings, [{"number": 7, "bad": True}], threads=2, engine="ray"))
        assert caught.value.path == "export.index"
        assert ray.is_initialized(), "a Ray that was there is left"
    finally:
        ray.shutdown()
