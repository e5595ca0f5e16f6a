"""A cluster of several machines, `make cluster`: jobs are submitted to it, and its machines die, are cut off and come.

Each machine is a network namespace with its own address and its own /tmp, see tests/namespaces.py. Its figures are in
benchmarks/RESULTS.md, "A cluster of namespaces".
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from demo.clips import write_clips
from demo.scenes import scenes
from demo.writers import write
from shardsight.job import load_results
from tests.chaos.nodes import Nodes, Submitted, nodes
from tests.chaos.service import within
from tests.conftest import WEIGHTS, job_of
from tests.namespaces import lacking

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacking()), reason=lacking())]
MINUTES = float(os.environ.get("MINUTES", 10))  # of Ray's killers
DETECT = ("--yolo", "s3://bucket/models/detect.pt", "--precision", "fp32", "--no-scaled-decode")
PALIGEMMA = ("--paligemma", "s3://bucket/models/paligemma", "--paligemma-actors", 1, "--max-tokens", 16)
# What a job is given, beside its output.
KINDS: dict[str, tuple[Any, ...]] = {
    "pictures": ("s3://bucket/pictures", *DETECT, "--rows-per-file", 20),
    "tracked": ("s3://bucket/clips", *DETECT, "--track", "bytetrack", "--fps", 5, "--rows-per-file", 10),
    "paligemma": ("s3://bucket/asked", *DETECT, *PALIGEMMA, "--prompt", "caption en", "--rows-per-file", 5),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and two workers, and a bucket with models, pictures as tars and loose files, and clips."""
    with nodes(tmp_path_factory.mktemp("cluster") / "machines") as cluster:
        shutil.copytree(WEIGHTS, cluster.bucket / "models")
        for folder, tar, loose in (("pictures", 400, 100), ("asked", 60, 10)):
            write(scenes(tar, 1), cluster.bucket / folder, "tar")
            write(scenes(loose, 2), cluster.bucket / folder / "loose", "folder")
        write_clips(8, 1, cluster.bucket / "clips")
        yield cluster


@pytest.fixture
def whole(cluster: Nodes) -> Nodes:
    """Two workers of the usual size, whatever the test before did to them."""
    return workers(cluster, "a", "b")


def workers(cluster: Nodes, *names: str, **options: Any) -> Nodes:
    """The cluster, once it has these workers and no others."""
    for name in set(cluster.workers) - set(names):
        cluster.kill(name)
    for name in set(names) - set(cluster.workers):
        cluster.join(name, **options)
    cluster.settle()
    return cluster


def rows_of(cluster: Nodes, out: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = load_results(cluster.bucket / out).to_table().to_pylist()
    return rows


Undisturbed = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(cluster: Nodes) -> Undisturbed:
    """A kind of job → its rows by id, where nothing happens to it; run once."""
    known: dict[str, dict[str, Any]] = {}

    def run(kind: str) -> dict[str, Any]:
        if kind not in known:
            workers(cluster, "a", "b")
            job = cluster.submit(*KINDS[kind], "--output", f"s3://bucket/{kind}-0", module="jobs.annotate")
            assert job.code() == 0, job.said()
            rows = rows_of(cluster, f"{kind}-0")
            known[kind] = {row["id"]: row for row in rows}
            assert len(known[kind]) == len(rows) == job_of(cluster.bucket / f"{kind}-0")["rows"]
            record("nothing", kind, rows, job.began, [])
        return known[kind]

    return run


def record(event: str, kind: str, rows: list[Any], began: float, jobs: list[Submitted]) -> None:
    """A line of the table in RESULTS.md. Redone: what was decoded more than once."""
    decoded = [id for job in jobs for id in job.decoded.read_text().split("\n")[:-1]]
    redone = len(decoded) - len(set(decoded)) if jobs else "–"
    print(f"\n| {event} | {kind} | {len(rows)} | {time.monotonic() - began:.0f} | {redone} |")


def begin(cluster: Nodes, kind: str, out: str, files: int = 2, options: tuple[str, ...] = ()) -> Submitted:
    """A job that is in the middle: it has written so many files of results."""
    job = cluster.submit(*KINDS[kind], "--output", f"s3://bucket/{out}", options=options)
    before = cluster.files(out)
    within(240, lambda: cluster.files(out) >= before + files or job.process.poll() is not None, job.said)
    assert job.process.poll() is None, job.said()
    return job


def check(cluster: Nodes, event: str, kind: str, expected: dict[str, Any], out: str, jobs: list[Submitted]) -> None:
    """Each input once, with the row that it has where nothing happens."""
    assert jobs[-1].code() == 0, jobs[-1].said()
    rows, job = rows_of(cluster, out), job_of(cluster.bucket / out)
    record(event, kind, rows, jobs[0].began, jobs)
    assert job["status"] == "done" and job["exactly_once"] is True and job["rows"] == len(rows)
    assert len({row["id"] for row in rows}) == len(rows) and {row["id"] for row in rows} == set(expected)
    for row in rows:
        assert_same(row, expected[row["id"]])


def assert_same(row: dict[str, Any], other: dict[str, Any]) -> None:
    assert row["error"] is other["error"] is None
    for one, two in zip(row["detections"] or [], other["detections"] or [], strict=True):
        assert (one["track_id"], one["class_id"]) == (two["track_id"], two["class_id"])
        assert [one[side] for side in ("x1", "y1", "x2", "y2")] == pytest.approx(
            [two[side] for side in ("x1", "y1", "x2", "y2")], abs=0.01
        )
    assert [one["text"] for one in row["answers"] or []] == [two["text"] for two in other["answers"] or []]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_is_killed(whole: Nodes, undisturbed: Undisturbed, kind: str) -> None:
    """As a spot node is: what it computed and had not passed on is computed again, by the other."""
    expected = undisturbed(kind)
    job = begin(whole, kind, f"{kind}-killed")
    whole.kill("b")
    check(whole, "a worker is killed", kind, expected, f"{kind}-killed", [job])


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_is_cut_off_for_a_minute(whole: Nodes, undisturbed: Undisturbed, kind: str) -> None:
    """It goes on computing, and cannot say so to anybody; nothing of it is there twice when it is back."""
    expected = undisturbed(kind)
    job = begin(whole, kind, f"{kind}-cut")
    whole.workers["b"].cut()
    time.sleep(60)
    whole.workers["b"].restore()
    check(whole, "a worker is cut off for 60 s", kind, expected, f"{kind}-cut", [job])
    whole.kill("b")  # Ray may have given it up, or not


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_joins(cluster: Nodes, undisturbed: Undisturbed, kind: str) -> None:
    expected = undisturbed(kind)
    workers(cluster, "a")
    job = begin(cluster, kind, f"{kind}-joined")
    cluster.join("b")
    check(cluster, "a worker joins", kind, expected, f"{kind}-joined", [job])


@pytest.mark.parametrize("kind", KINDS)
def test_the_drivers_node_dies(whole: Nodes, undisturbed: Undisturbed, kind: str) -> None:
    """Submitted again, the job goes on: at once, though Ray may still say that the first one runs."""
    expected, out = undisturbed(kind), f"{kind}-driver"
    whole.join("driver", cpus=0, resources={"driver": 1})
    whole.settle()
    options = ("--entrypoint-resources", '{"driver": 1}')
    job = begin(whole, kind, out, options=options)
    whole.kill("driver")
    assert job.code() == -1 and job_of(whole.bucket / out)["status"] == "running"
    again = whole.submit(*KINDS[kind], "--output", f"s3://bucket/{out}")
    check(whole, "the driver's node dies", kind, expected, out, [job, again])
    assert job_of(whole.bucket / out)["resumed_rows"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_little_memory_for_objects(cluster: Nodes, undisturbed: Undisturbed, kind: str) -> None:
    """What does not fit goes to the disk, of each node its own; frames that are tracked stay in their process."""
    expected = undisturbed(kind)
    workers(cluster, "small-a", "small-b", small=True)
    job, spilled = cluster.submit(*KINDS[kind], "--output", f"s3://bucket/{kind}-small"), set[Path]()
    while job.process.poll() is None:
        for machine in cluster.workers.values():
            spilled.update(machine.folder.glob("nodes/ray/session_*/ray_spilled_objects*/*"))
        time.sleep(0.1)
    assert spilled or kind == "tracked"
    check(cluster, "80 MB for objects", kind, expected, f"{kind}-small", [job])


@pytest.mark.parametrize("kind", KINDS)
def test_slow_storage(whole: Nodes, undisturbed: Undisturbed, kind: str) -> None:
    """From the first results on, the S3 server sends 0.5 MB a second, of some 27 MB of pictures."""
    expected = undisturbed(kind)
    job = begin(whole, kind, f"{kind}-slow")
    whole.store.limit(4)
    try:
        check(whole, "S3 sends 4 Mbit/s", kind, expected, f"{kind}-slow", [job])
    finally:
        whole.store.unlimit()


def test_rays_own_killers(whole: Nodes, undisturbed: Undisturbed) -> None:
    """One job after the other while processes and nodes are killed, and nodes come back: each input once in each."""
    expected = {kind: undisturbed(kind) for kind in KINDS}
    killers, runs = whole.submit(60 * MINUTES, module="tests.chaos.killers"), 0
    while killers.process.poll() is None:
        kind, out = list(KINDS)[runs % len(KINDS)], f"killers-{runs}"
        jobs = list[Submitted]()
        while not jobs or jobs[-1].code():
            jobs.append(whole.submit(*KINDS[kind], "--output", f"s3://bucket/{out}"))
            while jobs[-1].process.poll() is None:
                for name, machine in whole.workers.items():
                    if not machine.runs("raylet"):
                        whole.restart(name)
                        within(60, partial(machine.runs, "raylet"))
                time.sleep(0.5)
            print(f"{out}: exit code {jobs[-1].code()}")
            assert len(jobs) < 9, jobs[-1].said()
        check(whole, "Ray's killers", kind, expected[kind], out, jobs)
        runs += 1
    print(re.findall(r"killed \d+ \w+", killers.said()))
    assert killers.code() == 0 and runs >= min(MINUTES, 4), killers.said()
