"""The flow, wired with Ray Data: units → read and decode → YOLO → PaliGemma → Parquet."""

import pickle
import warnings
from functools import partial
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from shardsight.actors import Annotator, Stage
from shardsight.decode.frames import Load
from shardsight.isolate import Isolate
from shardsight.results.coverage import Coverage
from shardsight.sources import Listing, Unit
from shardsight.storage import Storage

# Blocks that a model works on at once: vLLM's engine batches across them, so that it never waits for the next.
CALLS = {"yolo": 1, "paligemma": 4}


def read(*inputs: str, storage: dict[str, str] | None = None) -> Dataset:
    """Inputs as of `annotate` → frames at their full size, for pipelines of one's own: tables of decode.frames.TABLE,
    one row a picture, with an `error` and no `frame` where it cannot be decoded. Raises UsageError."""
    store = Storage(storage or {})
    units = list(Listing(list(inputs), store).left(Coverage()))
    return _blocks(units).map_batches(Load(store), batch_size=1, batch_format="pyarrow")


def _blocks(units: list[Unit]) -> Dataset:
    """A table of a unit each, in the column `unit`."""
    return ray.data.from_items(
        [{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=min(len(units), 5000)
    )


def flow(units: list[Unit], load: Load, stages: list[Stage], isolate: bool = False) -> Dataset:
    """Units → annotated rows. Rows in a process that died are missing, unless each record is isolated."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A block is what one call of the model gets, of frames; or what is not yet written.
    context.target_max_block_size = 64 << 10 if isolate else 32 << 20
    # Deaths are ignored: the driver sees in the footers what is missing. For other errors see isolate.only_deaths.
    context.max_errored_blocks = 0 if isolate else -1
    blocks = _blocks(units)
    # Of arguments that go in 2.64; the pinned release has no other way to bound its retries, which have no
    # end by default, where a record kills whatever process it is in.
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
    if isolate:

        def start(stage: Stage) -> Any:
            return ray.remote(Annotator).options(num_cpus=stage.cpus, num_gpus=stage.gpus).remote(stage, True)

        return blocks.map_batches(
            Isolate,
            fn_constructor_args=(load, [(stage.kind, partial(start, stage)) for stage in stages]),
            compute=ActorPoolStrategy(min_size=1, max_size=max(stage.actors[1] for stage in stages)),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
        )
    blocks = blocks.map_batches(
        load, batch_size=1, batch_format="pyarrow", num_cpus=1, ray_remote_args_fn=lambda: {"max_retries": 1}
    )
    for stage in stages:
        blocks = _with_model(blocks, stage)
    return blocks


def _with_model(blocks: Dataset, stage: Stage) -> Dataset:
    calls = CALLS[stage.kind]
    return blocks.map_batches(
        Annotator,
        fn_constructor_args=(stage,),
        compute=ActorPoolStrategy(
            min_size=stage.actors[0],
            max_size=stage.actors[1],
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=stage.cpus,
        num_gpus=stage.gpus,
        ray_remote_args_fn=lambda: {"max_restarts": 20, "max_task_retries": 1},
    )
