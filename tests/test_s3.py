"""The job from and to a real S3 server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardsight.storage import Storage
from tests.conftest import S3, S3_KEY, S3_SECRET, Listener, job_of, rows_of, write_tar

Annotate = Callable[..., tuple[int, str]]


def test_in_and_out(s3: S3, jpegs: list[bytes], annotate: Annotate, detector: Path) -> None:
    """Pictures, a tar, names that URLs dislike; results land in the bucket, and a second run finds them there."""
    bucket = s3.bucket("data")
    (bucket / "in" / "sub").mkdir(parents=True)
    names = ["a b.jpg", "sub/c#1.jpg", "100%.jpg", "é😀.jpg"]
    for name, data in zip(names, jpegs, strict=False):
        (bucket / "in" / name).write_bytes(data)
    (bucket / "in" / "broken.jpg").write_bytes(b"")
    write_tar(bucket / "in" / "t.tar", [(f"{index}.jpg", data) for index, data in enumerate(jpegs[4:10])])
    command = ("s3://data/in", "--output", "s3://data/out", "--yolo", detector, *s3.options(), "--max-error-rate", 0.5)
    code, said = annotate(*command)
    assert code == 0, said
    rows = {row["id"]: row for row in rows_of(bucket / "out")}
    expected = [f"s3://data/in/{name}" for name in [*names, "broken.jpg"]]
    assert set(rows) == {*expected, *(f"s3://data/in/t.tar#{index}.jpg" for index in range(6))}
    assert [id for id, row in rows.items() if row["error"]] == ["s3://data/in/broken.jpg"]
    assert job_of(bucket / "out")["exactly_once"] is True
    assert S3_SECRET not in (bucket / "out" / "job.json").read_text()
    assert annotate(*command)[0] == 0
    assert job_of(bucket / "out")["stages"]["decode"]["rows"] == 0
    globbed = ("s3://data/in/*.jpg", "--output", "s3://data/globbed", *command[3:])
    assert annotate(*globbed)[0] == 0
    assert job_of(bucket / "globbed")["inputs"] == 4


def test_wrong_requests_are_one_sentence(s3: S3, tmp_path: Path, annotate: Annotate, detector: Path) -> None:
    bucket = s3.bucket("wrong")
    (bucket / "a.jpg").write_bytes(b"x")
    fine = ("--output", tmp_path / "out", "--yolo", detector)
    for arguments, words in [
        (("s3://wrong", *fine, *s3.options(key="other")), "keys"),
        (("s3://wrong", *fine, *s3.options(secret="other")), "keys"),
        (("s3://missing-bucket/in", *fine, *s3.options()), "bucket missing-bucket"),
        (("s3://wrong/no/such/prefix", *fine, *s3.options()), "nothing at"),
        (("s3://wrong", "--output", "s3://missing-bucket/out", "--yolo", detector, *s3.options()), "missing-bucket"),
    ]:
        code, said = annotate(*arguments)
        assert code == 2 and words in said and said.count("\n") == 1, (arguments, said)


def test_large_files_are_read_by_ranges(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte in order across chunks, seeks included, and a range that was cut short is asked for again."""
    data = bytes(range(256)) * 4000
    (s3.bucket("ranges") / "x.bin").write_bytes(data)
    monkeypatch.setattr("shardsight.storage.CHUNK", 100_003)
    storage = Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET})
    whole = storage.s3.cat_file
    calls: list[Any] = []

    def cut_short(*args: Any, **kwargs: Any) -> bytes:
        calls.append(kwargs)
        got: bytes = whole(*args, **kwargs)
        return got[:-1] if len(calls) % 3 == 1 else got

    monkeypatch.setattr(storage.s3, "cat_file", cut_short)
    monkeypatch.setattr("shardsight.storage.time.sleep", lambda _: None)
    with storage.open("s3://ranges/x.bin") as file:
        assert file.read() == data
        file.seek(500_000)
        assert file.read(10) == data[500_000:500_010]
        file.seek(-5, 2)
        assert file.read() == data[-5:]


def test_a_store_sends_nobody_elsewhere() -> None:
    """A redirect is the store's failure: what it points to is not asked."""
    elsewhere = Listener()
    store = Listener(307, elsewhere.url + "/stolen")
    options = {"endpoint_url": store.url, "key": S3_KEY, "secret": S3_SECRET}
    with pytest.raises(Exception, match="another address"):
        Storage(options, patience=0).read("s3://bucket/a.jpg")
    assert store.heard and not elsewhere.heard
    store.close()
    elsewhere.close()
