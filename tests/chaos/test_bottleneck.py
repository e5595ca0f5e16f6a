"""Jobs that are slow for a reason name that reason."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.scenes import scenes
from demo.writers import write
from tests.chaos.proxy import proxy
from tests.conftest import S3, WEIGHTS, job_of, start_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SMALL = ("--yolo", WEIGHTS / "detect.pt", "--imgsz", "96")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "in"
    write(scenes(200, 5), folder, "folder")
    return folder


def large(folder: Path, count: int, width: int, height: int) -> Path:
    """Pictures of noise, which take long to decode."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(file.getvalue())
    return folder


def bottleneck(out: Path, *arguments: Any) -> tuple[str, str]:
    job = start_job(*arguments, "--output", out)
    said = job.communicate()[1]
    assert job.returncode == 0, said
    content = job_of(out)
    print(content["bottleneck"], content["advice"], content["stages"])
    advice = " ".join(content["advice"].split())
    assert advice in " ".join(said.split())
    return content["bottleneck"], advice


def test_slow_storage(s3: S3, pictures: Path, tmp_path: Path) -> None:
    for path in sorted(pictures.rglob("*.jpg")):
        (s3.bucket("slow") / path.name).write_bytes(path.read_bytes())
    with proxy(s3.url, delays={"GET": 1.0}) as slow:
        stage, advice = bottleneck(tmp_path / "out", "s3://slow", *SMALL, *s3.options(url=slow.url))
    assert stage == "read" and "nearer to its storage" in advice


def test_slow_decoding(tmp_path: Path) -> None:
    folder = large(tmp_path / "in", 100, 4000, 3000)
    stage, advice = bottleneck(tmp_path / "out", folder, *SMALL, "--no-scaled-decode")
    assert stage == "decode" and "add CPU nodes" in advice


def test_slow_yolo(pictures: Path, tmp_path: Path) -> None:
    stage, advice = bottleneck(tmp_path / "out", pictures, "--yolo", WEIGHTS / "detect.pt", "--imgsz", "1280")
    assert stage == "yolo" and "reading and decoding" in advice


def test_slow_paligemma(pictures: Path, tmp_path: Path) -> None:
    prompts = ("--prompt", "caption en", "--prompt", "ocr", "--prompt", "detect ring ; star ; cross")
    stage, _ = bottleneck(tmp_path / "out", pictures, *SMALL, "--paligemma", WEIGHTS / "paligemma", *prompts)
    assert stage == "paligemma"


def test_slow_writing(s3: S3, pictures: Path, tmp_path: Path) -> None:
    s3.bucket("results")
    with proxy(s3.url, delays={"PUT": 2.0}) as slow:
        out = "s3://results/out"
        job = start_job(pictures, "--output", out, *SMALL, "--rows-per-file", "4", *s3.options(url=slow.url))
        said = job.communicate()[1]
    assert job.returncode == 0, said
    assert "writing: the flow waited for it" in said and "--rows-per-file" in said
