"""The service and its peers under the same load: `python -m benchmarks.servers`.

Pictures: JPEGs of 1280×720 → YOLOv8n's boxes as JSON, for 1, 8 and 64 clients, who ask as soon as they are answered for
one picture or for sixteen a request. Questions: a picture of 224×224 and `caption en` → 16 tokens of a PaliGemma of 60
million random weights in fp32, by OpenAI's protocol. Contenders alternate. Nothing else should run on the machine,
though the clients, locust's, take their share of its cores. What the peers are: server_contenders.py.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks import measuring
from benchmarks.paligemma import PROMPTS, SMALLER, TOKENS, draw, random_model
from benchmarks.service import crowd
from benchmarks.throughput import make_pictures
from demo.run import WEIGHTS
from tests.chaos.service import running, within
from tests.conftest import free_port

LOADS = ((1, 1), (8, 1), (64, 1), (1, 16), (8, 16), (64, 16))  # clients, pictures a request
NAMES = {
    "shardsight": "Shardsight",
    "shardsight_exact": "Shardsight, fp32",
    "litserve": "LitServe with ultralytics",
    "fastapi": "FastAPI with ultralytics",
    "vllm": "vLLM's own server",
    "vllm_all": "the same, told to use every core",
}
PICTURES = ("shardsight", "shardsight_exact", "litserve", "fastapi")
QUESTIONS = ("shardsight_exact", "vllm", "vllm_all")


class Figures(NamedTuple):
    """Pictures a second, and milliseconds of a request. failed: requests of another status than 200, a second."""

    rate: float
    median: float
    p99: float
    failed: float


Found = dict[tuple[str, tuple[int, int]], list[Figures]]


@contextmanager
def serving(name: str, folder: Path, paligemma: Path | None) -> Iterator[str]:
    """Its address. paligemma: what is asked; of peers, alone."""
    if name.startswith("shardsight"):
        models = {"yolo": None, "paligemma": str(paligemma), "max_tokens": TOKENS} if paligemma else {"paligemma": []}
        precision = "fp32" if name == "shardsight_exact" else "auto"
        with running(folder, imgsz=640, precision=precision, **models) as service:
            yield service.url
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-m", "benchmarks.server_contenders", name, paligemma or WEIGHTS / "detect.pt", port)
    with open(folder / f"{name}.log", "w+") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, start_new_session=True)
        try:
            within(300, lambda: process.poll() is not None or _answers(url), lambda: f"{name} does not come up")
            if process.returncode:
                sys.exit(f"{name} failed:\n{Path(log.name).read_text()[-3000:]}")
            yield url
        finally:
            with suppress(ProcessLookupError):  # it has failed, and left nobody
                os.killpg(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    """Whether the server is ready; those without a path for that answer as soon as they listen, which is then."""
    try:
        return httpx.get(f"{url}/health").status_code != 503
    except httpx.TransportError:
        return False


def asked(name: str, url: str, pictures: Path, load: tuple[int, int], seconds: float, prompt: str) -> Figures:
    clients, each = load
    many = clients * each >= (64 if prompt else 256)
    waited = seconds * (4 if many else 1)  # the clients' last requests are answered, and counted, after it
    found = crowd(url, pictures, clients, waited, each=each, **_request(name, prompt))
    rate, middle, _, p99, _ = found.get(200, (0.0,) * 5)
    return Figures(rate, middle, p99, sum(one[0] / each for status, one in found.items() if status != 200))


def _request(name: str, prompt: str) -> dict[str, Any]:
    """What benchmarks.crowd sends."""
    if prompt:
        return {"form": "chat", "prompt": prompt, "tokens": TOKENS}
    return {"form": "" if name.startswith("shardsight") else "files"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15, help="of each load; four times as many of the largest")
    parser.add_argument(
        "--task", choices=("pictures", "questions"), action="append", help="repeatable; both by default"
    )
    parser.add_argument("--only", choices=list(NAMES), action="append", help="repeatable; all by default")
    args = measuring.arguments(parser)
    loads, rounds = (LOADS[1:5], 1) if args.quick else (LOADS, args.rounds)
    with tempfile.TemporaryDirectory() as work:
        folder, pictures, small = Path(work), Path(work) / "pictures", Path(work) / "small"
        make_pictures(pictures, 320)
        draw(small, 320)
        paligemma = random_model(folder / "paligemma", SMALLER, wide=3)
        tasks = {
            "pictures": (PICTURES, loads, pictures, None, ""),
            "questions": (QUESTIONS, [load for load in loads if load[1] == 1], small, paligemma, PROMPTS[0]),
        }
        for task in args.task or tasks:
            names, some, shown, model, prompt = tasks[task]
            names = [name for name in names if name in (args.only or names)]
            found: Found = defaultdict(list)
            for number in range(rounds):
                for name in names if number % 2 == 0 else reversed(names):  # so that a drift of the machine cancels
                    with serving(name, folder, model) as url:
                        warm = crowd(url, shown, 8, args.seconds, **_request(name, prompt))
                        if list(warm) != [200]:
                            sys.exit(f"{name} answers with {', '.join(map(str, warm))}")
                        for load in some:
                            found[name, load].append(asked(name, url, shown, load, args.seconds, prompt))
                            print(task, NAMES[name], load, found[name, load][-1], flush=True)
            what = f"{TOKENS} tokens an answer" if prompt else "YOLOv8n at 640"
            unit = "answers" if prompt else "pictures"
            text = report(found, unit, f"{what}, {args.seconds:g} s a load, median of {rounds} rounds")
            print(text)
            if args.record:
                measuring.record(measuring.card(f"The service, {task}", args), text)


def report(found: Found, unit: str, work: str) -> str:
    """Medians over the rounds; the ratio of rates to the fastest peer's round by round (least–most)."""
    medians = {key: Figures(*map(statistics.median, zip(*runs, strict=True))) for key, runs in found.items()}
    columns = f"{unit}/s | times the fastest peer | median, ms | 99%, ms | failed/s"
    lines = [f"| clients | pictures a request | | {columns} |"]
    lines += ["|---:|---:|---|---:|---:|---:|---:|---:|"]
    for (name, load), one in sorted(medians.items(), key=lambda item: (item[0][1][::-1], item[0][0])):
        peers = [key for key in medians if key[1] == load and not key[0].startswith("shardsight")]
        fastest = max(peers, key=lambda key: medians[key].rate, default=None)
        against = measuring.against(found[name, load], found[fastest]) if fastest else ""
        figures = [f"{one.rate:.1f}", against, f"{one.median:,.0f}", f"{one.p99:,.0f}", f"{one.failed:.1f}"]
        lines.append("| " + " | ".join([*map(str, load), NAMES[name], *figures]) + " |")
    said = measuring.conditions(work, ("ray", "litserve", "fastapi", "vllm", "ultralytics", "locust"))
    return "\n".join([*lines, "", said, ""])


if __name__ == "__main__":
    main()
