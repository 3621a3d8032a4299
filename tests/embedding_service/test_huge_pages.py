from __future__ import annotations

import torch

from embedding_service.huge_pages import prefer_huge_pages


def test_small_tensors_are_left_alone() -> None:
    assert not prefer_huge_pages(torch.zeros(1000))


def test_a_large_tensor_keeps_what_is_in_it() -> None:
    tensor = torch.arange(5_000_000)
    views = tensor[7:9], tensor[-1:]
    prefer_huge_pages(tensor)  # whether the system has any is its own business
    assert torch.equal(tensor, torch.arange(5_000_000))
    tensor[8] = -1
    assert [view.tolist() for view in views] == [[7, -1], [4_999_999]]
