"""A job's page: what it says is what the results say, wherever they are, and it asks nothing of the network.

How it looks and what it draws is tested in a browser, in test_page.py.
"""

import base64
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsight import cli
from shardsight.decode.pictures import decode
from shardsight.row import ROW
from shardsight.storage import Storage
from shardsight.viewer.job import BINS, summary
from shardsight.viewer.page import thumbnail
from tests.clips import decoded, encode, number_of, numbered
from tests.conftest import S3, write_tar

HOSTILE = "</script><script>alert(1)</script><b onload='x'>\"&amp; é😀.jpg"


def detection(label: str | None = "star", score: float | None = 0.9, **more: Any) -> dict[str, Any]:
    return {"label": label, "class_id": 1, "score": score, "x1": 10.0, "y1": 20.0, "x2": 60.0, "y2": 80.0} | more


def row(id: str, uri: str | None = None, **more: Any) -> dict[str, Any]:
    return {"id": id, "uri": uri or id, "width": 640, "height": 480, "detections": [detection()]} | more


def failed(id: str, type: str = "NotAnImage", message: str = "no picture") -> dict[str, Any]:
    return row(id, detections=None, error={"stage": "decode", "type": type, "message": message})


def write_job(out: Path, *files: list[dict[str, Any]], **more: Any) -> Path:
    """A job's output as if annotate had written it, a results file for each list of rows."""
    (out / "results").mkdir(parents=True)
    for number, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows, schema=ROW), out / "results" / f"part-{number}.parquet")
    job = {"status": "done", "started": "2026-01-01T00:00:00+00:00", "configuration": {"storage": {}, "prompt": []}}
    job |= {"models": {"yolo": {"path": "some/best.pt"}}, "inputs": 3, "rows": 3, "rows_per_second": 1.5}
    (out / "job.json").write_text(json.dumps(job | {"exactly_once": True} | more))
    return out


def data_of(page: Path) -> dict[str, Any]:
    """What the page's scripts are given."""
    text = page.read_text()
    data: dict[str, Any] = json.loads(text.split('id="data">')[1].split("</script>")[0])
    return data


def test_page(tmp_path: Path, jpegs: list[bytes]) -> None:
    """The page holds each row whole, its picture, and every error; no name that a user chose becomes markup."""
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "t.tar", [(HOSTILE.replace("/", "_"), jpegs[0]), ("b.jpg", jpegs[1])])
    loose = tmp_path / "in" / HOSTILE.replace("/", "_")
    loose.write_bytes(jpegs[2])
    tar = str(tmp_path / "in" / "t.tar")
    hostile = f"{tar}#{HOSTILE.replace('/', '_')}"
    rows = [row(hostile, tar, detections=[detection(HOSTILE)]), row(f"{tar}#b.jpg", tar), row(str(loose))]
    bad = failed(f"{tar}#{HOSTILE}", message=HOSTILE)
    out = write_job(tmp_path / HOSTILE.replace("/", "_"), [*rows, bad], ignored={HOSTILE: 2})
    assert cli.show([str(out)]) == 0
    text = (out / "page.html").read_text()
    assert "alert(1)</script>" not in text and "<b onload" not in text
    assert text.count("<script") == text.count("</script>") == 2
    data = data_of(out / "page.html")
    shown = {item["rows"][0]["row"]["id"]: item for item in data["items"]}
    assert set(shown) == {one["id"] for one in rows}
    for one in rows:
        assert shown[one["id"]]["picture"].startswith("data:image/jpeg;base64,")
        assert shown[one["id"]]["rows"][0]["row"]["detections"][0]["label"] == one["detections"][0]["label"]
    assert data["errors"] == [
        {"stage": "decode", "type": "NotAnImage", "count": 1, "examples": [{"id": bad["id"], "message": HOSTILE}]}
    ]
    numbers = {one["name"]: one["value"] for one in data["numbers"]}
    assert numbers["rows"] == "4" and numbers["errors"] == "1" and numbers["each input exactly once"] == "yes"
    assert numbers[f"left out: {HOSTILE}"] == "2"


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    """The page opens from a disk without a network: no address in it but the name of SVG's elements."""
    out = write_job(tmp_path / "out", [row("a.jpg")])
    assert cli.show([str(out)]) == 0
    text = (out / "page.html").read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|\bimport\b.*\bfrom\b|<link|src=", text)
    assert "default-src 'none'" in text


def test_job_in_a_store(
    s3: S3, tmp_path: Path, jpegs: list[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job in S3 is shown with the options given, its pictures come from there too, and the page lands here."""
    bucket = s3.bucket("shown")
    write_tar(bucket / "t.tar", [("a.jpg", jpegs[0])])
    (bucket / "b.jpg").write_bytes(jpegs[1])
    tar = "s3://shown/t.tar"
    write_job(bucket / "out", [row(f"{tar}#a.jpg", tar), row("s3://shown/b.jpg"), row("s3://shown/gone.jpg")])
    monkeypatch.chdir(tmp_path)
    assert cli.show(["s3://shown/out/", *s3.options()]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    items = data_of(tmp_path / "page.html")["items"]
    assert [item["picture"] is not None for item in items] == [True, True, False]
    assert "cannot be shown" in items[2]["problem"]


@pytest.mark.parametrize("name", ["t.tar", "t.tgz", "t.parquet"])
def test_a_shard_is_read_once(tmp_path: Path, jpegs: list[bytes], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of its pictures are shown, as a shard may be gigabytes; and each row has its own picture."""
    shard = tmp_path / name
    members = [str(number) if name == "t.parquet" else f"{number}.jpg" for number in range(8)]
    if name == "t.parquet":
        pq.write_table(pa.table({"image": jpegs[:8]}), shard)
    else:
        write_tar(shard, list(zip(members, jpegs, strict=False)))
    if name == "t.tgz":
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    out = write_job(tmp_path / "out", [row(f"{shard}#{member}", str(shard)) for member in members])
    opened: list[str] = []
    plain = Storage.open

    def counted(self: Storage, uri: str, *more: Any) -> Any:
        opened.append(uri)
        return plain(self, uri, *more)

    monkeypatch.setattr(Storage, "open", counted)
    assert cli.show([str(out)]) == 0
    assert opened.count(str(shard)) == 1
    shown = [item["picture"] for item in data_of(out / "page.html")["items"]]
    assert shown == [thumbnail(decode(data)[0], 1024) for data in jpegs[:8]]


def test_pictures_that_are_gone_or_broken(tmp_path: Path, jpegs: list[bytes]) -> None:
    """Their rows are shown all the same, with the reason."""
    (tmp_path / "now-text.jpg").write_text("no picture")
    (tmp_path / "now-empty.jpg").touch()
    names = [str(tmp_path / name) for name in ("gone.jpg", "now-text.jpg", "now-empty.jpg")]
    gone_tar = str(tmp_path / "gone.tar")
    out = write_job(tmp_path / "out", [*map(row, names), row(f"{gone_tar}#a.jpg", gone_tar)])
    assert cli.show([str(out)]) == 0
    items = data_of(out / "page.html")["items"]
    assert len(items) == 4 and not any(item["picture"] for item in items)
    for item in items:
        assert re.fullmatch(r"The picture cannot be shown: (?!None).+", item["problem"])


# --- Videos


def frame_rows(id: str, uri: str, indices: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of frames of a clip of 25 a second, each with a box of its own."""
    return [
        row(f"{id}@{index}", uri, width=128, height=96, frame_index=index, pts_seconds=index / 25)
        | {"detections": [detection(x1=float(index), track_id=1)]}
        for index in indices
    ]


def small_frames(uri: str) -> list[tuple[float, int]]:
    """(seconds, number of the picture) of the frames of an embedded video."""
    head, data = uri.split(",", 1)
    assert head == "data:video/mp4;base64"
    return [(seconds, number_of(frame)) for seconds, frame in decoded(base64.b64decode(data))]


def assert_shown(item: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The item plays the frames of just these rows, at their times."""
    (only,) = item["rows"]
    assert [one["id"] for one in only["frames"]] == [one["id"] for one in rows] and only["row"] == only["frames"][0]
    shown = small_frames(item["video"])
    start = rows[0]["pts_seconds"]
    assert [index for _, index in shown] == [one["frame_index"] for one in rows]
    assert [seconds for seconds, _ in shown] == pytest.approx([one["pts_seconds"] - start for one in rows], abs=0.001)


@pytest.mark.parametrize("where", ["folder", "t.tar", "t.parquet", "s3"])
def test_videos(where: str, s3: S3, tmp_path: Path) -> None:
    """Wherever a video stands, it is on the page once, with the rows of its frames."""
    clip, indices = encode(numbered(40)), range(0, 40, 3)
    if where == "s3":
        (s3.bucket("films") / "v.mp4").write_bytes(clip)
        id = uri = "s3://films/v.mp4"
    else:
        uri = str(tmp_path / ("v.mp4" if where == "folder" else where))
        id = {"folder": uri, "t.tar": f"{uri}#v.mp4", "t.parquet": f"{uri}#0"}[where]
        if where == "folder":
            Path(uri).write_bytes(clip)
        elif where == "t.tar":
            write_tar(Path(uri), [("v.mp4", clip)])
        else:
            pq.write_table(pa.table({"image": [clip]}), uri)
    rows = frame_rows(id, uri, indices)
    asked = {"configuration": {"storage": {}, "prompt": [], "every": 3}}
    out = write_job(tmp_path / "out", rows[7:], rows[:7], **asked)  # in several files, not in order
    assert cli.show([str(out), *(s3.options() if where == "s3" else [])]) == 0
    (item,) = data_of(out / "page.html")["items"]
    assert item["problem"] is None and item["picture"].startswith("data:image/jpeg")
    assert_shown(item, rows)


def test_a_video_is_one_of_the_things_shown(tmp_path: Path, jpegs: list[bytes]) -> None:
    """However many frames it has, pictures beside it are shown, too; of each the first frames, which the page says."""
    (tmp_path / "a.jpg").write_bytes(jpegs[0])
    videos = [str(tmp_path / f"{name}.mp4") for name in "bc"]
    for video in videos:
        Path(video).write_bytes(encode(numbered(80)))
    rows = [frame_rows(video, video, range(80)) for video in videos]
    out = write_job(tmp_path / "out", [*rows[0], row(str(tmp_path / "a.jpg")), *rows[1]])
    job = json.loads((out / "job.json").read_text())
    many = summary(str(out), job, 3, Storage())
    assert [("video" in item) for item in many["items"]] == [True, False, True] and many["note"] == "All of them."
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shardsight.viewer.videos.MOST_FRAMES", 60)
        items = summary(str(out), job, 3, Storage())["items"]
    assert items[0]["problem"] == "The first 60 frames are shown."
    assert_shown(items[0], rows[0][:60])
    assert summary(str(out), job, 1, Storage())["note"].startswith("1 of 3, ")


def test_videos_that_are_gone_broken_or_cut(tmp_path: Path) -> None:
    """Their rows are shown all the same, with the reason; of a cut one, what is left of it."""
    names = [str(tmp_path / name) for name in ("gone.mp4", "text.mp4", "cut.mkv")]
    gone = str(tmp_path / "gone.tar")
    (tmp_path / "text.mp4").write_text("no video")
    whole = encode(numbered(40), "matroska", g="5", bf="0")
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    rows = [frame_rows(id, uri, range(40)) for id, uri in [*zip(names, names, strict=True), (f"{gone}#v.mp4", gone)]]
    out = write_job(tmp_path / "out", *rows)
    assert cli.show([str(out)]) == 0
    items = {item["rows"][0]["row"]["uri"]: item for item in data_of(out / "page.html")["items"]}
    for uri in (names[0], names[1], gone):
        assert re.fullmatch(r"The video cannot be shown: (?!None).+", items[uri]["problem"])
        assert items[uri]["video"] is None and len(items[uri]["rows"][0]["frames"]) == 40
    cut = items[names[2]]
    shown = len(cut["rows"][0]["frames"])
    assert 1 < shown < 40 and cut["problem"] == f"The first {shown} frames are shown."
    assert_shown(cut, rows[2][:shown])


def test_size_of_an_embedded_video(tmp_path: Path) -> None:
    """At most 640 pixels wide, with even sides, whatever the video's; and its bytes are bounded."""
    (tmp_path / "v.mp4").write_bytes(encode([np.zeros((722, 1282, 3), np.uint8)] * 3))
    noise = np.random.default_rng(0).integers(0, 255, (20, 96, 128, 3), np.uint8)
    (tmp_path / "w.mp4").write_bytes(encode(noise, crf="5"))
    uris = [str(tmp_path / "v.mp4"), str(tmp_path / "w.mp4")]
    out = write_job(tmp_path / "out", frame_rows(uris[0], uris[0], range(3)), frame_rows(uris[1], uris[1], range(20)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shardsight.viewer.videos.BYTES", 40_000)
        items = summary(str(out), json.loads((out / "job.json").read_text()), 2, Storage())["items"]
    sizes = [decoded(base64.b64decode(item["video"].split(",")[1]))[0][1].shape for item in items]
    assert sizes == [(360, 640, 3), (96, 128, 3)]
    assert len(items[1]["video"]) < 100_000 and 1 <= len(items[1]["rows"][0]["frames"]) < 20


def test_a_job_that_still_runs(tmp_path: Path) -> None:
    """Its rows so far, without the totals that it does not have yet."""
    out = write_job(tmp_path / "out", [row("a.jpg"), failed("b.jpg")])
    job = json.loads((out / "job.json").read_text())
    running = {name: job[name] for name in ("started", "configuration", "models")} | {"status": "running"}
    (out / "job.json").write_text(json.dumps(running))
    assert cli.show([str(out), "--page", str(tmp_path / "p.html")]) == 0
    data = data_of(tmp_path / "p.html")
    assert [(one["name"], one["value"]) for one in data["numbers"]] == [("rows", "2"), ("errors", "1")]
    assert data["subtitle"].endswith("running")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}"], "no job.json"),
        (["{tmp}/empty"], "no results yet"),
        (["{tmp}/out", "--storage", "anon"], "KEY=VALUE"),
        (["{tmp}/out", "--page", "{tmp}/no/such/folder/p.html"], "cannot be written"),
        (["{tmp}/out", "--count", "-1"], "0 or more"),
    ],
)
def test_wrong_requests_are_one_sentence(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path / "out", [row("a.jpg")])
    write_job(tmp_path / "empty")
    assert cli.show([one.format(tmp=tmp_path) for one in arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


LABELS = st.sampled_from(["star", "ring", "", None])
DETECTIONS = st.lists(
    st.builds(detection, LABELS, st.one_of(st.none(), st.floats(0, 1, width=32), st.just(float("nan")))), max_size=3
)
ANSWERS = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["detect a", "segment b", "ocr"]), "detections": st.none() | DETECTIONS}
    ),
    max_size=2,
)
ROWS = st.lists(
    st.one_of(
        st.builds(lambda found, said: row("a", detections=found, answers=said), st.none() | DETECTIONS, ANSWERS),
        st.builds(lambda kind: failed("b", kind), st.sampled_from(["Empty", "Cut"])),
    ),
    max_size=6,
)


@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 6))
def test_counts(tmp_path_factory: pytest.TempPathFactory, files: list[list[dict[str, Any]]], count: int) -> None:
    """Histograms and errors are of all rows, and the rows shown are `count` different ones without an error."""
    for number, one in enumerate(one for rows in files for one in rows):
        one["id"] = one["uri"] = f"/nowhere/{number}"
    out = write_job(tmp_path_factory.mktemp("counts") / "out", *files)
    data = summary(str(out), json.loads((out / "job.json").read_text()), count, Storage())
    rows = [one for rows in files for one in rows]
    labels, scores = Counter[tuple[str, str]](), Counter[tuple[str, int]]()
    for one in rows:
        layers = [
            ("YOLO", one["detections"]),
            *((said["prompt"], said["detections"]) for said in one.get("answers", [])),
        ]
        for name, found in layers:
            labels.update((name, each["label"] or "(no label)") for each in found or [])
            numbers = [each["score"] for each in found or [] if each["score"] is not None]
            scores.update((name, min(BINS - 1, int(each * BINS))) for each in numbers if each == each)
    shown = data["layers"]
    assert {(layer["name"], label): n for layer in shown for label, n in layer["labels"]} == dict(labels)
    assert {(layer["name"], n): s for layer in shown for n, s in enumerate(layer["scores"]) if s} == dict(scores)
    kinds = Counter(one["error"]["type"] for one in rows if one.get("error"))
    assert {kind["type"]: kind["count"] for kind in data["errors"]} == dict(kinds)
    ids = [item["rows"][0]["row"]["id"] for item in data["items"]]
    good = {one["id"] for one in rows if not one.get("error")}
    assert len(ids) == len(set(ids)) == min(count, len(good)) and set(ids) <= good
