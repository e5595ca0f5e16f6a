"""cluster.yaml and cluster-gcp.yaml, and the job as `ray job submit` runs it."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import botocore.validate
import httpx
import pytest
import yaml
from ray._raylet import RAY_NODE_ACCELERATOR_TYPE_KEY, RAY_NODE_MARKET_TYPE_KEY
from ray.scripts import scripts
from ray.util.accelerators import NVIDIA_L4

from shardsight.actors import decoders, plan
from shardsight.cluster import _credentials, living_cluster
from shardsight.settings import UsageError
from tests.conftest import BIN, ROOT, free_port, job_of, ray_head, start_job

RAY = str(BIN / "ray")
TAKE_ALL = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
taken = ray.remote(num_cpus=2)(type("Idle", (), {"ready": lambda self: True})).remote()
ray.get(taken.ready.remote())
print("taken", flush=True)
sys.stdin.read()
"""
PRIVATE = """
import sys, psutil, ray, shardsight
from ray._private.node import Node
from ray.data._internal.stats import _StatsManager
before = vars(Node)["start_api_server"], vars(_StatsManager)["update_execution_metrics"]
shardsight.annotate(sys.argv[1], output=sys.argv[2], yolo=sys.argv[3])
for process in psutil.Process().children(recursive=True):
    print(*process.cmdline())
print(*ray.util.list_named_actors(all_namespaces=True))
print(before == (vars(Node)["start_api_server"], vars(_StatsManager)["update_execution_metrics"]))
"""
CLUSTERS = {file: yaml.safe_load((ROOT / file).read_text()) for file in ("cluster.yaml", "cluster-gcp.yaml")}


@pytest.mark.parametrize("file", CLUSTERS)
def test_the_cluster_is_one_that_ray_takes(file: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = CLUSTERS[file]
    validate_config(prepare_config(config))
    wrong = copy.deepcopy(config)
    wrong["available_node_types"]["models"]["label"] = {}
    for broken in (config | {"max_workerz": 1}, wrong):
        with pytest.raises(Exception, match=r"'(max_workerz|label)' was unexpected"):
            validate_config(prepare_config(broken))


@pytest.mark.parametrize("file", CLUSTERS)
def test_the_head_runs_no_work_and_workers_come_from_zero(file: str) -> None:
    config = CLUSTERS[file]
    head, decode, models = (config["available_node_types"][name] for name in ("head", "decode", "models"))
    assert config["head_node_type"] == "head" and head["resources"] == {"CPU": 0}
    for worker in (decode, models):
        assert worker["min_workers"] == 0 < worker["max_workers"]
        node = worker["node_config"]
        market = node["InstanceMarketOptions"]["MarketType"] if "aws" in config["provider"].values() else None
        assert market == "spot" or node["scheduling"]["provisioningModel"] == "SPOT"
        assert worker["labels"][RAY_NODE_MARKET_TYPE_KEY] == "spot"
    assert models["resources"]["GPU"] == 1 and models["labels"][RAY_NODE_ACCELERATOR_TYPE_KEY] == NVIDIA_L4
    assert "GPU" not in decode["resources"]


@pytest.mark.parametrize("file", CLUSTERS)
def test_only_who_has_the_token_uses_the_cluster(file: str) -> None:
    """Or whoever reaches the head's ports runs what he likes: without a token, Ray starts without authentication."""
    config = CLUSTERS[file]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("export RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1].split()


@pytest.mark.parametrize("file", CLUSTERS)
def test_the_commands_are_ones_that_bash_and_ray_read(file: str) -> None:
    config = CLUSTERS[file]
    for name in ("setup", "head_setup", "head_start_ray", "worker_start_ray"):
        for command in config[f"{name}_commands"]:
            subprocess.run(["bash", "-n"], input=command, text=True, check=True)
            for start in re.findall(r"ray (start .*)", command):
                scripts.cli.commands["start"].make_context("start", shlex.split(start)[1:])
            # Or each worker would compute with one thread, see Ray's _with_interactive.
            assert "ray start" not in command or command.startswith("unset OMP_NUM_THREADS; ulimit -n 65536;")


def test_a_second_setup_changes_nothing(tmp_path: Path) -> None:
    """`ray up` runs the commands again on nodes that are set up."""
    (command,) = [one for one in CLUSTERS["cluster.yaml"]["setup_commands"] if ".bashrc" in one]
    (tmp_path / ".bashrc").write_text("# before\n")
    for _ in range(2):
        subprocess.run(["bash", "-ec", command], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    line = "export RAY_AUTH_MODE=token PATH=/home/ubuntu/shardsight/.venv/bin:$PATH"
    assert (tmp_path / ".bashrc").read_text() == f"# before\n{line}\n"


def test_the_nodes_are_ones_that_ec2_takes() -> None:
    """Ray passes node_config to EC2 as it is."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for type in CLUSTERS["cluster.yaml"]["available_node_types"].values():
        wanted = {**type["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not botocore.validate.ParamValidator().validate(wanted, model).has_errors()
        wanted["InstanceMarketOption"] = {}
        assert "InstanceMarketOption" in botocore.validate.ParamValidator().validate(wanted, model).generate_report()
        (disk,) = type["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 100  # Ubuntu's own has room for 8 GB


def test_the_clusters_differ_in_their_cloud_alone() -> None:
    ours, other = ({**config} for config in CLUSTERS.values())
    for key in ("provider", "available_node_types", "head_setup_commands"):
        assert ours.pop(key) != other.pop(key)
    assert ours == other


def test_a_machine_that_never_ran_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_ray: None) -> None:
    """Nothing is there to join, the private cluster of another job least of all: it ends with that job."""
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(tmp_path / "none"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert living_cluster() == "local"
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    with pytest.raises(UsageError, match="RAY_ADDRESS=nonsense"):
        living_cluster()


def test_a_ray_of_ones_own_starts_what_a_job_needs(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """A dashboard that nobody sees, and what serves it, would take two of the seconds until the first row."""
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    process = start_python(PRIVATE, str(tmp_path / "a.jpg"), str(tmp_path / "out"), str(detector), address="local")
    *processes, actors, restored, _ = process.communicate(timeout=120)[0].split("\n")
    started = " ".join(processes)
    assert "raylet" in started and "gcs_server" in started
    assert not re.search(r"dashboard/dashboard\.py|monitor\.py", started)
    assert "ActorLocationTracker" in actors and not re.search(
        "stats|Coordinator", actors
    )  # the first shows that they are listed
    assert restored == "True"


def test_credentials_of_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives the workers those in its runtime environment, and refuses a driver that gives them again."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the job")
    monkeypatch.setenv("AWS_REGION", "of the node")
    runtime = {"working_dir": "gcs://a.zip", "env_vars": {"AWS_ACCESS_KEY_ID": "of the job"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": runtime, "metadata": {}}))
    found = _credentials()
    assert found["AWS_REGION"] == "of the node" and "AWS_ACCESS_KEY_ID" not in found
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert _credentials()["AWS_ACCESS_KEY_ID"] == "of the job"


@pytest.mark.parametrize("private", [True, False])
def test_actors_fit_on_a_node(monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    """On many small nodes, an actor of more CPUs than any has would be waited for without end. And once some of the
    nodes are gone, the rest must have room for decoding, or no actor ever gets work."""
    monkeypatch.setattr("shardsight.cluster.nodes", lambda _: [{}, {"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 2.0}])
    monkeypatch.setattr("shardsight.cluster.private", lambda: private)
    monkeypatch.setattr("shardsight.cluster.free_cpus", lambda: 6.0)
    (stage,) = plan({"yolo": {}}, {"yolo": None}, None)
    assert (stage.threads, stage.cpus, stage.initial) == (2, 0.01, 3)
    assert stage.actors == ((3 if private else 1), 3)


@pytest.mark.parametrize("free, each", [(6.0, 0.01), (2.5, 0.01), (1.0234375, 0.0078125), (1.0, 0.0), (0.0, 0.0)])
def test_actors_leave_a_cpu_to_reading(monkeypatch: pytest.MonkeyPatch, free: float, each: float) -> None:
    """Also where other jobs hold most of them: actors that took the last would wait for reading, which waits for it."""
    monkeypatch.setattr("shardsight.cluster.nodes", lambda _: [{"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 2.0}])
    monkeypatch.setattr("shardsight.cluster.free_cpus", lambda: free)
    (stage,) = plan({"yolo": {}}, {"yolo": None}, None)
    assert stage.cpus == each


@pytest.mark.parametrize(
    "models, gpus, shares", [(["yolo"], 2, [1]), (["yolo", "paligemma"], 4, [1 / 8, 7 / 8]), (["yolo"], 0, [0])]
)
def test_every_gpu_computes_each_model(
    monkeypatch: pytest.MonkeyPatch, models: list[str], gpus: int, shares: list[float]
) -> None:
    """GPUs of its own for YOLO would rest while PaliGemma, a hundred times as slow, has too few."""
    monkeypatch.setattr("shardsight.cluster.nodes", lambda _: [{"CPU": 32.0, "GPU": float(gpus)}])
    monkeypatch.setattr("shardsight.cluster.free_cpus", lambda: 32.0)
    stages = plan({name: {} for name in models}, dict.fromkeys(models), None)
    assert [stage.gpus for stage in stages] == shares
    assert {stage.initial for stage in stages} == {gpus or 8}


@pytest.mark.parametrize("gpus, share, count", [(1, 0.2, 5), (1, 0.1, 10), (2, 0.3, 6), (1, 0.7, 1)])
def test_as_many_actors_as_fit_on_the_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: float, share: float, count: int
) -> None:
    monkeypatch.setattr("shardsight.cluster.nodes", lambda _: [{"CPU": 32.0, "GPU": float(gpus)}])
    (stage,) = plan({"yolo": {}}, {"yolo": None}, share)
    assert stage.initial == count


@pytest.mark.parametrize(
    "cpus, gpus, count", [(1.0, 0.0, 1), (2.0, 0.0, 1), (4.0, 0.0, 3), (32.0, 0.0, 31), (32.0, 1.0, 30)]
)
def test_decoding_has_most_cores_where_it_needs_them(
    monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, count: int
) -> None:
    """A photo of 12 megapixels takes longer to decode than to compute."""
    node = {"CPU": cpus, "GPU": gpus}
    monkeypatch.setattr("shardsight.cluster.nodes", lambda _: [node])
    monkeypatch.setattr("shardsight.cluster.free_cpus", lambda: cpus)
    stages = plan({"yolo": {}, "paligemma": {}}, {"yolo": None, "paligemma": None}, None)
    assert decoders(stages) == count


def start_python(program: str, *arguments: str, address: str | None = None) -> subprocess.Popen[str]:
    """address: of the Ray that it uses."""
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | ({"RAY_ADDRESS": address} if address else {})
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


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


def test_a_job_says_what_it_waits_for(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """Another job has all of the cluster's CPUs. And what no node has is refused: it would wait for ever. What the
    dashboard of jobs draws is among Ray's metrics."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpegs[0])
    (tmp_path / "in" / "b.jpg").write_bytes(b"no picture")
    command = (tmp_path / "in", "--output", tmp_path / "out", "--yolo", detector, "--max-error-rate", "1")
    drawn = set(re.findall(r"ray_shardsight_\w+", (ROOT / "deploy" / "grafana-jobs.json").read_text()))
    assert len(drawn) == 6
    port, exported = free_port(), free_port()
    with ray_head(f"--port={port}", f"--metrics-export-port={exported}", "--labels=team=vision") as (head, _):
        address = f"127.0.0.1:{port}"
        taken = start_python(TAKE_ALL, address)
        assert taken.stdout and taken.stdout.readline() == "taken\n"
        job = start_job(*command, "--label-selector", "team=vision", cluster=address)
        assert job.stderr
        assert "waiting for 1 CPU; the cluster has 0 of 2 CPU free" in job.stderr.readline()
        assert job.poll() is None
        taken.communicate("go on")
        shown: set[str] = set()
        while job.poll() is None or not drawn <= shown:
            shown |= set(re.findall(r"^(\w+)\{", httpx.get(f"http://127.0.0.1:{exported}/metrics").text, re.M))
            time.sleep(0.2)
        assert job.wait(120) == 0 and job_of(tmp_path / "out")["rows"] == 2
        refused = start_job(*command, "--overwrite", "--gpus-per-actor", "1", cluster=address)
        said = refused.communicate(timeout=120)[1]
        assert refused.returncode == 2 and said.count("\n") == 1
        assert "no node of the Ray cluster has 1 CPU and 1 GPU" in said
        refused = start_job(*command, "--overwrite", "--label-selector", "team=audio", cluster=address)
        said = refused.communicate(timeout=120)[1]
        assert refused.returncode == 2 and said.count("\n") == 1
        assert "no node with team=audio of the Ray cluster has 1 CPU" in said
        assert head.poll() is None


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
