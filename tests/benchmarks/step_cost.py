"""What a two-tower training step costs beside its loss, and what a second worker adds.

    python -m tests.benchmarks.step_cost [--steps 60] [--rows 1000000] [--repeats 2]

Every worker is one process with one torch thread, pinned to one core, so that what the loop reads and prepares ahead in
a background thread costs its time too. A step is the loop's: prepared by `read_ahead`, then `TwoTower.step` (lookup,
towers, loss, backward, fused optimiser). It is measured in blocks of ten that begin and end with an idle background
thread, alternating with the loss alone: logits of random normalised vectors, softmax, backward in plain torch.

    step_over_loss      wall seconds of a step / wall seconds of the loss alone, same block; one worker
    scaling_2_workers   examples per second of two workers (gloo, a core each) / those of one
    ..._history         the same with 20 history items in the query tower beside the user

Figures are medians over blocks. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from embedding_service.ragged import Ragged
from tests.ranks import run_on_ranks
from trainers.contrast import ContrastSpec
from trainers.prepare import Sessions
from trainers.sessions import read_ahead
from trainers.two_tower import TwoTower

BATCH, DIM, SESSION_ITEMS, TEMPERATURE = 2048, 64, 21, 0.1
BLOCK_STEPS, WARMUP_BLOCKS = 10, 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="steps measured per model and run")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the user and of the item table")
    parser.add_argument("--repeats", type=int, default=2, help="runs of one and of two workers, alternating")
    arguments = parser.parse_args()
    blocks: dict[tuple[int, bool], list[dict[str, float]]] = {}
    for repeat in range(arguments.repeats):
        for workers in (1, 2):
            say(f"run {repeat + 1} of {arguments.repeats}, {workers} worker(s)")
            ranks = run_on_ranks(workers, measure, arguments.rows, arguments.steps, pin=True)
            for history in (False, True):
                found = ranks[0][str(history)]
                blocks.setdefault((workers, history), []).extend(found)
                say(f"  history {history}: " + ", ".join(f"{k} {v:.4g}" for k, v in summary(found).items()))
    print(json.dumps(report(blocks, arguments)))


def report(blocks: dict[tuple[int, bool], list[dict[str, float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for history, suffix in ((False, ""), (True, "_history")):
        one, two = summary(blocks[1, history]), summary(blocks[2, history])
        result[f"step_over_loss{suffix}"] = round(one["step_seconds"] / one["loss_seconds"], 3)
        result[f"scaling_2_workers{suffix}"] = round(two["examples_per_second"] / one["examples_per_second"], 3)
        result[f"examples_per_second{suffix}"] = round(one["examples_per_second"])
        result[f"milliseconds{suffix}"] = {
            name.removesuffix("_seconds"): round(1e3 * one[name], 2)
            for name in ("step_seconds", "loss_seconds", "update_seconds", "prepare_seconds")
        }
        result[f"update_over_loss{suffix}"] = round(one["update_seconds"] / one["loss_seconds"], 3)
    return {
        **result,
        "batch": BATCH,
        "dim": DIM,
        "rows": arguments.rows,
        "steps": arguments.steps * arguments.repeats,
        "threads_per_worker": 1,
        "cores_per_worker": 1,
        "launcher": "torch.multiprocessing spawn, gloo",
        "step": "read_ahead + prepare + TwoTower.step on one core; update: TwoTower.step alone",
    }


def summary(blocks: list[dict[str, float]]) -> dict[str, float]:
    """Medians over blocks; the step's time through its median ratio to the loss measured beside it."""
    found = {name: statistics.median(block[name] for block in blocks) for name in blocks[0]}
    ratio = statistics.median(block["step_seconds"] / block["loss_seconds"] for block in blocks)
    return {**found, "step_seconds": ratio * found["loss_seconds"]}


def measure(rows: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Runs on every rank: blocks of the model of id towers, and of the one with a history."""
    torch.set_flush_denormal(True)  # as the loop does
    sessions = zipf_sessions(rows, BATCH * (steps + 2 * BLOCK_STEPS) * dist.get_world_size())
    return {str(history): measure_model(sessions, rows, history=history) for history in (False, True)}


def measure_model(sessions: Sessions, rows: int, *, history: bool) -> list[dict[str, float]]:
    model = new_model(sessions, rows, history=history)
    plan = model.plan(sessions, (0, 0, 0))
    rank, world = dist.get_rank(), dist.get_world_size()
    span = BATCH * world
    loss = LossAlone()
    blocks = []
    for first in range(0, plan.size - span * BLOCK_STEPS + 1, span * BLOCK_STEPS):

        def prepared(first: int = first) -> Iterator[Any]:
            for start in range(first, first + span * BLOCK_STEPS, span):
                yield model.prepare(plan.batch(start, start + span, rank, world), 0)

        step_seconds, _ = timed_steps(model, read_ahead(prepared()))
        loss_seconds = loss.seconds()
        began = time.perf_counter()
        ready = list(prepared())
        prepare_seconds = (time.perf_counter() - began) / BLOCK_STEPS
        update_seconds, _ = timed_steps(model, iter(ready))
        blocks.append(
            {
                "step_seconds": step_seconds,
                "loss_seconds": loss_seconds,
                "update_seconds": update_seconds,
                "prepare_seconds": prepare_seconds,
                "examples_per_second": span / step_seconds,
                "distinct_rows": float(sum(len(ids) for ids in ready[0].lookups.ids.values())),
            }
        )
    return blocks[WARMUP_BLOCKS:]


def timed_steps(model: TwoTower, steps: Iterator[Any]) -> tuple[float, float]:
    """(wall seconds a step, mean loss) of a block that all ranks begin together."""
    dist.barrier()
    began = time.perf_counter()
    total = sum(model.step(step, 1.0)[0] for step in steps)
    dist.barrier()
    seconds = (time.perf_counter() - began) / BLOCK_STEPS
    assert np.isfinite(total)
    return seconds, total / BLOCK_STEPS / BATCH


class LossAlone:
    """The part of a step that no bookkeeping can take away, in plain torch."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.query, self.candidate = (
            F.normalize(torch.randn(BATCH, DIM, generator=random), dim=1).requires_grad_() for _ in range(2)
        )
        self.labels = torch.arange(BATCH)

    def seconds(self) -> float:
        """Wall seconds of one, mean of a block."""
        began = time.perf_counter()
        for _ in range(BLOCK_STEPS):
            self.query.grad = self.candidate.grad = None
            F.cross_entropy(self.query @ self.candidate.T / TEMPERATURE, self.labels).backward()  # type: ignore[no-untyped-call]
        return (time.perf_counter() - began) / BLOCK_STEPS


def zipf_sessions(rows: int, num_items: int) -> Sessions:
    """Sessions of 21 items by Zipf's law (exponent 1), each of a user drawn uniformly."""
    random = np.random.default_rng(0)
    count = -(-num_items // SESSION_ITEMS)
    share = np.cumsum(1.0 / np.arange(1, rows + 1))
    places = np.searchsorted(share, random.random(count * SESSION_ITEMS) * share[-1])
    items = random.permutation(rows)[places]  # frequent items lie anywhere in the table
    offsets = np.arange(count + 1, dtype=np.int64) * SESSION_ITEMS
    return Sessions(Ragged(items, offsets), random.integers(0, rows, count), {})


def new_model(sessions: Sessions, rows: int, *, history: bool) -> TwoTower:
    return TwoTower(
        np.bincount(sessions.items.values, minlength=rows),
        rows={"item": rows, "user": rows},
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
        precision="fp32",
        init_scale=0.0,
        examples="every_item",
        mask="session",
        history_decay=1.0,
        history_length=SESSION_ITEMS - 1,
        training_history_length=SESSION_ITEMS - 1,
        contrast=ContrastSpec(temperature=TEMPERATURE),
        normalize=True,
        batch_size=BATCH,
        chunk_size=0,
        optimizer="rowwise_adagrad",
        learning_rate=0.05,
        dense_learning_rate=1e-3,
        seed=0,
        device=torch.device("cpu"),
    )


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
