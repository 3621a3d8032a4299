"""Tables larger than memory, on CPU: a rank's rows in a file on local disk that is mapped into memory.

The system keeps in memory what is used and writes the rest back when it wants the memory. The file has no name: it is
gone with its process, whatever ends it. What has to last is a checkpoint's.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as TensorShard

from embedding_service.row_exchange import Shard
from embedding_service.tables import Optimizer, TableSpec

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class DiskTable:
    """This rank's rows of table `spec` and of its optimiser's state, on the disk of `spec.folder`; all zero at first.

    Rank r holds rows from r * ceil(rows / ranks) on, as in memory, so that a checkpoint fits both.
    """

    def __init__(self, spec: TableSpec, *, optimizer: Optimizer) -> None:
        """Raises OSError, which names the folder, where it does not exist or has no room for the rows."""
        self.spec = spec
        world, rank = dist.get_world_size(), dist.get_rank()
        per_rank = -(-spec.rows // world)
        self._starts = [min(spec.rows, per_rank * r) for r in range(world + 1)]
        self.first_row = self._starts[rank]
        rows = self._starts[rank + 1] - self.first_row
        width = {"sgd": 0, "rowwise_adagrad": 1, "adagrad": spec.dim}[optimizer]
        self._maps: list[mmap.mmap] = []
        weights = self._mapped(rows, spec.dim, _DTYPES[spec.precision])
        state = self._mapped(rows, width, torch.float32)
        self.shard = Shard(spec.rows, per_rank, weights, state, spec.frozen, on_disk=True)
        self.is_scanned = True

    def _mapped(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        size = rows * width * dtype.itemsize
        if not size:
            return torch.zeros(rows, width, dtype=dtype)
        with tempfile.TemporaryFile(dir=self.spec.folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now, not by a signal in a later step
            except OSError as error:
                problem = f"{error.strerror}: table {self.spec.name} needs {size:,} bytes there"
                raise OSError(error.errno, problem, self.spec.folder) from None
            memory = mmap.mmap(file.fileno(), size)
        self._maps.append(memory)
        numbers = np.frombuffer(memory, np.float16 if dtype == torch.float16 else np.float32)
        return torch.from_numpy(numbers.reshape(rows, width))

    def expect(self, *, scan: bool) -> None:
        """Say how rows will be read: from beginning to end, or here and there, which is when reading ahead is waste."""
        if scan != self.is_scanned:
            for memory in self._maps:
                memory.madvise(mmap.MADV_NORMAL if scan else mmap.MADV_RANDOM)
            self.is_scanned = scan

    def state_dict(self) -> dict[str, ShardedTensor]:
        """`weight.<name>` and `optimizer.<name>.momentum1` as TorchRec lays them out, not copies."""
        name, state = self.spec.name, self.shard.state
        found = {f"weight.{name}": self._sharded(self.shard.weights)}
        if state.shape[1]:
            found[f"optimizer.{name}.momentum1"] = self._sharded(state[:, 0] if state.shape[1] == 1 else state)
        return found

    def _sharded(self, tensor: Tensor) -> ShardedTensor:
        width = list(tensor.shape[1:])
        spans = [
            ShardMetadata([start, *[0] * len(width)], [stop - start, *width], f"rank:{rank}/cpu")
            for rank, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False))
        ]
        own = spans[dist.get_rank()]
        metadata = ShardedTensorMetadata(
            shards_metadata=[span for span in spans if span.shard_sizes[0]],
            size=torch.Size([self.spec.rows, *width]),
            tensor_properties=TensorProperties(dtype=tensor.dtype),
        )
        shards = [TensorShard(tensor, own)] if len(tensor) else []
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)
