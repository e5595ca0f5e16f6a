"""The Ray that a job runs on, joined or started."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from shardsight.errors import UsageError


def join(verbose: bool = False) -> bool:
    """Join the cluster that RAY_ADDRESS or a local `ray start` names, else start one of this process; unless that is
    done. Returns whether one was started here. Raises UsageError.

    verbose: show what Ray and the workers log.
    """
    if joined():
        return False
    import ray

    with nullcontext() if verbose else _silent():  # Ray warns of several clusters on one machine
        address = living_cluster()
    # Workers of a cluster of our own inherit the environment; with a runtime_env, Ray would start them all anew.
    stores = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))}
    environment = {} if address == "local" else stores
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray logs each of its retries otherwise
    try:
        with nullcontext() if verbose else _silent():
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
    return address == "local"


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
    if joined():
        sys.modules["ray"].shutdown()


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
