"""fp32, fp16 and int8: the stated error bounds hold, and what cannot be stored is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from embedding_service.quantize import DTYPES, LIMITS, PRECISIONS, Precision, decode, encode, error_bound


def _vectors(limit: float) -> st.SearchStrategy[np.ndarray]:
    bound = min(limit, float(np.finfo(np.float32).max))
    values = st.floats(-bound, bound, width=32, allow_subnormal=True)
    return arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=values)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(data=st.data())
def test_error_stays_within_the_stated_bound(precision: Precision, data: st.DataObject) -> None:
    vectors = data.draw(_vectors(LIMITS[precision]))
    codes, scale = encode(vectors, precision)
    decoded = decode(codes, scale)
    assert codes.dtype == DTYPES[precision]
    assert decoded.dtype == np.float32
    error = np.abs(vectors.astype(np.float64) - decoded)
    assert (error <= error_bound(vectors, precision)).all()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_bound_is_not_slack(precision: Precision) -> None:
    """The bound is nearly reached: a bound ten times too wide would promise nothing."""
    vectors = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    error = np.abs(vectors.astype(np.float64) - decode(*encode(vectors, precision)))
    assert (error / error_bound(vectors, precision)).max() > 0.95


def test_fp32_is_lossless_and_int8_uses_its_range() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    np.testing.assert_array_equal(decode(*encode(vectors, "fp32")), vectors)
    codes, scale = encode(vectors, "int8")
    assert scale is not None
    assert (np.abs(codes.astype(int)).max(axis=1) == 127).all()
    np.testing.assert_allclose(scale, np.abs(vectors).max(axis=1) / 127, rtol=1e-6)


def test_zero_rows_and_empty_sets_survive() -> None:
    for precision in PRECISIONS:
        np.testing.assert_array_equal(decode(*encode(np.zeros((2, 3), np.float32), precision)), np.zeros((2, 3)))
        assert decode(*encode(np.zeros((0, 3), np.float32), precision)).shape == (0, 3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_row(precision: Precision, value: float) -> None:
    vectors = np.ones((4, 3), np.float32)
    vectors[2, 1] = value
    with pytest.raises(ValueError, match="row 2 holds nan or an infinity"):
        encode(vectors, precision)


def test_values_beyond_the_range_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 holds a value beyond 65504, the range of fp16"):
        encode(np.array([[1.0], [65520.0]], np.float32), "fp16")


def test_wrong_shapes_types_and_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be float \[n, d\]"):
        encode(np.zeros((2, 2), np.int64), "fp32")
    with pytest.raises(ValueError, match=r"must be float \[n, d\]"):
        encode(np.zeros(2, np.float32), "fp32")
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, int8; got 'int4'"):
        encode(np.zeros((2, 2), np.float32), "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one scale per row"):
        decode(np.zeros((2, 2), np.int8))
    with pytest.raises(ValueError, match="one scale per row"):
        decode(np.zeros((2, 2), np.float16), np.ones(2, np.float32))
