"""A session corpus that every machine has: the calls that the functions of the Python standard library make.

A session is the sequence of calls in one function or method, in source order; an item is a call's dotted name:

    from os import path as p                    session "shop.stock:Stock.load":
    class Stock:                                    os.path.join
        def load(self, name):                       self.check
            file = p.join(ROOT, name)               open
            self.check(open(file).read())           open().read

Names are as written, except that what the module imports or defines at top level is written in full (`p.join` is
`os.path.join`, and `Stock` is `shop.stock.Stock`, here as in the modules that import it). `()` stands for a call and
`[]` for a subscript inside a name, `str` for a string literal. A bare `super()`, which only ever precedes the call of a
method on it, and a call that repeats the one before it are left out, and so are functions with fewer than two calls
then.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError, SettingError
from cluster.storage import complete_file
from embedding_service.hashing import stable_hash

SESSION_SCHEMA = pa.schema({"session": pa.string(), "module": pa.string(), "items": pa.list_(pa.string())})
CASE_SCHEMA = pa.schema({"session": pa.string(), "history": pa.list_(pa.string()), "items": pa.list_(pa.string())})

# tests repeat one another, and vendored packages are copies of others: a copy in train would give test cases away
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "_vendor", "_vendored", "__pycache__"})
_ROW_GROUP_ROWS = 8192

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Names = Mapping[str, str]


@dataclass(frozen=True)
class CallSession:
    """The calls of one function: at least two, no two equal ones side by side."""

    name: str  # module:qualname
    module: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class CorpusSummary:
    """What `write_corpus` has read and written."""

    files: int  # read and parsed
    skipped: int  # files that cannot be read, decoded or parsed
    functions: int  # with and without calls
    sessions: int  # functions with two or more calls
    calls: int  # items of all sessions
    train_sessions: int
    test_cases: int


def write_corpus(
    folder: str | Path,
    *,
    site_packages: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
    sources: Sequence[str | Path] = (),
    max_cases: int = 3,
) -> CorpusSummary:
    """Write `train.parquet` (session, module, items) and `test.parquet` (session, history, items) into `folder`.

    The standard library of the running Python is read; with `site_packages` all installed packages as well; `sources`
    (folders that would be on sys.path) replaces both. A share of about `held_out` of the functions, chosen by a stable
    hash of their names and `seed`, is not in train; each of them gives up to `max_cases` test cases by `next_calls`.
    The same files give the same bytes. Files are read one at a time and written in row groups of 8,192 rows, so memory
    does not grow with the corpus; both files appear when all is done.

    Raises DataError where there is nothing to read and SettingError for a `held_out` outside (0, 1).
    """
    if not 0 < held_out < 1:
        raise SettingError("held_out", f"must be more than 0 and less than 1; got {held_out}")
    roots = [Path(source) for source in sources] or source_roots(site_packages=site_packages)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = skipped = functions = sessions = calls = 0
    with ExitStack() as stack:
        train = stack.enter_context(_parquet_rows(target / "train.parquet", SESSION_SCHEMA))
        test = stack.enter_context(_parquet_rows(target / "test.parquet", CASE_SCHEMA))
        for module, path in python_files(roots):
            tree = parse(path)
            if tree is None:
                skipped += 1
                continue
            files += 1
            found = list(function_calls(tree, module, is_package=path.stem == "__init__"))
            functions += len(found)
            kept = [session for session in found if len(session.items) >= 2]
            sessions += len(kept)
            calls += sum(len(session.items) for session in kept)
            for session, hidden in zip(kept, _is_held_out(kept, held_out, seed), strict=True):
                if not hidden:
                    train.add(session.name, session.module, session.items)
                    continue
                for history, item in next_calls(session.items, max_cases):
                    test.add(session.name, history, [item])
        if not sessions:
            raise DataError("there are no Python functions to learn from here", file=", ".join(map(str, roots)))
    return CorpusSummary(files, skipped, functions, sessions, calls, train.num_rows, test.num_rows)


def next_calls(items: Sequence[str], max_cases: int) -> list[tuple[Sequence[str], str]]:
    """(prefix, next call) cases of one function, at most `max_cases`, shortest prefix first.

    A call is asked for only where the prefix has not made it yet: recommendations leave out what was seen. If there are
    more such places than `max_cases`, the last one and others at even distances before it are taken.
    """
    places = [i for i in range(1, len(items)) if items[i] not in items[:i]]
    num_cases = min(max_cases, len(places))
    chosen = [places[(case + 1) * len(places) // num_cases - 1] for case in range(num_cases)]
    return [(items[:place], items[place]) for place in chosen]


def source_roots(*, site_packages: bool = False) -> list[Path]:
    """The folders of the running Python's standard library and, if wanted, of its installed packages."""
    names = ["stdlib", "purelib", "platlib"] if site_packages else ["stdlib"]
    return list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in names))


def python_files(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """(module name, path) of the modules below `roots`, in the order of the roots and then of their paths.

    Folders whose name is no identifier (site-packages, lib-dynload, *.dist-info) are no packages and passed over, as
    are tests, IDLE and vendored copies.
    """
    for root in roots:
        for parent, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name.isidentifier() and name not in _SKIPPED_FOLDERS)
            package = Path(parent).relative_to(root).parts
            for file in sorted(files):
                stem, extension = os.path.splitext(file)
                if extension == ".py" and stem.isidentifier():
                    names = package if stem == "__init__" else (*package, stem)
                    yield ".".join(names) or stem, Path(parent, file)


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or None if it cannot be read, decoded or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are not this reader's business
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def function_calls(tree: ast.Module, module: str, *, is_package: bool = False) -> Iterator[CallSession]:
    """The calls of every function and method in `tree`, nested ones included, also where there are fewer than two."""
    package = module if is_package else module.rpartition(".")[0]
    scope = _Scope(tree)
    defined = {node.name: f"{module}.{node.name}" for node in scope.definitions}
    yield from _inner_functions(scope, module, "", package, {**defined, **scope.imported(package)})


def _inner_functions(scope: _Scope, module: str, prefix: str, package: str, names: _Names) -> Iterator[CallSession]:
    for node in scope.definitions:
        inner = _Scope(node)
        if isinstance(node, ast.ClassDef):
            yield from _inner_functions(inner, module, f"{prefix}{node.name}.", package, names)
            continue
        parameters = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        visible = {name: full for name, full in names.items() if name not in parameters}
        visible.update(inner.imported(package))
        yield CallSession(f"{module}:{prefix}{node.name}", module, inner.calls(visible))
        yield from _inner_functions(inner, module, f"{prefix}{node.name}.<locals>.", package, visible)


class _Scope:
    """What the body of a module, class or function holds itself, without the bodies of definitions inside it."""

    def __init__(self, owner: ast.Module | ast.ClassDef | _Function) -> None:
        self.definitions: list[ast.ClassDef | _Function] = []
        self._imports: list[ast.Import | ast.ImportFrom] = []
        self._calls: list[ast.Call] = []
        pending: list[ast.AST] = list(reversed(owner.body))
        while pending:  # no recursion: generated code nests deeper than Python's stack
            node = pending.pop()
            inside = list(ast.iter_child_nodes(node))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.definitions.append(node)
                inside = [*node.decorator_list, node.args]  # evaluated out here, where the function is defined
            elif isinstance(node, ast.ClassDef):
                self.definitions.append(node)
                inside = [*node.decorator_list, *node.bases, *node.keywords]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self._imports.append(node)
            elif isinstance(node, ast.Call):
                self._calls.append(node)
            pending.extend(reversed(inside))

    def imported(self, package: str) -> dict[str, str]:
        """Local name -> full name of what the scope imports; relative imports are those of a module in `package`."""
        names = {}
        for node in self._imports:
            for alias in node.names:
                if isinstance(node, ast.ImportFrom):
                    names[alias.asname or alias.name] = f"{_absolute(node, package)}.{alias.name}"
                elif alias.asname:
                    names[alias.asname] = alias.name
                else:  # `import a.b` binds a
                    names[alias.name.partition(".")[0]] = alias.name.partition(".")[0]
        return names

    def calls(self, names: _Names) -> tuple[str, ...]:
        """Names of the calls in the order of their opening brackets, immediate repeats left out."""
        ordered = sorted(self._calls, key=lambda call: (call.func.end_lineno or 0, call.func.end_col_offset or 0))
        items: list[str] = []
        for call in ordered:
            name = _call_name(call.func, names)
            if name not in (None, "super") and (not items or items[-1] != name):
                items.append(name)
        return tuple(items)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    kept = parents[: max(len(parents) - node.level + 1, 0)]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _call_name(function: ast.expr, names: _Names) -> str | None:
    """The dotted name of a called expression; None where it has no readable one (`f(x)(y)`, `(a or b)()`)."""
    if isinstance(function, ast.Call):
        return None
    suffix = ""
    node = function
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            suffix, node = f".{node.attr}{suffix}", node.value
        elif isinstance(node, ast.Call):
            suffix, node = f"(){suffix}", node.func
        elif isinstance(node, ast.Subscript):
            suffix, node = f"[]{suffix}", node.value
        elif isinstance(node, ast.JoinedStr):
            return f"str{suffix}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            return f"{type(node.value).__name__}{suffix}"
        else:
            return None
    return names.get(node.id, node.id) + suffix


def _is_held_out(sessions: Sequence[CallSession], share: float, seed: int) -> list[bool]:
    hashes = stable_hash(pa.array([session.name for session in sessions], pa.string()), seed=seed)
    hidden: list[bool] = (hashes < np.uint64(int(share * 2**64))).tolist()
    return hidden


class _RowBuffer:
    """Rows on their way into a Parquet file, written as a row group whenever there are enough."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self.num_rows = 0
        self._writer = writer
        self._rows: list[tuple[object, ...]] = []

    def add(self, *row: object) -> None:
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == _ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            schema = self._writer.schema
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            self._rows.clear()


@contextmanager
def _parquet_rows(path: Path, schema: pa.Schema) -> Iterator[_RowBuffer]:
    """A buffer of rows for a zstd Parquet file that appears at `path`, whole, if the block does not raise."""
    with complete_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        rows = _RowBuffer(writer)
        yield rows
        rows.flush()
