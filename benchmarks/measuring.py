"""Contenders side by side: each a command of its own, in alternating rounds, with all of its processes measured."""

import argparse
import ctypes
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
DONE = "BENCHMARK_DONE"  # names the file in which a contender notes what it has done
EVERY = 0.25  # seconds between two looks at the processes
TOGETHER = 0.1  # seconds from the first row on within which rows count as the first ones
NOISY = 0.1  # share of the machine that other work took, from which on a comparison says nothing
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of a contender become children of this process


@dataclass(frozen=True)
class Run:
    """seconds: of the whole command. first: until its first rows are done. rate: rows a second, from the moment when
    the first are done and without them, to the last; None where all come at once. cpu_seconds, peak_mb: of all
    processes together; each counts its part of the memory that they share. own_mb: of the command's own process.
    others: the share of the machine's CPU time that other work took, also in other virtual machines. objects: in its
    results, where they are counted.
    """

    seconds: float
    first: float | None
    rate: float | None
    cpu_seconds: float
    peak_mb: float
    own_mb: float
    others: float
    objects: int | None = None

    @property
    def speed(self) -> float:
        """Whole commands a second."""
        return 1 / self.seconds


def done(rows: int) -> None:
    """Note that so many more rows are done; called by contenders, in any of their processes."""
    if path := os.environ.get(DONE):
        with open(path, "a") as file:
            file.write(f"{time.time()} {rows}\n")


def stream(noted: str) -> tuple[float | None, float | None]:
    """Of what `done` noted: the time of the first rows, and rows a second beyond them, until the last ones' time."""
    marks = sorted((float(at), int(rows)) for at, rows in (line.split() for line in noted.splitlines()))
    if not marks:
        return None, None
    first, last = marks[0][0], marks[-1][0]
    later = [rows for at, rows in marks if at > first + TOGETHER]
    return first, sum(later) / (last - first) if later else None


def measure(*command: object) -> Run:
    """Run `python -m` command. Exits where it fails. This process may have no other children: all of them are measured,
    and ended."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    with tempfile.NamedTemporaryFile("r") as noted, tempfile.TemporaryFile("w+") as said, _Meter() as meter:
        began, at = time.perf_counter(), time.time()
        environment = os.environ | {DONE: noted.name}
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)], stdout=said, stderr=said, env=environment
        )
        code = process.wait()
        seconds = time.perf_counter() - began
        meter.end()
        if code:
            said.seek(0)
            sys.exit(f"{' '.join(map(str, command))} failed:\n{said.read()[-3000:]}")
        first, rate = stream(noted.read())
        memory = meter.peak / 2**20, meter.memory.get(process.pid, 0) / 2**20
        return Run(seconds, first and first - at, rate, meter.cpu_seconds, *memory, meter.others)


class _Meter:
    """Watches the descendants of this process, and the machine. cpu, memory: seconds and most bytes of each."""

    def __enter__(self) -> "_Meter":
        self.cpu, self.memory = dict[int, float](), dict[int, int]()
        self.peak, self.over = 0, threading.Event()
        self.own, self.before, self.waited = psutil.Process().cpu_times(), psutil.cpu_times(), _waited()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(EVERY):
            together = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError):
                    times = process.cpu_times()
                    self.cpu[process.pid] = times.user + times.system
                    found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.M)
                    taken = 1024 * int(found[1]) if found else 0
                    self.memory[process.pid] = max(taken, self.memory.get(process.pid, 0))
                    together += taken
            self.peak = max(self.peak, together)

    def end(self) -> None:
        """Wait for what the command has left behind, and end it."""
        left = psutil.Process().children(recursive=True)
        _, alive = psutil.wait_procs(left, timeout=10)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive)
        self._stop()
        own, times, before = psutil.Process().cpu_times(), psutil.cpu_times(), self.before
        self.cpu_seconds = max(sum(self.cpu.values()), _waited() - self.waited)  # those too short to be seen are in it
        idle = sum(getattr(times, name) - getattr(before, name) for name in ("idle", "iowait"))
        whole = sum(times[:8]) - sum(before[:8])  # without guests, which count as users
        mine = own.user + own.system - self.own.user - self.own.system
        self.others = max(0.0, (whole - idle - mine - self.cpu_seconds) / whole)


def _waited() -> float:
    """CPU seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


Runs = dict[str, dict[int, list[Run]]]


def contest(
    names: Sequence[str],
    sizes: Sequence[int],
    rounds: int,
    command: Callable[[str, int], Sequence[object]],
    objects: Callable[[str, int], int | None] = lambda name, size: None,
) -> Runs:
    """Contender → size of the work → its runs. In a round every contender does each size once, one after the other; in
    the next one in reverse, so that a drift of the machine cancels. objects: checks what a run left, and counts."""
    found: Runs = {name: {size: [] for size in sizes} for name in names}
    for number in range(rounds):
        for size in sizes:
            for name in names if number % 2 == 0 else reversed(names):
                run = measure(*command(name, size))
                found[name][size].append(replace(run, objects=objects(name, size)))
                said = f"{run.rate:.1f}/s, " if run.rate else ""
                print(
                    f"{name}, {size:,}: {run.seconds:.1f} s, {said}CPU {run.cpu_seconds:.0f} s, {run.peak_mb:,.0f} MB, "
                    f"other work {run.others:.0%}",
                    flush=True,
                )
    return found


def table(
    runs: Runs, labels: Mapping[str, str], peers: Sequence[str], unit: str, bare: Sequence[str] = (), rate: bool = True
) -> str:
    """Medians, as Markdown: seconds until the first row of the smallest size, of the whole command by size, and of the
    largest size the rate of the stream, with its ratio to the fastest peer's, round by round (least–most); CPU seconds,
    memory and objects found. bare: contenders that are no whole command. rate: False where much is computed before the
    first row is done, so that a rate would flatter; then the ratio is that of whole commands."""
    sizes, key = list(next(iter(runs.values()))), "rate" if rate else "speed"
    largest = sizes[-1]
    found = {name: median(one[largest], key) for name, one in runs.items()}
    fastest = max((name for name in peers if name in runs), key=lambda name: found[name], default=None)
    columns = ["first row, s", *(f"{size:,}, s" for size in sizes), *[f"{unit}/s"] * rate, "times the fastest peer"]
    counted = any(run.objects is not None for one in runs.values() for run in one[largest])
    columns += ["CPU, s", "MB", *["objects"] * counted]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, one in runs.items():
        figures = [median(one[sizes[0]], "first"), *(median(one[size], "seconds") for size in sizes)]
        cells = ["" if name in bare else f"{seconds:.1f}" for seconds in figures]
        cells += [f"{found[name]:.1f}"] * rate + [against(one[largest], runs[fastest][largest], key) if fastest else ""]
        cost = [median(one[largest], each) for each in ("cpu_seconds", "peak_mb", *["objects"] * counted)]
        cells += ["" if name in bare else f"{figure:,.0f}" for figure in cost]
        lines.append("| " + " | ".join([labels[name], *cells]) + " |")
    return "\n".join(lines)


def median(runs: Sequence[Run], key: str) -> float:
    """NaN where it is not known."""
    values = [value for value in (getattr(run, key) for run in runs) if value is not None]
    return statistics.median(values) if values else float("nan")


def against(runs: Sequence[Any], others: Sequence[Any], key: str = "rate") -> str:
    """The ratio of their `key`, round by round: its median (least–most); empty where there is none."""
    pairs = [(getattr(run, key), getattr(other, key)) for run, other in zip(runs, others, strict=True)]
    ratios = [own / other for own, other in pairs if own and other]
    if not ratios:
        return ""
    spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}×{spread}"


def noise(runs: Runs) -> str:
    """A sentence on how much other work there was."""
    most = max(run.others for one in runs.values() for some in one.values() for run in some)
    shares = [median(some, "others") for one in runs.values() for some in one.values()]
    said = f"Other work took {statistics.median(shares):.0%} of the machine, at most {most:.0%}"
    if often := sum(share > NOISY for share in shares):
        return f"{said}, and more than {NOISY:.0%} in {often} of {len(shares)} medians: **too much for a comparison**."
    return f"{said}."


def kind() -> str:
    """Of the machine: what its CPU computes in, how many cores it has, and its GPU."""
    flags = set(re.findall(r"\w+", _cpuinfo("flags")))
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512 without bf16", "avx2": "AVX2 alone"}
    cpu = next((name for flag, name in names.items() if flag in flags), platform.machine())
    return f"{cpu}, {os.cpu_count()} cores" + (f", {_gpu()}" if _gpu() else "")


def _cpuinfo(field: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


@cache
def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def conditions(work: str, packages: Sequence[str]) -> str:
    """What a table was measured on."""
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    cpu = _cpuinfo("model name") or platform.processor()
    machine = f"{cpu} ({kind()}{'' if _gpu() else ', no GPU'})"
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine}; {work}; {versions}"


def _version(package: str) -> str:
    """Also of vLLM, whose build for CPUs has another name."""
    with suppress(PackageNotFoundError):
        return version(package)
    return version(f"{package}-cpu")


def card(work: str, args: argparse.Namespace) -> str:
    """The title of a table. Figures of two kinds of machines are not to be compared, nor a quick one's with others."""
    return f"{work}, {kind()}{', quick' if args.quick else ''}"


def record(title: str, text: str, path: Path = HERE / "RESULTS.md") -> None:
    """Put a card into RESULTS.md, in place of an earlier one of the same title."""
    results = path.read_text()
    heading = f"## {title}\n"
    before, found, rest = results.partition(heading)
    after = rest[rest.index("\n## ") + 1 :] if "\n## " in rest else ""
    if not found:
        first = results.index("\n## ") + 1
        before, after = results[:first], results[first:]
    path.write_text(f"{before}{heading}\n{text.strip()}\n\n{after}".rstrip() + "\n")


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """A contest's own, and those that all have."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, and less work: some five minutes")
    parser.add_argument("--record", action="store_true", help="write the table into RESULTS.md, as this machine's card")
    args = parser.parse_args()
    if args.record and getattr(args, "only", None):
        parser.error("--record would replace the whole table by a part of it: leave out --only")
    return args
