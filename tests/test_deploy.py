"""deploy/: Kubernetes' manifests, the image, and the README's commands for clusters."""

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import cli as ray_cli
from ray.serve.schema import ServeDeploySchema

from serve.app import app
from serve.arguments import Arguments
from shardsight import settings
from tests.conftest import ROOT
from tests.test_house import LOCKS

DEPLOY = ROOT / "deploy"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(DEPLOY.glob("*.yaml"))}
CLUSTERS = {"raycluster": ("spec",), "rayjob": ("spec", "rayClusterSpec"), "rayservice": ("spec", "rayClusterConfig")}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def at(manifest: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        manifest = manifest[part]
    return manifest


def cluster_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = at(MANIFESTS[name], CLUSTERS[name])
    return found


def pods_of(name: str) -> Iterator[dict[str, Any]]:
    """Specs of all pods of a manifest."""
    cluster = cluster_of(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]
    if submitter := MANIFESTS[name]["spec"].get("submitterPodTemplate"):
        yield submitter["spec"]


def strict(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply` refuses them."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return found


def check(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError where KubeRay's definition of its kind does not allow a manifest."""
    schema = json.loads((ROOT / "tests" / "data" / "kuberay" / f"{manifest['kind']}.json").read_text())
    jsonschema.Draft7Validator(strict(schema)).validate(manifest)
    assert manifest["apiVersion"] == "ray.io/v1" and set(manifest["metadata"]) == {"name"}


def test_the_manifests_are_those_that_are_checked() -> None:
    assert set(MANIFESTS) == set(CLUSTERS)


@pytest.mark.parametrize("name", CLUSTERS)
def test_kuberay_takes_the_manifest(name: str) -> None:
    check(MANIFESTS[name])


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize(
    ("path", "right", "wrong"),
    [
        ((), "enableInTreeAutoscaling", "enableInTreeAutoscaler"),
        (("autoscalerOptions",), "version", "versions"),
        (("workerGroupSpecs", 0), "minReplicas", "minReplica"),
        (("workerGroupSpecs", 0, "template", "spec"), "tolerations", "toleration"),
        (("headGroupSpec", "template", "spec", "containers", 0), "livenessProbe", "livenessprobe"),
        (("headGroupSpec", "template", "spec", "containers", 0, "securityContext"), "capabilities", "capability"),
        (("headGroupSpec", "template", "spec", "containers", 0, "livenessProbe", "httpGet"), "port", "ports"),
    ],
)
def test_a_misspelt_field_is_refused(name: str, path: tuple[str | int, ...], right: str, wrong: str) -> None:
    """Or Kubernetes would refuse, on the day of the deployment, what was checked here."""
    manifest = copy.deepcopy(MANIFESTS[name])
    place = at(manifest, CLUSTERS[name] + path)
    place[wrong] = place.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        check(manifest)


@pytest.mark.parametrize("version", ["v3", 2])
def test_a_wrong_value_is_refused(version: Any) -> None:
    manifest = copy.deepcopy(MANIFESTS["raycluster"])
    manifest["spec"]["autoscalerOptions"]["version"] = version
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize("name", CLUSTERS)
def test_rays_autoscaler_reads_the_cluster(name: str) -> None:
    """Workers start from zero, which Ray does where a group's limits say what a node of it would have."""
    cluster = cluster_of(name)
    metadata = {"name": name, "namespace": "default"}
    config = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": copy.deepcopy(cluster)})
    types = config["available_node_types"]
    assert types.pop("headgroup")["resources"]["CPU"] == 0
    assert {type["min_workers"] for type in types.values()} == {0}
    assert types["models"]["resources"]["GPU"] == 1 and types["models"]["max_workers"] > 1
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cluster_asks_for_a_token(name: str) -> None:
    """Without one, whoever reaches the head's port runs what he likes. KubeRay takes a token from Ray 2.52 on."""
    assert cluster_of(name)["authOptions"] == {"mode": "token"}
    assert cluster_of(name)["rayVersion"] == ray.__version__


@pytest.mark.parametrize("name", CLUSTERS)
def test_pods_are_bounded_and_not_root(name: str) -> None:
    """Requests equal limits: Ray counts a node's CPUs by its limits, and would count those of others."""
    for pod in pods_of(name):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["image"] in ("shardsight:cpu", "shardsight:gpu")
            wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert wants_gpu == (container["image"] == "shardsight:gpu")


@pytest.mark.parametrize("name", CLUSTERS)
def test_nodes_have_probes_a_disk_and_spot(name: str) -> None:
    """Without a disk at /tmp, where models of a store are staged, they would lie in the container's own layer."""
    cluster = cluster_of(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        # KubeRay's own check of readiness, unlike one that is written here, asks Serve's proxy.
        assert ("readinessProbe" in container) == (name != "rayservice")
        (mount,), (volume,) = container["volumeMounts"], group["template"]["spec"]["volumes"]
        assert mount == {"name": volume["name"], "mountPath": "/tmp"} and "emptyDir" in volume
    for group in cluster["workerGroupSpecs"]:
        tolerated = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
        assert ("nvidia.com/gpu" in tolerated) == (group["groupName"] == "models")


def check_job(arguments: list[str]) -> None:
    """Raises UsageError. By default a job is sized to the cluster, which has no node yet that computes."""
    found = settings.parse(arguments)
    assert found.gpus_per_actor


def test_the_job_is_one_that_the_command_takes() -> None:
    command = shlex.split(MANIFESTS["rayjob"]["spec"]["entrypoint"])
    assert command[:3] == ["python", "-m", "jobs.annotate"]
    check_job(command[3:])


def test_the_job_gets_its_keys_from_a_secret() -> None:
    for container in (pod["containers"][0] for pod in pods_of("rayjob") if "volumes" in pod):
        assert container["envFrom"] == [{"secretRef": {"name": "shardsight-store", "optional": True}}]


def test_the_service_is_one_that_serve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, and the deployments whose options it sets, are checked by the application itself."""
    monkeypatch.chdir(ROOT)
    config = ServeDeploySchema.model_validate(yaml.safe_load(MANIFESTS["rayservice"]["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert (application.import_path, application.route_prefix) == ("serve.app:app", "/")
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    arguments = Arguments(**application.args)
    assert arguments.gpus and arguments.replicas > 1
    built = app(arguments)._bound_deployment
    names = {built.name, *(handle._bound_deployment.name for handle in built.init_args[3].values())}
    assert {deployment.name for deployment in application.deployments} <= names
    # A GPU holds one replica of each model.
    assert arguments.gpus * (len(names) - 1) <= 1


def test_the_service_has_keys_and_survives_its_head() -> None:
    cluster = cluster_of("rayservice")
    redis = cluster["gcsFaultToleranceOptions"]
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "shardsight-redis"
    for pod in pods_of("rayservice"):
        (key,) = pod["containers"][0]["env"]
        # Not optional: without keys, the service would answer nobody.
        assert key["name"] == "SHARDSIGHT_API_KEYS" and "optional" not in key["valueFrom"]["secretKeyRef"]
    (models,) = cluster["workerGroupSpecs"]
    assert {"containerPort": 8000, "name": "serve"} in models["template"]["spec"]["containers"][0]["ports"]


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each of the Dockerfile's instructions."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in whole.splitlines() if line)]


def stages() -> dict[str, dict[str, Any]]:
    """Each stage of the Dockerfile: its base, and its instructions, those of the stages below it first."""
    found: dict[str, dict[str, Any]] = {}
    name = ""
    for instruction, rest in instructions():
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = {"base": base, "steps": list(found.get(base, {"steps": []})["steps"])}
        elif name:
            found[name]["steps"].append((instruction, rest))
    return found


def test_the_dockerfile_has_instructions_that_docker_knows() -> None:
    known = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
    assert {name for name, _ in instructions()} <= known
    for name, stage in stages().items():
        assert stage["base"] in stages() or re.fullmatch(r"python:3\.11-slim-\w+", stage["base"]), name


def test_what_the_image_copies_is_there_and_sent() -> None:
    """A source that .dockerignore keeps back is one that Docker does not find."""
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    sent = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = set()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            if sources[0].startswith("--from="):
                stage, (source,) = sources[0].removeprefix("--from="), sources[1:]
                assert stage in stages() and source == target == "/opt/venv"
                continue
            # Of several sources Docker copies what is in folders, not the folders.
            assert len(sources) == 1 or all((ROOT / source).is_file() for source in sources)
            copied |= set(sources)
    assert copied == sent and all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_targets_are_of_their_kind(target: str) -> None:
    stage = stages()[target]
    users = [rest for name, rest in stage["steps"] if name == "USER"]
    assert users[-1] == "1000:1000"  # a number, by which Kubernetes sees that it is not root
    copied = [rest for name, rest in stage["steps"] if name == "COPY" and rest.startswith("--from")]
    assert copied == [f"--from=build-{target} /opt/venv /opt/venv"]
    (install,) = [rest for _, rest in stages()[f"build-{target}"]["steps"] if "--requirements pyproject.toml" in rest]
    extras = re.findall(r"--extra (\w+)", install)
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert extras[0] == target and {"serve", "tune", "gcs", "azure"} < set(extras) <= declared
    assert f"--constraint {LOCKS[target]}" in install and "--compile-bytecode" in install
    tools = " ".join(rest for name, rest in stage["steps"] if name == "RUN" and "apt-get" in rest)
    assert {"wget", "libnuma1"} <= set(tools.split())  # of KubeRay's probes, and of vLLM


def test_the_image_is_built_with_the_makefiles_uv() -> None:
    (ours,) = re.findall(r"^ARG UV=(\S+)$", DOCKERFILE, re.MULTILINE)
    (makes,) = re.findall(r"^UV = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert ours == makes


def test_the_images_environment_is_what_processes_read() -> None:
    environment = dict(
        pair.split("=", 1) for name, rest in stages()["cpu"]["steps"] if name == "ENV" for pair in rest.split()
    )
    assert environment["PATH"].startswith("/opt/venv/bin:")
    (folder,) = [rest for name, rest in stages()["cpu"]["steps"] if name == "WORKDIR"]
    assert environment["PYTHONPATH"] == folder  # where workers find serve, jobs and tune
    assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "serve.guard:proxy_middleware"


def test_nothing_names_a_registry_or_a_secret() -> None:
    for path in (*DEPLOY.iterdir(), ROOT / ".dockerignore", ROOT / "cluster.yaml", ROOT / "cluster-gcp.yaml"):
        text = path.read_text()
        assert not re.search(r"--(extra-)?index|index-url|registry\.|ghcr\.io|ecr\.|\.pkg\.dev|password: \w", text), (
            path
        )


SECTION = re.search(r"^## On a cluster\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
assert SECTION
BLOCKS = "\n".join(re.findall(r"```sh\n(.*?)```", SECTION[1], re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.partition(" #")[0].removeprefix("export ").strip(" &") for line in BLOCKS.splitlines() if line]


def options_of(command: list[str]) -> dict[str, Any]:
    """A `ray` command's options, as Ray itself parses them. Raises click.UsageError."""
    found: Any = ray_cli
    while isinstance(found, click.Group):
        name, *command = command
        found = found.commands[name]
    parameters: dict[str, Any] = found.make_context(name, command).params
    return parameters


@pytest.mark.parametrize("command", [one for one in COMMANDS if ".venv/bin/ray" in one])
def test_the_readmes_ray_commands_parse(command: str) -> None:
    """They need a cloud; but their options, and those of the job that they submit, are checked."""
    words = shlex.split(command)
    options = options_of(words[words.index(".venv/bin/ray") + 1 :])
    if config := options.get("cluster_config_file"):
        assert (ROOT / config).is_file()
    if entrypoint := options.get("entrypoint"):
        assert list(entrypoint[:3]) == ["python", "-m", "jobs.annotate"]
        check_job(list(entrypoint[3:]))


def test_an_option_that_ray_does_not_know_is_refused() -> None:
    with pytest.raises(click.UsageError, match="--adress"):
        options_of(["job", "submit", "--adress", "http://127.0.0.1:8265", "--", "true"])


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith(("kubectl apply", "docker build"))])
def test_the_readmes_manifests_and_targets_are_there(command: str) -> None:
    words = shlex.split(command)
    (file,) = [words[index + 1] for index, word in enumerate(words) if word in ("--file", "--filename")]
    assert (ROOT / file).is_file()
    if "--target" in words:
        target = words[words.index("--target") + 1]
        assert target in stages() and words[words.index("--tag") + 1] == f"shardsight:{target}"


def test_the_readme_makes_the_secrets_that_the_manifests_read() -> None:
    made = {tuple(shlex.split(one)[4:]) for one in COMMANDS if one.startswith("kubectl create secret generic")}
    keys = {(name, *(pair.removeprefix("--from-literal=").partition("=")[0] for pair in rest)) for name, *rest in made}
    assert {("shardsight-api-keys", "keys"), ("shardsight-redis", "password")} <= keys


def test_the_section_names_all_of_deploy() -> None:
    for path in (*DEPLOY.iterdir(), Path("cluster.yaml"), Path("cluster-gcp.yaml")):
        assert path.name in SECTION[1], path
