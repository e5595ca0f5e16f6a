"""Paths and stores: two S3 servers and one of Google Cloud Storage, all real programs that answer over HTTP."""

import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shardsight.object_stores import Changed, MissingBucket, MissingObject, NoAccess, Rejected, Unavailable
from shardsight.storage import Entry, Storage, StorageError, explain, is_remote
from tests.conftest import S3, S3_KEY, S3_SECRET, Listener

ODD_KEYS = [
    *("q", "q?versionId=3.jpg", "q?generation=3", "a#b", "a#12", "100%.jpg", "%2F", "a+b c", "é😀.jpg", "trailing."),
    *("..x", "a&b=c;d", "~'\"<>|*", "back\\slash", "?", "a?b#c%20", "{0}{}", "sub/" + "x" * 200, "c:d@e"),
]


@pytest.fixture
def rclone(s3: S3) -> Storage:
    s3.bucket("bucket")
    return Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET})


@pytest.fixture(params=["rclone", "moto", "gcs"])
def store(request: pytest.FixtureRequest) -> tuple[Storage, str]:
    """A store, and the uri of a prefix in it that this test alone uses."""
    scheme = "gs" if request.param == "gcs" else "s3"
    return request.getfixturevalue(request.param), f"{scheme}://bucket/{request.node.originalname}"


def test_keys_are_used_as_they_are_listed(store: tuple[Storage, str], moto: Storage) -> None:
    """A key that is parsed as a version's address, or quoted wrongly, would give the row of another picture."""
    storage, root = store
    keys = [
        *ODD_KEYS,
        *(["double//slash", "tab\tx"] if storage is moto else []),
    ]  # the other servers cannot store such keys
    for key in keys:
        storage.write(f"{root}/{key}", key.encode())
    listed = list(storage.walk(root, hidden=True))
    assert sorted(entry.uri for entry in listed) == sorted(f"{root}/{key}" for key in keys)
    for entry in listed:
        key = entry.uri.removeprefix(f"{root}/").encode()
        assert storage.read(entry.uri) == key
        assert storage.read_range(entry.uri, len(key) - 1, len(key)) == key[-1:]
        assert storage.info(entry.uri) == entry and entry.size == len(key)
    for entry in listed:
        storage.remove(entry.uri)
    assert not storage.is_folder(root)


def test_the_version_changes_when_an_object_is_written_again(store: tuple[Storage, str]) -> None:
    """A changed input must be run again; the listing alone tells, without a request per object."""
    storage, root = store
    storage.write(f"{root}/a", b"one")
    storage.write(f"{root}/b", b"one")
    before = list(storage.walk(root))
    storage.write(f"{root}/a", b"two")
    after = list(storage.walk(root))
    assert before[0].version != after[0].version and before[1] == after[1]


def test_listings_of_several_pages(gcs: Storage, moto: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix with more objects than a page holds is listed whole and in order, without hidden ones and markers."""
    for storage, root in ((moto, "s3://bucket/pages"), (gcs, "gs://bucket/pages")):
        for name in [*(f"{n:04}" for n in range(12)), ".hidden", "sub/.hidden/x", "sub/"]:
            storage.write(f"{root}/{name}", b"x")
        (only,) = storage._stores.values()
        whole = only._ask  # type: ignore[attr-defined]
        asked = []

        def few(*parts: str, _whole: Any = whole, _asked: list[str] = asked, **arguments: Any) -> Any:
            """With pages of five."""
            if "prefix" in arguments or "Prefix" in arguments:
                arguments |= {"maxResults": 5} if "prefix" in arguments else {"MaxKeys": 5}
                _asked.append(parts[0])
            return _whole(*parts, **arguments)

        monkeypatch.setattr(only, "_ask", few)
        assert [entry.uri for entry in storage.walk(root)] == [f"{root}/{n:04}" for n in range(12)]
        assert len(asked) >= 3


def test_errors_name_what_is_missing(store: tuple[Storage, str]) -> None:
    """An object that is missing must not send the user to look for a bucket, nor the other way round."""
    storage, root = store
    gone, nowhere = f"{root}/gone.jpg", root.replace("bucket", "no-such-bucket") + "/gone.jpg"
    for ask in (storage.read, storage.info, storage.tag, storage.open):
        with pytest.raises(MissingObject) as missing:
            ask(gone)
        assert explain(gone, missing.value) == f"{gone} does not exist: check the name"
        with pytest.raises(MissingBucket) as no_bucket:
            ask(nowhere)
        assert "no bucket no-such-bucket" in explain(nowhere, no_bucket.value)
    with pytest.raises(MissingBucket):
        list(storage.walk(nowhere))
    with pytest.raises(MissingBucket):
        storage.write(nowhere, b"x")
    assert not storage.exists(gone) and not storage.exists(nowhere)


def test_wrong_credentials_stop_the_job(s3: S3) -> None:
    """Wrong or expired keys are no error of a single object, else a job would write a million rows that say so."""
    storage = Storage({"endpoint_url": s3.url, "key": S3_KEY, "secret": "other"})
    s3.bucket("keys")
    for ask in (storage.read, storage.info, lambda uri: list(storage.walk(uri))):
        with pytest.raises(NoAccess, match=r"s3://keys/x/? .*check the keys"):
            ask("s3://keys/x")
    with pytest.raises(NoAccess, match="keys"):
        Storage({"profile": "no-such-profile"}).read("s3://keys/x")


@pytest.mark.parametrize("status", [503, 429, 500])
def test_transient_errors_are_retried(status: int) -> None:
    """A request to a busy store is repeated while there is time, and then raised."""
    for seconds in (0.0, 60.0):
        server = Listener(*[status] * 3, 200)
        storage = Storage({"endpoint_url": server.url, "key": S3_KEY, "secret": S3_SECRET}, retry_seconds=seconds)
        if seconds:
            assert storage.read("s3://bucket/a.jpg") == b"" and len(server.heard) == 4
        else:
            with pytest.raises(Unavailable):
                storage.read("s3://bucket/a.jpg")
        server.close()


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (400, Rejected), (501, Rejected)])
def test_refused_requests_are_not_retried(status: int, kind: type[Exception]) -> None:
    server = Listener(status, 200)
    options = {"endpoint_url": server.url, "key": S3_KEY, "secret": S3_SECRET}
    with pytest.raises(kind):
        Storage(options, retry_seconds=60.0).read("s3://bucket/a.jpg")
    assert len(server.heard) == 1
    server.close()


def test_an_unreachable_store_is_one_sentence() -> None:
    storage = Storage({"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"}, retry_seconds=0.0)
    with pytest.raises(StorageError, match=r"^s3://b/a.jpg cannot be reached \(.*endpoint_url"):
        storage.read("s3://b/a.jpg")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_redirects_are_not_followed(scheme: str) -> None:
    """A store must not make the job send requests, and credentials, to another host."""
    elsewhere = Listener(200)
    server = Listener(307, location=elsewhere.url + "/stolen")
    keys = {"key": S3_KEY, "secret": S3_SECRET} if scheme == "s3" else {"anon": "true"}
    with pytest.raises(Rejected, match="another address"):
        Storage({"endpoint_url": server.url, **keys}).read(f"{scheme}://bucket/a.jpg")
    assert server.heard and not elsewhere.heard
    server.close()
    elsewhere.close()


def test_a_store_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives az:// without the extra installed is told what to install."""
    monkeypatch.setitem(sys.modules, "adlfs", None)
    for uri in ("az://c/x", "abfs://c@account.dfs.core.windows.net/x"):
        with pytest.raises(StorageError, match=r"pip install 'shardsight\[azure\]'"):
            Storage({"account_name": "a"}).read(uri)


def test_each_service_takes_its_own_options(gcs: Storage) -> None:
    """A job may read from one store and write to another: the keys of both are given together."""
    both = Storage(gcs.options | {"key": "for s3", "account_name": "for azure"})
    both.write("gs://bucket/options", b"x")
    assert pickle.loads(pickle.dumps(both)).read("gs://bucket/options") == b"x"


def test_conditional_writes(gcs: Storage, moto: Storage) -> None:
    """Of two concurrent writers, one learns that it was second."""
    for storage, uri in ((moto, "s3://bucket/condition"), (gcs, "gs://bucket/condition")):
        first = storage.write_if(uri, b"1", "")
        assert storage.tag(uri) == first
        with pytest.raises(Changed):
            storage.write_if(uri, b"2", "")
        second = storage.write_if(uri, b"3", first)
        with pytest.raises(Changed):
            storage.write_if(uri, b"4", first)
        assert storage.read(uri) == b"3" and storage.tag(uri) == second


def test_large_files_are_read_by_ranges(rclone: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte comes in order across chunks and after seeks, and a range that was cut short is requested again."""
    data = bytes(range(256)) * 4000
    rclone.write("s3://bucket/x.bin", data)
    monkeypatch.setattr("shardsight.storage.CHUNK", 100_003)
    monkeypatch.setattr("shardsight.storage.time.sleep", lambda _: None)
    (only,) = rclone._stores.values()
    whole, calls = only.get, []

    def cut_short(*args: Any) -> bytes:
        calls.append(args)
        got: bytes = whole(*args)
        return got[:-1] if len(calls) % 3 == 1 else got

    monkeypatch.setattr(only, "get", cut_short)
    with rclone.open("s3://bucket/x.bin") as file:
        assert file.read() == data
        file.seek(500_000)
        assert file.read(10) == data[500_000:500_010]
        file.seek(-5, 2)
        assert file.read() == data[-5:]


def test_a_walk_through_a_folder(tmp_path: Path) -> None:
    """Links are followed but never in a circle, a broken one is an entry too, hidden files are listed on request."""
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("b", "a c", "sub/d", ".hidden", "sub/.git/config"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "sub" / "circle").symlink_to(tmp_path)
    (tmp_path / "sub" / "broken").symlink_to(tmp_path / "nowhere")
    storage = Storage()
    found = list(storage.walk(str(tmp_path)))
    assert [entry.uri.removeprefix(f"{tmp_path}/") for entry in found] == ["a c", "b", "sub/broken", "sub/d"]
    assert found[2] == Entry(f"{tmp_path}/sub/broken", None, None)
    assert [storage.info(entry.uri) for entry in found if entry.size] == [entry for entry in found if entry.size]
    assert len(list(storage.walk(str(tmp_path), hidden=True))) == 6
    before = storage.info(str(tmp_path / "b"))
    os.utime(tmp_path / "b", ns=(1, 1))
    assert storage.info(str(tmp_path / "b")).version != before.version


@pytest.mark.parametrize(
    ("uri", "remote"), [("s3://b/k", True), ("gs://b/k", True), ("abfs://c/k", True), ("az://c", True)]
    + [("https://h/k", False), ("/s3://b", False), ("s3", False), ("s3:/b", False)],
)  # fmt: skip
def test_which_uris_are_remote(uri: str, remote: bool) -> None:
    assert is_remote(uri) == remote


def test_readers_see_a_whole_file_or_none(tmp_path: Path) -> None:
    """A file that is replaced is never missing or truncated for a reader."""
    path, storage, stop = str(tmp_path / "f"), Storage(), threading.Event()
    storage.write(path, b"x" * 100_000)
    seen = set()

    def look() -> None:
        while not stop.is_set():
            seen.add(len(storage.read(path)))

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(50):
        storage.write(path, b"y" * 100_000)
    stop.set()
    thread.join()
    assert seen == {100_000}
