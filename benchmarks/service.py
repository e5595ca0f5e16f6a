"""The service under load, by locust: `make load`.

Closed loop: 1, 8 and 64 clients that ask as soon as they are answered, next to the model alone on the same cores.
Open loop: twice what 64 clients get, for two minutes, and 64 clients again at once afterwards. Nothing else should run
on the machine, though locust takes its share of the two cores.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import conditions, measure
from benchmarks.throughput import make_pictures
from tests.chaos.service import running
from tests.conftest import WEIGHTS

HERE = Path(__file__).parent


def crowd(url: str, pictures: Path, clients: int, seconds: float, rest: float = 0, **more: Any) -> Any:
    """{status: (pictures per second, median, 95th and 99th percentile and longest in ms)}, by locust. more: `form`,
    `prompt`, `tokens`, `each`, of benchmarks.crowd."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "crowd"
        command = [sys.executable, "-m", "locust", "--locustfile", HERE / "crowd.py", "--headless"]
        command += ["--host", url, "--users", clients, "--spawn-rate", clients, "--run-time", f"{seconds:.0f}s"]
        command += ["--csv", out, "--stop-timeout", "600", "--only-summary", "--exit-code-on-error", "0"]
        environment = os.environ | {"PICTURES": str(pictures), "REST": str(rest)}
        environment |= {name.upper(): str(value) for name, value in more.items()}
        subprocess.run([*map(str, command)], check=True, capture_output=True, env=environment)
        with open(f"{out}_stats.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["Name"] != "Aggregated"]
    latencies = ("50%", "95%", "99%", "100%")
    rates = {int(row["Name"]): float(row["Requests/s"]) * more.get("each", 1) for row in rows}
    return {int(row["Name"]): (rates[int(row["Name"])], *(float(row[name]) for name in latencies)) for row in rows}


def alone(pictures: Path) -> float:
    """Pictures per second of YOLO alone, with its inputs in memory and all cores."""
    return measure("benchmarks.contenders", "limit", pictures, pictures, WEIGHTS / "detect.pt", 640).rate or math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=320, help="that the clients ask for in turn")
    parser.add_argument("--seconds", type=float, default=30, help="of each closed loop")
    parser.add_argument("--open-seconds", type=float, default=120)
    parser.add_argument("--record", action="store_true", help="write the table beside this file")
    args = parser.parse_args()
    lines = ["| clients | pictures/s | of the model alone | median, ms | 95% | 99% | longest | statuses |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---|"]
    with tempfile.TemporaryDirectory() as work:
        folder, pictures = Path(work), Path(work) / "pictures"
        make_pictures(pictures, args.pictures)
        own = [alone(pictures)]
        with running(folder, imgsz=640) as service:
            crowd(service.url, pictures, 8, 10)  # everything is loaded and warm
            closed = {clients: crowd(service.url, pictures, clients, args.seconds) for clients in (1, 8, 64)}
            capacity = closed[64][200][0]
            many = crowd(service.url, pictures, 8, args.seconds, each=16)
            before = service.memory()
            waiting = math.ceil(2 * capacity) * 4  # enough that one is always free to ask
            overload = crowd(service.url, pictures, waiting, args.open_seconds, rest=waiting / (2 * capacity))
            after = service.memory()
            again = crowd(service.url, pictures, 64, 10)
            spoken = crowd(service.url, pictures, 64, args.seconds, prompt="caption en")
        own.append(alone(pictures))
    model = statistics.mean(own)
    rows = {f"{clients}": found for clients, found in closed.items()}
    rows |= {"8, with 16 pictures a request": many}
    rows |= {f"open loop, {2 * capacity:.0f} asked a second": overload, "64, at once afterwards": again}
    rows |= {"64, who ask PaliGemma too": spoken}
    for name, found in rows.items():
        rate, *latencies = found[200]
        counts = ", ".join(f"{status}: {each[0]:.1f}/s" for status, each in sorted(found.items()))
        share = f"{rate / model:.2f}" if "PaliGemma" not in name else ""
        lines.append(f"| {name} | {rate:.1f} | {share} | {' | '.join(f'{x:.0f}' for x in latencies)} | {counts} |")
    said = f"The model alone: {' and '.join(f'{x:.1f}' for x in own)} pictures/s, before and after. Memory of Serve's "
    said += f"processes: {before:,} MB before the open loop, {after:,} MB after."
    work = f"JPEGs of 1280×720, YOLOv8n at 640, {args.seconds:.0f} s a closed loop"
    table = "\n".join([*lines, "", said, "", conditions(work, ("ray", "locust", "torch")), ""])
    print(table)
    if args.record:
        (HERE / "service.md").write_text(table)


if __name__ == "__main__":
    main()
