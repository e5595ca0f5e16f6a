"""The flow, wired with Ray Data: units → read and decode → YOLO → PaliGemma → Parquet.

Where videos are tracked, YOLO's actors have the units read and decoded themselves: see tracking.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionResources
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.stats import _StatsManager

from shardsight import cluster
from shardsight.actors import Annotator, Stage, decoders
from shardsight.decode.frames import Load
from shardsight.decode.split import FRAMES, Split, is_long
from shardsight.decode.video import Sampling
from shardsight.isolate import isolated
from shardsight.results.coverage import Coverage
from shardsight.sources import Listing, Unit
from shardsight.storage import Storage
from shardsight.tracking import OPEN, TrackingAnnotator
from shardsight.watching import Hook

# Blocks that a model works on at once: vLLM's engine batches across them, so that it never waits for the next.
CALLS = {"yolo": 1, "paligemma": 4}


# Frames that wait, bytes for each block that is being made or computed: some four blocks of them.
WAITING = 128 << 20


def read(*inputs: str, storage: dict[str, str] | None = None, **frames: Any) -> Dataset:
    """Inputs as of `annotate` → frames at their full size, for pipelines of one's own: tables of decode.frames.TABLE,
    one row per picture and per frame of a video, with an `error` and no `frame` where it cannot be decoded. frames:
    which of a video, as fps, every or keyframes of `annotate`. Raises UsageError."""
    store = Storage(storage or {})
    units = list(Listing(list(inputs), store).left(Coverage()))
    return _decoded(units, Load(store, sampling=Sampling(**frames)))


def _blocks(units: list[Unit]) -> Dataset:
    """A table of a unit each, in the column `unit`."""
    return ray.data.from_items(
        [{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=min(len(units), 5000)
    )


def _decoded(units: list[Unit], load: Load, **options: Any) -> Dataset:
    """Units → frames; of a long video, its parts in several tasks, unless a clip may go from one into the next."""
    blocks = _blocks(units)
    if not load.clips and any(map(is_long, units)):
        blocks = blocks.map_batches(Split(load.storage, load.sampling, FRAMES), batch_size=1, batch_format="pyarrow")
        blocks = blocks.repartition(target_num_rows_per_block=1)
    return blocks.map_batches(load, batch_size=1, batch_format="pyarrow", **options)


def flow(units: list[Unit], load: Load, stages: list[Stage], isolate: bool = False) -> Dataset:
    """Units → annotated rows. Rows in a process that died are missing, unless each record is isolated."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Hook]
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=_memory(stages))
    # A block is what one call of the model gets, of frames; or what is not yet written.
    context.target_max_block_size = 64 << 10 if isolate else 32 << 20
    # Deaths are ignored: the driver sees in the footers what is missing. For other errors see isolate.only_deaths.
    context.max_errored_blocks = 0 if isolate else -1
    # Of arguments that go in 2.64; the pinned release has no other way to bound its retries, which have no
    # end by default, where a record kills whatever process it is in.
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
    if isolate:
        return isolated(_blocks(units), load, stages)
    if stages[0].tracks:
        tracking, *stages = stages
        together = min(OPEN, -(-len(units) // tracking.initial))
        blocks = _with_model(_blocks(units), tracking, TrackingAnnotator, (load, tracking), together)
    else:
        options = {"num_cpus": 1, "label_selector": stages[0].labels}
        blocks = _decoded(units, load, **options, ray_remote_args_fn=lambda: {"max_retries": 1})
    for stage in stages:
        blocks = _with_model(blocks, stage, Annotator, (stage,))
    return blocks


def _memory(stages: list[Stage]) -> float | None:
    """Bytes that blocks may take in a Ray of this process, whose store would else fill with frames that wait; it keeps
    the memory that it once took. In a cluster, whose pools may grow, Ray's own share of it."""
    if not cluster.private():
        return None
    return float(WAITING * (decoders(stages) + sum(stage.initial * CALLS[stage.kind] for stage in stages)))


class _Machine(ClusterAutoscaler):  # type: ignore[misc]  # Ray Data has no types
    """What a Ray of this process has, of which nothing comes or goes."""

    def try_trigger_scaling(self) -> None:
        pass

    def on_executor_shutdown(self) -> None:
        pass

    def get_total_resources(self) -> ExecutionResources:
        return ExecutionResources.from_resource_dict(ray.cluster_resources())


@contextmanager
def lean() -> Iterator[None]:
    """Execute datasets without the actors that tell Ray Data's dashboard and Ray's autoscaler of them, in a Ray of this
    process, which has neither: two processes, each of which takes a second to start."""
    if not cluster.private():
        yield
        return
    names = "register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics"
    without_statistics = cluster.replaced(_StatsManager, **dict.fromkeys(names, lambda *_, **__: None))
    with (
        without_statistics,
        cluster.replaced(streaming_executor, create_cluster_autoscaler=lambda *_, **__: _Machine()),
    ):
        yield


def _with_model(
    blocks: Dataset, stage: Stage, actor: Any, arguments: tuple[Any, ...], batch_size: int | None = None
) -> Dataset:
    calls = CALLS[stage.kind]
    # A batch is a block, as it comes. map_batches refuses that where GPUs are asked for.
    return blocks.map_batches_internal(
        actor,
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(
            min_size=stage.actors[0],
            max_size=stage.actors[1],
            initial_size=stage.initial,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        batch_size=batch_size,
        batch_format="pyarrow",
        **stage.options,
        ray_remote_args_fn=lambda: {"max_restarts": 20, "max_task_retries": 1},
    )
