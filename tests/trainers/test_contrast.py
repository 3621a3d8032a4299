"""Every kind of negatives, alone and mixed, against the softmax over the catalogue; and workers that share them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cluster.errors import SettingError
from cluster.rank import process_group
from embedding_service.ragged import Ragged
from embedding_service.tables import TableSpec
from embedding_service.towers import Given
from tests.ranks import run_on_ranks
from tests.trainers.batches import pair_batch
from tests.trainers.runs import final_tensors, small_config, write_sessions
from trainers.contrast import TEMPERATURES, Contrast, ContrastSpec
from trainers.features import Feature
from trainers.loop import train
from trainers.mining import NOTHING, Mined, MiningSpec
from trainers.models import check_model
from trainers.prepare import Sessions
from trainers.two_tower import HistoryEncoder, TwoTower

ITEMS, DIM = 40, 4
MINING = MiningSpec(num=1500, every=4, skip=0, take=4, margin=2.0)


class Planted:
    """A catalogue whose items are met by Zipf's law, n queries for items drawn by it, and what all items would cost."""

    def __init__(self, n: int) -> None:
        random = torch.Generator().manual_seed(n)
        self.popularity = torch.softmax(-torch.arange(1.0, ITEMS + 1).log(), 0)
        self.items = torch.randn(ITEMS, DIM, generator=random).requires_grad_()
        self.query = torch.randn(n, DIM, generator=random).requires_grad_()
        self.drawn = torch.multinomial(self.popularity, n, replacement=True, generator=random)
        self.counts = (self.popularity * 1e6).long().numpy()

    def full_gradients(self, positive_log_q: Tensor) -> tuple[Tensor, ...]:
        logits = self.query @ self.items.T
        own = F.one_hot(self.drawn, ITEMS) * positive_log_q[:, None]
        loss = F.cross_entropy(logits - own, self.drawn, reduction="sum")
        return torch.autograd.grad(loss, (self.query, self.items))

    def windows(self) -> np.ndarray:
        """The four items that vectors of some steps ago ranked highest for each query."""
        stale = self.items + 0.3 * torch.randn(self.items.shape, generator=torch.Generator().manual_seed(5))
        return (self.query @ stale.T).topk(4).indices.reshape(-1).numpy()

    def sampled_gradients(self, spec: ContrastSpec, num_mined: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
        contrast = Contrast(self.counts, spec, dim=DIM)
        mined = NOTHING
        if num_mined:
            windows = self.windows()
            rows = windows[np.random.default_rng(3).integers(len(windows), size=num_mined)]
            mined = Mined(rows, *np.unique(windows, return_counts=True), np.empty(0, np.int64))
        sampled = contrast.sampler.draw(spec.sampled_negatives, 7) if contrast.sampler else None
        pool = contrast.pool(pair_batch(self.drawn.numpy(), sampled=sampled), mined)
        self.query.grad = self.items.grad = None
        contrast.backward(self.query, self.items[self.drawn], self.items[torch.from_numpy(pool.extra)], pool, chunk=0)
        assert self.query.grad is not None
        assert self.items.grad is not None
        return (self.query.grad, self.items.grad), contrast.log_q(pool, pool.batch.item)


def relative_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    return [float((mine - full).norm() / full.norm()) for mine, full in zip(found, wanted, strict=True)]


def assert_close_to(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Up to sampling error: some 3000 candidates estimate 40 items, of which the rarest are drawn 20 times."""
    query, items = relative_error(found, wanted)
    assert query < 0.08
    assert items < 0.12


POOLS: dict[str, tuple[int, dict[str, Any], int]] = {  # examples, settings, mined negatives
    "in-batch": (3000, {}, 0),
    "uniform": (400, {"in_batch": False, "sampled_negatives": 3000}, 0),
    "unigram": (400, {"in_batch": False, "sampled_negatives": 3000, "sampled_exponent": 0.75}, 0),
    "inverse unigram": (400, {"in_batch": False, "sampled_negatives": 3000, "sampled_exponent": -0.5}, 0),
    "in-batch and uniform": (1500, {"sampled_negatives": 1500}, 0),
    "in-batch and unigram": (1500, {"sampled_negatives": 1500, "sampled_exponent": 0.5}, 0),
    "in-batch and mined": (1500, {}, 1500),
    "uniform and mined": (400, {"in_batch": False, "sampled_negatives": 1500}, 1500),
    "all three": (1000, {"sampled_negatives": 1000}, 1000),
}


@pytest.mark.parametrize("kind", POOLS)
def test_the_gradient_is_that_of_the_full_softmax(kind: str) -> None:
    n, settings, num_mined = POOLS[kind]
    planted = Planted(n)
    spec = ContrastSpec(temperature=1.0, **settings)
    found, _ = planted.sampled_gradients(spec, num_mined)
    wanted = planted.full_gradients(torch.zeros(n))
    assert_close_to(found, wanted)
    without, _ = planted.sampled_gradients(dataclasses.replace(spec, logq=0.0), num_mined)
    error, error_without = relative_error(found, wanted)[0], relative_error(without, wanted)[0]
    assert error_without > 1.9 * error, "this test would not notice a missing correction"


@pytest.mark.parametrize("kind", POOLS)
def test_a_corrected_positive_weighs_what_it_would_as_a_candidate(kind: str) -> None:
    n, settings, num_mined = POOLS[kind]
    planted = Planted(n)
    found, log_q = planted.sampled_gradients(ContrastSpec(temperature=1.0, logq_positive=True, **settings), num_mined)
    assert_close_to(found, planted.full_gradients(log_q))


@pytest.mark.parametrize("kind", ["in-batch", "in-batch and uniform"])
def test_streamed_frequencies_serve_as_well(kind: str) -> None:
    n, settings, _ = POOLS[kind]
    planted = Planted(n)
    spec = ContrastSpec(temperature=1.0, frequency_slots=4096, **settings)
    found, _ = planted.sampled_gradients(spec)
    assert max(relative_error(found, planted.full_gradients(torch.zeros(n)))) < 0.2  # of one batch of a stream


@pytest.mark.parametrize("objective", ["info_nce", "nt_xent", "ccl", "triplet"])
def test_session_items_and_repeated_ones_are_no_negatives(objective: Any) -> None:
    """Two examples of one session, one of another with an item of theirs, and sampled hits of both."""
    spec = ContrastSpec(objective=objective, sampled_negatives=3, margin=0.0, triplet_negative="hard", logq=0.0)
    contrast = Contrast(np.ones(6, np.int64), spec, dim=DIM)
    own = [[0, 1, 5], [0, 1, 5], [2, 0]]
    pool = contrast.pool(pair_batch(np.array([0, 1, 2]), own=own, sampled=np.array([5, 3, 0])))
    vectors = torch.randn(3, 3, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    query, item, extra = vectors[0], F.normalize(vectors[1], dim=1), F.normalize(vectors[2], dim=1)
    contrast.backward(query, item, extra, pool, chunk=0)
    assert vectors.grad is not None
    assert not vectors.grad[2, 2].any()  # item 0 is everybody's own
    if objective in ("info_nce", "nt_xent"):
        assert vectors.grad[2, 1].any()  # item 3 is nobody's
    pairs = {(i, j) for i in range(3) for j, row in enumerate([0, 1, 2, 5, 3, 0]) if row in own[i]}
    assert {tuple(divmod(place, 6)) for place in pool.hits.tolist()} == pairs


def test_nt_xent_is_the_mean_of_both_directions() -> None:
    contrast = Contrast(np.ones(9, np.int64), ContrastSpec(objective="nt_xent", temperature=0.5, logq=0.0), dim=DIM)
    own = [[0, 3], [1], [2, 1], [3], [4]]
    pool = contrast.pool(pair_batch(np.arange(5), own=own))
    random = torch.Generator().manual_seed(2)
    query, item = (torch.randn(5, DIM, generator=random).requires_grad_() for _ in range(2))
    found = contrast.backward(query, item, item[:0], pool, chunk=0)
    logits = 2.0 * query @ item.T
    mask = torch.tensor([[i != j and j in own[i] for j in range(5)] for i in range(5)])
    logits = logits.masked_fill(mask, -torch.inf)
    both = [F.cross_entropy(side, torch.arange(5), reduction="sum") for side in (logits, logits.T)]
    wanted = 0.5 * (both[0] + both[1])
    assert found == pytest.approx(wanted.item(), rel=1e-6)
    mine = (query.grad, item.grad)
    torch.testing.assert_close(mine, torch.autograd.grad(wanted, (query, item)))


def test_a_learned_temperature_follows_the_gradient_and_stays_in_its_range() -> None:
    contrast = Contrast(np.ones(4, np.int64), ContrastSpec(temperature=0.02, learn_temperature=True), dim=DIM)
    assert contrast.log_scale is not None
    assert contrast.log_scale.exp().item() == pytest.approx(50.0)
    for value, temperature in ((9.0, TEMPERATURES[0]), (-9.0, TEMPERATURES[1])):
        torch.nn.init.constant_(contrast.log_scale, value)
        contrast.clamp()
        assert (-contrast.log_scale).exp().item() == pytest.approx(temperature)


# Workers that share candidates, and batches in chunks: a model trained for some steps of ten sessions' examples.

SPAN, STEPS = 30, 9
MODELS: dict[str, dict[str, Any]] = {
    "info_nce": {"gather": True},
    "mixed, learned": {"gather": True, "sampled_negatives": 20, "learn_temperature": True},
    "sampled": {"in_batch": False, "sampled_negatives": 20, "sampled_exponent": 0.5},
    "nt_xent": {"gather": True, "objective": "nt_xent", "logq_positive": True},
    "nt_xent in chunks": {"gather": True, "objective": "nt_xent", "chunk_size": 4},
    "ccl": {"gather": True, "objective": "ccl"},
    "triplet": {"gather": True, "objective": "triplet", "triplet_negative": "random"},
    "mined": {"gather": True, "mining": MiningSpec(num=16, every=2, skip=1, take=5, margin=0.5)},
    "streaming": {"gather": True, "frequency_slots": 64},
    "attention": {"gather": True, "history_encoder": "attention", "described": True},
    "gru": {"gather": True, "history_encoder": "gru", "described": True},
}


def sessions() -> Sessions:
    random = np.random.default_rng(0)
    lists = [random.choice(60, random.integers(2, 7), replace=False).tolist() for _ in range(80)]
    return Sessions(Ragged.from_lists(lists), None, {})


def train_model(
    *, chunk_size: int = 0, history_encoder: HistoryEncoder = "mean", described: bool = False, **settings: Any
) -> dict[str, Any]:
    data, random = sessions(), np.random.default_rng(1)
    item_features = {"tags": Feature("list"), "price": Feature("number", 1), "text": Feature("vector", 3)}
    tags = Ragged.from_lists([random.integers(0, 9, n).tolist() for n in random.integers(0, 4, 60)])
    item_values: dict[str, Given] = {"tags": tags, "price": random.normal(size=(60, 1))}
    item_values["text"] = random.normal(size=(60, 3)).astype(np.float32)
    model = TwoTower(
        np.bincount(data.items.values, minlength=60), maps={},
        tables=[TableSpec("item", 60, 8, 8**-0.5)] + [TableSpec("item_tags", 9, 8, 8**-0.5)] * described,
        item_features=item_features if described else {}, item_values=item_values if described else {},
        query=("history",), query_features={}, list_pooling="mean", share_items=True, id_dropout=0.3 * described,
        history_encoder=history_encoder, hidden=(8,), dim=8,
        examples="every_item", mask="session", history_decay=1.0, history_length=8, training_history_length=0,
        contrast=ContrastSpec(**settings), normalize=True, batch_size=SPAN, chunk_size=chunk_size, optimizer="sgd",
        learning_rate=0.05, dense_learning_rate=0.01, seed=1, device=torch.device("cpu"),
    )  # fmt: skip
    plan = model.plan(data, (0, 0, 0))
    before = model.encode_items(0, 60)
    total = torch.zeros(STEPS, dtype=torch.float64)
    for i in range(STEPS):
        batch = plan.batch(i * SPAN, (i + 1) * SPAN, dist.get_rank(), dist.get_world_size())
        total[i] = model.step(model.prepare(batch, 0), 1.0)[0]
    dist.all_reduce(total)
    dense = {name: value.clone() for name, value in model.dense.state_dict().items()}
    return {"loss": total, "before": before, "items": model.encode_items(0, 60), "dense": dense}


def train_all() -> dict[str, Any]:
    return {name: train_model(**MODELS[name]) for name in MODELS}


@functools.cache
def results(world_size: int) -> dict[str, Any]:
    if world_size == 1:
        with process_group("cpu"):
            return train_all()
    return run_on_ranks(world_size, train_all)[0]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_workers_that_share_candidates_give_the_numbers_of_one(name: str, world_size: int) -> None:
    one, many = results(1)[name], results(world_size)[name]
    torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-4)
    assert (one["items"] - one["before"]).abs().max() > 0.1, "the test trains next to nothing"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_size", [7, 30])
def test_chunks_give_the_gradient_of_the_whole_batch(name: str, chunk_size: int) -> None:
    with process_group("cpu"):
        torch.testing.assert_close(
            train_model(**{**MODELS[name], "chunk_size": chunk_size}), results(1)[name], rtol=1e-3, atol=1e-4
        )


def test_what_the_loss_remembers_survives_a_stop(tmp_path: Path) -> None:
    """Four sessions of an epoch each end bit-equal to one of four: temperature, frequencies and index included."""
    data = write_sessions(tmp_path / "train.parquet")
    settings = {
        "model": {
            "kind": "two_tower", "examples": "every_item", "learn_temperature": True, "frequency_slots": 97,
            "sampled_negatives": 10, "mined_negatives": 32, "mined_every": 8, "mined_skip": 2, "mined_take": 9,
        },
        "train": {"batch_size": 256, "final_rate": 1.0, "checkpoint_seconds": 60.0, "chunk_size": 100},
    }  # fmt: skip

    def run(name: str, epochs: int) -> dict[str, str]:
        sections = {**settings, "train": {**settings["train"], "epochs": epochs}}
        config = small_config(tmp_path / name, data, **sections)  # type: ignore[arg-type]
        train(config, on_event=lambda event: None)
        return final_tensors(config)

    whole = run("whole", 4)
    for epochs in (1, 2, 3):
        assert run("parts", epochs) != whole
    assert run("parts", 4) == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_batch": False}, r"model\.in_batch: is false.*set model\.sampled_negatives"),
        ({"in_batch": False, "sampled_negatives": 5, "gather": True}, r"model\.gather: is about in-batch negatives"),
        ({"in_batch": False, "sampled_negatives": 5, "objective": "nt_xent"}, r"model\.objective: nt_xent"),
        ({"objective": "ccl", "frequency_slots": 5}, r"model\.frequency_slots: estimates how often in-batch"),
        ({"objective": "ccl", "normalize": False}, r"model\.objective: ccl compares cosines"),
        ({"objective": "triplet", "learn_temperature": True}, r"model\.learn_temperature: triplet with a margin"),
        ({"learn_temperature": True, "temperature": 0.005}, r"model\.temperature: must be in \[0\.01, 10\.0\]"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    config = small_config(tmp_path, tmp_path, model={"kind": "two_tower", **settings})
    with pytest.raises(SettingError, match=message):
        check_model(config)
