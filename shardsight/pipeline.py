"""The flow, wired with Ray Data: units → read and decode → YOLO → PaliGemma → Parquet."""

import os
import pickle
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from shardsight.decode.frames import Load, let_signals_kill
from shardsight.isolate import Careful
from shardsight.models.info import ModelDied
from shardsight.sources import Unit

# Blocks that a model works on at once: vLLM's engine batches across them, so that it never waits for the next.
CALLS = {"yolo": 1, "paligemma": 4}


@dataclass(frozen=True)
class Stage:
    """A model of the flow, in a pool of actors.

    name: `yolo`, `paligemma`, or `paligemma 448` of a further resolution. arguments: of its class. actors: least and
    most. cpus, gpus: what Ray reserves for one. threads: that it computes with.
    """

    name: str
    arguments: dict[str, Any]
    actors: tuple[int, int]
    cpus: float
    gpus: float
    threads: int

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]


def plan(models: dict[str, dict[str, Any]], actors: dict[str, str | None], gpus_per_actor: float | None) -> list[Stage]:
    """Models' arguments by name → stages, sized to the cluster, of which each gets its share: an actor a GPU; without
    one, an actor four threads, of which one is left to decoding."""
    cpus, gpus = int(ray.cluster_resources().get("CPU", 1)), ray.cluster_resources().get("GPU", 0.0)
    share = (min(1.0, gpus / len(models)) if gpus else 0.0) if gpus_per_actor is None else gpus_per_actor
    threads = min(cpus, 4)
    count = max(1, int(gpus // (share * len(models))) if share else cpus // (threads * len(models)))
    reserved = float(cpus > count * len(models)) if share else (threads - 1) / len(models)
    stages = []
    for name, arguments in models.items():
        stage = Stage(name, arguments, (count, count), reserved, share, threads)
        low, _, high = (actors[stage.kind] or "").partition(":")
        stages.append(replace(stage, actors=(int(low), int(high or low))) if low else stage)
    return stages


class Annotator:
    """A model in an actor; torch is imported there and not in the driver."""

    def __init__(self, stage: Stage) -> None:
        let_signals_kill()
        if stage.kind == "yolo":
            from shardsight.models.yolo.model import Yolo

            self.model: Any = Yolo(**stage.arguments, threads=stage.threads)
        else:
            from shardsight.models.paligemma.engine import PaliGemma

            memory = 0.9 * (stage.gpus or 1)  # of the GPU that it may share with another model
            self.model = PaliGemma(**stage.arguments, threads=stage.threads, memory=memory)

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            return self.model(table)
        except ModelDied:
            os._exit(1)  # Ray starts another, and asks it


def flow(units: list[Unit], load: Load, stages: list[Stage], careful: bool = False) -> Dataset:
    """Units → annotated rows. What a dying process takes with it is missing from them, unless it is `careful`."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A block is what one call of the model gets, of frames; or what is not yet written.
    context.target_max_block_size = 64 << 10 if careful else 32 << 20
    context.max_errored_blocks = 0 if careful else -1  # the driver sees from the footers what is missing
    work = [{"unit": pickle.dumps(unit)} for unit in units]
    blocks = ray.data.from_items(work, override_num_blocks=min(len(work), 5000))
    # Of arguments that go in 2.64; the pinned release has no other way to bound its retries, which have no
    # end by default, where a record ends whatever process it is in.
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
    if careful:

        def start(stage: Stage) -> Any:
            return ray.remote(Annotator).options(num_cpus=stage.cpus, num_gpus=stage.gpus).remote(stage)

        return blocks.map_batches(
            Careful,
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
        calls = CALLS[stage.kind]
        blocks = blocks.map_batches(
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
    return blocks
