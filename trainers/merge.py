"""Adding up what workers and threads have learned side by side, without overshooting.

All begin a block with the same rows, take their own steps, and the differences are added. Where a row moves little in a
block, the sum is what one worker would have done with all their data. A frequent row has arrived in each of them: the
sum would carry it k times as far, and from about eight workers on training diverges, while the mean starves the rest.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

_NEGLIGIBLE = 0.05  # (k - 1) * a below this: the factor is above .975


def principal_axes(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of H = `moment` / 4 [dim, dim]: float32 [dim] descending, [dim, dim] a row each."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(moment).double() / 4)  # torch's threads are the worker's own
    descending = values.flip(0).clamp(min=0.0).float().numpy()
    return descending, np.ascontiguousarray(vectors.flip(1).T.float().numpy())


def temper(difference: np.ndarray, exposure: np.ndarray, axes: tuple[np.ndarray, np.ndarray], num_parts: int) -> None:
    """Shrink one part's `difference` in place such that the sum over `num_parts` parts is one of them k times as long.

    A row under logistic loss against partners p descends on a Hessian H of at most E[p p'] / 4 (Böhning 1992). Steps of
    summed rate t carry it by D = (1 - exp(-t H)) (optimum - start), k times as many by (1 - exp(-k t H)) of the same.
    So each of k parts contributes f(t H) D with

        f(a) = (1 - exp(-k a)) / (k (1 - exp(-a)))

    in the directions of H's eigenvectors: 1 where little was learned, 1 / k where the optimum was reached. What rows
    have in common is learned fast and what tells them apart is not, so a factor for the row as a whole would not do.

    difference: float32 [n, dim], or wider rows, whose rest stays; exposure: float64 [n], the summed rate t of each
    row's steps; axes: H's, of an even dimension, see `principal_axes`. Needs nothing from other parts, whose data are
    taken to be as its own.
    """
    assert len(axes[0]) % 2 == 0
    if num_parts > 1:
        _temper(difference, exposure, *axes, num_parts)


@numba.njit("float64(float64, int64)", nogil=True, cache=True)
def sum_factor(exposure: float, num_parts: int) -> float:
    """f(a) of `temper` for a = `exposure`, of 1e-9 at least: below it the quotient has too few digits."""
    left = np.exp(-exposure)
    return float((1.0 - left**num_parts) / (num_parts * (1.0 - left)))


@numba.njit(
    "void(float32[:, ::1], float64[::1], float32[::1], float32[:, ::1], int64)", nogil=True, fastmath=True, cache=True
)
def _temper(difference, exposure, values, vectors, num_parts):  # type: ignore[no-untyped-def]
    dim = values.size
    change = np.empty(dim, np.float32)
    for i in range(difference.shape[0]):
        row = difference[i]
        if exposure[i] * values[0] * (num_parts - 1) <= _NEGLIGIBLE:
            continue  # most rows of a block are rare, and this one need not even be read
        for d in range(dim):
            change[d] = np.float32(0.0)
        for j in range(0, dim - 1, 2):  # two axes in one pass over the row
            learned = exposure[i] * values[j]
            if learned * (num_parts - 1) <= _NEGLIGIBLE:
                break
            axis, other = vectors[j], vectors[j + 1]
            along = across = np.float32(0.0)
            for d in range(dim):
                along += row[d] * axis[d]
                across += row[d] * other[d]
            along *= np.float32(sum_factor(learned, num_parts) - 1.0)
            learned = exposure[i] * values[j + 1]
            across *= np.float32(
                sum_factor(learned, num_parts) - 1.0 if learned * (num_parts - 1) > _NEGLIGIBLE else 0.0
            )
            for d in range(dim):
                change[d] += along * axis[d] + across * other[d]
        for d in range(dim):
            row[d] += change[d]
