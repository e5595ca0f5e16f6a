"""What computes a model in a job: how many actors, of what size, and what is in each."""

import os
import traceback
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from shardsight import cluster
from shardsight.decode.frames import default_fatal_signals
from shardsight.models.info import ModelDied
from shardsight.row import without_frames

YOLO_SHARE = 0.125  # of a GPU that it shares with PaliGemma: one to three GB suffice
# CPUs that Ray reserves for an actor without a GPU. More than none, so that it does not go to a node without CPUs, such
# as a head; little, so that actors that Ray restarts after a node died leave CPUs to the decoding that they wait for.
PLACED = 0.01
DECODING = 1.0  # CPUs that it reserves for a process that reads and decodes


@dataclass(frozen=True)
class Stage:
    """A model of the flow, in a pool of actors.

    name: `yolo`, `paligemma`, or `paligemma 448` of a further resolution. arguments: of its class. actors: least and
    most; without a most, as many as the cluster comes to have room for. initial: how many there are at the start. cpus,
    gpus: what Ray reserves for one. threads: that it computes with. last: no model comes after it. labels: of the nodes
    that it may run on.
    """

    name: str
    arguments: dict[str, Any]
    actors: tuple[int, int | None]
    initial: int
    cpus: float
    gpus: float
    threads: int
    last: bool = True
    labels: dict[str, str] | None = None

    @property
    def tracks(self) -> bool:
        """Whether it follows videos frame by frame."""
        return bool(self.arguments.get("track"))

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def calls(self) -> int:
        """Blocks that one of its processes works on at once: vLLM's engine batches across them, and never waits."""
        return 4 if self.kind == "paligemma" else 1

    @property
    def request(self) -> dict[str, float]:
        """What Ray reserves for one of its processes, by the names of Ray's resources."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    @property
    def options(self) -> dict[str, Any]:
        """The same, as options of a Ray actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "label_selector": self.labels}


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


def plan(
    models: dict[str, dict[str, Any]],
    actors: dict[str, str | None],
    gpus_per_actor: float | None,
    labels: dict[str, str] | None = None,
) -> list[Stage]:
    """Models' arguments by name → stages, sized to the nodes with these labels: every GPU computes each of the models;
    without GPUs, every four threads do. So its time goes to what needs it, whatever each model takes for a picture; see
    benchmarks/SCALE.md.

    On a cluster that the job joins, nodes may come and go. A pool then has as many actors as it finds GPUs for. Without
    GPUs it does not grow, but it shrinks while its actors have nothing to do, as those that Ray moves from a node that
    died may.
    """
    nodes = cluster.nodes(labels)
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    shares = dict.fromkeys(models, gpus_per_actor) if gpus_per_actor is not None else _shares(list(models), gpus)
    largest = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    threads = min(largest, 4) or 4
    if together := sum(shares.values()):
        count = max(1, int(gpus / together + 1e-6))
        reserved = float(cpus > count * len(models))
    else:
        count = max(1, int(cpus // threads))
        # Reading keeps a CPU, also where other jobs hold some: it would wait for actors that wait for it.
        free = cluster.free_cpus() if cpus else 2.0
        reserved = max(0.0, min(PLACED if threads > 1 else 0.0, (free - 1) / count) / len(models))
    least, most = (count, count) if cluster.private() else (1, None if together else count)
    stages = []
    for name, arguments in models.items():
        last = name == list(models)[-1]
        stage = Stage(name, arguments, (least, most), count, reserved, shares[name], threads, last, labels)
        low, _, high = (actors[stage.kind] or "").partition(":")
        stages.append(replace(stage, actors=(int(low), int(high or low)), initial=int(low)) if low else stage)
    return stages


def _shares(names: list[str], gpus: float) -> dict[str, float]:
    """Of a GPU, for each model's process. It bounds memory alone: of the time each takes what it needs."""
    others = [name for name in names if name != "yolo"]
    if not gpus or not others:
        return dict.fromkeys(names, float(gpus > 0))
    yolo = {"yolo": YOLO_SHARE} if "yolo" in names else {}
    return yolo | dict.fromkeys(others, (1 - sum(yolo.values())) / len(others))


def decoders(stages: list[Stage]) -> int:
    """How many processes read and decode at once: as many as find room beside the models. Without GPUs that is on all
    CPUs but one, as large pictures need them, and the models' threads rest meanwhile."""
    cpus = sum(node.get("CPU", 0.0) for node in cluster.nodes(stages[0].labels))
    left = cpus - sum(stage.cpus * stage.initial for stage in stages)
    return max(1, int(left / DECODING + 1e-6))


def block(stages: list[Stage], usual: int) -> int:
    """Rows of a table of frames, at most. On a CPU PaliGemma may take seconds a row, and a table's rows are lost
    together. Four tables, which an actor works on at once, are more than its engine's batch."""
    slow = any(stage.kind == "paligemma" and not stage.gpus for stage in stages)
    return 16 if slow else usual


def gpu_memory(gpus: float) -> float:
    """The share of a GPU's memory for a process that Ray reserves so much of a GPU for, others sharing the rest."""
    return 0.9 * min(gpus or 1.0, 1.0)
