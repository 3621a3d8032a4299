"""Item2Vec: skip-gram with negative sampling over sessions (Barkan and Koenigstein 2016; Mikolov et al. 2013).

Two tables are learned and both are kept: 'similar items' compares input vectors, 'recommend' ranks output vectors
against the session's input vectors, which is what the objective trains for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding_service.mapped_tables import MappedAsked, MappedTables
from embedding_service.ragged import Ragged
from embedding_service.row_maps import RowMap
from embedding_service.sharding import MakeTables, ShardedTables
from embedding_service.tables import TableSpec, deduplicate
from embedding_service.towers import Given, Tower, TowerInput, TowerSpec, input_rows
from trainers import skipgram
from trainers.examples import TokenBlock, TokenPlan, equal_shares
from trainers.lookups import read_blocks
from trainers.merge import principal_axes, temper
from trainers.negatives import UnigramSampler, keep_probability
from trainers.prepare import Sessions
from trainers.row_runs import RowRuns

_TABLES = {"input": "input", "item": "output"}  # vector set of the artifact -> table
NEGATIVE_REUSE = (
    2  # how often a drawn negative is used in a block, on average; with 8, eight workers disagree about them
)
_SAMPLE = 2048  # rows that a second moment is estimated from


@dataclass(frozen=True)
class _Part:
    """A thread's share of a block of sessions; tokens and negatives are indices into its own distinct rows."""

    tokens: np.ndarray
    offsets: np.ndarray
    negatives: np.ndarray
    source: np.ndarray  # its rows of the input table, as places in the block's; the first of `target`
    target: np.ndarray
    seed: int


@dataclass(frozen=True)
class _Block:
    """A block of sessions, ready: the distinct rows of both tables, and what each thread does with them."""

    source: np.ndarray
    target: np.ndarray
    parts: tuple[_Part, ...]
    asked: MappedAsked  # `source` and `target`, as the tables are asked for them

    @property
    def num_examples(self) -> int:
        return sum(len(part.tokens) for part in self.parts)


@dataclass(frozen=True)
class _Learned:
    """What a part has added to its rows, padded as they were, and the loss of a sample of its targets."""

    source: np.ndarray
    target: np.ndarray
    loss: float
    pairs: int
    contexts: float  # of a token, on average
    samples: tuple[np.ndarray, ...]  # rows as they are now: input and output rows of tokens, output rows of negatives


class Item2Vec:
    """Input and output tables under plain SGD, as published."""

    def __init__(
        self,
        counts: np.ndarray | RowRuns,
        *,
        tables: Sequence[TableSpec],
        maps: Mapping[str, RowMap],
        cbow: bool,
        window: int,
        ordered: bool,
        num_negatives: int,
        negative_exponent: float,
        subsample: float,
        history_decay: float,
        history_length: int,
        block_items: int,
        learning_rate: float,
        seed: int,
        threads: int,
        device: torch.device,
        make_tables: MakeTables = ShardedTables,
    ) -> None:
        """counts: int64 [rows], how often each item occurs in training; tables, maps: see `model_tables`; block_items:
        items of a worker's step.
        """
        self.num_items, self.counts = len(counts), RowRuns.of(counts)
        dim = tables[0].dim
        self.tables = MappedTables(
            tables,
            maps,
            optimizer="sgd",
            learning_rate=1.0,  # the kernel has applied the rate: the table adds the difference as it is
            seed=seed,
            device=device,
            make_tables=make_tables,
        )
        block = TowerInput("history", "history", "input", dim, history_decay, history_length)
        self.query_tower = Tower(TowerSpec((block,), dim))
        self.dense: nn.ModuleDict = nn.ModuleDict()
        self.dense_optimizer: torch.optim.Optimizer | None = None
        self._sampler = UnigramSampler(self.counts, negative_exponent)
        self._keep = keep_probability(self.counts, subsample) if subsample > 0.0 else None
        self._frozen = (self.tables.specs["input"].frozen, self.tables.specs["output"].frozen)
        self._cbow, self._window, self._ordered, self._num_negatives = cbow, window, ordered, num_negatives
        self._block_items, self._learning_rate, self._threads = block_items, learning_rate, threads

    def plan(self, sessions: Sessions, numbers: tuple[int, ...]) -> TokenPlan:
        """The blocks of a window; numbers: (seed, epoch, window)."""
        return TokenPlan(
            sessions, block_items=self._block_items, ordered=self._ordered, keep=self._keep, numbers=numbers
        )

    def prepare(self, batch: TokenBlock, seed: int) -> _Block:
        """Draw negatives, find distinct rows, for each thread and for all, and say which will be looked up.

        A collective call, which one thread may make ahead.
        """
        cuts = equal_shares(batch.items.offsets, self._threads)
        shares = [batch.items.slice(*cut) for cut in itertools.pairwise(cuts)]
        seeds = [(seed * 1_000_003 + i) % 2**63 for i in range(len(shares))]
        uses: dict[str, np.ndarray] = {}
        for i, (items, own_seed) in enumerate(zip(shares, seeds, strict=True)):
            num = -(-len(items.values) * self._num_negatives // NEGATIVE_REUSE)
            uses |= {f"tokens {i}": items.values, f"negatives {i}": self._sampler.draw(num, own_seed)}
        target, index = deduplicate(uses)
        is_source = np.zeros(len(target), bool)
        for i in range(len(shares)):
            is_source[index[f"tokens {i}"]] = True
        source_place = np.cumsum(is_source) - 1
        parts = []
        for i, (items, own_seed) in enumerate(zip(shares, seeds, strict=True)):
            tokens, negatives = index[f"tokens {i}"], index[f"negatives {i}"]
            own_sources, own = np.zeros(len(target), bool), np.zeros(len(target), bool)
            own_sources[tokens] = own[tokens] = own[negatives] = True
            first = np.flatnonzero(own_sources)
            rows = np.concatenate([first, np.flatnonzero(own & ~own_sources)])
            place = np.empty(len(target), np.int64)
            place[rows] = np.arange(len(rows))
            parts.append(_Part(place[tokens], items.offsets, place[negatives], source_place[first], rows, own_seed))
        source = target[is_source]
        asked = self.tables.route({"input": torch.from_numpy(source), "output": torch.from_numpy(target)})
        return _Block(source, target, tuple(parts), asked)

    def step(self, block: _Block, rate: float) -> tuple[float, int]:
        """Look the block's rows up, run SGD over its windows, add the difference to the tables.

        rate: factor on the peak learning rate. Returns (summed loss, its number of pairs) of a sample of the targets.
        """
        found = self.tables.lookup(block.asked)
        before = [found[name].detach().cpu().numpy() for name in ("input", "output")]

        num_parts = self._threads * dist.get_world_size()
        with ThreadPoolExecutor(len(block.parts)) as pool:
            learned = list(
                pool.map(lambda part: self._learn(part, before[0], before[1], rate * self._learning_rate), block.parts)
            )
            if num_parts > 1:
                axes = [principal_axes(moment) for moment in self._partner_moments(block.parts, learned)]

                def merge(part: _Part, result: _Learned) -> None:
                    exposures = self._exposures(part, result)
                    for change, steps, own in zip((result.source, result.target), exposures, axes, strict=True):
                        temper(change, rate * self._learning_rate * steps, own, num_parts)

                list(pool.map(merge, block.parts, learned))
            inputs = [(part.source, result.source) for part, result in zip(block.parts, learned, strict=True)]
            outputs = [(part.target, result.target) for part, result in zip(block.parts, learned, strict=True)]
            ids = (block.source, block.target)
            gradients = list(pool.map(self._gradient, ("input", "output"), ids, before, (inputs, outputs)))
        device = found["input"].device
        moves = [torch.from_numpy(gradient).to(device) for gradient in gradients]
        torch.autograd.backward([found["input"], found["output"]], moves)
        loss, pairs = sum(result.loss for result in learned), sum(result.pairs for result in learned)
        if not all(move.sum().isfinite() for move in moves):
            loss = float("nan")  # the kernel's sigmoid is clamped, so its own sum would hide it
        return loss, pairs

    def _gradient(
        self, name: str, ids: np.ndarray, before: np.ndarray, learned: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """What the SGD of the table `name` is to subtract: less the sum of what the parts learned. float32 [n, dim].

        ids: int64 [n]; before: float32 [n, dim], the block's rows; learned: of each part its rows among them and what
        these have learned.
        """
        gradient = np.zeros_like(before)
        for rows, change in learned:
            skipgram.subtract_rows(gradient, rows, change)
        if name in self.tables.maps:
            gradient *= own_part(self.tables.maps[name], ids)[:, None]
        return gradient

    def _learn(self, part: _Part, source_rows: np.ndarray, target_rows: np.ndarray, rate: float) -> _Learned:
        """SGD over the part on copies of its rows."""
        source, target = skipgram.take_padded(source_rows, part.source), skipgram.take_padded(target_rows, part.target)
        loss, pairs, contexts = skipgram.run_block(
            source,
            target,
            part.tokens,
            part.offsets,
            part.negatives,
            cbow=self._cbow,
            window=self._window,
            num_negatives=self._num_negatives,
            learning_rate=rate,
            seed=part.seed,
            frozen=self._frozen,
        )
        samples = (source[_sample(part.tokens)], target[_sample(part.tokens)], target[_sample(part.negatives)])
        skipgram.subtract_taken(source, source_rows, part.source)
        skipgram.subtract_taken(target, target_rows, part.target)
        return _Learned(
            source,
            target,
            loss,
            pairs,
            contexts / max(1, len(part.tokens)),
            samples,
        )

    def _exposures(self, part: _Part, learned: _Learned) -> tuple[np.ndarray, np.ndarray]:
        """How many steps each input and each output row has taken, all partners counted: float64 [u], [v].

        An input row meets a target and its negatives each time it is a context; an output row meets every query of its
        position, and of the positions that draw it.
        """
        count = np.bincount(part.tokens, minlength=len(part.target))
        drawn = np.bincount(part.negatives, minlength=len(part.target)) * (
            self._num_negatives * len(part.tokens) / max(1, len(part.negatives))
        )
        source_steps = learned.contexts * (1 + self._num_negatives) * count[: len(part.source)]
        return source_steps, (1.0 if self._cbow else learned.contexts) * (count + drawn)

    def _partner_moments(self, parts: Sequence[_Part], learned: Sequence[_Learned]) -> tuple[np.ndarray, np.ndarray]:
        """E[p p'] over the partners p of input rows, and of output rows: float32 [dim, dim] each, of a sample."""
        dim, num_negatives = self.query_tower.spec.dim, self._num_negatives
        source, own, drawn = (
            torch.from_numpy(np.concatenate([one.samples[i][:, :dim] for one in learned])) for i in range(3)
        )
        contexts = max(
            1.0,
            sum(len(p.tokens) * one.contexts for p, one in zip(parts, learned, strict=True))
            / max(1, sum(len(p.tokens) for p in parts)),
        )
        queries = source.T @ source / max(1, len(source))
        if self._cbow and len(source):  # the mean of `contexts` rows
            center = source.mean(0)
            queries = queries / contexts + (1.0 - 1.0 / contexts) * torch.outer(center, center)
        outputs = own.T @ own / max(1, len(own)) + num_negatives * (drawn.T @ drawn) / max(1, len(drawn))
        return (outputs / (1 + num_negatives)).numpy(), queries.numpy()

    def encode_queries(self, history: Ragged, single: Mapping[str, Given]) -> Tensor:
        """Query vectors of n histories: float32 [n, dim]. A collective call."""
        inputs = input_rows(self.query_tower.spec, history=history, single=single)
        with torch.no_grad():
            return self.query_tower(read_blocks(self.tables, inputs, _TABLES))  # type: ignore[no-any-return]

    def encode_items(self, start: int, stop: int) -> Tensor:
        """Candidate vectors of items start..stop - 1: float32 [stop - start, dim]. A collective call."""
        return self.vectors("item", start, stop)

    def vectors(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a vector set of the artifact: float32 [stop - start, dim]. A collective call."""
        with torch.no_grad():
            return self.tables.lookup({_TABLES[name]: torch.arange(start, stop)})[_TABLES[name]]

    def vector_sets(self) -> dict[str, str]:
        """Vector set of the artifact -> key map of its rows."""
        return {"item": "item", "input": "item"}

    def table_rows(self, name: str) -> int:
        """Ids of the table behind a vector set."""
        return self.num_items

    def table_of(self, name: str) -> str | None:
        """The table that holds a vector set as it is."""
        return _TABLES[name]

    similar_set = "input"


def own_part(map: RowMap, ids: np.ndarray) -> np.ndarray:
    """What part of its change each of a block's distinct `ids` (int64 [n]) gives to its rows: float32 [n].

    Each has learned for itself, as if its rows were its own, and their changes add up in the rows that they share: a
    row of n ids would overshoot n times over, if they agree, and by sqrt(n), if they do not. 1 / mean of sqrt(n) over
    an id's rows; their mean, 1 / n, learns more slowly and no better, the plain sum diverges.
    """
    if not len(ids):
        return np.empty(0, np.float32)
    lists = map.lists(ids)
    _, row, num = np.unique(lists.values, return_inverse=True, return_counts=True)
    part: np.ndarray = lists.lengths / np.add.reduceat(np.sqrt(num)[row], lists.offsets[:-1])
    return part.astype(np.float32)


def _sample(rows: np.ndarray) -> np.ndarray:
    """About `_SAMPLE` of `rows`, evenly spaced."""
    return rows[:: max(1, len(rows) // _SAMPLE)]
