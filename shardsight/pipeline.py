"""The flow, wired with Ray Data: units → read and decode → YOLO → Parquet."""

import pickle
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from shardsight.careful import Careful
from shardsight.load import Load
from shardsight.results import Results, Written
from shardsight.sources import Unit

# A file is written when it is full, or at the latest after so long: what a kill can cost.
BYTES, SECONDS = 128 << 20, 20.0


@dataclass(frozen=True)
class Plan:
    """actors: least and most. cpus, gpus: what Ray reserves for one. threads: that it computes with."""

    actors: tuple[int, int]
    cpus: float
    gpus: float
    threads: int


def plan(actors: str | None, gpus_per_actor: float | None) -> Plan:
    """Sized to the cluster: an actor a GPU; without one, four threads an actor, of which one is left to decoding."""
    cpus, gpus = int(ray.cluster_resources().get("CPU", 1)), ray.cluster_resources().get("GPU", 0.0)
    share = (1.0 if gpus else 0.0) if gpus_per_actor is None else gpus_per_actor
    threads = min(cpus, 4)
    count = max(1, int(gpus // share) if share else cpus // threads)
    low, _, high = (actors or str(count)).partition(":")
    reserved = float(cpus > count) if share else threads - 1.0
    return Plan((int(low), int(high or low)), reserved, share, threads)


class Annotator:
    """YOLO in an actor; torch is imported there and not in the driver."""

    def __init__(self, **arguments: Any) -> None:
        from shardsight.yolo import Yolo

        self.model = Yolo(**arguments)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self.model(table)


def flow(units: list[Unit], load: Load, arguments: dict[str, Any], plan: Plan, careful: bool = False) -> Dataset:
    """Units → annotated rows. What a dying process takes with it is missing from them, unless it is `careful`."""
    arguments = arguments | {"threads": plan.threads}
    resources = {"num_cpus": plan.cpus, "num_gpus": plan.gpus}
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
        return blocks.map_batches(
            Careful,
            fn_constructor_args=(load, lambda: ray.remote(Annotator).options(**resources).remote(**arguments)),
            compute=ActorPoolStrategy(min_size=1, max_size=plan.actors[1]),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
        )
    return blocks.map_batches(
        load, batch_size=1, batch_format="pyarrow", num_cpus=1, ray_remote_args_fn=lambda: {"max_retries": 1}
    ).map_batches(
        Annotator,
        fn_constructor_kwargs=arguments,
        compute=ActorPoolStrategy(min_size=plan.actors[0], max_size=plan.actors[1]),
        batch_size=None,
        batch_format="pyarrow",
        **resources,
        ray_remote_args_fn=lambda: {"max_restarts": 20, "max_task_retries": 1},
    )


@ray.remote(num_cpus=0)
def write(results: Results, rows_per_file: int, *blocks: pa.Table) -> Written:
    return results.write(pa.concat_tables(blocks), rows_per_file)


def run(rows: Dataset, results: Results, rows_per_file: int) -> Iterator[tuple[int, list[Written]]]:
    """Write rows as they come; yields how many came and what was written. Interrupted, it writes what it has."""
    waiting: list[Any] = []
    writing: list[Any] = []
    held, size, since = 0, 0, time.monotonic()
    try:
        for bundle in rows.iter_internal_ref_bundles():
            waiting += bundle.block_refs
            held, size = held + (bundle.num_rows() or 0), size + bundle.size_bytes()
            if held >= rows_per_file or size >= BYTES or time.monotonic() - since >= SECONDS:
                writing.append(write.remote(results, rows_per_file, *waiting))
                waiting, held, size, since = [], 0, 0, time.monotonic()
            finished, writing = ray.wait(writing, num_returns=len(writing), timeout=0) if writing else ([], [])
            yield bundle.num_rows() or 0, ray.get(finished)
    finally:
        if waiting:
            writing.append(write.remote(results, rows_per_file, *waiting))
        last = ray.get(writing)
    yield 0, last
