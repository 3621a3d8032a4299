"""Rows read and updated by the compiled loops are those of plain torch, in float32 and float16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embedding_service import row_kernels
from embedding_service.row_kernels import take_rows, update_rows

ROWS, DIM, RATE = 1000, 12, 0.1
PRECISIONS = [torch.float32, torch.float16]


def table(dtype: torch.dtype) -> Tensor:
    """Rows of all sizes: too small for float16, subnormal in it, too large for it, infinite and NaN."""
    sizes = torch.logspace(-9, 6, ROWS)[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    weights = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1)) * sizes[:, None]
    weights[0], weights[1] = float("inf"), float("nan")
    return weights.to(dtype)


def asked(num: int) -> Tensor:
    """Rows with repeats, the first and the last of the table among them."""
    rows = torch.randint(0, ROWS, (num,), generator=torch.Generator().manual_seed(2))
    return torch.cat([rows, torch.tensor([ROWS - 1, 0, 1])]) if num else rows


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("num", [0, 1, 700])
def test_rows_are_taken_bit_by_bit(dtype: torch.dtype, num: int) -> None:
    weights, rows = table(dtype), asked(num)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(take_rows(weights, rows).view(bits), weights[rows].view(bits))


def optimized(weights: Tensor, state: Tensor, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The update by plain torch in float64, in the table's precision."""
    summed = torch.zeros(ROWS, DIM, dtype=torch.float64).index_add_(0, rows, gradient.double())
    squares = summed.square()
    state = state.double() + (squares.mean(1, keepdim=True) if state.shape[1] == 1 else squares[:, : state.shape[1]])
    step = RATE * summed / (state.sqrt() + 1e-8) if state.shape[1] else RATE * summed
    touched = torch.zeros(ROWS, 1, dtype=torch.bool).index_fill_(0, rows, True)
    return torch.where(touched, (weights.double() - step), weights.double()).to(weights.dtype), state.float()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("width", [0, 1, DIM])
@pytest.mark.parametrize("converts_half", [True, False])
def test_an_update_is_that_of_the_formula(
    dtype: torch.dtype, width: int, converts_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_kernels, "_CONVERTS_HALF", converts_half and row_kernels._CONVERTS_HALF)
    weights, rows = table(dtype), asked(700)
    state = torch.rand(ROWS, width, generator=torch.Generator().manual_seed(3))
    gradient = torch.randn(len(rows), DIM, generator=torch.Generator().manual_seed(4))
    expected, expected_state = optimized(weights, state, rows, gradient)
    update_rows(weights, state, rows, torch.argsort(rows, stable=True), gradient, RATE)
    one_step = 2.0**-10 if dtype == torch.float16 else 1e-5  # of the last bit, where a sum is rounded otherwise
    torch.testing.assert_close(weights, expected, rtol=one_step, atol=2.0**-24 * 4, equal_nan=True)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-6)


def test_a_float16_weight_is_rounded_to_the_nearest_and_half_to_even() -> None:
    weights = torch.ones(4, 4, dtype=torch.float16)
    last_bit = 2.0**-10  # of float16 from 1 to 2
    gradient = -last_bit * torch.tensor([0.49, 0.5, 0.51, 1.5])[:, None].expand(4, 4).contiguous()
    rows = torch.arange(4)
    update_rows(weights, torch.empty(4, 0), rows, rows, gradient, 1.0)
    assert ((weights[:, 0].float() - 1) / last_bit).tolist() == [0.0, 0.0, 1.0, 2.0]
