from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ArtifactError
from embedding_service.ragged import Ragged
from embedding_service.towers import (
    HistoryAttention,
    HistoryGru,
    InputRows,
    Sequences,
    Tower,
    TowerInput,
    TowerSpec,
    input_rows,
    missing,
    pool,
    recency_weights,
    says,
)

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


def features_spec() -> TowerSpec:
    return TowerSpec(
        (
            TowerInput("tags", "tags", "tags", 4, encoder="mean"),
            TowerInput("all_tags", "tags", "tags", 4, encoder="sum"),
            TowerInput("age", "age", "", 4, encoder="project", width=1, center=30.0, scale=0.1),
            TowerInput("text", "text", "", 4, encoder="project", width=3, scale=2.0),
        ),
        4,
    )


def test_input_rows_of_every_kind_of_feature() -> None:
    tags = Ragged.from_lists([[4, 5, 5], [], [1]])
    text = np.array([[1, 2, -1], [np.nan] * 3, [0, 0, 1e30]], np.float32)
    given = {"tags": tags, "age": np.array([[20.0], [np.nan], [1e300]]), "text": text}
    found = input_rows(features_spec(), history=None, single=given)
    for name, weights in (("tags", [1 / 3, 1 / 3, 1 / 3, 1.0]), ("all_tags", [1.0] * 4)):
        looked_up = found[name]
        assert isinstance(looked_up, InputRows)
        assert Ragged(looked_up.rows, looked_up.offsets).to_lists() == tags.to_lists()
        assert looked_up.weights is not None
        assert looked_up.weights.tolist() == pytest.approx(weights)
    numbers = {name: found[name] for name in ("age", "text")}
    assert all(isinstance(one, np.ndarray) and one.dtype == np.float32 for one in numbers.values())
    assert numbers["age"].tolist() == [[-1.0], [0.0], [100.0]]  # type: ignore[union-attr]
    assert numbers["text"].tolist() == [[2.0, 4.0, -2.0], [0.0] * 3, [0.0, 0.0, 100.0]]  # type: ignore[union-attr]


def test_what_is_missing_says_nothing_and_is_no_rows() -> None:
    for block in features_spec().inputs:
        nothing = missing(block, 2)
        assert says(nothing).tolist() == [False, False]
        found = input_rows(TowerSpec((block,), 4), history=None, single={block.source: nothing})[block.name]
        assert not found.any() if isinstance(found, np.ndarray) else found.offsets.tolist() == [0, 0, 0]
    assert missing(TowerInput("user", "user", "user", 4), 2).tolist() == [-1, -1]  # type: ignore[union-attr]


def test_says_tells_where_something_is_known() -> None:
    assert says(np.array([0, -1, 7])).tolist() == [True, False, True]
    assert says(np.array([0, -1, 7]), 7).tolist() == [True, False, False]
    assert says(Ragged.from_lists([[7, 3], [], [7], [-1]]), 7).tolist() == [True, False, False, False]
    assert says(np.array([[np.nan], [0.0]])).tolist() == [False, True]


def test_projected_numbers_are_as_long_as_new_embeddings() -> None:
    torch.manual_seed(0)
    tower = Tower(TowerSpec((TowerInput("text", "text", "", 64, encoder="project", width=300),), 64))
    projected = tower({"text": torch.randn(500, 300)})
    embeddings = (2 * torch.rand(500, 64) - 1) * 64**-0.5  # as tables start
    ratio = projected.norm(dim=1).mean() / embeddings.norm(dim=1).mean()
    assert 0.9 < ratio < 1.1


def histories(lists: list[list[int]], dim: int = 4) -> Sequences:
    """Item i is row i of a fixed matrix."""
    rows = torch.randn(10, dim, generator=torch.Generator().manual_seed(1))
    ragged = Ragged.from_lists(lists)
    return Sequences(rows[torch.from_numpy(ragged.values)], torch.from_numpy(ragged.offsets))


LISTS = [[4, 5, 6, 7], [], [9], [1, 1], [2, 8, 3]]


def test_attention_is_its_formula() -> None:
    torch.manual_seed(0)
    attention = HistoryAttention(4, 4, 0.7)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight)
    found = attention(histories(LISTS))
    for i, one in enumerate(LISTS):
        rows = histories([one]).rows
        wanted = torch.zeros(4)
        if one:
            query = attention.query.weight @ rows[-1] + attention.query.bias
            scores = []
            for place, row in enumerate(rows):
                age = len(one) - 1 - place
                key = attention.key.weight @ (row + attention.position[age])
                scores.append(attention.bias[age] + query @ key / 2.0)
            wanted = torch.softmax(torch.stack(scores), 0) @ rows
        torch.testing.assert_close(found[i], wanted)


@pytest.mark.parametrize("decay", [0.6, 1.0])
def test_attention_begins_as_the_recency_weighted_mean(decay: float) -> None:
    found = HistoryAttention(4, 6, decay)(histories(LISTS))
    ragged = Ragged.from_lists(LISTS)
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    weights = torch.from_numpy(recency_weights(ragged.offsets, decay).copy())
    wanted = pool(rows, torch.from_numpy(ragged.values), torch.from_numpy(ragged.offsets[:-1].copy()), weights)
    torch.testing.assert_close(found, wanted)


def test_gru_is_its_formula() -> None:
    """Cho et al. 2014, with the reset gate on the projected state as cuDNN and torch have it."""
    torch.manual_seed(0)
    encoder = HistoryGru(4)
    found, gru = encoder(histories(LISTS)), encoder.gru
    for i, one in enumerate(LISTS):
        state = torch.zeros(4)
        for row in histories([one]).rows:
            x = (gru.weight_ih_l0 @ row + gru.bias_ih_l0).chunk(3)
            h = (gru.weight_hh_l0 @ state + gru.bias_hh_l0).chunk(3)
            reset, update = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
            state = (1 - update) * torch.tanh(x[2] + reset * h[2]) + update * state
        wanted = encoder.out.weight @ state if one else torch.zeros(4)
        torch.testing.assert_close(found[i], wanted)


@pytest.mark.parametrize("encoder", ["attention", "gru"])
def test_a_history_is_encoded_alike_in_any_company(encoder: Any) -> None:
    torch.manual_seed(0)
    block = TowerInput("history", "history", "input", 4, 0.5, 8, encoder)
    tower = Tower(TowerSpec((block,), 4)).double()
    whole = histories(LISTS)
    together = tower({"history": Sequences(whole.rows.double(), whole.offsets)})
    for i, one in enumerate(LISTS):
        alone = histories([one])
        torch.testing.assert_close(tower({"history": Sequences(alone.rows.double(), alone.offsets)})[0], together[i])


@pytest.mark.parametrize("encoder", ["attention", "gru"])
def test_every_row_of_a_history_gets_a_gradient(encoder: Any) -> None:
    torch.manual_seed(0)
    tower = Tower(TowerSpec((TowerInput("history", "history", "input", 4, 0.5, 8, encoder),), 4))
    rows = torch.randn(10, 4, requires_grad=True)
    ragged = Ragged.from_lists(LISTS)
    block = Sequences(rows[torch.from_numpy(ragged.values)], torch.from_numpy(ragged.offsets))
    tower({"history": block}).square().sum().backward()
    assert rows.grad is not None
    seen = rows.grad.abs().sum(1) > 0
    assert seen.nonzero().flatten().tolist() == sorted({item for one in LISTS for item in one})
    nothing = torch.empty(0, 4, requires_grad=True)  # a rank without a history takes part in the exchange
    tower({"history": Sequences(nothing, torch.zeros(3, dtype=torch.int64))}).sum().backward()
    assert nothing.grad is not None
