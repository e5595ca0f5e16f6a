"""What each stage of a running pass does, and what the pass waits for: Ray Data's own counts, twice a second."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from ray.data._internal.execution.execution_callback import ExecutionCallback

from shardsight import cluster
from shardsight.actors import DECODING, Stage
from shardsight.tracking import OPEN

EVERY = 0.5  # seconds between two looks
PENDING_EVERY = 5.0  # seconds between two looks at what Ray has not placed yet


class Watch:
    """Of a job: what its stages did in all of its passes.

    slots: stage → seconds of all the processes that it had. gpu_seconds: stage → seconds of the GPUs that it held.
    queue: stage → blocks that wait before it. processes: stage → how many it has. held, spilled, made, seconds: as of
    bottleneck.Use. say: is told what the pass waits for, as one line; empty when it no longer waits.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.slots, self.gpu_seconds = Counter[str](), Counter[str]()
        self.queue, self.processes = dict[str, int](), dict[str, int]()
        self.held = self.seconds = 0.0
        self._bytes: dict[Any, tuple[int, int]] = {}

    @property
    def spilled(self) -> int:
        return sum(spilled for spilled, _ in self._bytes.values())

    @property
    def made(self) -> int:
        return sum(made for _, made in self._bytes.values())

    @contextmanager
    def watching(self, stages: list[Stage]) -> Iterator[None]:
        """Watch the dataset that is executed meanwhile."""
        self.stages = stages
        self._last = self._asked = time.monotonic()
        self._said = ""
        Hook.watch = self
        try:
            yield
        finally:
            Hook.watch = None
            self._tell("")

    def look(self, executor: Any) -> None:
        """Take the counts of an execution, unless that was done just now."""
        now = time.monotonic()
        passed = now - self._last
        if passed < EVERY:
            return
        self._last = now
        pools, tasks = [], []
        for op, state in executor._topology.items():
            self._bytes[op] = op.metrics.obj_store_mem_spilled, op.metrics.bytes_task_outputs_generated
            found = op.get_autoscaling_actor_pools()
            pools += [(pool, state) for pool in found]
            if not found and op.input_dependencies:
                tasks.append((op, state))
        models = list(zip(self.stages, pools, strict=True))
        self._count_models(models, passed)
        alive = [pool.num_alive_actors() for pool, _ in pools]
        running = sum(op.metrics.num_tasks_running for op, _ in tasks)
        free = int(cluster.free_cpus() / DECODING)
        readers = running + free if tasks else OPEN * alive[0]  # tracking's actors have readers of their own
        self.processes |= {"read": readers, "decode": readers}
        if running or not tasks:
            self.slots["decode"] += passed * readers
        if self.made or all(alive):
            self.seconds += passed
        waiting = any(state.total_enqueued_input_blocks() for _, state in pools)
        if all(alive) and not (running or waiting) and any(op._in_task_submission_backpressure for op, _ in tasks):
            self.held += passed
        reading = [{"CPU": DECODING}] if running and not self.made else []
        wanted = [stage.request for stage, (pool, _) in models if not pool.num_alive_actors()]
        if now - self._asked > PENDING_EVERY:
            self._asked = now
            requests = reading + wanted
            self._tell(cluster.waiting(requests, self.stages[0].labels) if requests else "")

    def _count_models(self, models: list[tuple[Stage, Any]], passed: float) -> None:
        processes, queue = Counter[str](), Counter[str]()
        for stage, (pool, state) in models:
            alive = pool.num_alive_actors()
            processes[stage.kind] += alive
            queue[stage.kind] += state.total_enqueued_input_blocks()
            self.slots[stage.kind] += passed * alive
            self.gpu_seconds[stage.kind] += passed * alive * stage.gpus
        self.processes, self.queue = dict(processes), dict(queue)

    def _tell(self, said: str) -> None:
        if said != self._said:
            self._said = said
            self.say(said)


class Hook(ExecutionCallback):  # type: ignore[misc]  # Ray Data has no types
    """Has Ray Data call the watch of this process, if it has one: Ray Data itself makes the callback, of a class that
    it also sends to workers."""

    watch: ClassVar[Watch | None] = None

    def on_execution_step(self, executor: Any) -> None:
        if self.watch:
            self.watch.look(executor)
