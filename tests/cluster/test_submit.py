"""A job on a real Ray cluster of two nodes: separate raylets on this machine, one CPU each, and a job server."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from cluster import cli
from cluster.errors import LaunchError
from cluster.submit import submit
from embedding_service.artifact import Artifact


def _free_port() -> int:
    """Ray's own default is one number for every cluster of a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    node = {"num_cpus": 1, "object_store_memory": 2**27}
    head = {"include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": _free_port()}
    cluster = Cluster(initialize_head=True, head_node_args={**node, **head})
    try:
        cluster.add_node(**node, dashboard_agent_listen_port=_free_port())
        yield f"http://{cluster.head_node.address_info['webui_url']}"
    finally:
        cluster.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder to submit: a config whose data and run lie elsewhere, where both nodes reach them; lexshard is installed
    on both."""
    folder = tmp_path / "project"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sessions = [rng.integers(0, 50, size=rng.integers(2, 8)).tolist() for _ in range(400)]
    pq.write_table(pa.table({"items": sessions}), tmp_path / "train.parquet")
    (folder / "run.toml").write_text(
        f'run = "{tmp_path}/run"\n[data]\ntrain = "{tmp_path}/train.parquet"\n[model]\ndim = 8\n[train]\nepochs = 2\n'
    )
    return folder


def test_jobs_train_on_both_nodes_and_publish(
    job_server: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two workers, and one CPU a node: neither node alone could run them."""
    options = ["--address", job_server, "--working-dir", str(project), "--python", sys.executable]
    status = cli.main(["submit", *options, "--", "train", "run.toml", "--workers", "2"])
    log = capsys.readouterr().out
    assert status == 0, log
    assert log.splitlines()[0].startswith("job raysubmit_")
    assert "trained 2 epochs" in log
    assert log.splitlines()[-1] == "job SUCCEEDED"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["workers"] == 2

    assert cli.main(["submit", *options, "--", "export", str(tmp_path / "run")]) == 0
    assert Artifact.open(tmp_path / "run" / "artifacts").vectors("item").dim == 8


def test_a_job_that_fails_says_why(job_server: str, project: Path) -> None:
    log: list[str] = []
    status = submit(
        ["config", "none.toml"], address=job_server, working_dir=str(project), python=sys.executable, on_log=log.append
    )
    assert status == "FAILED"
    assert "lexshard: error: setting none.toml: there is no such config file" in "".join(log)


def test_no_job_server(project: Path) -> None:
    with pytest.raises(LaunchError, match=r"no job could be submitted to http://127\.0\.0\.1:1"):
        submit(["config"], address="http://127.0.0.1:1", working_dir=str(project), on_log=lambda _: None)
