"""How fast models are, and what they take: each alone in a process of its own, on pictures that are decoded already.

The models of a round are measured one after the other, and the rounds are repeated, so that what else the machine does
falls on all of them alike.
"""

import os
import platform
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from shardsight.actors import Annotator, Stage
from shardsight.job import raised
from shardsight.models.table import from_pictures
from shardsight.row import Failure, with_column
from shardsight.sources import as_json
from shardsight.sources.files import fetch
from shardsight.storage import Storage

PICTURES = 32  # of the labelled set, evenly spread
SECONDS = 1.5  # of a round, for one picture at a time; and again for whole batches
LEAST = 5  # pictures of a round, one at a time, however long they take
RAPL = Path("/sys/class/powercap")
BATCH = {True: 64, False: 16}  # pictures at once, by whether there is a GPU, of a model that does not say it itself


@dataclass(frozen=True)
class Asked:
    """What a model is measured with. arguments: of its class. pictures: (uri, prompts) each."""

    kind: str
    arguments: dict[str, Any]
    pictures: Sequence[tuple[str, list[str]]]
    storage: Storage


def measure(models: dict[str, Asked], rounds: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the machine, figures of each model by name), measured in alternating rounds. Ray has to be joined.

    Figures: `latency_ms` {p50, p90, p99, pictures} of one picture at a time; `pictures_per_second`, the median of the
    rounds, and `pictures_per_second_range` [least, most], at `batch_size`; `peak_memory_mb` of the process;
    `peak_gpu_memory_mb` and `joules_per_picture`, or None, and then `joules_reason`. A model whose process fails has
    `reason` alone. PaliGemmas fill a GPU, and are therefore measured after the others, one by one.
    """
    machine: dict[str, Any] = {}
    figures: dict[str, dict[str, Any]] = {}
    together = [name for name, asked in models.items() if asked.kind == "yolo"]
    groups = [together, *([name] for name in models if name not in together)]
    for names in filter(None, groups):
        found = _measure_together({name: models[name] for name in names}, rounds, machine)
        figures |= found
    return machine, figures


def _measure_together(models: dict[str, Asked], rounds: int, machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    gpus = ray.cluster_resources().get("GPU", 0.0)
    share = min(1.0, 1 / len(models)) if gpus else 0.0
    processes = {name: _Process.options(num_cpus=0, num_gpus=share).remote(asked) for name, asked in models.items()}
    rounds_of: dict[str, list[_Round]] = {name: [] for name in models}
    failed: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):  # the first warms up
        for name, process in processes.items():
            if name in failed:
                continue
            try:
                found = ray.get(process.round.remote())
                if not machine:
                    machine.update(ray.get(process.machine.remote()))
            except ray.exceptions.RayError as error:
                kind, said = raised(error)
                failed[name] = {"reason": f"{kind}: {said}"}
                continue
            if number:
                rounds_of[name].append(found)
    figures = {
        name: failed.get(name) or _figures(rounds_of[name], ray.get(process.memory.remote()))
        for name, process in processes.items()
    }
    for process in processes.values():
        ray.kill(process)
    return figures


@dataclass
class _Round:
    """seconds: of each picture alone. batches: (pictures, seconds) of each batch. joules: during the batches."""

    seconds: list[float] = field(default_factory=list)
    batches: list[tuple[int, float]] = field(default_factory=list)
    joules: float | None = None
    joules_reason: str | None = None


class _Model:
    """A model in its process, with the decoded pictures."""

    def __init__(self, asked: Asked) -> None:
        cpus, gpus = os.cpu_count() or 1, float(bool(ray.get_gpu_ids()))
        self.model = Annotator(Stage(asked.kind, asked.arguments, (1, 1), 1, 0, gpus, cpus)).model
        self.kind = asked.kind
        self.batch_size = getattr(self.model, "batch_size", BATCH[bool(gpus)])
        self.table = _decoded(asked, self.model.input if asked.kind == "yolo" else self.model.info.input)

    def round(self) -> _Round:
        made = _Round()
        began = time.perf_counter()
        while len(made.seconds) < LEAST or time.perf_counter() - began < SECONDS:
            place = len(made.seconds) % len(self.table)
            made.seconds.append(self._seconds(self.table.slice(place, 1)))
        batch = self.table.take([n % len(self.table) for n in range(self.batch_size)])
        energy, began = _Energy(), time.perf_counter()
        while not made.batches or time.perf_counter() - began < SECONDS:
            made.batches.append((len(batch), self._seconds(batch)))
        made.joules, made.joules_reason = energy.since()
        return made

    def _seconds(self, table: pa.Table) -> float:
        began = time.perf_counter()
        found = self.model(table)
        seconds = time.perf_counter() - began
        if errors := [one for one in found["error"].to_pylist() if one]:
            raise Failure(errors[0]["type"], errors[0]["message"])
        return seconds

    def memory(self) -> dict[str, Any]:
        return peak_memory(self.kind) | {"batch_size": self.batch_size}

    def machine(self) -> dict[str, Any]:
        return machine()


def peak_memory(kind: str) -> dict[str, float | None]:
    """MB of this process, and of the GPU: what PyTorch reserved, or, of vLLM, all that is in use on it."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        gpu = round((torch.cuda.max_memory_reserved() if kind == "yolo" else total - free) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_memory_mb": round(peak, 1), "peak_gpu_memory_mb": gpu}


def machine() -> dict[str, Any]:
    """What computes here."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "system": platform.platform(),
    }


_Process = ray.remote(_Model)


def _decoded(asked: Asked, input: Any) -> pa.Table:
    """Those of the pictures that can be read, with what each is asked in its metadata. Raises Failure."""
    data, prompts = [], []
    failure = Failure("NoPictures", "none of the labelled pictures can be read")
    for uri, own in asked.pictures:
        try:
            data.append(fetch(uri, asked.storage))
            prompts.append(own[:1])
        except Failure as error:
            failure = error
    if not data:
        raise failure
    table = from_pictures(data, input)
    column = asked.arguments.get("prompt_column")
    if column:
        table = with_column(table, "metadata", pa.array([as_json({column: own}) for own in prompts], pa.string()))
    table = table.filter(table["error"].is_null())
    if not len(table):
        raise failure
    return table


def _figures(rounds: Sequence[_Round], memory: dict[str, Any]) -> dict[str, Any]:
    milliseconds = 1000 * np.array([seconds for one in rounds for seconds in one.seconds])
    rates = [sum(n for n, _ in one.batches) / sum(seconds for _, seconds in one.batches) for one in rounds]
    pictures = sum(n for one in rounds for n, _ in one.batches)
    joules = [one.joules for one in rounds if one.joules is not None]
    whole = len(joules) == len(rounds)
    return {
        "latency_ms": {f"p{p}": round(float(np.percentile(milliseconds, p)), 3) for p in (50, 90, 99)}
        | {"pictures": len(milliseconds)},
        "pictures_per_second": round(float(np.median(rates)), 3),
        "pictures_per_second_range": [round(min(rates), 3), round(max(rates), 3)],
        "rounds": len(rounds),
        **memory,
        "joules_per_picture": round(sum(joules) / pictures, 4) if whole else None,
        "joules_reason": None if whole else rounds[-1].joules_reason,
    }


class _Energy:
    """Joules that CPU packages (RAPL) and the GPU (NVML) have used since this was made."""

    def __init__(self) -> None:
        self.reason = ""
        self.before = self._read()

    def since(self) -> tuple[float | None, str | None]:
        """(joules, None), or (None, why this machine does not tell)."""
        after = self._read()
        if not after or after.keys() != self.before.keys():
            return None, self.reason
        return sum((now - self.before[name][0]) % most for name, (now, most) in after.items()), None

    def _read(self) -> dict[str, tuple[float, float]]:
        """Counter → (joules, the value at which it begins again at 0)."""
        found = {}
        try:
            for folder in sorted(RAPL.glob("intel-rapl:?")):
                energy, most = ((folder / name).read_text() for name in ("energy_uj", "max_energy_range_uj"))
                found[folder.name] = int(energy) / 1e6, int(most) / 1e6
        except OSError as error:
            self.reason = f"{RAPL} cannot be read: {error.strerror}"
            return {}
        with suppress(Exception):  # of any kind: no driver, no GPU, or one that does not count
            import pynvml

            pynvml.nvmlInit()
            for number in ray.get_gpu_ids():
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(number))
                found[f"gpu {number}"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, float("inf")
        self.reason = (
            "" if found else f"this machine has no energy counter: no {RAPL}/intel-rapl, and no GPU that counts"
        )
        return found
