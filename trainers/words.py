"""Intrinsic quality of word vectors: similarity judged by people, and analogies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.config import config_from_dict, config_to_dict, load_config
from cluster.errors import CheckpointError, DataError
from cluster.launch import launch
from cluster.rank import current_rank
from embedding_service.artifact import Artifact
from embedding_service.exact import unit_length
from embedding_service.keys import Vocabulary
from trainers.evaluate import load_trained
from trainers.prepare import load_prepared

_BATCH = 512


def evaluate_words(
    path: str, *, pairs: Sequence[str] = (), analogies: Sequence[str] = (), which: str = "best", top: int = 30_000
) -> list[dict[str, Any]]:
    """The report of `lexshard evaluate --word-pairs --analogies`: of a run's checkpoint, or of an artifact.

    pairs: files of `word word score` lines; analogies: files of `: section` and `a b c d` lines (Mikolov et al. 2013),
    whatever their case; which: `best` or `last` checkpoint; top: see `analogy_accuracy`. Returns a row {"what",
    "score", "used", "given"} for every file of pairs (Spearman) and every section of analogies (accuracy), whose `used`
    lines of the `given` ones have known words only; a score that cannot be told from these is None. Raises
    LexshardError.
    """
    folder = Path(path)
    questions: dict[str, Any] = {"pairs": list(pairs), "analogies": list(analogies), "top": top}
    if (folder / "config.toml").exists():
        config = load_config(folder / "config.toml", [f"run={folder}"])
        settings = {"config": config_to_dict(config), "which": which, **questions}
        report: list[dict[str, Any]] = launch(
            _evaluate_checkpoint, settings, workers=1, engine="inline", storage=str(folder)
        )
        return report
    if not folder.exists():
        raise CheckpointError(f"{path}: there is no such run or artifact")
    artifact = Artifact.open(folder)
    name = "input" if "input" in artifact.manifest["vectors"] else "item"
    words = _words(artifact.keys(artifact.manifest["vectors"][name]["keys"]), path)
    return score_words(words, artifact.vectors(name).take(np.arange(len(words))), **questions)


def _evaluate_checkpoint(settings: dict[str, Any]) -> list[dict[str, Any]]:
    config = config_from_dict(settings.pop("config"))
    prepared, place = load_prepared(config.run), current_rank(config.cluster.device)
    model, _ = load_trained(config, prepared, place, which=settings.pop("which"))
    words = _words(prepared.keys["item"], config.run)
    return score_words(words, model.vectors(model.similar_set, 0, len(words)).cpu().numpy(), **settings)


def _words(vocabulary: Vocabulary, path: str) -> list[str]:
    if vocabulary.keys.type != pa.large_string():
        raise DataError(
            f"its items are {vocabulary.keys.type} keys, not words; leave out the pairs and analogies", file=path
        )
    words: list[str] = vocabulary.keys.to_pylist()
    return words


def score_words(
    words: Sequence[str], vectors: np.ndarray, *, pairs: Sequence[str], analogies: Sequence[str], top: int = 30_000
) -> list[dict[str, Any]]:
    """The report of `evaluate_words` for vectors float32 [n, dim] of n words, most frequent first."""
    rows = {word.lower(): row for row, word in reversed(list(enumerate(words)))}
    vectors = unit_length(vectors)
    report: list[dict[str, Any]] = []
    for file in pairs:
        listed, scores = read_pairs(file)
        found = np.array([[rows.get(word, -1) for word in pair] for pair in listed])
        known = (found >= 0).all(axis=1)
        left, right = vectors[found[known].T]
        value = spearman((left * right).sum(axis=1), scores[known])
        report.append(_report(file, value, int(known.sum()), len(listed)))
    for file in analogies:
        for section, questions in read_analogies(file).items():
            found = np.array([[rows.get(word, len(vectors)) for word in one] for one in questions])
            known = (found < min(top, len(vectors))).all(axis=1)
            value = analogy_accuracy(vectors, found[known], top=top)
            report.append(_report(section, value, int(known.sum()), len(questions)))
    return report


def _report(what: str, score: float, used: int, given: int) -> dict[str, Any]:
    return {"what": what, "score": None if np.isnan(score) else score, "used": used, "given": given}


def read_pairs(file: str) -> tuple[list[list[str]], np.ndarray]:
    """(the pairs' words in lower case, their scores float64 [n]); lines that begin with # are left out.

    Columns after the third are not read. Raises DataError for a line that does not begin with two words and a number.
    """
    words, scores = [], []
    for number, line in _lines(file):
        parts = line.lower().split()
        try:
            score = float(parts[2])
        except (IndexError, ValueError):
            score = float("nan")
        if not np.isfinite(score):
            raise DataError(f"line {number} is not `word word score`: {line!r}", file=file)
        words.append(parts[:2])
        scores.append(score)
    if not words:
        raise DataError("holds no word pairs", file=file)
    return words, np.array(scores)


def read_analogies(file: str) -> dict[str, list[list[str]]]:
    """Section -> its questions, four words each in lower case. Raises DataError for a line of another form."""
    sections: dict[str, list[list[str]]] = {}
    section = "analogies"
    for number, line in _lines(file):
        if line.startswith(":"):
            section = line[1:].strip()
            continue
        parts = line.lower().split()
        if len(parts) != 4:
            raise DataError(f"line {number} is neither `: section` nor four words: {line!r}", file=file)
        sections.setdefault(section, []).append(parts)
    if not sections:
        raise DataError("holds no analogies", file=file)
    return sections


def analogy_accuracy(vectors: np.ndarray, questions: np.ndarray, *, top: int) -> float:
    """Share of questions a : b = c : d whose d is nearest to b - a + c (3CosAdd, Mikolov et al. 2013); nan without any.

    vectors: float32 [n, dim] of unit length, most frequent word first; questions: int64 [q, 4], rows below `top`, the
    number of words among which d is searched. a, b and c themselves are no answers.
    """
    if not len(questions):
        return float("nan")
    candidates = vectors[:top]
    right = 0
    for start in range(0, len(questions), _BATCH):
        a, b, c, d = questions[start : start + _BATCH].T
        scores = (vectors[b] - vectors[a] + vectors[c]) @ candidates.T
        for given in (a, b, c):
            scores[np.arange(len(given)), given] = -np.inf
        right += int((scores.argmax(axis=1) == d).sum())
    return right / len(questions)


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's rank correlation of two samples [n], ties at their mean rank; nan if n < 2 or one is constant."""
    first, second = (_ranks(values) - (len(values) + 1) / 2 for values in (left, right))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 [n]."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return ranks


def _lines(file: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that say something."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as text: {error}", file=file) from None
    numbered = enumerate(text.splitlines(), start=1)
    return [(number, line) for number, line in numbered if line.strip() and not line.startswith("#")]
