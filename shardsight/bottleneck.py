"""Which stage bounds a job, and what would help: arithmetic over what the stages did."""

from collections.abc import Mapping
from dataclasses import dataclass

# Memory bounds a job where it held reading back for more than this share of the time, while the busiest stage waited.
SAVED = 0.2
SPILLED = 0.5  # share of the flow's bytes that may go to the disk
# Of the stages that are no models, as a sentence calls them.
_NAMES = {"read": "reading", "decode": "decoding", "write": "writing"}


@dataclass(frozen=True)
class Use:
    """What the stages of a job did.

    busy: stage → seconds in which its processes computed, or waited for a store. slots: stage → seconds of all the
    processes that it had; reading and decoding are done by the same ones, `decode`. seconds: of the whole stream.
    blocked: seconds in which the flow waited for results to be written. held: seconds in which memory held reading back
    though nothing waited for the models. spilled, made: bytes that Ray's object store wrote to the disk, and was given.
    """

    busy: Mapping[str, float]
    slots: Mapping[str, float]
    seconds: float
    blocked: float = 0.0
    held: float = 0.0
    spilled: float = 0.0
    made: float = 0.0
    gpu: bool = False

    def shares(self) -> dict[str, float]:
        """Stage → the share, 0 to 1, of its processes' time in which it was busy; of writing, the share of the job's
        time in which the flow waited for it."""
        slots = {**self.slots, "read": self.slots.get("decode", 0.0)}
        found = {stage: _share(busy, slots.get(stage, 0.0)) for stage, busy in self.busy.items() if stage != "write"}
        return found | {"write": _share(self.blocked, self.seconds)}

    def bottleneck(self) -> tuple[str, str] | None:
        """(a stage or `memory`, the sentence that says why and what to do). None if nothing was computed."""
        if not any(self.busy.values()):
            return None
        shares = self.shares()
        models = {stage: share for stage, share in shares.items() if stage not in _NAMES and self.busy[stage]}
        reading, decoding = shares.get("read", 0.0), shares.get("decode", 0.0)
        prepared_by = "read" if reading > decoding else "decode"
        preparing = min(1.0, reading + decoding)
        candidates = {prepared_by: preparing, **models, "write": shares["write"]}
        stage = max(candidates, key=lambda name: candidates[name])
        held, spilled = _share(self.held, self.seconds), _share(self.spilled, self.made)
        if spilled > SPILLED or min(held, 1 - candidates[stage]) > SAVED:
            return "memory", self._memory(held)
        if stage in models:
            others = f"reading and decoding {preparing:.0%}"
        else:
            others = ", ".join(f"{name} waited {1 - share:.0%} of the time" for name, share in models.items())
        return stage, f"{self._why(stage, candidates[stage])}, {others}: {self._advice(stage)}"

    def line(self, queue: Mapping[str, int]) -> str:
        """The shares, as "busy: decode 92%, yolo 38% (2 queued)". queue: stage → blocks that wait before it."""
        shares = {stage: share for stage, share in self.shares().items() if self.busy.get(stage)}
        said = [
            f"{stage} {share:.0%}" + (f" ({queue[stage]} queued)" if queue.get(stage) else "")
            for stage, share in shares.items()
        ]
        return "busy: " + ", ".join(said) if said else ""

    def _why(self, stage: str, share: float) -> str:
        if stage == "write":
            return f"writing: the flow waited for it {share:.0%} of the time"
        if stage == "read":
            return f"reading: {share:.0%} of its slots busy, most of that waiting for the storage"
        return f"{_NAMES.get(stage, stage)}: {share:.0%} of its {'slots' if stage == 'decode' else 'time'} busy"

    def _advice(self, stage: str) -> str:
        return {
            "read": "run the job nearer to its storage, or add CPU nodes, which read more at once",
            "decode": "add CPU nodes",
            "write": "choose a larger --rows-per-file, or an --output that is nearer",
        }.get(stage, f"add {'GPU' if self.gpu else 'CPU'} nodes, or see tune.throughput for a faster configuration")

    def _memory(self, held: float) -> str:
        return (
            f"memory: it held reading back {held:.0%} of the time, and {self.spilled / 1e6:,.0f} MB of frames went to "
            "the disk: give Ray more memory for objects (ray start --object-store-memory), or add nodes"
        )


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else float(part > 0)
