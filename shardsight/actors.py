"""What computes a model in a job: how many actors, of what size, and what is in each."""

import os
import traceback
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray

from shardsight.decode.frames import default_fatal_signals
from shardsight.models.info import ModelDied
from shardsight.row import without_frames


@dataclass(frozen=True)
class Stage:
    """A model of the flow, in a pool of actors.

    name: `yolo`, `paligemma`, or `paligemma 448` of a further resolution. arguments: of its class. actors: least and
    most. cpus, gpus: what Ray reserves for one. threads: that it computes with. last: no model comes after it.
    """

    name: str
    arguments: dict[str, Any]
    actors: tuple[int, int]
    cpus: float
    gpus: float
    threads: int
    last: bool = True

    @property
    def tracks(self) -> bool:
        """Whether it follows videos frame by frame."""
        return bool(self.arguments.get("track"))

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]


class Annotator:
    """A model in an actor; torch is imported there and not in the driver. alone: see Isolate."""

    def __init__(self, stage: Stage, alone: bool = False) -> None:
        default_fatal_signals()
        self.last, self.alone = stage.last, alone
        if stage.kind == "yolo":
            from shardsight.models.yolo.model import Yolo

            self.model: Any = Yolo(**stage.arguments, threads=stage.threads)
        else:
            from shardsight.models.paligemma.model import PaliGemma

            self.model = PaliGemma(**stage.arguments, threads=stage.threads, memory=gpu_memory(stage.gpus))

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            table = self.model(table)
            return without_frames(table) if self.last else table
        except ModelDied:
            if self.alone:
                raise
            traceback.print_exc()
            os._exit(1)  # Ray starts another process, and gives it the same table


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
        stage = Stage(name, arguments, (count, count), reserved, share, threads, name == list(models)[-1])
        low, _, high = (actors[stage.kind] or "").partition(":")
        stages.append(replace(stage, actors=(int(low), int(high or low))) if low else stage)
    return stages


def processes(stages: list[Stage]) -> dict[str, int]:
    """Stage → how many processes may compute it; reading and decoding are one, on the CPUs that are left."""
    free = ray.cluster_resources().get("CPU", 1) - sum(stage.cpus * stage.actors[0] for stage in stages)
    decoders = max(1, int(free))
    found = {"read": decoders, "decode": decoders}
    for stage in stages:
        found[stage.kind] = found.get(stage.kind, 0) + stage.actors[1]
    return found


def gpu_memory(gpus: float) -> float:
    """The share of a GPU's memory for a process that Ray reserves so much of a GPU for, others sharing the rest."""
    return 0.9 * min(gpus or 1.0, 1.0)
