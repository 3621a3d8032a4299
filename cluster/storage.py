"""One way to reach files: local paths and object-store URLs, checksums, and writes that either happen or do not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs

from cluster.errors import DataError


def open_filesystem(location: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem and the path on it of a local path or an `s3://`, `gs://`, `file://` URL.

    Raises DataError for a scheme that cannot be opened.
    """
    text = os.fspath(location)
    if "://" not in text:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
        return filesystem, str(path)
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"cannot be opened: {error}", file=text) from None


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """A temporary name next to `path` that becomes `path` if the block succeeds, and else goes away.

    A reader sees all of the file or the former one, whatever is killed when. Raises OSError where it cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file", str(target))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` to a local `path`, all of it or nothing."""
    with complete_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def sync_folder(folder: str | Path) -> None:
    """Make the folder's entries (renames, new files) durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(temporary: str | Path, final: str | Path) -> None:
    """Rename a finished folder to its final name, after making its files durable. `final` must not exist."""
    for file in Path(temporary).rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        elif file.is_dir():
            sync_folder(file)
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(Path(final).parent)


def remove_folder(folder: str | Path) -> None:
    """Remove a folder and all below it; the name disappears first, so that no reader meets half of it."""
    path = Path(folder)
    if not path.exists():
        return
    doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex}.removed")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def checksum(path: str | Path) -> str:
    """`sha256:<hex>` of a local file's bytes, read in pieces."""
    with open(path, "rb") as handle:
        return "sha256:" + hashlib.file_digest(handle, "sha256").hexdigest()
