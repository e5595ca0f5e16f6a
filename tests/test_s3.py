"""The job from and to a real S3 server."""

from collections.abc import Callable
from pathlib import Path

from tests.conftest import S3, S3_SECRET, job_of, rows_of, write_tar

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
        (("s3://wrong/no/such/prefix", *fine, *s3.options()), "does not exist"),
        (("s3://wrong", "--output", "s3://missing-bucket/out", "--yolo", detector, *s3.options()), "missing-bucket"),
    ]:
        code, said = annotate(*arguments)
        assert code == 2 and words in said and said.count("\n") == 1, (arguments, said)
