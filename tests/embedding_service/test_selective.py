"""Filters, diversity, explanations and live changes, against brute force over the stored vectors."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.errors import ArtifactError, DataError, KeyNotFound
from embedding_service import activations, admission, attributes, http_queries, overlay
from embedding_service import allowed as search_among
from embedding_service import selective as selective_module
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.attributes import Attributes
from embedding_service.gates import Gates
from embedding_service.http_schema import ARROW_TYPE
from embedding_service.keys import Vocabulary
from embedding_service.overlay import Added, Overlay
from embedding_service.retrieval import Retriever
from embedding_service.selective import SelectiveRetriever, Wishes
from embedding_service.towers import TowerInput, TowerSpec
from tests.embedding_service.artifacts import DIM as PUBLISHED_DIM
from tests.embedding_service.artifacts import HISTORY, clustered, publish
from tests.embedding_service.services import LocalService
from tests.embedding_service.test_hostile_versions import replaced
from tests.embedding_service.test_http_arrow import column, stream

ROWS, DIM, K = 3000, 16, 10
KEYS = [f"i{row:04d}" for row in range(ROWS)]
COLOURS = ["red", "green", "blue", "rare"]


def colour(row: int) -> str:
    return "rare" if row % 997 == 5 else COLOURS[row % 3]


def write(
    root: Path, version: str, *, factory: str = "HNSW32", keep: int = ROWS, table: pa.Table | None = None
) -> Path:
    vectors = clustered(ROWS, DIM, clusters=40, seed=3)
    with ArtifactWriter(root, version) as writer:
        writer.add_keys("item", Vocabulary(pa.array(KEYS[:keep]), np.arange(keep, 0, -1)))
        writer.add_vectors("item", rows=keep, dim=DIM, keys="item", precision="fp32").write(0, vectors[:keep])
        writer.set_query_tower(TowerSpec((TowerInput("history", "history", "item", DIM, decay=0.8),), DIM), {})
        for name in ("recommend", "similar"):
            metric: Any = "cosine" if name == "similar" else "ip"
            writer.add_index(name, vectors="item", metric=metric, factory=factory, recall_target=0.99, recall_k=K)
        rows = [row for row in range(keep) if row % 50]  # some items have no attributes
        table = pa.table({
            "item": [KEYS[row] for row in rows], "colour": [colour(row) for row in rows],
            "size": [row % 7 for row in rows], "available": [row % 2 == 0 for row in rows],
        })  # fmt: skip
        pq.write_table(table, root / "table.parquet")
        writer.add_file("attributes.parquet", root / "table.parquet")
        return writer.publish(lineage={}, figures={})


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("root"), "one")


@pytest.fixture
def selective(version: Path, tmp_path: Path) -> SelectiveRetriever:
    artifact = Artifact.open(version)
    attributes = Attributes.read(version / "attributes.parquet", artifact.keys("item"))
    return SelectiveRetriever(Retriever(artifact), Overlay(tmp_path / "overlay" / "one.json"), attributes)


def best(query: np.ndarray, rows: list[int], k: int) -> list[str]:
    """The slow formula: all allowed rows, sorted by inner product."""
    scores = clustered(ROWS, DIM, clusters=40, seed=3)[rows].astype(np.float64) @ query.astype(np.float64)
    return [KEYS[rows[place]] for place in np.lexsort((rows, -scores))[:k]]


QUERIES = clustered(40, DIM, clusters=40, seed=3) + 0.1


class TestFilters:
    @pytest.mark.parametrize("through_index", [True, False])
    @pytest.mark.parametrize(
        ("where", "fits"),
        [
            ({"colour": "red"}, lambda row: colour(row) == "red"),
            (
                {"colour": ["red", "rare"], "available": True},
                lambda row: colour(row) in ("red", "rare") and row % 2 == 0,
            ),
            ({"colour": "rare"}, lambda row: colour(row) == "rare"),  # four items: fewer than k
            ({"size": 3, "available": False}, lambda row: row % 7 == 3 and row % 2),
            ({"size": [0, 1, 2, 3, 4, 5, 6]}, lambda row: True),
            ({"colour": "nobody's"}, lambda row: False),
        ],
    )  # fmt: skip
    def test_as_brute_force(
        self,
        selective: SelectiveRetriever,
        monkeypatch: pytest.MonkeyPatch,
        where: Any,
        fits: Any,
        through_index: bool,
    ) -> None:
        if through_index:
            monkeypatch.setattr(search_among, "EXACT_ROWS", 0)
        rows = [row for row in range(ROWS) if row % 50 and fits(row)]
        found = selective.search(QUERIES, K, Wishes(where=where)).keys
        expected = [best(query, rows, K) for query in QUERIES]
        assert [len(keys) for keys in found] == [min(K, len(rows))] * len(QUERIES)
        assert all({int(key[1:]) for key in keys} <= set(rows) for keys in found)
        pairs = [(set(a), set(b)) for a, b in zip(found, expected, strict=True) if b]
        same = np.mean([len(a & b) / len(b) for a, b in pairs] or [1])
        assert same >= 0.97  # the index's own recall, of .99 at k and less beyond; without it, all
        if not through_index:
            assert found == expected

    def test_far_from_the_query_the_rest_is_scored(
        self, selective: SelectiveRetriever, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is allowed is the half that scores lowest: the index's best thousands hold none of it."""
        monkeypatch.setattr(search_among, "EXACT_ROWS", 0)
        monkeypatch.setattr(search_among, "MAX_FETCH", 200)
        query = QUERIES[:1]
        worst = [int(key[1:]) for key in best(query[0], list(range(ROWS)), ROWS)[ROWS // 2 :]]
        found = selective.search(query, K, Wishes(allow=[KEYS[row] for row in worst])).keys[0]
        assert found == best(query[0], sorted(worst), K)

    def test_lists_and_seen_items(self, selective: SelectiveRetriever) -> None:
        session = ["i0001", "i0041", "nobody"]
        plain = selective.retriever.recommend([session], 5).keys[0]
        denied = selective.recommend([session], 5, wishes=Wishes(deny=plain[:2])).keys[0]
        assert denied[:3] == plain[2:]
        only = selective.recommend([session], 5, wishes=Wishes(allow=[*session, plain[4], plain[1], "nobody"])).keys[0]
        assert only == [plain[1], plain[4]]
        seen = selective.recommend([session], 5, exclude_seen=False, wishes=Wishes(allow=session)).keys[0]
        assert set(seen) == {"i0001", "i0041"}

    def test_similar_leaves_out_the_item_itself(self, selective: SelectiveRetriever) -> None:
        found = selective.similar(["i0004", "i0004"], K, Wishes(where={"available": True})).keys
        assert found[0] == found[1]
        assert "i0004" not in found[0]
        assert all(int(key[1:]) % 2 == 0 for key in found[0])

    def test_nothing_known_gives_the_most_frequent_that_are_allowed(self, selective: SelectiveRetriever) -> None:
        found = selective.recommend([["nobody"]], 3, wishes=Wishes(where={"colour": "blue"}))
        assert (found.keys, found.cold_start) == ([["i0002", "i0008", "i0011"]], [True])

    def test_without_wishes_it_is_the_fast_path(self, selective: SelectiveRetriever) -> None:
        sessions = [["i0001"], ["i0002", "i0950"], []]
        assert selective.recommend(sessions, K).keys == selective.retriever.recommend(sessions, K).keys
        assert selective.similar(KEYS[:5], K).keys == selective.retriever.similar(KEYS[:5], K).keys

    def test_unknown_attributes_are_named(self, selective: SelectiveRetriever) -> None:
        with pytest.raises(DataError, match="no attribute 'color'; this version has: available, colour, size"):
            selective.search(QUERIES[:1], K, Wishes(where={"color": "red"}))

    def test_true_is_not_one(self, selective: SelectiveRetriever) -> None:
        assert selective.search(QUERIES[:1], K, Wishes(where={"size": True})).keys == [[]]

    @pytest.mark.parametrize(
        "table", [pa.table({"x": [1]}), pa.table({"item": [1]}), pa.table({"item": ["i0001"], "price": [1.5]})]
    )
    def test_tables_that_are_none(self, tmp_path: Path, version: Path, table: pa.Table) -> None:
        pq.write_table(table, tmp_path / "t.parquet")
        with pytest.raises(ArtifactError, match=r"t\.parquet: is no table of items' attributes"):
            Attributes.read(tmp_path / "t.parquet", Artifact.open(version).keys("item"))


def test_explanations_are_what_the_score_loses(selective: SelectiveRetriever) -> None:
    session = ["i0003", "nobody", "i0043", "i0101"]
    found = selective.retriever.recommend([session], 4).keys[0]
    vectors = clustered(ROWS, DIM, clusters=40, seed=3)
    pulls = selective.explain(session, found)
    for key, told in zip(found, pulls, strict=True):
        whole = selective.retriever.encode([session])[1][0] @ vectors[int(key[1:])]
        for one, pull in told:
            rest = [item for item in session if item != one]
            without = selective.retriever.encode([rest])[1][0] @ vectors[int(key[1:])]
            assert pull == pytest.approx(whole - without, abs=1e-4)
        assert [pull for _, pull in told] == sorted((pull for _, pull in told), reverse=True)
        assert {one for one, _ in told} == {"i0003", "i0043", "i0101"}


def test_explanations_keep_the_user_and_the_features(tmp_path: Path) -> None:
    width = PUBLISHED_DIM
    inputs = (HISTORY, TowerInput("user", "user", "user", width), TowerInput("shop", "shop", "shop", width))
    torch.manual_seed(0)
    service = LocalService(tmp_path, publish(tmp_path, version="a", spec=TowerSpec(inputs, width, hidden=(8,))).name)
    retriever = Retriever(Artifact.open(tmp_path / "a"))
    body = {"session": ["i0003", "i0043"], "user": "u7", "features": {"shop": 4}, "k": 3, "explain": True}
    items = service.ask("POST", "/v1/recommend", body).json["items"]
    service.close()

    def score(session: list[str], key: str) -> float:
        query = retriever.encode([session], users=["u7"], features={"shop": [4]})[1][0]
        return float(query @ retriever.candidates("recommend").vectors.take(np.array([int(key[1:])]))[0])

    for item in items:
        for pull in item["because"]:
            rest = [key for key in body["session"] if key != pull["key"]]  # type: ignore[attr-defined]
            expected = item["score"] - score(rest, item["key"])
            assert pull["contribution"] == pytest.approx(expected, abs=1e-4)


class TestSideTable:
    def admit(self, folder: Path, table: pa.Table) -> object:
        pq.write_table(table, folder / "attributes.parquet")
        replaced("attributes.parquet", (folder / "attributes.parquet").read_bytes())(folder)
        return admission.admit(folder, None, Gates())

    def test_admission_reads_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write(tmp_path, "bad", factory="Flat", keep=60)
        with pytest.raises(ArtifactError, match="price: a column of double; filters take strings"):
            self.admit(folder, pa.table({"item": ["i0001"], "price": [1.5]}))
        monkeypatch.setattr(attributes, "MIN_BYTES", 20_000)
        monkeypatch.setattr(attributes, "MAX_ITEM_BYTES", 1)
        large = pa.table({"item": ["i0001", "i0002"], "text": ["x" * 100_000, "y" * 100_000]})
        with pytest.raises(ArtifactError, match="bytes when it is read, too much for 60 items"):
            self.admit(folder, large)

    def test_one_long_string_for_every_row_is_held_once(self, tmp_path: Path, version: Path) -> None:
        text = "x" * 2**16
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), pa.array([text]))
        table = pa.table({"item": KEYS, "text": texts})
        pq.write_table(table, tmp_path / "t.parquet", store_schema=False)
        catalogue = Artifact.open(version).keys("item")
        former, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
        pa.set_memory_pool(pool)
        try:
            read = Attributes.read(tmp_path / "t.parquet", catalogue)
        finally:
            pa.set_memory_pool(former)
        assert read.mask({"text": text}).all()
        assert not read.mask({"text": "x"}).any()
        assert 0 < pool.max_memory() < 2**16 * ROWS / 4

    def test_memory_is_for_what_is_listed(self, tmp_path: Path) -> None:
        folder = write(tmp_path, "one", factory="Flat", keep=60)
        listed = sum(file["bytes"] for file in json.loads((folder / "manifest.json").read_text())["files"].values())
        (folder / "sparse").touch()
        os.truncate(folder / "sparse", 2**40)
        assert admission._listed_bytes(folder) == listed

    def test_the_process_that_reads_is_given_no_token(self, version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, str] = {}

        def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
            given.update(env)
            return subprocess.CompletedProcess(command, 0, '{"figures": []}', "")

        monkeypatch.setattr(subprocess, "run", run)
        secret = "a-secret-of-the-tests"
        for name in ("LEXSHARD_TOKEN", "LEXSHARD_READ_TOKEN", "LEXSHARD_FEEDBACK_TOKEN", "LEXSHARD_OTHER"):
            monkeypatch.setenv(name, secret)
        assert admission.admit_apart(version, None, Gates(), timeout_seconds=1) == []
        assert [name for name, value in given.items() if value == secret] == ["LEXSHARD_OTHER"]


class TestOverlay:
    def test_what_it_hides_is_worked_out_once(
        self, selective: SelectiveRetriever, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        selective.overlay.add([selective.place("new", like=["i0007"], attributes={})])
        selective.overlay.delete(KEYS[100:150])
        looked_up: list[int] = []
        rows_of = selective_module._rows_of

        def counted(catalogue: Vocabulary, keys: list[str]) -> Any:
            looked_up.append(len(keys))
            return rows_of(catalogue, keys)

        monkeypatch.setattr(selective_module, "_rows_of", counted)
        for _ in range(3):
            assert not set(selective.recommend([["i0100", "i0007"]], K).keys[0]) & set(KEYS[100:150])
            selective.similar(["i0007"], K)
        assert looked_up == [51, 51]  # once for each index
        changes = selective.overlay.now
        assert changes.recommend is changes.recommend
        selective.overlay.delete(["i0001"])
        selective.similar(["i0007"], K)
        assert looked_up == [51, 51, 52]

    def test_an_item_that_came_back_elsewhere_and_goes_again_stays_gone(self, selective: SelectiveRetriever) -> None:
        selective.delete(["i0041"])
        selective.overlay.add([selective.place("i0041", like=["i0007"], attributes={})])
        selective.overlay.add([selective.place("new", like=["i0007"], attributes={})])
        assert selective.delete(["i0041", "new"]).deleted == {"i0041"}
        assert "i0041" not in selective.recommend([["i0001"]], 75).keys[0]

    def test_vectors_that_could_not_be_read_again_are_not_written(self, selective: SelectiveRetriever) -> None:
        selective.overlay.delete(["i0001"])
        good, bad = np.ones(DIM, np.float32), np.full(DIM, np.nan, np.float32)
        for one in (Added("new", good, bad), Added("new", np.full(DIM, np.inf, np.float32), good)):
            with pytest.raises(DataError, match="item 'new': its vectors are not finite"):
                selective.overlay.add([one])
        selective.overlay.refresh()
        assert (selective.overlay.now.added, selective.overlay.now.deleted) == ((), {"i0001"})

    def test_more_than_could_be_read_again_is_not_written(
        self, selective: SelectiveRetriever, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(overlay, "MAX_BYTES", 100)
        with pytest.raises(DataError, match="the limit is 100: publish a version"):
            selective.overlay.add([selective.place("new", like=["i0007"], attributes={})])
        assert not selective.overlay.now

    def test_a_slow_reader_does_not_have_the_last_word(
        self, selective: SelectiveRetriever, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        selective.overlay.delete(["i0001"])
        other = Overlay(selective.overlay._file)
        selective.overlay.delete(["i0002"])
        read, reading, go_on = Overlay._read, threading.Event(), threading.Event()

        def slow(self: Overlay) -> Any:
            found = read(self)
            if threading.current_thread() is thread:
                reading.set()
                assert go_on.wait(30)
            return found

        thread = threading.Thread(target=other.refresh)
        monkeypatch.setattr(Overlay, "_read", slow)
        thread.start()
        assert reading.wait(30)
        selective.overlay.delete(["i0003"])
        late = threading.Thread(target=other.refresh)
        late.start()
        late.join(0.2)  # it waits for the one before, or has overtaken it
        go_on.set()
        thread.join(30)
        late.join(30)
        assert other.now.deleted == {"i0001", "i0002", "i0003"}

    def test_an_item_near_others_is_found_and_can_be_asked_for(self, selective: SelectiveRetriever) -> None:
        like = ["i0007", "i0047"]
        selective.overlay.add([selective.place("new", like=like, attributes={"colour": "red"})])
        assert "new" in selective.recommend([["i0087"]], 75).keys[0]  # its cluster has 75 items
        assert {int(key[1:]) % 40 for key in selective.similar(["new"], 5).keys[0]} == {7}
        assert "new" not in selective.similar(["new"], ROWS).keys[0]
        for wishes, shown in (
            (Wishes(where={"colour": "red"}), True),
            (Wishes(where={"colour": "blue"}), False),
            (Wishes(deny=["new"]), False),
        ):
            assert ("new" in selective.recommend([["i0087"]], 75, wishes=wishes).keys[0]) == shown
        vectors = clustered(ROWS, DIM, clusters=40, seed=3)
        assert selective.embed_items(["new", "?"]) == [pytest.approx(vectors[[7, 47]].mean(axis=0)), None]

    def test_the_sample_of_queries_says_whose_row_each_is(self, selective: SelectiveRetriever) -> None:
        """But of a replaced item, whose query is another vector than its row's, and of an added one."""
        selective.overlay.add([selective.place(key, like=["i0047"], attributes={}) for key in ("i0003", "new")])
        selective.retriever.asked["similar"].take()
        selective.similar(["i0007", "i0003", "new"], 5)
        sample = selective.retriever.asked["similar"].take()
        assert sample is not None
        assert sorted(sample[1].tolist()) == [-1, -1, 7]

    def test_by_vector_and_by_attributes(self, selective: SelectiveRetriever) -> None:
        vector = np.array(selective.embed_items(["i0007"])[0], np.float32)
        selective.overlay.add([selective.place("by-vector", vector=vector, attributes={})])
        assert selective.search(vector, 2).keys[0] in (["i0007", "by-vector"], ["by-vector", "i0007"])
        rare = selective.place("by-attributes", attributes={"colour": "rare"})
        rows = [row for row in range(ROWS) if row % 50 and colour(row) == "rare"]
        assert rare.recommend == pytest.approx(clustered(ROWS, DIM, clusters=40, seed=3)[rows].mean(axis=0), abs=1e-5)

    def test_what_is_taken_off_is_gone_and_k_are_found(self, selective: SelectiveRetriever) -> None:
        before = selective.recommend([["i0001"]], 5).keys[0]
        selective.overlay.delete(before[:3])
        after = selective.recommend([["i0001"]], 5).keys[0]
        assert after[:2] == before[3:]
        assert len(after) == 5
        with pytest.raises(KeyNotFound, match=before[0]):
            selective.similar([before[0]], 5)
        selective.overlay.add([selective.place(before[0], like=[before[3]], attributes={})])  # back, elsewhere
        assert before[0] in selective.recommend([["i0001"]], 5).keys[0]

    def test_another_process_sees_it(self, selective: SelectiveRetriever, tmp_path: Path) -> None:
        other = Overlay(tmp_path / "overlay" / "one.json")
        selective.overlay.delete(["i0001"])
        assert not other.now
        other.refresh()
        assert other.now.deleted == {"i0001"}
        other.delete(["i0002"])
        selective.overlay.delete(["i0003"])  # on top of the other's change
        assert selective.overlay.now.deleted == {"i0001", "i0002", "i0003"}

    def test_mistakes(self, selective: SelectiveRetriever) -> None:
        with pytest.raises(DataError, match="say where the new item belongs"):
            selective.place("new", attributes={})
        with pytest.raises(KeyNotFound, match="'nobody' is not in the item vocabulary"):
            selective.place("new", like=["nobody"], attributes={})
        with pytest.raises(DataError, match="key 7: the keys of this version are of type string"):
            selective.place(7, like=["i0001"], attributes={})
        with pytest.raises(DataError, match="query vectors must be"):
            selective.place("new", vector=np.zeros(3, np.float32), attributes={})

    @pytest.mark.parametrize("text", ["", "{}", '{"added": [{"key": 1}], "deleted": []}', "[1]"])
    def test_a_damaged_file_is_named_and_changes_nothing(
        self, selective: SelectiveRetriever, tmp_path: Path, text: str
    ) -> None:
        selective.overlay.delete(["i0001"])
        (tmp_path / "overlay" / "one.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"one\.json: is damaged"):
            selective.overlay.refresh()
        assert selective.overlay.now.deleted == {"i0001"}

    def test_a_batch_shares_the_answer_of_one(self, selective: SelectiveRetriever) -> None:
        selective.overlay.add([selective.place("new", like=["i0007"], attributes={})])
        selective.overlay.delete(["i0047"])
        sessions = [[KEYS[row]] for row in (7, 8, 9)] + [[]]
        batch = selective.recommend(sessions, K).keys
        assert batch == [selective.recommend([session], K).keys[0] for session in sessions]


class TestOverHttp:
    @pytest.fixture
    def service(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
        def admit_here(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> object:
            return admission.admit(candidate, live, gates)

        monkeypatch.setattr(activations, "admit_apart", admit_here)
        root = tmp_path / "root"
        write(root, "one", factory="Flat", keep=400)
        write(root, "two", factory="Flat", keep=390)
        running = LocalService(root, "one")
        yield running
        running.close()

    def test_wishes(self, service: LocalService) -> None:
        body = {"session": ["i0001"], "k": 6, "filter": {"where": {"available": True}, "deny": ["i0002"]}}
        answer = service.ask("POST", "/v1/recommend", {**body, "explain": True, "diversity": 0.5}).json
        assert len(answer["items"]) == 6
        assert all(int(item["key"][1:]) % 2 == 0 for item in answer["items"])
        assert [pull["key"] for pull in answer["items"][0]["because"]] == ["i0001"]
        batch = service.ask("POST", "/v1/recommend", {"sessions": [["i0001"]], **{k: body[k] for k in ("k", "filter")}})
        single = service.ask("POST", "/v1/recommend", body).json
        assert batch.json["results"][0]["items"] == single["items"]
        similar = service.ask("POST", "/v1/similar", {"key": "i0001", "filter": {"allow": ["i0005"]}}).json
        assert [item["key"] for item in similar["items"]] == ["i0005"]
        wished = f"filter={quote(json.dumps(body['filter']))}&diversity=0.5"
        asked = {**body, "diversity": 0.5}
        by_parameter = service.ask("GET", f"/v1/recommend?items=i0001&k=6&{wished}").json
        assert by_parameter["items"] == service.ask("POST", "/v1/recommend", asked).json["items"]
        del asked["session"]
        by_parameter = service.ask("GET", f"/v1/similar?key=i0001&k=6&{wished}").json
        assert by_parameter["items"] == service.ask("POST", "/v1/similar", {**asked, "key": "i0001"}).json["items"]
        vectors = np.random.default_rng(0).standard_normal((3, DIM)).astype(np.float32)
        found = service.ask("POST", f"/v1/search?k=6&{wished}", stream([column(vectors)]), content_type=ARROW_TYPE)
        expected = service.ask("POST", "/v1/search", {**asked, "vectors": vectors.tolist()}).json["results"]
        answered = pa.ipc.open_stream(found.body).read_all()
        assert answered["keys"].to_pylist() == [[item["key"] for item in one["items"]] for one in expected]
        for parameter, told in (
            ("filter=x", "the parameter `filter` is not valid JSON"),
            ("filter=[]", "`filter`: must be a JSON object"),
            ('filter={"wher":{}}', "there is no field `filter.wher`; did you mean `where`?"),
            ("diversity=2", "`diversity`: input should be less than or equal to 1"),
        ):
            status, _, message = service.ask("GET", f"/v1/similar?key=i0001&{parameter}").error
            assert (status, message[: len(told)]) == (400, told)
        refused = service.ask("POST", "/v1/similar", {"key": "i0001", "filter": {"where": {"x": 1}}}).error
        assert refused[:2] == (400, "invalid_request")
        unknown = service.ask("POST", "/v1/similar", {"key": "i0001", "filter": {"wher": {}}}).error
        assert unknown[2] == "there is no field `filter.wher`; did you mean `where`?"

    WISHES = (
        ("recommend", {"session": ["i0001"], "explain": True}),
        ("recommend", {"session": ["i0001"], "diversity": 0.5}),
        ("recommend", {"sessions": [["i0001"]], "filter": {"deny": ["i0002"]}}),
        ("similar", {"key": "i0001", "filter": {"where": {"available": True}}}),
        ("similar", {"keys": ["i0001"], "diversity": 0.5}),
        ("search", {"vector": [0.5] * DIM, "diversity": 0.5}),
        ("search", {"vectors": [[0.5] * DIM], "diversity": 0.5}),
    )

    def test_wishes_leave_the_event_loop(self, service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
        api = service.versions.now.live.api
        assert api.selective is not None
        monkeypatch.setattr(api, "_is_quick", lambda _: True)
        threads: list[threading.Thread] = []

        def watched(name: str) -> None:
            work = getattr(api.selective, name)

            def noted(*arguments: Any, **named: Any) -> Any:
                threads.append(threading.current_thread())
                return work(*arguments, **named)

            monkeypatch.setattr(api.selective, name, noted)

        watched("_choose")
        watched("explain")
        for path, body in self.WISHES:
            threads.clear()
            assert service.ask("POST", f"/v1/{path}", body).status == 200
            assert threads
            assert threading.main_thread() not in threads

    def test_diverse_lists_are_charged_by_what_they_compare(
        self, service: LocalService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body = {"sessions": [["i0001"]] * 90, "k": 50}
        assert service.ask("POST", "/v1/recommend", body).status == 200
        status, code, message = service.ask("POST", "/v1/recommend", {**body, "diversity": 0.5}).error
        assert (status, code) == (413, "batch_too_large")
        assert message.startswith("90 diverse lists of k = 50 compare 1125000 pairs of items; the limit is 1000000")
        monkeypatch.setattr(http_queries, "MAX_DIVERSE", 20)
        for asked in ({"key": "i0001"}, {"keys": ["i0001"]}):
            refused = service.ask("POST", "/v1/similar", {**asked, "k": 21, "diversity": 0.1}).error
            assert refused == (400, "invalid_request", "`k` with `diversity` is at most 20; got 21")

    def test_a_damaged_overlay_does_not_keep_the_version_down(self, service: LocalService) -> None:
        file = service.store.overlay_file("one")
        file.parent.mkdir(parents=True)
        file.write_text("{")
        service.restart()
        assert service.ask("GET", "/v1/similar?key=i0001").status == 200
        service.versions.refresh_overlays()
        assert "one.json: is damaged" in service.versions.problem
        status, code, message = service.ask("POST", "/v1/items/delete", {"keys": ["i0002"]}).error
        assert (status, code) == (409, "refused")
        assert message.endswith("remove it")
        file.unlink()
        assert service.ask("POST", "/v1/items/delete", {"keys": ["i0002"]}).json["num_deleted"] == 1

    def test_embed_and_search(self, service: LocalService) -> None:
        embedded = service.ask("POST", "/v1/embed", {"sessions": [["i0001", "i0002"]]}).json
        found = service.ask("POST", "/v1/search", {"vector": embedded["vectors"][0], "k": 5}).json["items"]
        body = {"session": ["i0001", "i0002"], "k": 5, "exclude_seen": False}
        assert found == service.ask("POST", "/v1/recommend", body).json["items"]
        assert service.ask("POST", "/v1/embed", {"keys": ["nobody"]}).json == {"version": "one", "vectors": [None]}

    def test_items_come_and_go_and_a_new_version_says_what_it_loses(self, service: LocalService) -> None:
        assert service.ask("POST", "/v1/items", {"key": "new", "like": ["i0007"]}, token=b"").status == 401
        assert service.ask("POST", "/v1/items", {"key": "new", "like": ["i0007"]}).json == {
            "version": "one",
            "num_added": 1,
        }
        assert service.ask("POST", "/v1/items", {"key": "x", "like": ["zz"]}).error[:2] == (404, "key_not_found")
        assert service.ask("GET", "/v1/similar?key=new&k=1").json["items"][0]["key"] == "i0007"
        told = service.ask("POST", "/v1/items/delete", {"keys": ["i0047", "zz", 3]}).json
        assert (told["num_deleted"], told["unknown"]) == (1, ["zz", 3])
        results = service.ask("POST", "/v1/similar", {"keys": ["new", "i0047"], "k": 1}).json["results"]
        assert [result["unknown"] for result in results] == [[], ["i0047"]]
        service.restart()
        assert service.ask("GET", "/v1/items").json["deleted"] == ["i0047"]
        body = {"version": "two", "wait_seconds": 60}
        told = service.ask("POST", "/v1/versions/activate", body).json
        assert (told["added_items_lost"], told["deleted_items_back"]) == (1, 1)
        assert told["examples"] == ["new", "i0047"]
        assert service.ask("GET", "/v1/similar?key=new").status == 404
        assert service.ask("POST", "/v1/versions/rollback", {}).status == 200
        assert service.ask("GET", "/v1/similar?key=new").status == 200
