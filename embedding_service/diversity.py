"""Diverse lists: maximal marginal relevance over what was found."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedding_service.exact import Float32, unit_length


def mmr(scores: Float32, vectors: Float32, k: int, diversity: float) -> npt.NDArray[np.int64]:
    """Which k of m candidates to show, in that order: int64 [min(k, m)], the highest score first.

    Each next one is argmax (1 - diversity) relevance - diversity max cosine with those chosen before (Carbonell and
    Goldstein 1998, SIGIR, section 2), relevance being the score scaled to 0..1 over the candidates. Equal ones go by
    their place. scores [m], descending; vectors [m, dim]; diversity 0 leaves the order as it is.
    """
    span = float(scores.max() - scores.min()) if len(scores) else 0.0
    relevance = (scores.astype(np.float64) - scores.min(initial=np.inf)) / (span or 1.0)
    unit = unit_length(vectors).astype(np.float64)
    closest = np.full(len(scores), -np.inf)
    chosen: list[int] = []
    for _ in range(min(k, len(scores))):
        penalty = diversity * closest if chosen else 0.0
        value = (1 - diversity) * relevance - penalty
        value[chosen] = -np.inf
        chosen.append(int(np.argmax(value)))
        closest = np.maximum(closest, unit @ unit[chosen[-1]])
    return np.array(chosen, np.int64)
