"""Tars: every member is a record, an error or counted, whatever it is and wherever the archive ends."""

import gzip
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardsight.results.coverage import Ranges
from shardsight.sources import MAX_BYTES, Record, Unit, read
from shardsight.storage import Storage
from tests.conftest import write_tar

COMPRESS = {"tar": bytes, "tar.gz": gzip.compress, "tar.zst": zstandard.compress}


def records(path: Path, skip: Ranges | None = None) -> list[Record]:
    return list(read(Unit("tar", str(path), skip=skip or []), Storage()))


def member(
    name: str, data: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = type, link, len(data)
    return info, data


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@contextmanager
def stored(data: bytes, name: str = "a.tar") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        yield path


def failures(found: list[Record]) -> list[str | None]:
    return [record.failure and record.failure.type for record in found]


def test_samples_of_a_tar(tmp_path: Path) -> None:
    """WebDataset: neighbours of a key become metadata, in whatever order they come; two pictures are two records."""
    write_tar(
        tmp_path / "a.tar",
        [
            *[("a.cls", b"7"), ("a.jpg", b"A"), ("a.json", b'{"x": NaN, "y": [1]}')],
            *[("dir/b.txt", b"words"), ("dir/b.left.png", b"L"), ("dir/b.right.png", b"R")],
            *[("c.json", b"no json"), ("c.JPG", b"C"), ("lone.json", b"{}"), ("README", b"hi"), ("._a.jpg", b"mac")],
        ],
    )
    found = records(tmp_path / "a.tar")
    assert [(r.index, r.id.rpartition("#")[2], r.data) for r in found] == [
        *[(0, "a.jpg", b"A"), (1, "dir/b.left.png", b"L"), (2, "dir/b.right.png", b"R"), (3, "c.JPG", b"C")]
    ]
    assert [r.metadata and json.loads(r.metadata) for r in found] == [
        *[{"cls": 7, "json": {"x": None, "y": [1]}}, {"txt": "words"}, {"txt": "words"}, {"json": "no json"}]
    ]
    assert [r.last for r in found] == [False, False, False, True]


@given(st.lists(st.sampled_from(["a.jpg", "a.jpg#2", "b.jpg", "a.png"]), max_size=8))
@settings(max_examples=60)
def test_names_that_repeat_stay_apart(names: list[str]) -> None:
    """Ids are unique even where a member's name looks like our mark for a second one; and stable when some are done."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write_tar(path, [(name if name.endswith("g") else f"{name}.jpg", b"x") for name in names])
        found = records(path)
        ids = [record.id for record in found]
        assert len(set(ids)) == len(ids) == max(1, len(names))
        assert [record.id for record in records(path, skip=[(0, len(names) // 2)])] == ids[len(names) // 2 :]


@given(st.integers(0, 20_000))
@example(11264)  # where the last member ends: more could have followed
@example(11265)  # and a zero, which begins no header
@settings(max_examples=80)
def test_a_tar_cut_anywhere(cut: int) -> None:
    """All whole members come out, and the cut is said exactly once, unless only padding is gone."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        members = [(f"{index}.jpg", bytes([4 - index]) * (100 + 700 * index)) for index in range(5)]
        write_tar(path, members)
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        found = records(path)
        good = [record.data for record in found if record.data is not None]
        end, fit = 0, 0
        for _, data in members:
            end += 512 + len(data)
            fit += end <= cut
            end = -(-end // 512) * 512
        assert good == [data for _, data in members][:fit]
        failures = [record for record in found if record.failure]
        complete = cut > end
        assert len(failures) == (0 if complete else 1), (cut, end, found)
        assert found[-1].last and [record.last for record in found].count(True) == 1
        assert len({record.id for record in found}) == len(found)


def test_damage_in_the_middle_of_a_tar_is_said(tmp_path: Path) -> None:
    """tarfile ends quietly at a damaged header, and every member after it would be lost unseen."""
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{index}.jpg", b"x" * 600) for index in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1536 : 2 * 1536 + 100] = b"\xff" * 100
    path.write_bytes(data)
    found = records(path)
    assert [record.failure and record.failure.type for record in found] == [None, None, "TruncatedTar"]


def test_long_and_foreign_names(tmp_path: Path) -> None:
    """200 characters, and bytes that are no UTF-8, as old archives hold them."""
    long = "d" * 120 + "/" + "n" * 200 + ".jpg"
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format, encoding="latin-1") as tar:
            for name in (long, "b\xe9.jpg"):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        found = records(tmp_path / "a.tar")
        assert found[0].id.endswith(long) and found[1].id.endswith("jpg")
        for record in found:
            record.id.encode()


@dataclass
class Entry:
    """A member as the model of unpacking below knows it."""

    name: str
    data: bytes
    type: bytes
    link: str


names = st.sampled_from(["a.jpg", "b.JPG", "b.left.png", "./c.webp", "two\nlines.jpg", "a.json", "c.txt", "x.npy", "y"])
types = st.sampled_from([tarfile.REGTYPE] * 4 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
entries = st.lists(
    st.tuples(names, types, st.sampled_from(["a.jpg", "b.JPG", "c.webp", "gone.jpg", "/etc/x.jpg"])), max_size=9
)


def modelled(drawn: list[tuple[str, bytes, str]]) -> list[Entry]:
    """Regular members with a content of their own each; of neighbours no links, so that each counts once."""
    made = []
    for index, (name, type, link) in enumerate(drawn):
        linked = type in (tarfile.LNKTYPE, tarfile.SYMTYPE)
        type = tarfile.REGTYPE if linked and name.endswith(("json", "txt")) else type
        made.append(Entry(name, f"content {index}".encode() if type == tarfile.REGTYPE else b"", type, link))
    return made


def meaning(entries: list[Entry], index: int, depth: int = 0) -> bytes | None:
    """What unpacking leaves at a member, None where a link is broken."""
    entry = entries[index]
    if entry.type == tarfile.REGTYPE:
        return entry.data
    if depth > 40:
        return None
    files = [i for i, e in enumerate(entries) if e.name.removeprefix("./") == entry.link and e.type != tarfile.DIRTYPE]
    if entry.type == tarfile.LNKTYPE:
        files = [i for i in files if i < index][-1:] or [i for i in files if i > index][:1]
    if not files or entries[files[-1]].type == tarfile.FIFOTYPE:
        return None
    return meaning(entries, files[-1], depth + 1)


@given(
    entries,
    st.integers(0, 9),
    st.sampled_from(list(COMPRESS)),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
@example([("a.jpg", b"0", "a.jpg"), ("a.jpg", b"5", "a.jpg"), ("a.jpg", b"1", "a.jpg")], 0, "tar", tarfile.PAX_FORMAT)
@settings(max_examples=150)
def test_every_member_is_accounted_for(
    drawn: list[tuple[str, bytes, str]], joint: int, ending: str, format: int
) -> None:
    """Each is a record with the content that unpacking would leave, an error, joined to a picture, or counted by
    reason; of joined and compressed archives, too; and places stay the same when some of them are done."""
    members = modelled(drawn)
    made = [member(entry.name, entry.data, entry.type, entry.link) for entry in members]
    parts = [made[:joint], made[joint:]] if 0 < joint < len(made) else [made]
    with stored(COMPRESS[ending](b"".join(tar_of(part, format) for part in parts)), f"a.{ending}") as path:
        found = records(path)
        assert [record.index for record in found] == list(range(len(found)))
        assert len({record.id for record in found}) == len(found)
        assert [record.last for record in found] == [False] * (len(found) - 1) + [True]
        if failures(found) == ["NoImages"]:
            assert found[0].ignored == found[-1].ignored and sum(found[0].ignored.values()) == len(members)
            return
        pictures = [i for i, e in enumerate(members) if e.type not in (tarfile.DIRTYPE, tarfile.FIFOTYPE)]
        pictures = [i for i in pictures if members[i].name.lower().endswith(("jpg", "png", "webp"))]
        assert [record.data for record in found] == [meaning(members, i) for i in pictures]
        assert {f for f in failures(found) if f} <= {"BrokenLink", "NotAFile"}
        texts = {text for record in found for text in json.loads(record.metadata or "{}").values()}
        assert len(found) + len(texts) + sum(found[-1].ignored.values()) == len(members)
        for cut in range(len(found)):
            rest = records(path, skip=[(0, cut)] if cut else [])
            assert [(r.index, r.id, r.data, r.metadata, r.last) for r in rest] == [
                (r.index, r.id, r.data, r.metadata, r.last) for r in found[cut:]
            ]
            assert rest[-1].ignored == found[-1].ignored


@given(st.integers(0, 5000), st.sampled_from(["tar.gz", "tar.zst"]))
@settings(max_examples=60)
def test_a_compressed_tar_cut_anywhere(cut: int, ending: str) -> None:
    """What can be decompressed comes out, and the cut is said once, with the same places when some are done."""
    import random

    payload = [random.Random(index).randbytes(900) for index in range(5)]
    whole = COMPRESS[ending](tar_of([member(f"{index}.jpg", data) for index, data in enumerate(payload)]))
    with stored(whole[: min(cut, len(whole) - 1)], f"a.{ending}") as path:
        found = records(path)
        good = [record.data for record in found if not record.failure]
        assert good == payload[: len(good)]
        assert len(found) - len(good) == (cut < len(whole) - 1 or len(good) < 5) or len(good) == 5
        for done in range(len(found)):
            rest = records(path, skip=[(0, done)] if done else [])
            assert [(r.index, r.last) for r in rest] == [(r.index, r.last) for r in found[done:]]


@pytest.mark.parametrize("ending", COMPRESS)
def test_links_of_every_kind(ending: str, tmp_path: Path) -> None:
    """A data set without its duplicates keeps one of them and links: to what came before, to what comes later, through
    other links and through linked folders; a link that leads out of the archive or in a circle is an error."""
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    made = [
        *[member("./v1/a.jpg", b"A"), member("v1/hard.jpg", b"", hard, "./v1/a.jpg")],
        *[member("v1/soft.jpg", b"", soft, "a.jpg"), member("v1/later.jpg", b"", soft, "../z.jpg")],
        *[member("chain.jpg", b"", soft, "v1/later.jpg"), member("now", b"", soft, "v1")],
        *[member("through.jpg", b"", soft, "now/a.jpg"), member("out.jpg", b"", soft, "/data/a.jpg")],
        *[member("gone.jpg", b"", hard, "nothing.jpg"), member("x.jpg", b"", soft, "y.jpg")],
        *[member("y.jpg", b"", soft, "x.jpg"), member("self.jpg", b"", hard, "self.jpg")],
        *[
            member("w.json", b'"w"'),
            member("w.jpg", b"W"),
            member("z.jpg", b"Z"),
            member("z.json", b"", hard, "w.json"),
        ],
    ]
    (tmp_path / "a").write_bytes(COMPRESS[ending](tar_of(made)))
    found = {record.id.rpartition("#")[2]: record for record in records(tmp_path / "a")}
    linked = {
        name: found[name].data for name in ("v1/hard.jpg", "v1/soft.jpg", "v1/later.jpg", "chain.jpg", "through.jpg")
    }
    assert linked == {
        **{"v1/hard.jpg": b"A", "v1/soft.jpg": b"A", "v1/later.jpg": b"Z", "chain.jpg": b"Z", "through.jpg": b"A"}
    }
    broken = [name for name, record in found.items() if record.failure and record.failure.type == "BrokenLink"]
    assert broken == ["out.jpg", "gone.jpg", "x.jpg", "y.jpg", "self.jpg"]
    assert found["w.jpg"].metadata == found["z.jpg"].metadata == '{"json": "w"}'


def test_entries_that_are_no_pictures_are_counted(tmp_path: Path) -> None:
    """So that nobody believes that all was done where a caption was not joined or a video was not read."""
    made = [
        *[member("folder.jpg", type=tarfile.DIRTYPE), member("pipe.jpg", type=tarfile.FIFOTYPE), member("a.mp3", b"v")],
        *[member("lone.json", b"{}"), member(".hidden.jpg", b"x"), member("README", b"hi"), member("a.jpg", b"A")],
        *[
            member("b.json", b"", tarfile.SYMTYPE, "gone"),
            member("b.jpg", b"B"),
            member("1.txt", b"1"),
            member("2.txt"),
        ],
    ]
    (tmp_path / "a.tar").write_bytes(tar_of(made))
    found = records(tmp_path / "a.tar")
    assert [record.data for record in found] == [b"A", b"B"] and not found[0].ignored
    assert found[-1].ignored == {
        **{
            "folders": 1,
            "devices and pipes": 1,
            ".mp3 files": 1,
            ".json files without a picture": 1,
            "hidden files": 1,
        },
        **{"files without a known ending": 1, ".json files that cannot be read: BrokenLink": 1},
        ".txt files without a picture": 2,
    }


def test_what_follows_an_archive_is_read_or_said(tmp_path: Path) -> None:
    """`cat a.tar b.tar` is common, and tarfile stops after the first without a word."""
    one, two = tar_of([member("1.jpg", b"1")]), tar_of([member("2.jpg", b"2")])
    for joined in (one + two, one[:1536] + b"\0" * 512 + two, gzip.compress(one) + gzip.compress(two)):
        (tmp_path / "a.tar").write_bytes(joined)
        assert [record.data for record in records(tmp_path / "a.tar")] == [b"1", b"2"]
    (tmp_path / "a.tar").write_bytes(one + b"no tar at all")
    found = records(tmp_path / "a.tar")
    assert failures(found) == [None, "TruncatedTar"] and "10,240" in (
        (found[1].failure and found[1].failure.message) or ""
    )


def test_damage_after_a_link_costs_nothing_before_it(tmp_path: Path) -> None:
    """A checksum that is wrong at the end of a file of joined archives must not hide the later ones' members."""
    one = tar_of([member("a.jpg", b"A"), member("b.jpg", b"", tarfile.SYMTYPE, "a.jpg")])
    data = bytearray(gzip.compress(one + tar_of([member("c.jpg", b"C")])))
    data[-8] ^= 1
    (tmp_path / "a.tgz").write_bytes(data)
    found = records(tmp_path / "a.tgz")
    assert [record.data for record in found] == [b"A", b"A", b"C", None]
    assert failures(found) == [None, None, None, "TruncatedTar"]


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    import bz2

    for data, type, words in [
        (b"", "EmptyFile", "no bytes"),
        (b"words", "NotATar", "not a tar"),
        (bz2.compress(tar_of([])), "NotATar", "bzip2"),
        (b"\x1f\x8b\x08" + bytes(50), "NotATar", "not a tar"),
        (bytes(10240), "NoImages", "no picture"),
    ]:
        (tmp_path / "a.tar").write_bytes(data)
        (record,) = records(tmp_path / "a.tar")
        assert record.failure and record.failure.type == type and words in record.failure.message and record.last


def test_odd_neighbours_do_not_cost_their_picture(tmp_path: Path) -> None:
    """JSON nested by the thousand, numbers of 5,000 digits and a byte order mark stay text or are understood."""
    made = [
        ("a.json", b"[" * 100_000),
        ("a.cls", b"9" * 5000),
        ("a.jpg", b"A"),
        ("b.json", b"\xef\xbb\xbf[1]"),
        ("b.jpg", b"B"),
    ]
    write_tar(tmp_path / "a.tar", made)
    a, b = records(tmp_path / "a.tar")
    assert json.loads(a.metadata or "") == {"json": "[" * 100_000, "cls": "9" * 5000}
    assert (a.data, b.data, b.metadata) == (b"A", b"B", '{"json": [1]}')


def test_a_member_that_is_too_large_costs_itself_alone(tmp_path: Path) -> None:
    """Sparse archives claim terabytes; the members after such a one are read all the same."""
    path = tmp_path / "a.tar"
    large = tarfile.TarInfo("large.jpg")
    large.size = MAX_BYTES + 1
    end = 512 + -(-large.size // 512) * 512
    with path.open("wb") as file:
        file.write(large.tobuf())
        file.seek(end)
        file.write(tar_of([member("small.jpg", b"S")]))
    found = records(path)
    assert failures(found) == ["TooManyBytes", None] and found[1].data == b"S"
