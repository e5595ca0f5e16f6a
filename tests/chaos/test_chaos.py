"""The long proofs, `make chaos`: nothing lost and nothing twice, whatever is killed or fails.

What is random is drawn from $SEED, which the output names; the same seed repeats the same draws.
"""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.proxy import proxy
from tests.conftest import S3, free_port, job_of, rows_of, serve_s3, start_job, write_tar

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("SEED", random.randrange(10**6)))
COUNTED = "tests.chaos.counted"


@pytest.fixture(autouse=True)
def seed() -> None:
    print(f"SEED={SEED}")


def make_inputs(folder: Path, jpegs: list[bytes], tars: int, parquets: int, loose: int, each: int = 300) -> int:
    """Returns how many inputs there are."""
    folder.mkdir(parents=True)
    for number in range(tars):
        write_tar(folder / f"{number}.tar", [(f"{n}.jpg", jpegs[n % len(jpegs)]) for n in range(each)])
    for number in range(parquets):
        table = pa.table({"image": [jpegs[n % len(jpegs)] for n in range(each)]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=100)
    for n in range(loose):
        (folder / f"{n:05}.jpg").write_bytes(jpegs[n % len(jpegs)])
    return each * (tars + parquets) + loose


def kill_all(job: subprocess.Popen[str]) -> None:
    """The driver and everything that it started, at once."""
    driver = psutil.Process(job.pid)
    family = [driver, *driver.children(recursive=True)]
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, 30)
    job.wait()


def ids_of(out: Path) -> list[str]:
    files = list(out.glob("results/*.parquet"))
    return [id for (id,) in duckdb.sql(f"select id from '{out}/results/*.parquet'").fetchall()] if files else []


class Reader(threading.Thread):
    """Somebody who looks at the results all the time."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.done = out, threading.Event()
        self.looked, self.errors = 0, list[str]()

    def run(self) -> None:
        connection = duckdb.connect()
        while not self.done.wait(0.05):
            if list(self.out.glob("results/*.parquet")):
                try:
                    connection.sql(f"select count(*), count(error) from '{self.out}/results/*.parquet'").fetchall()
                    self.looked += 1
                except duckdb.Error as error:
                    self.errors.append(str(error))


def test_killed_at_random_moments(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """`kill -9` of everything at 20 random moments: each id once, no finished picture decoded again.

    A moment is at most a second after so many new files of results, so that however slow the machine is, kills
    fall from the start of the job to its end; two in five fall while it starts.
    """
    total = make_inputs(tmp_path / "in", jpegs, tars=10, parquets=4, loose=4000)
    out, chance = tmp_path / "out", random.Random(SEED)
    command = (tmp_path / "in", "--output", out, "--yolo", detector, "--rows-per-file", 100)
    reader = Reader(out)
    reader.start()
    there: set[str] = set()
    ever: set[str] = set()
    for run in range(21):
        notes = tmp_path / f"decoded-{run}"
        notes.touch()
        job = start_job(*command, module=COUNTED, env={"COUNTED": str(notes)})
        if run < 20:
            files, before = chance.randint(-1, 3), len(list(out.glob("results/*.parquet")))
            while len(list(out.glob("results/*.parquet"))) < before + files:
                assert job.poll() is None, job.communicate()
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 1 if files > 0 else 8))
            assert job.poll() is None
            kill_all(job)
        else:
            _, said = job.communicate(timeout=1200)
            assert job.returncode == 0, said
        decoded = notes.read_text().split("\n")[:-1]
        ever.update(decoded)
        again = there.intersection(decoded)
        now = ids_of(out)
        print(f"run {run}: decoded {len(decoded)}, again {len(again)}, rows {len(now)}")
        assert not again
        assert len(now) == len(set(now))
        there = set(now)
    assert there == ever  # what was decoded was noted
    reader.done.set()
    reader.join()
    assert len(there) == total and job_of(out)["exactly_once"] is True
    assert not reader.errors and reader.looked > 100


@pytest.mark.parametrize("victim", ["ray::MapBatches(", "ray::MapWorker("])
@pytest.mark.parametrize("paligemma", [False, True])
def test_killed_workers(tmp_path: Path, jpegs: list[bytes], detector: Path, victim: str, paligemma: bool) -> None:
    """A reader or a model process killed three times in mid-job: it ends without a rerun, each id once.

    With PaliGemma in the flow, its engine lives in the process that is killed, or YOLO's does.
    """
    from tests.small_paligemma import make

    total = make_inputs(tmp_path / "in", jpegs, tars=6, parquets=2, loose=300)
    asked = ("--paligemma", make(tmp_path / "small"), "--max-tokens", 8) if paligemma else ()
    job = start_job(tmp_path / "in", "--output", tmp_path / "out", "--yolo", detector, *asked)
    chance, killed = random.Random(SEED), 0
    while job.poll() is None and killed < 3:
        time.sleep(chance.uniform(0.5, 3))
        if found := workers(job, victim):
            chance.choice(found).kill()
            killed += 1
    _, said = job.communicate(timeout=1200)
    assert killed == 3 and job.returncode == 0, said
    ids = ids_of(tmp_path / "out")
    assert len(ids) == len(set(ids)) == total
    assert job_of(tmp_path / "out")["exactly_once"] is True and not job_of(tmp_path / "out")["errors"]


def workers(job: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(kind):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_faulty_store(tmp_path: Path, s3: S3, jpegs: list[bytes], detector: Path) -> None:
    """One request in ten fails, in reading and in writing: each id once all the same."""
    total = make_inputs(s3.bucket("faulty") / "in", jpegs, tars=4, parquets=2, loose=600)
    with proxy(s3.url, 0.1, SEED) as faulty:
        options = s3.options(url=faulty.url)
        command = ("s3://faulty/in", "--output", "s3://faulty/out", "--yolo", detector, "--rows-per-file", 50)
        job = start_job(*command, *options)
        _, said = job.communicate(timeout=1200)
        print(dict(faulty.counts))
        assert job.returncode == 0, said
        assert len(faulty.counts) == 5
    rows = rows_of(s3.bucket("faulty") / "out")
    assert len(rows) == len({row["id"] for row in rows}) == total
    assert not any(row["error"] for row in rows)


def test_a_store_that_goes_away(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """For 30 seconds in mid-job: the job waits, and goes on."""
    folder, port = tmp_path / "s3", free_port()
    total = make_inputs(folder / "away" / "in", jpegs, tars=4, parquets=2, loose=600)
    server = serve_s3(folder, port)
    options = S3(folder, f"http://127.0.0.1:{port}").options()
    command = ("s3://away/in", "--output", "s3://away/out", "--yolo", detector, "--rows-per-file", 50)
    job = start_job(*command, *options)
    try:
        while not list((folder / "away" / "out").glob("results/*.parquet")):
            assert job.poll() is None, job.communicate()
            time.sleep(0.1)
        server.kill()
        server.wait()
        time.sleep(30)
        assert job.poll() is None
        server = serve_s3(folder, port)
        _, said = job.communicate(timeout=1200)
    finally:
        server.kill()
        server.wait()
    assert job.returncode == 0, said
    rows = rows_of(folder / "away" / "out")
    assert len(rows) == len({row["id"] for row in rows}) == total
    assert not any(row["error"] for row in rows)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_two_at_once(tmp_path: Path, s3: S3, jpegs: list[bytes], detector: Path, where: str) -> None:
    """Started together, one is refused, whichever; what a killed run leaves behind stops nobody."""
    make_inputs(tmp_path / "in", jpegs, tars=1, parquets=1, loose=100)
    s3.bucket("two")
    out, options = (tmp_path / "out", []) if where == "disk" else ("s3://two/out", s3.options())
    command = (tmp_path / "in", "--output", out, "--yolo", detector, *options)
    jobs = [start_job(*command) for _ in range(2)]
    said = [job.communicate(timeout=600)[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 2], said
    assert sum("another run is writing" in text for text in said) == 1

    held = start_job(*command, "--overwrite")
    place = tmp_path / "out" if where == "disk" else s3.bucket("two") / "out"
    while not (place / "job.json").exists() or job_of(place)["status"] != "running":
        time.sleep(0.1)
    kill_all(held)
    last = start_job(*command)
    assert (last.communicate(timeout=600), last.returncode)[1] == 0
    ids = ids_of(place)
    assert len(ids) == len(set(ids)) == 700


def test_a_large_tar_in_little_memory(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """3 GB: no process of ours takes more than 1.5 GB beyond what its model takes."""
    large = [data + bytes(2_000_000 - len(data)) for data in jpegs]  # a decoder reads no further than the end marker
    write_tar(tmp_path / "large.tar", [(f"{n}.jpg", large[n % len(large)]) for n in range(1500)])
    job = start_job(tmp_path / "large.tar", "--output", tmp_path / "out", "--yolo", detector)
    peaks = watch(job)
    assert job.returncode == 0
    print({name: f"{peak >> 20} MB" for name, peak in peaks.items()})
    assert max(peaks.values()) < 1500 << 20
    assert job_of(tmp_path / "out")["rows"] == 1500


def test_a_million_finished_files(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """A restart that finds them all done: under 300 MB in the driver, and under 20 s."""
    from shardsight.results.writer import Results
    from shardsight.row import PLACE, ROW, SECONDS
    from shardsight.storage import Storage

    folder, out = tmp_path / "in", tmp_path / "out"
    (folder).mkdir()
    first = folder / f"{0:07}.jpg"
    first.write_bytes(jpegs[0])
    for n in range(1, 1_000_000):
        os.mknod(folder / f"{n:07}.jpg")  # empty: what is finished is not opened
    command = (folder, "--output", out, "--yolo", detector)
    job = start_job(*command, "--limit", 1)
    assert (job.communicate(timeout=300), job.returncode)[1] == 0
    schema = pa.schema([*ROW, *PLACE, *((name, pa.float64()) for name in SECONDS)])
    for start in range(1, 1_000_000, 10_000):
        ids = [str(folder / f"{n:07}.jpg") for n in range(start, min(start + 10_000, 1_000_000))]
        columns: dict[str, Any] = {"id": ids, "uri": ids, "record": [0] * len(ids), "frame_number": [0] * len(ids)}
        arrays = [pa.array(columns.get(field.name, [None] * len(ids)), field.type) for field in schema]
        Results(str(out), Storage()).write(pa.Table.from_arrays(arrays, schema=schema), 10_000)
    command = (*command, "--limit", 1_000_000)
    (out / "job.json").unlink()
    started = time.monotonic()
    job = start_job(*command)
    peaks = watch(job, every=0.02)
    seconds = time.monotonic() - started
    print(f"{seconds:.1f} s, driver {peaks['driver'] >> 20} MB")
    assert job.returncode == 0 and job_of(out)["resumed_rows"] == 1_000_000
    shutil.rmtree(folder)  # pytest would keep the million, and take minutes to end
    assert peaks["driver"] < 300 << 20 and seconds < 20


def watch(job: subprocess.Popen[str], every: float = 0.2) -> dict[str, int]:
    """Until the job ends: the most memory that each kind of process had to itself, in bytes."""
    peaks: Counter[str] = Counter()
    driver = psutil.Process(job.pid)
    while job.poll() is None:
        for process in [driver, *driver.children(recursive=True)]:
            try:
                name = "driver" if process.pid == job.pid else process.cmdline()[0]
                memory = process.memory_info()
                peaks[name] = max(peaks[name], memory.rss - memory.shared)
            except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
                continue
        time.sleep(every)
    return dict(peaks)
