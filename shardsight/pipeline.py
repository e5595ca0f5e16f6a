"""The flow, wired with Ray Data: units → read and decode → YOLO → PaliGemma → Parquet.

Where videos are tracked, YOLO's actors have the units read and decoded themselves: see tracking.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from shardsight import one_machine
from shardsight.actors import DECODING, Annotator, Stage
from shardsight.decode.frames import Load
from shardsight.decode.split import Split, is_long
from shardsight.decode.video import Sampling
from shardsight.isolate import isolated
from shardsight.results.coverage import Coverage
from shardsight.sources import Listing, Unit, pack
from shardsight.storage import Storage
from shardsight.tracking import OPEN, TrackingAnnotator
from shardsight.watching import Hook


def read(*inputs: str, storage: dict[str, str] | None = None, **frames: Any) -> Dataset:
    """Inputs as of `annotate` → frames at their full size, for pipelines of one's own: tables of decode.frames.TABLE,
    one row per picture and per frame of a video, with an `error` and no `frame` where it cannot be decoded. frames:
    which of a video, as fps, every or keyframes of `annotate`. Raises UsageError."""
    store = Storage(storage or {})
    units = Listing(list(inputs), store).left(Coverage())
    return _decoded(_packed(units), Load(store, sampling=Sampling(**frames)))


def _packed(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """Each packed as `unit`, and whether it is `long`."""
    return [{"unit": pack(unit), "long": is_long(unit)} for unit in units]


def _blocks(units: list[dict[str, Any]]) -> Dataset:
    return ray.data.from_items(units, override_num_blocks=min(len(units), 5000))


def _decoded(units: list[dict[str, Any]], load: Load, **options: Any) -> Dataset:
    """Units → frames; of a long video, its parts in several tasks, unless a clip may go from one into the next."""
    blocks = _blocks(units)
    if not load.clips and any(unit["long"] for unit in units):
        blocks = blocks.map_batches(Split(load.storage, load.sampling), batch_size=1, batch_format="pyarrow", **options)
        blocks = blocks.repartition(target_num_rows_per_block=1)
    return blocks.map_batches(load, batch_size=1, batch_format="pyarrow", **options)


def flow(left: Iterable[Unit], load: Load, stages: list[Stage], isolate: bool = False) -> Dataset:
    """Units → annotated rows, by isolate.only_deaths. What was in a process that died is missing, unless isolated."""
    units, context = _packed(left), DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Hook]
    context.execution_options.resource_limits = one_machine.limits(stages)
    # A block is what one call of the model gets, of frames; or what is not yet written.
    context.target_max_block_size = 64 << 10 if isolate else 32 << 20
    # Deaths are ignored: the driver sees in the footers what is missing. For other errors see isolate.only_deaths.
    context.max_errored_blocks = 0 if isolate else -1
    # `ray_remote_args_fn` goes in Ray 2.64, but the pinned release has no other way to bound retries. By default they
    # have no end, and a record may kill each process that it is given to.
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
    if isolate:
        return isolated(_blocks(units), load, stages)
    if stages[0].tracks:
        tracking, *stages = stages
        together = min(OPEN, -(-len(units) // tracking.initial))
        blocks = _with_model(_blocks(units), tracking, TrackingAnnotator, (load, tracking), together)
    else:
        options = {"num_cpus": DECODING, "label_selector": stages[0].labels}
        blocks = _decoded(units, load, **options, ray_remote_args_fn=lambda: {"max_retries": 1})
    for stage in stages:
        blocks = _with_model(blocks, stage, Annotator, (stage,))
    return blocks


def _with_model(
    blocks: Dataset, stage: Stage, actor: Any, arguments: tuple[Any, ...], batch_size: int | None = None
) -> Dataset:
    # A batch is a block, as it comes. map_batches refuses that where GPUs are asked for.
    return blocks.map_batches_internal(
        actor,
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(
            min_size=stage.actors[0],
            max_size=stage.actors[1],
            initial_size=stage.initial,
            max_concurrent_calls_per_actor=stage.calls,
            enable_true_multi_threading=stage.calls > 1,
        ),
        batch_size=batch_size,
        batch_format="pyarrow",
        **stage.options,
        ray_remote_args_fn=lambda: {"max_restarts": 20, "max_task_retries": 1},
    )
