"""Two-tower training against plain PyTorch, against its loss alone, and on two workers against one.

    python -m tests.benchmarks.two_tower_speed [--rounds 12] [--rows 1000000]

Every worker is one process with one torch thread, pinned to one core, so that what the loop reads and prepares ahead in
a background thread costs its time too. A step is the loop's: prepared by `read_ahead`, then `TwoTower.step` (lookup,
towers, loss, backward, update of the rows). It is measured in blocks of ten that begin and end with an idle background
thread. What is compared takes turns block by block, so that both sides see the same moments of the machine; figures are
medians over the rounds, ratios are medians of each round's ratio.

    ratio_plain         examples per second / those of a loop in plain PyTorch over the same batches: nn.Embedding(
                        sparse=True), the same towers and loss by torch's own functions, torch.optim.Adagrad (ours:
                        adagrad); ..._sgd: SGD. One worker
    ratio_bf16          examples per second with train.matmul = "bf16" / with "fp32"; null where the CPU has no bfloat16
    step_over_loss      wall seconds of a step / of the loss alone: logits of random normalised vectors, softmax,
                        backward in plain torch; one worker, row-wise Adagrad
    scaling_2_workers   examples per second of two workers (gloo, a core each) / those of one; the same optimiser
    ..._history         the same with 20 history items in the query tower beside the user

The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from embedding_service.ragged import Ragged
from embedding_service.tables import Optimizer, TableSpec
from tests.ranks import run_on_ranks
from trainers.contrast import ContrastSpec
from trainers.examples import PairBatch, PairPlan
from trainers.models import has_bf16
from trainers.negatives import frequency
from trainers.prepare import Sessions
from trainers.sessions import read_ahead
from trainers.two_tower import TwoTower

BATCH, DIM, SESSION_ITEMS, TEMPERATURE, RATE = 2048, 64, 21, 0.1, 0.05
BLOCK_STEPS, WARMUP_ROUNDS = 10, 2
OPTIMIZERS: dict[str, Optimizer] = {"": "adagrad", "_sgd": "sgd"}  # suffix of `ratio_plain` -> optimiser of both sides
KINDS = {"": False, "_history": True}  # suffix of a figure -> whether queries see a history


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.two_tower_speed", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds that are measured, of ten steps each")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the user and of the item table")
    arguments = parser.parse_args()
    rounds = arguments.rounds + WARMUP_ROUNDS
    say("one and two workers")
    one, two = in_turns(measure_workers, arguments.rows, rounds)
    say("plain PyTorch")
    plain = run_on_ranks(1, measure_plain, arguments.rows, rounds // 2, pin=True)[0]
    print(json.dumps(report(one, two, plain) | {"rows": arguments.rows, "rounds": arguments.rounds}))


def report(one: dict[str, Any], two: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in KINDS:
        steps, loss, together = one[kind]["step_seconds"], one[kind]["loss_seconds"], two[kind]["step_seconds"]
        result |= {
            f"step_over_loss{kind}": median_ratio(steps, loss),
            f"scaling_2_workers{kind}": round(2 * median_ratio(steps, together), 3),
            f"examples_per_second{kind}": round(BATCH / statistics.median(steps)),
            f"distinct_rows{kind}": one[kind]["distinct_rows"][0],
        }
        times = {"step": steps, "step_2_workers": together, "loss": loss}
        for optimizer in OPTIMIZERS:
            values = plain[f"{optimizer}{kind}"]
            result[f"ratio_plain{optimizer}{kind}"] = median_ratio(values["plain_seconds"], values["step_seconds"])
            times |= {f"plain{optimizer}": values["plain_seconds"]}
        short = plain[kind].get("bf16_seconds")
        result[f"ratio_bf16{kind}"] = median_ratio(plain[kind]["step_seconds"], short) if short else None
        result[f"milliseconds{kind}"] = {
            name: round(1e3 * statistics.median(seconds), 2) for name, seconds in times.items()
        }
    return {**result, "batch": BATCH, "dim": DIM, "threads_per_worker": 1, "cores_per_worker": 1}


def median_ratio(upper: list[float], lower: list[float]) -> float:
    return round(statistics.median(u / w for u, w in zip(upper, lower, strict=True)), 3)


def in_turns(measure: Callable[..., Any], *args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What rank 0 of one worker and of two workers return, which run side by side and take turns by `Turns`."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for workers in (1, 2):
            os.mkfifo(Path(folder) / str(workers))
        turns = {workers: Turns(folder, workers) for workers in (1, 2)}
        turns[2].give(1)

        def group(workers: int) -> Any:
            try:
                return run_on_ranks(workers, measure, folder, *args, pin=True)[0]
            finally:  # whoever is left goes on alone
                turns[workers].give(1000)

        one, two = pool.map(group, (1, 2))
        return one, two


class Turns:
    """A token that the groups of one and of two workers pass to and fro, each waiting for it at its own pipe."""

    def __init__(self, folder: str, workers: int) -> None:
        self._mine, self._other = (os.open(Path(folder) / str(number), os.O_RDWR) for number in (workers, 3 - workers))

    def take(self) -> None:
        os.read(self._mine, 1)

    def give(self, times: int) -> None:
        os.write(self._other, b"." * times)


def measure_workers(folder: str, rows: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Runs on every rank of both groups: a block of every kind per turn. kind -> figure -> one value per round."""
    torch.set_flush_denormal(True)  # as the loop does
    rank, world = dist.get_rank(), dist.get_world_size()
    sessions = zipf_sessions(rows, BATCH * BLOCK_STEPS * rounds * world)
    models = {kind: new_model(sessions, rows, history, "rowwise_adagrad") for kind, history in KINDS.items()}
    plans = {kind: model.plan(sessions, (0, 0, 0)) for kind, model in models.items()}
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    loss = LossAlone()
    turns = Turns(folder, world) if rank == 0 else None
    for number in range(rounds):
        if turns is not None:
            turns.take()
        for kind, model in models.items():
            figures = {"step_seconds": timed(train, model, plans[kind], number)}
            if world == 1:
                figures["loss_seconds"] = timed(loss.block)
                batch = next(batches(plans[kind], number))
                figures["distinct_rows"] = sum(len(ids) for ids in model.prepare(batch, 0).lookups.ids.values())
            if number >= WARMUP_ROUNDS:
                for name, value in figures.items():
                    found[kind].setdefault(name, []).append(value)
        if turns is not None:
            turns.give(1)
    return found


def measure_plain(rows: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Runs alone: ours and the plain loop in turns over the same batches. Optimiser and kind -> figure -> values."""
    torch.set_flush_denormal(True)
    sessions = zipf_sessions(rows, BATCH * BLOCK_STEPS * rounds)
    found: dict[str, dict[str, list[float]]] = {}
    for kind, history in KINDS.items():
        for suffix, optimizer in OPTIMIZERS.items():
            model = new_model(sessions, rows, history, optimizer)
            plan = model.plan(sessions, (0, 0, 0))
            plain = PlainLoop(model, sessions, optimizer)
            sides = {"step": partial(train, model, plan), "plain": partial(plain.train, plan)}
            if not suffix and has_bf16(torch.device("cpu")):
                sides["bf16"] = partial(train, new_model(sessions, rows, history, optimizer, matmul="bf16"), plan)
            figures: dict[str, list[float]] = {f"{side}_seconds": [] for side in sides}
            for number in range(rounds):
                for side, block in sides.items():
                    figures[f"{side}_seconds"].append(timed(block, number))
            found[f"{suffix}{kind}"] = {name: values[1:] for name, values in figures.items()}
            del model, plain, sides  # before the next ones are made
    return found


def timed(block: Callable[..., Any], *args: Any) -> float:
    """Wall seconds per step of a block that all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    block(*args)
    dist.barrier()
    return (time.perf_counter() - began) / BLOCK_STEPS


def train(model: TwoTower, plan: PairPlan, number: int) -> float:
    """Block `number` of the training, as the loop does it; this rank's summed loss."""
    total = sum(model.step(step, 1.0)[0] for step in read_ahead(model.prepare(b, 0) for b in batches(plan, number)))
    assert np.isfinite(total)
    return total


def batches(plan: PairPlan, number: int) -> Iterator[PairBatch]:
    """This rank's batches of block `number`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    span = BATCH * world
    for start in range(number * BLOCK_STEPS * span, (number + 1) * BLOCK_STEPS * span, span):
        yield plan.batch(*plan.share(start, start + span, rank, world))


class PlainLoop:
    """The model as one would write it in PyTorch without anything else, beginning with the weights of `model`."""

    def __init__(self, model: TwoTower, sessions: Sessions, optimizer: Optimizer) -> None:
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call] # the default; unsaid, torch warns
        self.tables = {name: nn.Embedding(spec.rows, DIM, sparse=True) for name, spec in model.tables.specs.items()}
        for name, table in self.tables.items():
            for first, rows in model.tables.local_shards(name):
                table.weight.data[first : first + len(rows)] = rows
        counts = np.bincount(sessions.items.values, minlength=self.tables["item"].num_embeddings)
        self.log_q = torch.from_numpy(np.log(frequency(counts).dense()).astype(np.float32))
        self.with_history = any(block.source == "history" for block in model.query_tower.spec.inputs)
        weights = [table.weight for table in self.tables.values()]
        self.optimizer = (
            torch.optim.Adagrad(weights, lr=RATE, eps=1e-8)
            if optimizer == "adagrad"
            else torch.optim.SGD(weights, RATE)
        )

    def train(self, plan: PairPlan, number: int) -> float:
        return sum(self.step(batch) for batch in batches(plan, number))

    def step(self, batch: PairBatch) -> float:
        assert batch.user is not None
        items = torch.from_numpy(batch.item)
        query = self.tables["user"](torch.from_numpy(batch.user))
        if self.with_history:
            history, offsets = torch.from_numpy(batch.history.values), torch.from_numpy(batch.history.offsets[:-1])
            query = query + F.embedding_bag(history, self.tables["item"].weight, offsets, mode="mean", sparse=True)
        query, candidate = F.normalize(query, dim=1), F.normalize(self.tables["item"](items), dim=1)
        logits: Tensor = query @ candidate.T / TEMPERATURE - self.log_q[items]
        hits = batch.hits(batch.positives)
        hits = hits[hits % (len(items) + 1) != 0]  # not the positive's own place
        logits.view(-1).index_fill_(0, torch.from_numpy(hits), -torch.inf)
        loss = F.cross_entropy(logits, torch.arange(len(items)), reduction="sum")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()


class LossAlone:
    """The part of a step that no bookkeeping can take away, in plain torch."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.query, self.candidate = (
            F.normalize(torch.randn(BATCH, DIM, generator=random), dim=1).requires_grad_() for _ in range(2)
        )
        self.labels = torch.arange(BATCH)

    def block(self) -> None:
        for _ in range(BLOCK_STEPS):
            self.query.grad = self.candidate.grad = None
            F.cross_entropy(self.query @ self.candidate.T / TEMPERATURE, self.labels).backward()  # type: ignore[no-untyped-call]


def zipf_sessions(rows: int, num_items: int) -> Sessions:
    """Sessions of 21 items by Zipf's law (exponent 1), each of a user drawn uniformly."""
    random = np.random.default_rng(0)
    count = -(-num_items // SESSION_ITEMS)
    share = np.cumsum(1.0 / np.arange(1, rows + 1))
    places = np.searchsorted(share, random.random(count * SESSION_ITEMS) * share[-1])
    items = random.permutation(rows)[places]  # frequent items lie anywhere in the table
    offsets = np.arange(count + 1, dtype=np.int64) * SESSION_ITEMS
    return Sessions(Ragged(items, offsets), random.integers(0, rows, count), {})


def new_model(
    sessions: Sessions, rows: int, history: bool, optimizer: Optimizer, *, matmul: Literal["fp32", "bf16"] = "fp32"
) -> TwoTower:
    return TwoTower(
        np.bincount(sessions.items.values, minlength=rows),
        tables=[TableSpec(name, rows, DIM, DIM**-0.5) for name in ("item", "user")],
        maps={},
        item_features={},
        item_values={},
        query=("user", "history") if history else ("user",),
        query_features={},
        list_pooling="mean",
        share_items=True,
        id_dropout=0.0,
        history_encoder="mean",
        hidden=(),
        dim=DIM,
        examples="every_item",
        mask="session",
        history_decay=1.0,
        history_length=SESSION_ITEMS - 1,
        training_history_length=SESSION_ITEMS - 1,
        contrast=ContrastSpec(temperature=TEMPERATURE, logq_positive=True, matmul=matmul),
        normalize=True,
        batch_size=BATCH,
        chunk_size=0,
        optimizer=optimizer,
        learning_rate=RATE,
        dense_learning_rate=1e-3,
        seed=0,
        device=torch.device("cpu"),
    )


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
