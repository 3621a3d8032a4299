"""Rows of a table in memory, read and updated in one pass each: compiled loops that ask for rows before they need them.

In a table far larger than the CPU's caches a row is a wait for memory. The loops name the row that is `_AHEAD` rows on
to the CPU, so many are on their way at once; and they read and write float16 as it lies, without a copy as float32.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _typed_intrinsic
from torch import Tensor

_EPSILON = np.float32(1e-8)
_AHEAD = 16

_intrinsic: Any = _typed_intrinsic  # its types know nothing of the typing context that numba passes
_Code = tuple[Any, Callable[..., Any]]  # what numba wants of an intrinsic: its signature, and what emits its code


def take_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """weights[rows]: [m, dim] in the precision of weights, float32 or float16 [n, dim]; rows: int64 [m], in range."""
    out = torch.empty(len(rows), weights.shape[1], dtype=weights.dtype)
    _take_rows(_plain(weights), rows.numpy(), _plain(out))
    return out


def update_rows(
    weights: Tensor, state: Tensor, rows: Tensor, order: Tensor, gradient: Tensor, learning_rate: float
) -> None:
    """One step of the optimiser, whose kind the width of the state says: see `Shard` and `Shard.update`.

    weights: float32 or float16 [n, dim]; state: float32 [n, 0], [n, 1] or [n, dim]; rows, order: int64 [m]; gradient:
    float32 [m, dim], in which gradients of equal rows are added up.
    """
    if weights.dtype == torch.float16 and not _CONVERTS_HALF:
        distinct, index = torch.unique(rows, return_inverse=True)
        copies, states = weights.index_select(0, distinct).float(), state.index_select(0, distinct)
        update_rows(copies, states, index, order, gradient, learning_rate)
        weights.index_copy_(0, distinct, copies.to(weights.dtype))
        state.index_copy_(0, distinct, states)
        return
    _update_rows(
        _plain(weights), state.numpy(), rows.numpy(), order.numpy(), gradient.numpy(), np.float32(learning_rate)
    )


def _converts_half() -> bool:
    """Whether the CPU that numba compiles for has instructions between float16 and float32: else its code would call
    a function that is nowhere.
    """
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return platform.machine() not in ("x86_64", "AMD64") or "+f16c" in features


_CONVERTS_HALF = _converts_half()


def _plain(weights: Tensor) -> np.ndarray:
    """As numba takes it: float32, or the bits of float16, which it does not have."""
    if weights.dtype == torch.float32:
        return weights.numpy()
    assert weights.dtype == torch.float16
    return weights.view(torch.int16).numpy().view(np.uint16)


@_intrinsic  # type: ignore[untyped-decorator]
def _number(context: Any, stored: Any) -> _Code:
    """float32 of a stored weight."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if stored == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(stored), code


@_intrinsic  # type: ignore[untyped-decorator]
def _stored(context: Any, number: Any, like: Any) -> _Code:
    """A float32 in the form of the stored weight `like`, rounded to the nearest, half to even."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if like == types.float32:
            return arguments[0]
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return like(types.float32, like), code


@_intrinsic  # type: ignore[untyped-decorator]
def prefetch(context: Any, array: Any, place: Any) -> _Code:
    """Have the CPU fetch the memory where array[place] begins, in compiled code; the program does not wait.

    Who changes it clears numba's cache of `skipgram` too, which has it compiled in.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = context.make_array(array)(context, builder, arguments[0])
        stride = builder.extract_value(found.strides, 0)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.gep(builder.bitcast(found.data, byte), [builder.mul(arguments[1], stride)])
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        name = "llvm.prefetch.p0i8"
        fetch = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(fetch, [address, word(0), word(3), word(1)])  # to be read, kept in all caches, of data
        return context.get_dummy_value()

    return types.void(array, types.int64), code


@numba.njit(
    [f"void({weight}[:, ::1], int64[::1], {weight}[:, ::1])" for weight in ("float32", "uint16")],
    nogil=True,
    cache=True,
)
def _take_rows(weights: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    for i in range(rows.size):
        if i + _AHEAD < rows.size:
            prefetch(weights, rows[i + _AHEAD])
        row = np.uint64(rows[i])  # unsigned: numba need not ask whether an index counts from the end
        for d in range(weights.shape[1]):
            out[i, d] = weights[row, d]


@numba.njit(
    [
        f"void({weight}[:, ::1], float32[:, ::1], int64[::1], int64[::1], float32[:, ::1], float32)"
        for weight in ("float32", "uint16")
    ],
    nogil=True,
    cache=True,
    fastmath={"reassoc", "contract", "nsz"},  # sums in vector registers; infinities and NaN stay what they are
)
def _update_rows(
    weights: np.ndarray,
    state: np.ndarray,
    rows: np.ndarray,
    order: np.ndarray,
    gradient: np.ndarray,
    learning_rate: np.float32,
) -> None:
    dim = weights.shape[1]
    i = 0
    while i < order.size:
        if i + _AHEAD < order.size:
            coming = rows[np.uint64(order[i + _AHEAD])]
            prefetch(weights, coming)
            if state.shape[1] > 0:
                prefetch(state, coming)
        place = np.uint64(order[i])
        row = np.uint64(rows[place])
        i += 1
        while i < order.size and rows[order[i]] == rows[place]:
            other = np.uint64(order[i])
            for d in range(dim):
                gradient[place, d] += gradient[other, d]
            i += 1
        if state.shape[1] == 0:
            for d in range(dim):
                weight = weights[row, d]
                weights[row, d] = _stored(_number(weight) - learning_rate * gradient[place, d], weight)
        elif state.shape[1] == 1:
            square = np.float32(0.0)
            for d in range(dim):
                square += gradient[place, d] * gradient[place, d]
            state[row, 0] += square / np.float32(dim)
            step = learning_rate / (np.sqrt(state[row, 0]) + _EPSILON)
            for d in range(dim):
                weight = weights[row, d]
                weights[row, d] = _stored(_number(weight) - step * gradient[place, d], weight)
        else:
            for d in range(dim):
                state[row, d] += gradient[place, d] * gradient[place, d]
                step = learning_rate * gradient[place, d] / (np.sqrt(state[row, d]) + _EPSILON)
                weight = weights[row, d]
                weights[row, d] = _stored(_number(weight) - step, weight)
