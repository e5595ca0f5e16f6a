"""How fast a configuration is: a job's flow in small, whose processes stay, so that two can be timed alternating."""

import time
from types import TracebackType
from typing import Any

import pyarrow as pa
import ray

from shardsight.actors import Annotator, Stage, decoders
from shardsight.decode.frames import Load
from shardsight.evaluation import speed
from shardsight.row import Failure
from shardsight.sources import Record
from tune.throughput.choice import Rounds

CHUNK = 64  # pictures that one task decodes, at least


class _Decoder:
    def __init__(self, load: Load) -> None:
        self.load = load

    def decode(self, records: list[Record]) -> list[pa.Table]:
        return list(self.load.tables(map(self.load.row, records)))


class _Model(Annotator):
    def annotate(self, tables: list[pa.Table]) -> int:
        """How many pictures it computed. Raises Failure for the first that it could not."""
        computed = 0
        for table in tables:
            errors = [one for one in self(table)["error"].to_pylist() if one]
            if failed := [one for one in errors if one["stage"] != "decode"]:
                raise Failure(failed[0]["type"], failed[0]["message"])
            computed += len(table) - len(errors)
        return computed

    def memory(self) -> dict[str, Any]:
        return speed.peak_memory("yolo")

    def machine(self) -> dict[str, Any]:
        return speed.machine()


_DecoderProcess, _ModelProcess = ray.remote(_Decoder), ray.remote(_Model)


class Flow:
    """Decoding processes → a stage's actors, over the object store, as many of each as in a job. Reading and writing
    are left out. The processes are alive within `with`, where the errors of Ray are raised.

    chunks: references to lists of Records, which are used in turn. seconds: of a round.
    """

    def __init__(self, stage: Stage, load: Load, chunks: list[Any], seconds: float) -> None:
        self.chunks, self.seconds = chunks, seconds
        # Nothing is reserved, as two flows wait for each other here.
        spread = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        count = decoders([stage])
        self.decoders = [_DecoderProcess.options(**spread).remote(load) for _ in range(count)]
        self.models = [
            _ModelProcess.options(**spread, num_gpus=stage.gpus / 2).remote(stage) for _ in range(stage.initial)
        ]
        self.count = self.window = count + 2 * len(self.models)  # chunks of a round; and that are on their way

    def __enter__(self) -> "Flow":
        try:
            self.rate()  # in which the models are compiled
            began = time.perf_counter()
            self.rate()
            took = time.perf_counter() - began
        except BaseException:
            self.close()
            raise
        self.count = max(self.window, round(self.count * self.seconds / took))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for process in (*self.decoders, *self.models):
            ray.kill(process)

    def rate(self) -> float:
        """Pictures per second of a round."""
        under_way: list[Any] = []
        began, computed = time.perf_counter(), 0
        for number in range(self.count):
            if len(under_way) == self.window:
                done, under_way = ray.wait(under_way)
                computed += sum(ray.get(done))
            frames = self.decoders[number % len(self.decoders)].decode.remote(self.chunks[number % len(self.chunks)])
            under_way.append(self.models[number % len(self.models)].annotate.remote(frames))
        computed += sum(ray.get(under_way))
        return float(computed / (time.perf_counter() - began))

    def memory(self) -> dict[str, Any]:
        """See speed.peak_memory, of all of its actors together."""
        found = ray.get([model.memory.remote() for model in self.models])
        return {name: None if found[0][name] is None else sum(one[name] for one in found) for name in found[0]}

    def machine(self) -> dict[str, Any]:
        """What computes here; see speed.machine."""
        found: dict[str, Any] = ray.get(self.models[0].machine.remote())
        return found


def alternate(one: Flow, other: Flow, rounds: int) -> Rounds:
    """(pictures per second of one, of the other) in each round. Which of them is first changes, so that what gets
    faster or slower meanwhile falls on both alike."""
    found = []
    for number in range(rounds):
        if number % 2:
            second, first = other.rate(), one.rate()
        else:
            first, second = one.rate(), other.rate()
        found.append((first, second))
    return found
