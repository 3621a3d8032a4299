from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from cluster.errors import SettingError
from cluster.rank import current_rank, num_cores, process_group, torch_threads


def test_alone_in_the_world_without_an_environment() -> None:
    place = current_rank("cpu")
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (0, 1, 0, 1)
    assert place.is_first
    assert place.backend == "gloo"
    assert place.device == torch.device("cpu")


def test_place_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    place = current_rank("cpu")
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert not place.is_first


def test_process_group_of_one_is_made_and_torn_down() -> None:
    with process_group("cpu") as place:
        assert dist.get_world_size() == place.world_size == 1
        assert os.environ["LOCAL_WORLD_SIZE"] == "1"
        value = torch.ones(3)
        dist.all_reduce(value)
        assert value.tolist() == [1.0, 1.0, 1.0]
        dist.new_group([0])  # libraries make groups of their own
    assert not dist.is_initialized()
    assert "RANK" not in os.environ


def test_process_group_that_exists_is_left_alone() -> None:
    with process_group("cpu"):
        with process_group("cpu") as inner:
            assert inner.rank == 0
        assert dist.is_initialized()


def test_process_group_is_torn_down_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), process_group("cpu"):
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(SettingError, match=r"cluster\.device: is cuda, but no CUDA device"):
        current_rank("cuda")


def test_threads_are_set_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    with torch_threads(3) as threads:
        assert threads == torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert torch.get_num_threads() == before
    assert "OMP_NUM_THREADS" not in os.environ


def test_threads_share_the_cores_by_default() -> None:
    with torch_threads(0) as threads:
        assert threads == num_cores()
    with torch_threads(0, local_world_size=10 * num_cores()) as threads:
        assert threads == 1


def test_auto_is_the_device_that_the_group_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, in a run whose launcher has chosen cpu."""
    with process_group("cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert current_rank("auto").device == torch.device("cpu")
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert current_rank("auto").device == torch.device("cuda", 0)
