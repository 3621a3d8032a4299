"""The rules of the architecture: imports point one way, and heavy libraries have one door each."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("trainers", "embedding_service", "cluster")  # each may import those to its right
# These look at all of them, from inside their functions only; sizing.py is the part of cli.py that has its own noun.
FRONT_DOOR = ("cluster/cli.py", "cluster/sizing.py")

# library -> where it may be imported: a folder or files
DOORS = {
    "ray": ("cluster/", "embedding_service/app.py"),
    "torchrec": (
        "embedding_service/tables.py",
        "embedding_service/sharding.py",
        "embedding_service/shard_plan.py",
        "embedding_service/dynamic_rows.py",  # managed collision has to do with ids alone, and nothing with tables
    ),
    "fbgemm_gpu": ("embedding_service/tables.py", "embedding_service/sharding.py"),
    "faiss": ("embedding_service/index.py",),
    "datasketches": ("trainers/key_sketch.py", "trainers/profile.py"),
    "optuna": ("trainers/tune.py", "trainers/search_space.py"),
    "torch.distributed.checkpoint": ("trainers/checkpoint_tensors.py",),
    "umap": ("embedding_service/projection.py",),
    "grpc": (
        "embedding_service/app.py",
        "embedding_service/grpc_service.py",
        "embedding_service/retrieval_pb2_grpc.py",
    ),
    "pickle": (),
}


def _files(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files, f"no Python file in {folders}: this test looks in the wrong place"
    return files


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import, and of every `from` import's names as if they were modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import of {node.module}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _layer_violations(layer: str, source: str) -> list[str]:
    forbidden = LAYERS[: LAYERS.index(layer)]
    found = _imports(ast.parse(source))
    return [f"line {line}: {module}" for module, line in found if any(_within(module, name) for name in forbidden)]


def _door_violations(path: str, source: str) -> list[str]:
    return [
        f"{path}:{line}: {module}"
        for module, line in _imports(ast.parse(source))
        for library, doors in DOORS.items()
        if _within(module, library) and not path.startswith(doors)
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    for file in _files(layer):
        if str(file.relative_to(ROOT)) not in FRONT_DOOR:
            assert _layer_violations(layer, file.read_text()) == [], file


def test_heavy_libraries_come_in_by_their_door() -> None:
    for file in _files(*LAYERS):
        assert _door_violations(str(file.relative_to(ROOT)), file.read_text()) == []


def test_the_front_door_imports_nothing_heavy_at_the_top() -> None:
    for name in (*FRONT_DOOR, "cluster/arguments.py"):
        tree = ast.parse((ROOT / name).read_text())
        top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        modules = [module for module, _ in _imports(top)]
        assert modules
        ours = [module for module in modules if module.split(".")[0] in (*LAYERS, *DOORS, "torch", "numpy", "pyarrow")]
        assert all(module.startswith(("cluster.arguments", "cluster.errors", "cluster.sizing")) for module in ours)


def test_the_rules_catch_what_they_forbid() -> None:
    assert _layer_violations("cluster", "def f():\n    from trainers import loop") == ["line 2: trainers.loop"]
    assert _layer_violations("embedding_service", "import cluster.rank") == []
    assert _layer_violations("embedding_service", "import trainers.loop") == ["line 1: trainers.loop"]
    assert _door_violations("trainers/loop.py", "import ray.train") == ["trainers/loop.py:1: ray.train"]
    assert _door_violations("trainers/x.py", "from torch.distributed import checkpoint") != []
    assert _door_violations("cluster/submit.py", "import ray") == []
    assert _door_violations("trainers/x.py", "import raymond") == []
