"""Models that lie in object storage."""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardsight.models import selection
from shardsight.models.info import ModelError, sha256_of
from shardsight.models.paligemma import info as paligemma
from shardsight.models.staging import stage
from shardsight.models.yolo.model import Yolo
from shardsight.settings import Settings
from shardsight.storage import Entry, Storage
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


def test_a_copy_that_another_job_left_is_refused(s3: S3, here: Path) -> None:
    """A job began with best.pt; another is uploaded, and a second job leaves a copy of that on a node. An actor of the
    first that is restarted there would mix two models in one output."""
    s3.bucket("staged")
    uri, given, files = "s3://staged/best.pt", options(s3), {}
    for task in ("detect", "pose"):
        Storage(given).write(uri, (WEIGHTS / f"{task}.pt").read_bytes())
        files[task] = {"best.pt": sha256_of(WEIGHTS / f"{task}.pt")}
        assert Yolo(uri, storage=given, files=files[task]).task == task
    with pytest.raises(ModelError, match=rf"^{uri} is not the file that the job began with: its SHA-256 is another"):
        Yolo(uri, storage=given, files=files["detect"])


def test_a_folder_that_lost_or_gained_a_file_is_refused(s3: S3, here: Path) -> None:
    """vae-oid.npz decides whether answers have masks."""
    shutil.copytree(WEIGHTS / "paligemma", s3.bucket("staged") / "masks")
    uri, storage = "s3://staged/masks", Storage(options(s3))
    masks, refused = f"{uri}/vae-oid.npz", r"vae-oid\.npz is not the file that the job began with"
    before = paligemma.inspect(uri, storage=storage).files
    storage.remove(masks)
    after = paligemma.inspect(uri, storage=storage).files
    with pytest.raises(ModelError, match=refused):
        paligemma.inspect(uri, storage=storage, files=before)
    storage.write(masks, (WEIGHTS / "paligemma" / "vae-oid.npz").read_bytes())
    with pytest.raises(ModelError, match=refused):
        paligemma.inspect(uri, storage=storage, files=after)


@pytest.mark.parametrize("folder", [False, True])
def test_local_weights_that_were_retrained_in_place_are_refused(folder: bool, tmp_path: Path) -> None:
    """Given as a file, or as the folder that holds one."""
    file = tmp_path / "best.pt"
    shutil.copy(WEIGHTS / "detect.pt", file)
    settings = Settings(inputs=["-"], output=str(tmp_path / "out"), yolo=str(tmp_path if folder else file))
    (given,) = selection.arguments(selection.inspect(settings), settings).values()
    assert Yolo(**given).names
    shutil.copy(WEIGHTS / "pose.pt", file)
    with pytest.raises(ModelError, match=rf"^{file} is not the file that the job began with: its SHA-256 is another"):
        Yolo(**given)


@pytest.mark.parametrize(
    ("name", "beside"), [("a.onnx", "a.onnx.data"), ("a.onnx", "a.onnx_data"), ("a.pb", "metadata.yaml")]
)
def test_files_that_belong_to_an_export_come_with_it(name: str, beside: str, s3: S3, here: Path) -> None:
    """Without them it cannot be loaded."""
    folder = s3.bucket("staged") / beside
    folder.mkdir()
    for file in (name, beside, "b.onnx", "b.onnx.data"):
        (folder / file).write_text(file)
    uri, storage = f"s3://staged/{beside}/{name}", Storage(options(s3))
    copy = stage(uri, storage)
    files = {file: sha256_of(folder / file) for file in (name, beside)}
    assert {file.name: sha256_of(file) for file in copy.parent.iterdir() if file.suffix != ".sha256"} == files
    with pytest.raises(ModelError, match=rf"{beside} is not the file that the job began with"):
        stage(uri, storage, files | {beside: files[name]})


def test_keys_that_may_not_list_suffice_for_an_export(s3: S3, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For them S3 forbids a name that does not exist."""
    (s3.bucket("staged") / "alone.onnx").write_text("graph")
    info = Storage.info

    def forbidden(storage: Storage, uri: str) -> Entry:
        try:
            return info(storage, uri)
        except FileNotFoundError:
            raise PermissionError("Forbidden") from None

    monkeypatch.setattr(Storage, "info", forbidden)
    assert stage("s3://staged/alone.onnx", Storage(options(s3))).read_text() == "graph"
