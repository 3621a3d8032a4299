"""Scores of word vectors against scipy and the formula written out, on vectors whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from cluster.errors import DataError
from trainers.words import analogy_accuracy, read_analogies, read_pairs, score_words, spearman

WORDS = ["king", "queen", "man", "woman", "Paris", "paris"]
VECTORS = np.array([[3, 0, 1], [3, 1, 1], [0, 0, 2], [0, 2, 2], [-1, -1, 0], [9, 9, 9]], np.float32)


def write(folder: Path, text: str, name: str = "asked.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("levels", [4, 10**9], ids=["many ties", "no ties"])
def test_spearman_is_scipys(levels: int) -> None:
    random = np.random.default_rng(0)
    for size in (2, 3, 50):
        left, right = random.integers(0, levels, (2, size)).astype(float)
        left[:2], right[:2] = (0, 1), (1, 0)  # neither is constant
        assert spearman(left, right) == pytest.approx(spearmanr(left, right).statistic, abs=1e-12)


@pytest.mark.parametrize(("left", "right"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_spearman_of_what_has_no_ranks_is_nan(left: list[float], right: list[float]) -> None:
    assert np.isnan(spearman(np.array(left), np.array(right)))


def test_analogies_are_the_formula() -> None:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(40, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    questions = np.array([random.permutation(40)[:4] for _ in range(1300)])  # more than two batches
    for top in (40, 100):
        right = 0
        for a, b, c, d in questions:
            others = [row for row in range(40) if row not in (a, b, c)]
            right += d == max(others, key=lambda row: float(vectors[row] @ (vectors[b] - vectors[a] + vectors[c])))
        assert 0 < right < 1300
        assert analogy_accuracy(vectors, questions, top=top) == right / 1300
    low = questions[(questions < 20).all(axis=1)]
    assert analogy_accuracy(vectors, low, top=20) == analogy_accuracy(vectors[:20], low, top=20)
    assert np.isnan(analogy_accuracy(vectors, questions[:0], top=40))


def test_pairs_are_scored_with_their_coverage(tmp_path: Path) -> None:
    listed = [("king", "queen", 9.0), ("MAN", "woman", 7.5), ("king", "paris", 0.5), ("queen", "woman", 7.5)]
    text = "# judged by people\n\n" + "".join(f"{a}\t{b} {score}\n" for a, b, score in listed) + "king unheard 3\n"
    rows = {"king": 0, "queen": 1, "man": 2, "woman": 3, "paris": 4}  # of Paris and paris the more frequent one
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    cosines = [unit[rows[a.lower()]] @ unit[rows[b]] for a, b, _ in listed]
    file = write(tmp_path, text)
    (row,) = score_words(WORDS, VECTORS, pairs=[file], analogies=[])
    expected = spearmanr(cosines, [score for *_, score in listed]).statistic
    assert row == {"what": file, "score": pytest.approx(expected), "used": 4, "given": 5}


def test_analogies_are_scored_by_section(tmp_path: Path) -> None:
    text = "# note\n: royal\nman woman KING queen\nman woman king unheard\n: cities\nparis berlin rome oslo\n"
    report = score_words(WORDS, VECTORS, pairs=[], analogies=[write(tmp_path, text)])
    assert report == [
        {"what": "royal", "score": 1.0, "used": 1, "given": 2},
        {"what": "cities", "score": None, "used": 0, "given": 1},
    ]
    of_the_first = score_words(WORDS, VECTORS, pairs=[], analogies=[write(tmp_path, text)], top=3)
    assert of_the_first[0] == {"what": "royal", "score": None, "used": 0, "given": 2}  # woman is the fourth


def test_nothing_known_is_no_score(tmp_path: Path) -> None:
    file = write(tmp_path, "a b 1\nc d 2\n")
    (row,) = score_words(WORDS, VECTORS, pairs=[file], analogies=[])
    assert row == {"what": file, "score": None, "used": 0, "given": 2}


@pytest.mark.parametrize(
    "line", ["king queen", "king", "king,queen,3", "king queen high", "king queen nan", "king queen inf"]
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, f"man woman 3\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_pairs(file)
    assert str(caught.value) == f"{file}: line 3 is not `word word score`: {line!r}"


@pytest.mark.parametrize("line", ["king queen man", "king queen man woman boy", "king"])
def test_a_line_that_is_no_analogy_is_named(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, f": royal\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_analogies(file)
    assert str(caught.value) == f"{file}: line 2 is neither `: section` nor four words: {line!r}"


def test_files_that_say_nothing(tmp_path: Path) -> None:
    for text in ("", "# a note\n\n"):
        with pytest.raises(DataError, match=r"asked\.txt: holds no word pairs"):
            read_pairs(write(tmp_path, text))
    with pytest.raises(DataError, match=r"asked\.txt: holds no analogies"):
        read_analogies(write(tmp_path, ": a section without questions\n"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café bar 3\n".encode("latin-1"))
    for name in ("latin.txt", "missing.txt"):
        for read in (read_pairs, read_analogies):
            with pytest.raises(DataError, match=rf"{name}: cannot be read as text"):
                read(str(tmp_path / name))


def test_a_mark_of_the_byte_order_is_no_letter(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_text("king queen 3\n", encoding="utf-8-sig")
    assert read_pairs(str(tmp_path / "marked.txt"))[0] == [["king", "queen"]]
