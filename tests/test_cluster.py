"""cluster.yaml, and the job as `ray job submit` runs it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shardsight.cluster import living_cluster
from shardsight.settings import UsageError
from tests.conftest import BIN, ROOT, free_port, job_of, ray_head, start_job

RAY = str(BIN / "ray")


def test_cluster_yaml_is_what_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(config | {"max_workerz": 1}))


def test_a_machine_that_never_ran_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_ray: None) -> None:
    """Nothing is there to join, the private cluster of another job least of all: it ends with that job."""
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(tmp_path / "none"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert living_cluster() == "local"
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UsageError, match="RAY_ADDRESS=nonsense"):
        living_cluster()


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of the job server of a local `ray start --head`."""
    with ray_head() as (head, address):
        # The server answers before there is an agent to run a job.
        submit = [RAY, "job", "submit", "--address", address, "--", "true"]
        while subprocess.run(submit, capture_output=True).returncode:
            assert head.poll() is None
        yield address


def test_a_cluster_that_is_gone(
    tmp_path: Path, jpegs: list[bytes], detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named, it is one sentence; left behind by a `ray start` of long ago, it is as if it had never been."""
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    command = (tmp_path / "a.jpg", "--output", tmp_path / "out", "--yolo", detector)
    gone = f"127.0.0.1:{free_port()}"
    refused = start_job(*command, cluster=gone)
    said = refused.communicate(timeout=120)[1]
    assert refused.returncode == 2 and gone in said and said.count("\n") == 1

    (tmp_path / "address").write_text(gone)
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(tmp_path / "address"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert living_cluster() == "local"


@pytest.mark.slow
def test_submitted_jobs(cluster: str, tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """The contract's command, sent to a cluster: its results, and its exit code in what Ray says."""
    (tmp_path / "in").mkdir()
    for index in range(4):
        (tmp_path / "in" / f"{index}.jpg").write_bytes(jpegs[index])

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        python = ["--", sys.executable, "-m", "jobs.annotate", *arguments, "--yolo", str(detector)]
        command = [RAY, "job", "submit", "--address", cluster, "--working-dir", ".", *python]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = submit(str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert job_of(tmp_path / "out")["rows"] == 4 and job_of(tmp_path / "out")["exactly_once"] is True

    refused = submit(str(tmp_path / "nowhere"), "--output", str(tmp_path / "out2"))
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1 and re.search(r"exit code 2\b", said) and "does not exist: check the name" in said
