"""Sessions of calls, from small programs whose calls are known and from the standard library itself."""

from __future__ import annotations

import ast
import dataclasses
import sysconfig
import textwrap
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.errors import DataError, SettingError
from trainers import corpus
from trainers.corpus import function_calls, next_calls, parse, python_files, source_roots, write_corpus


def calls(source: str, module: str = "shop.stock", *, is_package: bool = False) -> dict[str, list[str]]:
    tree = ast.parse(textwrap.dedent(source))
    return {found.name: list(found.items) for found in function_calls(tree, module, is_package=is_package)}


def body(source: str) -> list[str]:
    """The calls of a function with these lines as its body."""
    return calls("def f():\n" + textwrap.indent(textwrap.dedent(source), "    "))["shop.stock:f"]


def test_the_example_of_the_documentation() -> None:
    lines = [line for line in (corpus.__doc__ or "").splitlines() if line.startswith("    ")]
    program, (title, *items) = "\n".join(line[:48] for line in lines), [line[48:].strip() for line in lines]
    assert calls(program) == {title.removeprefix('session "').removesuffix('":'): items}


def test_order_is_that_of_the_opening_brackets() -> None:
    assert body("a(b(c()), d())\ne()") == ["a", "b", "c", "d", "e"]
    assert body("x.first(y()).second(\n    z()\n).third()") == [
        "x.first",
        "y",
        "x.first().second",
        "z",
        "x.first().second().third",
    ]
    assert body("[g(i) for i in h()]\nw = lambda: v()") == ["g", "h", "v"]


def test_names() -> None:
    literals = "''.join(x)\nb''.join(x)\nf'{x}'.strip()"
    assert body("self.a.b()\n" + literals) == ["self.a.b", "str.join", "bytes.join", "str.strip"]
    assert body("x[0].go()\nx[1:2]()\nopen(p).read()") == ["x[].go", "x[]", "open", "open().read"]
    assert body("g(x)(y)\n(a or b)()\n(lambda: 1)()\n(name := c)()\n[].append(x)") == ["g"]


def test_imports_and_definitions_are_resolved() -> None:
    source = """
        import os.path, numpy as np, a.b as ab
        from collections import OrderedDict as Ordered, deque
        try:
            from fast import loads
        except ImportError:
            from slow import loads
        class Stock: ...
        def helper(): ...
        def f(deque):
            from json import dumps
            os.path.join(); np.dot(); ab.c(); Ordered(); deque(); loads(); dumps(); Stock(); helper(); unknown()
            def inner():
                dumps(); loads()
        def g():
            dumps()
    """
    found = calls(source)
    assert found["shop.stock:f"] == [
        *("os.path.join", "numpy.dot", "a.b.c", "collections.OrderedDict", "deque", "slow.loads", "json.dumps"),
        *("shop.stock.Stock", "shop.stock.helper", "unknown"),
    ]
    assert found["shop.stock:f.<locals>.inner"] == ["json.dumps", "slow.loads"]
    assert found["shop.stock:g"] == ["dumps"]


@pytest.mark.parametrize(
    ("line", "in_module", "in_package"),
    [
        ("from . import x", "shop.x", "shop.stock.x"),
        ("from .y import x", "shop.y.x", "shop.stock.y.x"),
        ("from ..y import x", "y.x", "shop.y.x"),
    ],
)
def test_relative_imports(line: str, in_module: str, in_package: str) -> None:
    source = f"{line}\ndef f(): x()"
    assert calls(source)["shop.stock:f"] == [in_module]
    assert calls(source, is_package=True)["shop.stock:f"] == [in_package]


def test_nested_functions_own_their_calls() -> None:
    source = """
        top()
        class Outer(base()):
            made_by_the_class = ignored()
            @decorate()
            async def method(self, x=ignored()):
                before()
                @wrap(1)
                def inner(y=default()):
                    within()
                class Local(parent()):
                    def deep(self):
                        deepest()
                after()
        if True:
            def conditional():
                one()
    """
    assert calls(source) == {
        "shop.stock:Outer.method": ["before", "wrap", "default", "parent", "after"],
        "shop.stock:Outer.method.<locals>.inner": ["within"],
        "shop.stock:Outer.method.<locals>.Local.deep": ["deepest"],
        "shop.stock:conditional": ["one"],
    }


def test_immediate_repeats_and_bare_super_are_left_out() -> None:
    assert body("a()\na()\nb()\na()\nsuper().__init__()\nsuper().__init__()") == ["a", "b", "a", "super().__init__"]


def test_code_nested_deeper_than_the_stack() -> None:
    deep = "x" + " + x" * 900 + " + last()"
    assert body(f"first()\ny = {deep}") == ["first", "last"]


def test_cases_ask_only_for_new_calls() -> None:
    assert next_calls("ab", 3) == [("a", "b")]
    assert next_calls("aba", 3) == [("a", "b")]
    assert next_calls("abcdefg", 3) == [("ab", "c"), ("abcd", "e"), ("abcdef", "g")]
    assert next_calls("abacad", 2) == [("a", "b"), ("abaca", "d")]
    assert next_calls("aa", 3) == []


def write_program(root: Path, module: str, num_functions: int) -> None:
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"def f{i}():\n    start()\n    step_{i % 7}()\n    stop()\n" for i in range(num_functions))
    )


def test_the_split_is_whole_and_repeatable(tmp_path: Path) -> None:
    for module in ("b.two", "a", "b.one"):
        write_program(tmp_path / "src", module, 200)
    first = write_corpus(tmp_path / "first", sources=[tmp_path / "src"], held_out=0.2)
    again = write_corpus(tmp_path / "again", sources=[tmp_path / "src"], held_out=0.2)
    other = write_corpus(tmp_path / "other", sources=[tmp_path / "src"], held_out=0.2, seed=1)
    assert first == again
    for name in ("train.parquet", "test.parquet"):
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes()
        assert content != (tmp_path / "other" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["test.parquet", "train.parquet"]

    train = pq.read_table(tmp_path / "first" / "train.parquet")
    test = pq.read_table(tmp_path / "first" / "test.parquet")
    assert train.schema == corpus.SESSION_SCHEMA
    assert test.schema == corpus.CASE_SCHEMA
    seen, hidden = train["session"].to_pylist(), set(test["session"].to_pylist())
    assert seen == sorted(seen, key=lambda name: (name.split(":")[0], int(name.split(":f")[1])))
    assert hidden.isdisjoint(seen)
    assert hidden | set(seen) == {f"{module}:f{i}" for module in ("a", "b.one", "b.two") for i in range(200)}
    assert 0.15 < len(hidden) / 600 < 0.25
    assert train.slice(0, 1).to_pylist() == [{"session": "a:f0", "module": "a", "items": ["start", "step_0", "stop"]}]
    assert (first.files, first.functions, first.sessions, first.calls) == (3, 600, 600, 1800)
    assert (first.train_sessions, first.test_cases) == (len(seen), len(test))
    assert (other.sessions, other.calls) == (600, 1800)
    for case in test.slice(0, 20).to_pylist():
        number = int(case["session"].split(":f")[1])
        whole = ["start", f"step_{number % 7}", "stop"]
        assert [*case["history"], *case["items"]] == whole[: len(case["history"]) + 1]


def test_row_groups_bound_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_ROW_GROUP_ROWS", 50)
    write_program(tmp_path / "src", "a", 200)
    summary = write_corpus(tmp_path / "out", sources=[tmp_path / "src"])
    file = pq.ParquetFile(tmp_path / "out" / "train.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(sizes) == summary.train_sessions
    assert max(sizes) == 50
    assert file.metadata.row_group(0).column(2).compression == "ZSTD"


def test_files_that_do_not_parse_are_counted(tmp_path: Path) -> None:
    write_program(tmp_path / "src", "good", 3)
    broken = {"syntax": b"def f(:", "latin": b"x = '\xe9'", "null": b"x = 1\0"}
    for name, content in broken.items():
        (tmp_path / "src" / f"{name}.py").write_bytes(content)
    (tmp_path / "src" / "coded.py").write_bytes("# coding: latin-1\ndef f():\n    é()\n    b()\n".encode("latin-1"))
    summary = write_corpus(tmp_path / "out", sources=[tmp_path / "src"], held_out=0.001)
    assert (summary.files, summary.skipped, summary.sessions) == (2, len(broken), 4)
    assert ["é", "b"] in pq.read_table(tmp_path / "out" / "train.parquet")["items"].to_pylist()


def test_warnings_of_the_parser_are_silenced(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text('x = "\\d"\nassert (x, "always true")\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(tmp_path / "old.py") is not None


def test_which_files_are_modules(tmp_path: Path) -> None:
    names = ["z.py", "p/__init__.py", "p/m.py", "p/tests/t.py", "test/t.py", "site-packages/s.py", "p/_vendor/v.py"]
    for name in [*names, "p/not-a-module.py", "p/data.txt", "p.dist-info/x.py", "a/b.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [(module, path.relative_to(tmp_path).as_posix()) for module, path in python_files([tmp_path])]
    assert found == [("z", "z.py"), ("a.b", "a/b.py"), ("p", "p/__init__.py"), ("p.m", "p/m.py")]


def test_nothing_to_read_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(DataError, match=r"src: there are no Python functions"):
        write_corpus(tmp_path / "out", sources=[tmp_path / "src"])
    assert list((tmp_path / "out").iterdir()) == []
    for wrong in (0.0, 1.0):
        with pytest.raises(SettingError, match="held_out"):
            write_corpus(tmp_path / "out", sources=[tmp_path / "src"], held_out=wrong)


def test_the_standard_library_has_sessions() -> None:
    (root,) = source_roots()
    assert root == Path(sysconfig.get_path("stdlib"))
    assert set(source_roots(site_packages=True)) > {root}
    modules = {module: path for module, path in python_files([root])}
    assert not any("test" in module.split(".") or module.startswith("site-packages") for module in modules)
    tree = parse(modules["json.decoder"])
    assert tree is not None
    found = {session.name: session.items for session in function_calls(tree, "json.decoder")}
    assert "json.scanner.make_scanner" in found["json.decoder:JSONDecoder.__init__"]
    assert "self.scan_once" in found["json.decoder:JSONDecoder.raw_decode"]


def test_the_summary_is_plain_data() -> None:
    summary = corpus.CorpusSummary(1, 2, 3, 4, 5, 6, 7)
    assert set(dataclasses.asdict(summary)) >= {"files", "functions", "sessions", "calls", "skipped"}
