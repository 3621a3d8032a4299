"""Adding up what workers and threads have learned side by side, without overshooting.

All begin a block with the same rows, take their own steps, and the differences are added. Where a row moves little in a
block, the sum is what one worker would have done with all their data. A frequent row has arrived in each of them: the
sum would carry it k times as far, and from about eight workers on training diverges, while the mean starves the rest.
"""

from __future__ import annotations

import numpy as np

_NEGLIGIBLE = 0.05  # (k - 1) * t * h below this: the factor is above .975


def temper(difference: np.ndarray, exposure: np.ndarray, moment: np.ndarray, num_parts: int) -> None:
    """Shrink one part's `difference` in place such that the sum over `num_parts` parts is one of them k times as long.

    A row under logistic loss against partners p descends on a Hessian H of at most E[p p'] / 4 (Böhning 1992). Steps of
    summed rate t carry it by D = (1 - exp(-t H)) (optimum - start), k times as many by (1 - exp(-k t H)) of the same.
    So each of k parts contributes f(t H) D with

        f(a) = (1 - exp(-k a)) / (k (1 - exp(-a)))

    in the directions of H's eigenvectors: 1 where little was learned, 1 / k where the optimum was reached. What rows
    have in common is learned fast and what tells them apart is not, so a factor for the row as a whole would not do.

    difference: float32 [n, dim]; exposure: float [n], the summed rate t of each row's steps; moment: float [dim, dim],
    E[p p'] over those steps. Needs nothing from other parts, whose data are taken to be as its own.
    """
    if num_parts == 1:
        return
    values, vectors = np.linalg.eigh(moment.astype(np.float64) / 4)
    values = values.clip(0.0)
    fast = np.flatnonzero(exposure * values[-1] * (num_parts - 1) > _NEGLIGIBLE)
    basis = vectors.astype(np.float32)
    turned = difference[fast] @ basis
    turned *= sum_factor(np.multiply.outer(exposure[fast], values), num_parts)
    difference[fast] = turned @ basis.T


def sum_factor(exposure: np.ndarray, num_parts: int) -> np.ndarray:
    """f(a) of `temper` for a = `exposure` >= 0, elementwise: float32."""
    small = np.maximum(exposure, 1e-6)
    factor: np.ndarray = np.expm1(-num_parts * small) / (num_parts * np.expm1(-small))
    return factor.astype(np.float32)
