"""A cluster that starts its machines for a job, and stops them after it: Ray's autoscaler, with machines that are
processes here."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from demo.scenes import scenes
from demo.writers import write
from tests.conftest import BIN, ROOT, WEIGHTS, free_port, job_of, rows_of, start_job

HEAD = "ray.head.default"  # as the provider calls it
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_EMPTY = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
_EMPTY += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")


def configuration(address: str) -> dict[str, Any]:
    """cluster.yaml with its own kinds of nodes, as Ray's fake provider starts them, which is named as one of a user's
    own: Ray's wheel lacks the file with its defaults."""
    ours = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    memory = {"object_store_memory": 200 << 20}
    types = {
        HEAD if name == ours["head_node_type"] else name: {
            "resources": kind["resources"] | memory,
            "labels": kind.get("labels", {}),
            "node_config": {},
        }
        | {"min_workers": kind.get("min_workers", 0), "max_workers": min(3, kind.get("max_workers", 0))}
        for name, kind in ours["available_node_types"].items()
    }
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": FAKE_HEAD_NODE_ID}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    provider |= {"launch_multiple": True, "foreground_node_launch": True}
    return {
        **{"cluster_name": "fake", "max_workers": 6, "idle_timeout_minutes": 0.2, "upscaling_speed": 1.0},
        **{"provider": provider, "auth": {}, "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False},
        **{"available_node_types": types, "head_node_type": HEAD, "rsync_filter": []},
        **{name: [] for name in _EMPTY},
    }


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a head without CPUs, whose autoscaler has cluster.yaml's kinds of nodes."""
    from ray._private.services import get_node_ip_address

    port = free_port()
    found = f"{get_node_ip_address()}:{port}"
    file = tmp_path / "cluster.json"
    file.write_text(json.dumps(configuration(found)))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the fake provider passes no token on
    environment = os.environ | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    environment |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
    environment |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    ports = (f"--port={port}", f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}")
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--num-cpus=0",
        "--num-gpus=0",
        f"--autoscaling-config={file}",
        "--block",
    ]
    head = subprocess.Popen([*command, *ports, "--object-store-memory=200000000"], env=environment)
    try:
        yield found
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            process.kill()
        head.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpus_come_for_a_job_and_go_after_it(address: str, tmp_path: Path) -> None:
    write(scenes(500, 3), tmp_path / "in", "folder")
    job = start_job(
        *(tmp_path / "in", "--output", tmp_path / "out", "--yolo", WEIGHTS / "detect.pt", "--imgsz", "960"),
        *("--gpus-per-actor", "1", "--batch-size", "4", "--rows-per-file", "25"),
        cluster=address,
    )
    most = 0.0
    while job.poll() is None:
        most = max(most, gpus(address))
        time.sleep(1)
    said = job.communicate()[1]
    assert job.returncode == 0, said
    assert len({row["id"] for row in rows_of(tmp_path / "out")}) == len(rows_of(tmp_path / "out")) == 500
    content = job_of(tmp_path / "out")
    assert content["exactly_once"] is True and content["stages"]["yolo"]["gpu_seconds"] > 0
    assert most > 1
    deadline = time.monotonic() + 120
    while gpus(address):
        assert time.monotonic() < deadline
        time.sleep(1)


def gpus(address: str) -> float:
    """How many GPUs the cluster has now."""
    status = subprocess.run([BIN / "ray", "status", f"--address={address}"], capture_output=True, text=True).stdout
    found = [line.split()[0].partition("/")[2] for line in status.splitlines() if line.strip().endswith(" GPU")]
    return float(found[0]) if found else 0.0
