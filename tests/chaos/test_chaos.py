"""The long proofs, `make chaos`: nothing lost and nothing twice, whatever is killed or fails.

What is random is drawn from $SEED, which the output names; the same seed repeats the same draws.
"""

import io
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

import av
import cv2
import duckdb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import shardsight
from tests.chaos.proxy import proxy
from tests.clips import encode, panned
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


CLIPS, FRAMES = 40, 60


def make_clips(folder: Path, jpegs: list[bytes]) -> None:
    """Videos alone and in a tar, of which one is cut off."""
    folder.mkdir(parents=True)
    pictures = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((320, 240))) for data in jpegs[:8]]
    clips = [encode(panned(picture, FRAMES), g="12", format="matroska") for picture in pictures]
    for number in range(CLIPS - 10):
        (folder / f"{number}.mkv").write_bytes(clips[number % len(clips)])
    (folder / "0.mkv").write_bytes(clips[0][: len(clips[0]) // 2])
    write_tar(folder / "a.tar", [(f"{number}.mkv", clips[number % len(clips)]) for number in range(10)])


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ((), ""),
        ((), "24"),
        (("--every", 3), "24"),
        (("--track", "botsort"), ""),
        (("--track", "bytetrack", "--fps", 5), ""),
    ],
    ids=["whole", "split", "sampled", "tracked", "tracked and sampled"],
)
def test_killed_amid_videos(
    tmp_path: Path, jpegs: list[bytes], detector: Path, flags: tuple[Any, ...], part: str
) -> None:
    """`kill -9` of everything at five random moments: the rows are those of a job that nobody stopped, identities
    included, and no finished frame is decoded again but where a video is tracked anew."""
    make_clips(tmp_path / "in", jpegs)
    options = (*("--yolo", detector, "--precision", "fp32", "--rows-per-file", 50, "--max-error-rate", 1), *flags)
    chance, written = random.Random(SEED), set[str]()
    for run in range(7):
        out = tmp_path / ("out" if run else "undisturbed")
        notes = tmp_path / f"decoded-{run}"
        notes.touch()
        command = (tmp_path / "in", "--output", out, *options)
        job = start_job(*command, module=COUNTED, env={"COUNTED": str(notes), "PART": part})
        if 0 < run < 6:
            files, before = chance.randint(0, 2), len(list(out.glob("results/*.parquet")))
            while len(list(out.glob("results/*.parquet"))) < before + files and job.poll() is None:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 1 if files else 8))
            kill_all(job)
        else:
            _, said = job.communicate(timeout=1200)
            assert job.returncode == 0, said
        decoded = notes.read_text().split("\n")[:-1]
        print(f"run {run}: decoded {len(decoded)}, rows {len(ids_of(out))}")
        if run and "--track" not in flags:
            assert not written.intersection(decoded)
        written = set(ids_of(out)) if run else set()
    expected, found = ({row["id"]: row for row in rows_of(tmp_path / name)} for name in ("undisturbed", "out"))
    assert found.keys() == expected.keys() and len(rows_of(tmp_path / "out")) == len(found) == job_of(out)["rows"]
    assert job_of(out)["exactly_once"] is True
    for id, row in expected.items():
        for one, other in zip(row["detections"] or [], found[id]["detections"] or [], strict=True):
            assert (one["track_id"], one["class_id"]) == (other["track_id"], other["class_id"])
            assert one["x1"] == pytest.approx(other["x1"], abs=1e-2)


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


def test_videos_in_a_faulty_store(tmp_path: Path, s3: S3, jpegs: list[bytes], detector: Path) -> None:
    """One request in ten fails: each frame once all the same, as from a disk."""
    make_clips(s3.bucket("shaky") / "in", jpegs)
    flags = ("--yolo", detector, "--precision", "fp32", "--max-error-rate", 1, "--every", 2)
    with proxy(s3.url, 0.1, SEED) as faulty:
        job = start_job("s3://shaky/in", "--output", "s3://shaky/out", *flags, *s3.options(url=faulty.url))
        _, said = job.communicate(timeout=1200)
        assert job.returncode == 0, said
    job = start_job(s3.bucket("shaky") / "in", "--output", tmp_path / "out", *flags)
    assert job.wait(1200) == 0
    name = str(s3.bucket("shaky"))
    local = {row["id"].replace(name, "s3://shaky"): len(row["detections"] or []) for row in rows_of(tmp_path / "out")}
    rows = rows_of(s3.bucket("shaky") / "out")
    assert {row["id"]: len(row["detections"] or []) for row in rows} == local and len(rows) == len(local)


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


@pytest.mark.parametrize("flags", [(), ("--track", "bytetrack")], ids=["not tracked", "tracked"])
def test_memory_is_flat_in_the_length_of_a_video(tmp_path: Path, detector: Path, flags: tuple[str, ...]) -> None:
    """An hour of 720p takes no process 200 MB more than ten seconds do."""
    seconds, rate = 10, 10
    noise = np.random.default_rng(0).integers(0, 255, (720, 1280 + 20 * seconds * rate, 3), np.uint8)
    ground = cv2.GaussianBlur(noise, (0, 0), 9)
    frames = (ground[:, 20 * number : 20 * number + 1280] for number in range(seconds * rate))
    (tmp_path / "short.mp4").write_bytes(encode(frames, g="50", preset="ultrafast"))
    repeat(tmp_path / "short.mp4", tmp_path / "long.mp4", 3600 // seconds, 25 / rate)
    peaks = {}
    for name in ("short", "long"):
        options = ("--yolo", detector, "--imgsz", 64, *flags)
        job = start_job(tmp_path / f"{name}.mp4", "--output", tmp_path / name, *options)
        peaks[name] = watch(job)
        assert job.returncode == 0
        print(name, job_of(tmp_path / name)["rows"], {kind: f"{peak >> 20} MB" for kind, peak in peaks[name].items()})
    assert job_of(tmp_path / "long")["rows"] == 3600 * rate
    kinds = {kind.partition("(")[0] for kind in peaks["long"]}
    for kind in kinds:
        short, long = (
            max((peak for name, peak in peaks[which].items() if name.startswith(kind)), default=0)
            for which in ("short", "long")
        )
        assert long < short + (200 << 20) or not short, kind


def repeat(source: Path, target: Path, times: int, stretch: float) -> None:
    """A video, so many times one after the other, slower by `stretch`, without encoding it again."""
    with av.open(str(source)) as container, av.open(str(target), "w") as made:
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
        stream = made.add_stream_from_template(container.streams.video[0])
        length = sum(packet.duration for packet in packets)
        for turn in range(times):
            container.seek(0)
            for packet in container.demux(video=0):
                if packet.dts is not None:
                    packet.pts = round((packet.pts + turn * length) * stretch)
                    packet.dts = round((packet.dts + turn * length) * stretch)
                    packet.duration = round(packet.duration * stretch)
                    packet.stream = stream
                    made.mux(packet)


def test_a_million_finished_files(tmp_path: Path, jpegs: list[bytes], detector: Path) -> None:
    """A restart that finds them all done: under 300 MB in the driver, and under 20 s. DuckDB reads what is there."""
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
    (found,) = shardsight.load_results(out).to_table(["detections"]).to_pylist()
    assert found["detections"]
    schema = pa.schema([*ROW, *PLACE, *((name, pa.float64()) for name in SECONDS)])
    for start in range(1, 1_000_000, 10_000):
        ids = [str(folder / f"{n:07}.jpg") for n in range(start, min(start + 10_000, 1_000_000))]
        columns: dict[str, Any] = {"id": ids, "uri": ids, "record": [0] * len(ids), "frame_number": [0] * len(ids)}
        columns["detections"] = [found["detections"]] * len(ids)
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
    rows, started = f"'{out}/results/*.parquet'", time.monotonic()
    assert duckdb.sql(f"select count(*), count(distinct id) from {rows}").fetchall() == [(1_000_000,) * 2]
    counts = duckdb.sql(f"select d.label, count(*) from {rows}, unnest(detections) as t(d) group by 1").fetchall()
    expected = Counter(one["label"] for one in found["detections"])
    assert dict(counts) == {label: 1_000_000 * count for label, count in expected.items()}
    print(f"DuckDB: {time.monotonic() - started:.1f} s")


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
