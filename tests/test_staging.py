"""Models that lie in object storage."""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardsight.models.info import ModelError, sha256_of
from shardsight.models.staging import stage
from shardsight.models.yolo.model import Yolo
from shardsight.storage import Storage
from tests.conftest import S3, S3_KEY, S3_SECRET, WEIGHTS


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's folder of copies."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def options(s3: S3) -> dict[str, str]:
    return {"endpoint_url": s3.url, "key": S3_KEY, "secret": S3_SECRET}


def test_many_processes_start_at_once(s3: S3, here: Path) -> None:
    shutil.copytree(WEIGHTS / "paligemma", s3.bucket("staged") / "whole")
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda _: stage("s3://staged/whole/", Storage(options(s3))), range(8)))
    (copy,) = set(copies)
    names = {path.name: sha256_of(path) for path in (WEIGHTS / "paligemma").iterdir() if path.is_file()}
    assert {path.name: sha256_of(path) for path in copy.iterdir()} == names
    assert len(list(copy.parent.parent.iterdir())) == 1  # nothing half is left


@pytest.mark.parametrize("in_folder", [False, True])
def test_other_bytes_than_the_drivers_are_refused(s3: S3, here: Path, in_folder: bool) -> None:
    """Torn or replaced since; and the right ones are taken once they are there."""
    folder = s3.bucket("staged") / f"other{in_folder}"
    folder.mkdir()
    uri = f"s3://staged/other{in_folder}" + ("" if in_folder else "/detect.pt")
    right = (WEIGHTS / "detect.pt").read_bytes()
    (folder / "detect.pt").write_bytes(right[:-1000] + bytes(1000))
    given: dict[str, Any] = {"storage": options(s3), "files": {"detect.pt": sha256_of(WEIGHTS / "detect.pt")}}
    with pytest.raises(ModelError, match=r"detect\.pt is not the file that the job began with: its SHA-256 is another"):
        Yolo(uri, **given)
    (folder / "detect.pt").write_bytes(right)
    assert Yolo(uri, **given).task == "detect"
