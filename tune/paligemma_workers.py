"""Several processes that train one model together: each computes its share of a batch, and all add their gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from ray import tune

_TIMEOUT = timedelta(minutes=30)  # for the others, which may still be loading or measuring
T = TypeVar("T")


class WorkerDied(Exception):
    """A process of the group is gone, or cannot be reached."""


class Group:
    """This process among the `count` of a trial, where each calls each method as often as the others; or alone.

    Its methods raise WorkerDied.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that this process computes."""
        return items[self.rank :: self.count]

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over the group."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_device())
        with _others_alive():
            dist.all_reduce(tensor)
        return list(tensor.tolist())

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each parameter's gradient by its sum over the group; none counts as zero."""
        if self.count == 1:
            return
        for one in parameters:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        with _others_alive():
            for work in [dist.all_reduce(one.grad, async_op=True) for one in parameters]:
                work.wait()

    def gather(self, found: list[T]) -> list[T]:
        """What each process found, one after the other."""
        if self.count == 1:
            return found
        all_found: list[Any] = [None] * self.count
        with _others_alive():
            dist.all_gather_object(all_found, found)
        return [one for part in all_found for one in part]


ALONE = Group()


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerDied(f"another process of the trial does not answer: {' '.join(str(error).split())}") from error


@contextmanager
def joined(rank: int, count: int, store: "dist.Store") -> Iterator[Group]:
    """The group, once all its processes are there."""
    backend = "nccl" if _device() == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_TIMEOUT)
    try:
        yield Group(rank, count)
    finally:
        dist.destroy_process_group()


@contextmanager
def started(count: int, work: Callable[[Group], None]) -> Iterator[Group]:
    """In a trial of Tune: a group of this process and others, each with a bundle of the trial's resources, which do the
    `work`. Raises what was raised in one of them, and WorkerDied where one was killed."""
    if count == 1:
        yield ALONE
        return
    host = ray.util.get_node_ip_address()
    store = dist.TCPStore(host, 0, count, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    bundle = tune.get_context().get_trial_resources().bundles[-1]
    remote = ray.remote(num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0), max_retries=0)(_work)
    others = [remote.remote(rank, count, host, store.port, work) for rank in range(1, count)]
    try:
        with joined(0, count, store) as group:
            yield group
    except WorkerDied as error:
        raise _cause(others) or error from error
    finally:
        for one in others:
            ray.cancel(one, force=True)


def _work(rank: int, count: int, host: str, port: int, work: Callable[[Group], None]) -> None:
    store = dist.TCPStore(host, port, count, is_master=False, timeout=_TIMEOUT)
    with joined(rank, count, store) as group:
        work(group)


def _cause(others: list[Any]) -> Exception | None:
    """What was raised in another process, other than that it, too, lacked one."""
    for one in ray.wait(others, num_returns=len(others), timeout=10)[0]:
        try:
            ray.get(one)
        except ray.exceptions.RayTaskError as failed:
            if isinstance(failed.cause, Exception) and not isinstance(failed.cause, WorkerDied):
                return failed.cause
        except ray.exceptions.RayError:
            continue
    return None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
