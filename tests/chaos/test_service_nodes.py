"""The service on several machines, `make cluster`: one of them dies while a new version is rolled out under load."""

import json
import time
from pathlib import Path

import pytest

from tests.chaos.nodes import nodes
from tests.chaos.service import Crowd, Deployed, pictures, within
from tests.namespaces import lacking

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacking()), reason=lacking())]
KEY = "a key of the service"
# Two of each, which Serve spreads over the nodes. The Gateway decodes, so that none may be on the head, as in
# deploy/rayservice.yaml.
DEPLOYMENTS = [
    {"name": "Gateway", "num_replicas": 2, "ray_actor_options": {"num_cpus": 1}},
    {"name": "yolo", "num_replicas": 2, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 1}},
]
DECLARED = {429, 503, 504}


def test_a_node_dies_amid_an_update(tmp_path: Path, jpegs: list[bytes]) -> None:
    """What was on its way there fails with a declared code, nothing else does, and the new version comes."""
    keys = {"SHARDSIGHT_API_KEYS": KEY, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.guard:proxy_middleware"}
    with nodes(tmp_path / "machines", **keys) as cluster:
        for name in ("a", "b", "c"):
            cluster.join(name, cpus=4)
        cluster.settle()
        url = f"http://{cluster.head.address}:8000"
        service = Deployed(tmp_path, cluster.address, url, **cluster.environment)
        service.deploy(DEPLOYMENTS, paligemma=[], conf=0.25)
        service.wait_until_running()
        with Crowd(4, pictures(jpegs), url, KEY) as crowd:
            crowd.hear(40)
            service.deploy(DEPLOYMENTS, paligemma=[], conf=0.99)
            within(60, lambda: service.status()["status"] == "DEPLOYING", service.status)
            cluster.kill("b")
            died = time.monotonic()
            within(180, lambda: any(_is_new(one.text) for one in list(crowd.said) if one.status == 200))
            crowd.hear(100)
        service.wait_until_running()
        recovered = time.monotonic()
    print(f"{len(crowd.said)} answers, {len(crowd.failed)} refused, whole again after {recovered - died:.0f} s")
    for one in crowd.failed:
        print(f"{one.began - died:.1f} to {one.ended - died:.1f} s: {one.status} {one.text[:200]}")
        assert one.status in DECLARED and json.loads(one.text)["status"] == one.status
        assert one.ended >= died


def _is_new(text: str) -> bool:
    """Whether an answer is of the new version, to which nothing is sure enough."""
    return not json.loads(text)["detections"]
