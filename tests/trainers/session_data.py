"""Small session files for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KINDS = ("parquet", "ipc_file", "ipc_stream")


def write_table(path: Path, columns: Mapping[str, Any] | pa.Table, kind: str = "parquet", chunk: int = 10) -> Path:
    """Write columns (or a table) as `kind`, `chunk` rows in every row group or record batch."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=chunk)
        return path
    make = pa.ipc.new_file if kind == "ipc_file" else pa.ipc.new_stream
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


def numbered_sessions(count: int, first: int = 0) -> pa.Table:
    """Session i has user i and the items i, i + 1, ... (i % 4 of them: every fourth is empty)."""
    users = range(first, first + count)
    return pa.table(
        {
            "items": pa.array([list(range(user, user + user % 4)) for user in users], pa.list_(pa.int64())),
            "user": pa.array(users, pa.int64()),
        }
    )
