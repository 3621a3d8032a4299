"""fp32 <-> fp16 and int8: how stored vectors lose bits, and at most how many.

With x a finite float32 component, x' its decoded stored form and m the largest |component| of its row:

    fp32  x' = x
    fp16  IEEE half, to nearest          |x - x'| <= max(|x| * 2^-11, 2^-25)      needs |x| <= 65504
    int8  x' = s * rint(x / s)           |x - x'| <= m / 254 * (1 + 2^-16) + 2^-120
          with s = m / 127 (float32, one per row: symmetric, no zero point)       needs |x| <= 2^127

`error_bound` computes these bounds; the tests hold `decode(encode(x))` against it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
DTYPES: dict[Precision, np.dtype] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("i1")}
LIMITS: dict[Precision, float] = {"fp32": float("inf"), "fp16": 65504.0, "int8": 2.0**127}

Float32 = npt.NDArray[np.float32]


def encode(vectors: np.ndarray, precision: Precision) -> tuple[np.ndarray, Float32 | None]:
    """The stored form of `vectors`.

    vectors: float [n, d]. Returns the codes [n, d] of dtype `DTYPES[precision]` and, for int8, the rows' scales
    float32 [n] (else None). Raises ValueError naming the first row that holds nan, an infinity or a value beyond the
    precision's range.
    """
    values = _checked(vectors, precision)
    if precision != "int8":
        return values.astype(DTYPES[precision]), None
    largest = np.abs(values).max(axis=1, initial=0.0)
    scale = (largest / np.float32(127.0)).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1.0))[:, None]  # a zero row has scale 0 and codes 0
    return np.clip(np.rint(values / divisor), -127, 127).astype(np.int8), scale


def decode(codes: np.ndarray, scale: np.ndarray | None = None) -> Float32:
    """The float32 [n, d] vectors of stored codes; `scale` float32 [n] belongs to int8 codes and to no others."""
    if (codes.dtype == np.int8) != (scale is not None):
        raise ValueError("int8 codes come with one scale per row, other precisions without")
    values = codes.astype(np.float32)
    if scale is not None:
        values *= scale[:, None]
    return values


def error_bound(vectors: np.ndarray, precision: Precision) -> np.ndarray:
    """The largest possible |x - decode(encode(x))| of each component: float64 [n, d] (the formulas above)."""
    size = np.abs(vectors.astype(np.float64))
    if precision == "fp32":
        return np.zeros_like(size)
    if precision == "fp16":
        return np.maximum(size * 2.0**-11, 2.0**-25)
    bound = size.max(axis=1, initial=0.0, keepdims=True) / 254 * (1 + 2.0**-16) + 2.0**-120
    return np.broadcast_to(bound, size.shape)


def _checked(vectors: np.ndarray, precision: Precision) -> Float32:
    """`vectors` as float32 [n, d] that fit `precision`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(f"vectors must be float [n, d]; got {vectors.dtype} {list(vectors.shape)}")
    values = np.ascontiguousarray(vectors, dtype=np.float32)
    fits = (np.isfinite(values) & (np.abs(values) <= LIMITS[precision])).all(axis=1)
    if not fits.all():
        row = int(np.argmin(fits))
        if np.isfinite(values[row]).all():
            raise ValueError(f"row {row} holds a value beyond {LIMITS[precision]:g}, the range of {precision}")
        raise ValueError(f"row {row} holds nan or an infinity: the model has diverged (lower its learning rate)")
    return values
