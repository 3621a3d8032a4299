from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import DataError
from tests.trainers.session_data import KINDS, numbered_sessions, write_table
from trainers.session_files import find_files, open_files
from trainers.sessions import Columns, SessionReader


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.parquet", "deep/er/c.parquet", "day=1/part-0", "day=2/part-0", "_log", ".hidden",
                 "_temporary/d.parquet", "deep/.part.crc", "deep/_SUCCESS"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a.parquet", "b.parquet", "day=1/part-0", "day=2/part-0", "deep/er/c.parquet"]),
        ("/", ["a.parquet", "b.parquet", "day=1/part-0", "day=2/part-0", "deep/er/c.parquet"]),
        ("/*.parquet", ["a.parquet", "b.parquet"]),
        ("/**/*.parquet", ["a.parquet", "b.parquet", "deep/er/c.parquet"]),
        ("/deep/**", ["er/c.parquet"]),
        ("/day=*", ["day=1/part-0", "day=2/part-0"]),
        ("/day=[!1]/*", ["day=2/part-0"]),
        ("/[ab].parquet", ["a.parquet", "b.parquet"]),
        ("/?.parquet", ["a.parquet", "b.parquet"]),
        ("/_temp*/*", ["_temporary/d.parquet"]),
        ("/_log", ["_log"]),
        ("/a.parquet", ["a.parquet"]),
    ],
)
def test_files_globs_and_folders(tree: Path, pattern: str, expected: list[str]) -> None:
    assert [relative for _, relative, _, _ in find_files(str(tree) + pattern)] == expected
    if "?" not in pattern:  # in a URL it begins the query
        urls = [name for name, _, _, _ in find_files(f"file://{tree}{pattern}")]
        assert [
            url.removeprefix(f"file://{tree}/").removeprefix("deep/" * (pattern == "/deep/**")) for url in urls
        ] == expected


def test_a_relative_glob_starts_at_the_working_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert [relative for _, relative, _, _ in find_files("*.parquet")] == ["a.parquet", "b.parquet"]


def test_a_name_with_brackets_is_a_name_if_it_exists(tmp_path: Path) -> None:
    file = write_table(tmp_path / "part[1]*.parquet", numbered_sessions(3))
    assert SessionReader(str(file)).num_sessions == 3


def test_kinds_are_told_by_content_and_may_be_mixed(tmp_path: Path) -> None:
    for i, kind in enumerate(KINDS):
        write_table(tmp_path / f"{i}.parquet", numbered_sessions(10, 10 * i), kind)
    reader = SessionReader(f"file://{tmp_path}", Columns(user="user"))
    assert reader.files == tuple(f"file://{tmp_path}/{i}.parquet" for i in range(3))
    assert sorted(reader.read_window(0, 0).user.to_pylist()) == list(range(30))  # type: ignore[union-attr]


def message(source: str, columns: Columns = Columns()) -> str:  # noqa: B008
    with pytest.raises(DataError) as caught:
        SessionReader(source, columns)
    return str(caught.value)


def test_no_source() -> None:
    assert message("") == "no data is named: `--set data.train=PATH` names a file, a folder, a glob or a URL"


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    expected = "there is no such file or folder; check the path (relative to the working directory)"
    assert message(f"{tmp_path}/no") == f"{tmp_path}/no: {expected}"


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", numbered_sessions(3))
    ignored = "(files whose name starts with _ or . are ignored)"
    assert message(f"{tmp_path}/*.arrow") == f"{tmp_path}/*.arrow: matches no file {ignored}"
    assert message(f"{tmp_path}/no/*.arrow") == (
        f"{tmp_path}/no/*.arrow: matches nothing: there is no folder {tmp_path}/no/; "
        "check the path (relative to the working directory)"
    )


def test_a_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / "_SUCCESS").touch()
    assert message(str(tmp_path)) == f"{tmp_path}: holds no file (files whose name starts with _ or . are ignored)"


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_without_rows(tmp_path: Path, kind: str) -> None:
    write_table(tmp_path / "a", numbered_sessions(0), kind)
    write_table(tmp_path / "b", numbered_sessions(0), kind)
    assert message(str(tmp_path)) == f"{tmp_path}: the data set is empty: 2 file(s), 0 rows"


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"session,item\n1,2\n", r"it starts with b'session,'"), (b"", "it has 0 bytes"), (b"ab", "it starts with b'ab'")],
)
def test_a_file_of_another_format(tmp_path: Path, content: bytes, found: str) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    assert message(str(file)) == (
        f"{file}: is neither Parquet nor Arrow IPC ({found}); convert it or take it away "
        "(files whose name starts with _ or . are ignored)"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    whole = write_table(tmp_path / "whole", numbered_sessions(30), kind).read_bytes()
    file = tmp_path / "cut"
    complete_stream = [len(whole) - 8] if kind == "ipc_stream" else []  # all but the end mark, which is optional
    for length in range(8, len(whole), 7):
        if length in complete_stream:
            continue
        file.write_bytes(whole[:length])
        refused = message(str(file))
        assert refused.startswith(str(file))
        assert any(text in refused for text in ("truncated", "ends inside record batch", "does not begin with a schema",
                                                "damaged", "the data set is empty", "no Arrow message"))  # fmt: skip


def test_a_truncated_parquet_file_says_so(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a", numbered_sessions(30))
    file.write_bytes(file.read_bytes()[:-20])
    assert message(str(file)) == f"{file}: is a truncated Parquet file: it does not end in PAR1; write or copy it again"


def test_a_truncated_arrow_file_says_so(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a", numbered_sessions(30), "ipc_file")
    file.write_bytes(file.read_bytes()[:-20])
    assert message(str(file)) == f"{file}: is a truncated Arrow file: it does not end in ARROW1; write or copy it again"


def test_a_truncated_arrow_stream_says_where(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a", numbered_sessions(30), "ipc_stream")
    file.write_bytes(file.read_bytes()[:-20])
    assert message(str(file)) == f"{file}, row group 2: ends inside record batch 2; write or copy it again"


def test_bytes_after_a_stream_are_not_ignored(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a", numbered_sessions(30), "ipc_stream")
    file.write_bytes(file.read_bytes() * 2)
    assert "bytes after the end of the stream; put every stream in its own file" in message(str(file))


def test_damage_inside_a_parquet_row_group_says_where(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a", numbered_sessions(30))
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36  # the first page's header
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a, row group 0: is damaged: .*; write or copy it again"):
        SessionReader(str(file)).read_window(0, 0)


def test_damage_inside_a_record_batch_says_where(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2], pa.int32())
    file = write_table(tmp_path / "a", {"items": pa.ListArray.from_arrays(offsets, pa.array([77, 78]))}, "ipc_stream")
    content = file.read_bytes()
    place = content.index(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]))  # the offsets 0, 1, 2
    file.write_bytes(content[:place] + bytes([0, 0, 0, 0, 255, 255, 0, 0]) + content[place + 8 :])
    with pytest.raises(DataError, match=r"a, row group 0: is damaged: .*; write or copy it again"):
        SessionReader(str(file)).read_window(0, 0)


def test_one_bad_file_among_many_is_the_one_named(tmp_path: Path) -> None:
    for i in range(20):
        write_table(tmp_path / f"{i:02}", numbered_sessions(3))
    (tmp_path / "13").write_bytes(b"not a table at all")
    assert message(str(tmp_path)).startswith(f"{tmp_path}/13: is neither Parquet nor Arrow IPC")


def test_opening_calls_the_check_with_every_schema(tmp_path: Path) -> None:
    write_table(tmp_path / "a", numbered_sessions(3))
    write_table(tmp_path / "b", numbered_sessions(3), "ipc_file")
    seen = []
    files = open_files(str(tmp_path), lambda schema, name: seen.append((name, schema.names)))
    assert sorted(seen) == [(file.name, ["items", "user"]) for file in files]
