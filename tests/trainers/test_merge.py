from __future__ import annotations

import numpy as np
import pytest

from trainers.merge import principal_axes, sum_factor, temper

DIM = 6


def quadratic(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(moment [DIM, DIM] with widely spread eigenvalues, the way from the start to the optimum [3, DIM])."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.normal(size=(DIM, DIM)))[0]
    return (turn * [8.0, 2.0, 0.5, 0.1, 0.01, 0.0]) @ turn.T, random.normal(size=(3, DIM))


def descended(moment: np.ndarray, way: np.ndarray, exposure: np.ndarray) -> np.ndarray:
    """How far gradient flow of summed rate `exposure` gets on the quadratic with Hessian moment / 4."""
    values, vectors = np.linalg.eigh(moment / 4)
    return ((way @ vectors) * -np.expm1(-np.multiply.outer(exposure, values))) @ vectors.T


@pytest.mark.parametrize("num_parts", [1, 2, 8, 32])
def test_the_sum_of_the_parts_is_one_part_as_much_longer(num_parts: int) -> None:
    moment, way = quadratic()
    exposure = np.array([0.3, 4.0, 500.0])
    part = descended(moment, way, exposure).astype(np.float32)
    temper(part, exposure, principal_axes(moment), num_parts)
    np.testing.assert_allclose(num_parts * part, descended(moment, way, num_parts * exposure), atol=0.05)


def test_a_row_that_has_hardly_moved_is_added_as_it_is() -> None:
    moment, way = quadratic()
    part = way.astype(np.float32)
    temper(part, np.full(3, 1e-4), principal_axes(moment), 32)
    assert np.array_equal(part, way.astype(np.float32))


def test_between_the_sum_and_the_mean() -> None:
    exposure = [1e-9, 0.1, 1.0, 10.0, 1e9]
    for num_parts in (2, 8, 32):
        factor = [sum_factor(one, num_parts) for one in exposure]
        assert factor[0] == pytest.approx(1.0, rel=1e-3)
        assert factor[-1] == pytest.approx(1.0 / num_parts)
        assert (np.diff(factor) <= 1e-6).all()
