"""Completion of keys, held against a loop over all of them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_service.completion import Completion

LETTERS = st.text("aAbß.é", max_size=5)


def slowly(keys: list[Any], typed: str, limit: int) -> list[int]:
    texts, wanted = [str(key).lower() for key in keys], typed.lower()
    begin = [row for row, text in enumerate(texts) if text.startswith(wanted)]
    inside = [row for row, text in enumerate(texts) if wanted in text and row not in begin] if len(wanted) >= 3 else []
    return [*begin, *inside][:limit]


@given(st.lists(LETTERS, min_size=1, max_size=40, unique=True), LETTERS, st.integers(1, 5))
def test_is_what_a_loop_finds(keys: list[str], typed: str, limit: int) -> None:
    assert list(Completion(pa.array(keys, pa.large_string())).rows(typed, limit)) == slowly(keys, typed, limit)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30, unique=True), st.integers(-20, 20))
def test_integers_by_their_digits(keys: list[int], typed: int) -> None:
    assert list(Completion(pa.array(keys)).rows(str(typed), 5)) == slowly(keys, str(typed), 5)


@pytest.mark.parametrize("typed", ["\U0010ffff", "\0", "a" * 200])
def test_odd_text_finds_nothing(typed: str) -> None:
    assert Completion(pa.array(["a", "b"], pa.large_string())).rows(typed, 3) == ()
