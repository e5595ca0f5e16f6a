"""What Ray Data does without where the job has started its own Ray, on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.stats import _StatsManager

from shardsight import cluster
from shardsight.actors import Stage, decoders

# Bytes for each block that is being made or computed: it and some three that wait.
BLOCK = 128 << 20


def limits(stages: list[Stage]) -> ExecutionResources:
    """Of Ray's store, which would else fill with frames that wait, and keeps the memory that it once took. In a
    cluster, whose pools may grow, none but Ray's own."""
    if not cluster.private():
        return ExecutionResources.for_limits()
    blocks = decoders(stages) + sum(stage.initial * stage.calls for stage in stages)
    return ExecutionResources.for_limits(object_store_memory=float(BLOCK * blocks))


class _Machine(ClusterAutoscaler):  # type: ignore[misc]  # Ray Data has no types
    """Its resources, of which nothing comes or goes."""

    def try_trigger_scaling(self) -> None:
        pass

    def on_executor_shutdown(self) -> None:
        pass

    def get_total_resources(self) -> ExecutionResources:
        return ExecutionResources.from_resource_dict(ray.cluster_resources())


@contextmanager
def lean() -> Iterator[None]:
    """Execute datasets without the actors that tell Ray Data's dashboard and Ray's autoscaler of them, of which there
    are none here: two processes, each of which takes a second to start."""
    if not cluster.private():
        yield
        return
    names = "register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics"
    without_statistics = cluster.replaced(_StatsManager, **dict.fromkeys(names, cluster.nothing))
    with (
        without_statistics,
        cluster.replaced(streaming_executor, create_cluster_autoscaler=lambda *_, **__: _Machine()),
    ):
        yield
