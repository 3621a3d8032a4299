from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ArtifactError
from embedding_service.ragged import Ragged
from embedding_service.towers import Tower, TowerInput, TowerSpec, input_rows, pool, recency_weights

HISTORY = Ragged.from_lists([[4, 5, 6, 7], [], [9], [1, 1]])


@settings(deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    decay=st.sampled_from([0.0, 0.3, 0.8, 1.0]) | st.floats(0.0, 1.0),
)
def test_recency_weights_are_the_decay_per_step_into_the_past(lengths: list[int], decay: float) -> None:
    weights = recency_weights(np.cumsum([0, *lengths]), decay)
    wanted: list[float] = []
    for length in lengths:
        powers = [decay**age for age in range(length - 1, -1, -1)]  # 0 ** 0 is 1: only the last item counts
        wanted += [power / sum(powers) for power in powers]
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, np.array(wanted, np.float32), rtol=1e-5, atol=1e-7)


def test_recency_weights_of_a_long_history_are_finite_and_sum_to_one() -> None:
    for decay in (0.0, 0.5, 0.999, 1.0):
        weights = recency_weights(np.array([0, 100_000]), decay)
        assert weights.astype(np.float64).sum() == pytest.approx(1.0, abs=1e-3)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(lists=st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_pool_is_the_weighted_sum(lists: list[list[int]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    index = Ragged.from_lists(lists)
    rows = torch.randn(5, 3, generator=random, requires_grad=True)
    weights = torch.rand(len(index.values), generator=random)
    found = pool(rows, torch.from_numpy(index.values), torch.from_numpy(index.offsets[:-1].copy()), weights)
    outer = torch.randn(len(lists), 3, generator=random)
    wanted, gradient, w = torch.zeros(len(lists), 3), torch.zeros(5, 3), iter(weights.tolist())
    for i, one in enumerate(lists):
        for row in one:
            weight = next(w)
            wanted[i] += weight * rows.detach()[row]
            gradient[row] += weight * outer[i]
    torch.testing.assert_close(found.detach(), wanted)
    (found * outer).sum().backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None  # also where every list is empty: a rank must take part in the exchange
    torch.testing.assert_close(rows.grad, gradient)


def test_pool_of_nothing_from_nothing_has_the_right_shape() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert pool(torch.empty(0, 4), none, torch.zeros(3, dtype=torch.int64), torch.empty(0)).tolist() == [[0.0] * 4] * 3
    assert pool(torch.empty(0, 4), none, none, torch.empty(0)).shape == (0, 4)


def tower_spec(**change: Any) -> TowerSpec:
    inputs = (
        TowerInput("user", "user", "user", 4),
        TowerInput("history", "history", "input", 4, decay=0.5, length=3),
        TowerInput("last", "last_item", "input", 4),
    )
    return TowerSpec(**{"inputs": inputs, "dim": 4, **change})


def test_input_rows_of_every_source() -> None:
    found = input_rows(tower_spec(), history=HISTORY, single={"user": np.array([8, -1, 0, -1])})
    assert list(found) == ["user", "history", "last"]
    assert [one.vectors for one in found.values()] == ["user", "input", "input"]
    lists = {name: Ragged(one.rows, one.offsets).to_lists() for name, one in found.items()}
    assert lists == {
        "user": [[8], [], [0], []],
        "history": [[5, 6, 7], [], [9], [1, 1]],
        "last": [[7], [], [9], [1]],
    }
    weights = {name: one.weights.tolist() for name, one in found.items()}
    assert weights["user"] == [1.0, 1.0]
    assert weights["last"] == [1.0, 1.0, 1.0]
    assert weights["history"] == pytest.approx([1 / 7, 2 / 7, 4 / 7, 1.0, 1 / 3, 2 / 3])


def test_length_zero_sees_the_whole_history() -> None:
    spec = TowerSpec((TowerInput("history", "history", "input", 4, length=0),), 4)
    found = input_rows(spec, history=HISTORY, single={})["history"]
    assert Ragged(found.rows, found.offsets).to_lists() == HISTORY.to_lists()


def test_no_examples_are_no_rows() -> None:
    found = input_rows(tower_spec(), history=Ragged.from_lists([]), single={"user": np.empty(0, np.int64)})
    assert all(one.offsets.tolist() == [0] and not len(one.rows) for one in found.values())


def blocks(n: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(n)
    return {name: torch.randn(n, 4, generator=random) for name in ("user", "history", "last")}


def test_a_tower_without_hidden_layers_sums_its_inputs() -> None:
    tower, given = Tower(tower_spec()), blocks(5)
    assert not list(tower.parameters())
    torch.testing.assert_close(tower(given), given["user"] + given["history"] + given["last"])
    single = Tower(TowerSpec((TowerInput("user", "user", "user", 4),), 4))
    assert torch.equal(single(given), given["user"])


def test_a_tower_with_hidden_layers_is_an_mlp_of_the_concatenated_inputs() -> None:
    tower, given = Tower(tower_spec(hidden=(7, 6), dim=3)), blocks(5)
    weights = dict(tower.named_parameters())
    assert [tuple(weight.shape) for weight in weights.values()] == [(7, 12), (7,), (6, 7), (6,), (3, 6), (3,)]
    hidden = torch.cat([given["user"], given["history"], given["last"]], 1)
    layers = list(weights.values())
    for i in range(0, len(layers), 2):
        hidden = hidden @ layers[i].T + layers[i + 1]
        if i < 4:
            hidden = hidden.clamp_min(0)
    torch.testing.assert_close(tower(given), hidden)
    assert tower(blocks(0)).shape == (0, 3)


def test_normalize_gives_unit_length_and_leaves_zeros() -> None:
    tower, given = Tower(tower_spec(normalize=True)), blocks(5)
    for block in given.values():
        block[2] = 0.0
    out = tower(given)
    torch.testing.assert_close(out.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    plain = Tower(tower_spec())(given)
    torch.testing.assert_close(out * plain.norm(dim=1, keepdim=True), plain)


def test_a_spec_goes_through_json() -> None:
    import json

    spec = tower_spec(hidden=(8,), normalize=True)
    assert TowerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("damage", [{"inputs": None}, {"hidden": 3}, {"other": 1}, {"inputs": [{"name": "x"}]}])
def test_a_spec_that_nobody_wrote_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="not a tower description"):
        TowerSpec.from_dict({**tower_spec().to_dict(), **damage})


def test_a_spec_without_a_field_is_refused() -> None:
    with pytest.raises(ArtifactError, match="not a tower description"):
        TowerSpec.from_dict({"dim": 4})


def test_towers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one input"):
        Tower(TowerSpec((), 4))
    with pytest.raises(ValueError, match="every input must have width 8"):
        Tower(tower_spec(dim=8))
