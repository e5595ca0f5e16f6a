"""The Ray that a job runs on, joined or started."""

import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from shardsight.errors import UsageError

_started = False  # the Ray that this process is connected to


def join(verbose: bool = False) -> bool:
    """Join the cluster that RAY_ADDRESS or a local `ray start` names, else start one of this process; unless that is
    done. Returns whether one was started here. Raises UsageError.

    verbose: show what Ray and the workers log.
    """
    global _started
    if joined():
        return False
    import ray

    with nullcontext() if verbose else _silent():  # Ray warns of several clusters on one machine
        address = living_cluster()
    # Workers of a cluster of our own inherit the environment; with a runtime_env, Ray would start them all anew.
    environment = {} if address == "local" else _credentials()
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray logs each of its retries otherwise
    try:
        with nullcontext() if verbose else _silent(), _lean(address, verbose):
            ray.init(
                address,
                logging_level=logging.INFO if verbose else logging.ERROR,
                log_to_driver=verbose,
                include_dashboard=False,
                runtime_env={"env_vars": environment} if environment else None,
            )
    except Exception as error:
        raise UsageError(_why_not(address, error)) from error
    if not verbose:
        import ray.data  # which configures its logging when it is imported

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    _started = address == "local"
    return _started


def _credentials() -> dict[str, str]:
    """Variables of this process by which workers can use its stores. Ray refuses those that `ray job submit` was given
    for the job, and gives them to the workers itself."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) and name not in submitted.get("env_vars", {})
    }


def _lean(address: str, verbose: bool) -> AbstractContextManager[None]:
    """Start a Ray of this process without what only clusters, and people who watch them, use: its dashboard, for which
    `ray.init` waits a second, and the monitors that start nodes and fetch workers' logs. Without them it takes 2.5
    seconds less to begin and end (2 cores, ray 2.60), and sends no telemetry, which is the dashboard's."""
    if address != "local":
        return nullcontext()
    from ray._private.node import Node

    names = ["start_api_server", "start_monitor"] + ([] if verbose else ["start_log_monitor"])
    return replaced(Node, **dict.fromkeys(names, nothing))


@contextmanager
def replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile a class or module has these functions, where Ray has no setting."""
    kept = {name: vars(owner)[name] for name in functions}
    for name, function in functions.items():
        setattr(owner, name, staticmethod(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(owner, name, function)


def nothing(*_: Any, **__: Any) -> None:
    """What a function is replaced by that is left out."""


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what Ray's native code writes to stderr, such as its log level; its errors are raised as well."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def joined() -> bool:
    """Whether this process is connected to Ray."""
    ray = sys.modules.get("ray")  # imported only where it is needed: it takes a second
    return ray is not None and ray.is_initialized()


def leave() -> None:
    """Disconnect from Ray; what `join` started ends."""
    global _started
    if joined():
        sys.modules["ray"].shutdown()
        _started = False


def living_cluster() -> str:
    """The address of the cluster to join, or "local". Ray itself waits many minutes for one that is gone.

    A cluster that another job started for itself is not joined: it ends with that job. Raises UsageError.
    """
    from ray._private.services import canonicalize_bootstrap_address

    named = os.environ.get("RAY_ADDRESS")
    if named and "://" in named:
        return named
    try:
        address = canonicalize_bootstrap_address(None)
        if address is None:
            return "local"
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        if named:
            raise UsageError(
                f"no Ray cluster answers at RAY_ADDRESS={named} ({error}): start it, or unset it"
            ) from None
        return "local"  # what an earlier `ray start` left behind
    return address


def private() -> bool:
    """Whether this process has started the Ray that it is connected to."""
    return _started


def nodes(labels: dict[str, str] | None = None) -> list[dict[str, float]]:
    """The resources of each node that is alive and has these labels."""
    import ray

    wanted = (labels or {}).items()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and wanted <= node["Labels"].items()]


def free_cpus() -> float:
    """How many CPUs of the cluster nobody has reserved."""
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def dead() -> int:
    """How many nodes of the cluster have died so far."""
    import ray

    return sum(not node["Alive"] for node in ray.nodes())


def waiting(requests: list[dict[str, float]], labels: dict[str, str] | None = None) -> str:
    """What of these requests Ray has no room for yet, as "waiting for 1 GPU; the cluster has 0 of 2 free, and 1 node is
    starting". Empty if all are placed. labels: of the nodes that they may be placed on.

    Raises UsageError for what no node has, and no autoscaler will start a node for.
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    status = GetClusterStatusReply()
    status.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    pending = [one.request for one in status.cluster_resource_state.pending_resource_requests if one.count]
    missing = [request for request in requests if any(_same(request, one) for one in pending)]
    if not missing:
        return ""
    scaling, there = status.autoscaling_state, nodes(labels)
    for request in missing:
        fits = any(all(node.get(name, 0.0) >= amount for name, amount in request.items()) for node in there)
        refused = any(_same(request, one) for one in scaling.infeasible_resource_requests)
        if not fits and (refused or not scaling.autoscaler_state_version):
            where = "".join(f" with {name}={value}" for name, value in (labels or {}).items())
            others = " or ".join(["--label-selector"] * bool(labels) + ["--gpus-per-actor"] * ("GPU" in request))
            raise UsageError(
                f"no node{where} of the Ray cluster has {_amounts(request)}, and none will be started: add one"
                + (f", or choose another {others}" if others else "")
            )
    free = ray.available_resources()
    names = sorted({name for request in missing for name in request})
    has = ", ".join(
        f"{free.get(name, 0.0):g} of {sum(node.get(name, 0.0) for node in there):g} {name}" for name in names
    )
    starting = sum(one.count for one in scaling.pending_instance_requests) + len(scaling.pending_instances)
    coming = f", and {starting} node{'s are' if starting > 1 else ' is'} starting" if starting else ""
    return f"waiting for {_amounts(max(missing, key=len))}; the cluster has {has} free{coming}"


def _amounts(request: dict[str, float]) -> str:
    """As text. CPUs are rounded up, as nodes have whole ones."""
    whole = {name: math.ceil(amount) if name == "CPU" else amount for name, amount in sorted(request.items())}
    return " and ".join(f"{amount:g} {name}" for name, amount in whole.items())


def _same(request: dict[str, float], other: Any) -> bool:
    """Whether a request of Ray's own protocol is for these amounts."""
    bundle = {name: round(amount, 4) for name, amount in other.resources_bundle.items() if amount}
    return bundle == {name: round(amount, 4) for name, amount in request.items()}


def _why_not(address: str, error: Exception) -> str:
    """Why Ray cannot be used, as one sentence."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "AF_UNIX path length" in said:
        name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
        folder = os.environ.get(name, "")
        return f"{name}={folder} is too long for the sockets of Ray: set RAY_TMPDIR to a shorter folder, as /tmp"
    place = (
        "Ray cannot be started on this machine"
        if address == "local"
        else f"the Ray cluster at {address} cannot be joined"
    )
    return f"{place}: {said[:500]}"
