"""The README's commands, as they stand."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from demo.scenes import COLOURS, KINDS, WORDS
from demo.writers import TASKS
from tests.conftest import BIN, ROOT, S3, S3_KEY, S3_SECRET, WEIGHTS, rows_of
from tests.small_paligemma import make

# As the demo's PaliGemma was trained to say it; random weights, or another prompt form, do not.
CAPTION = f"an? ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})( that says ({'|'.join(WORDS)}))?"
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.timeout(900)
def test_commands_in_their_order(tmp_path: Path, one_ray: str, s3: S3, jpegs: list[bytes]) -> None:
    """A stranger types what the README says, top to bottom. Only the bucket's names are another's, and PaliGemma, of
    which a small one of random weights has to do."""
    shutil.rmtree(ROOT / "demo-output", ignore_errors=True)  # of another version, perhaps
    small = make(tmp_path / "small")
    bucket = s3.bucket("bucket")
    (bucket / "shards").mkdir()
    (bucket / "shards" / "a.jpg").write_bytes(jpegs[0])
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    plain |= {"RAY_ADDRESS": one_ray}  # one cluster for all of them, as starting one takes ten seconds
    plain["PATH"] = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{plain['PATH']}"
    keys = {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET}
    assert BLOCKS
    for language, block in BLOCKS:
        command = block.replace("http://127.0.0.1:9000", s3.url).replace(
            "--yolo weights.pt", f"--yolo {WEIGHTS}/detect.pt"
        )
        command = command.replace("google/paligemma2-3b-mix-448", f"{small} --max-tokens 8")
        environment = plain | (keys if "s3://" in block else {})
        if command == "make serve\n":
            service = _serve(environment)
            continue
        run = ["bash", "-ec", command] if language == "bash" else [BIN / "python", "-c", command]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        assert "make demo" not in block or "PaliGemma's answers against the truth" in done.stdout
        if "/v1/annotate" in block:
            assert json.loads(done.stdout)["answers"]
            os.killpg(service.pid, signal.SIGINT)
            assert service.wait(60) is not None  # the jobs after it need its cores
    assert (ROOT / "demo-output" / "page.html").stat().st_size > 100_000
    assert (ROOT / "demo-output" / "mine" / "page.html").exists()
    assert list((bucket / "out" / "results").glob("*.parquet"))
    captions = [row["answers"][0]["text"] for row in rows_of(ROOT / "demo-output" / "annotated") if row["answers"]]
    in_form = [text for text in captions if re.fullmatch(CAPTION, text)]
    assert len(captions) > 120 and len(in_form) > 110


def _serve(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The service, once it answers."""
    service = subprocess.Popen(["make", "serve"], cwd=ROOT, env=environment, start_new_session=True)
    for _ in range(600):
        assert service.poll() is None
        with contextlib.suppress(OSError):
            if b"ok" in urllib.request.urlopen("http://127.0.0.1:8000/healthz", timeout=5).read():
                return service
        time.sleep(0.2)
    raise AssertionError("the service did not start within two minutes")


def test_the_models_figures_are_those_measured() -> None:
    """Weights that are trained anew, or a table that is not, would leave a figure that nobody measured."""
    figures = json.loads((WEIGHTS / "figures.json").read_text())
    table = re.findall(r"^\| (\w+) \|.*\| ([0-9.]+) \| ([0-9.]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {task for task, _, _ in table} == set(TASKS)
    for task, figure, size in table:
        assert float(figure) in {round(value, 3) for value in figures[task].values()}
        assert float(size) == round((WEIGHTS / f"{task}.pt").stat().st_size / 1e6, 1)


def test_the_benchmarks_table_is_the_one_that_was_recorded() -> None:
    assert (ROOT / "benchmarks" / "throughput.md").read_text().strip() in (ROOT / "README.md").read_text()


def test_the_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    """`jobs` and `tests` would collide with other packages of these names, and nobody installs the demo's models."""
    import sys
    import zipfile

    subprocess.run(
        [ROOT / ".venv" / "bin" / "uv", "build", "--quiet", "--wheel", "--out-dir", tmp_path, ROOT],
        check=True,
        env={**os.environ, "UV_PYTHON": sys.executable},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"shardsight"}
    assert wheel.stat().st_size < 1 << 20


def test_nothing_of_this_machine_is_committed() -> None:
    """No address of a package index in the lock, no file over 10 MB."""
    assert not re.search(r"https?://|file://|--(extra-)?index", (ROOT / "requirements.lock").read_text())
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.rstrip("\0").split("\0"):
        path = ROOT / name
        assert not path.exists() or path.stat().st_size < 10 << 20, name


def test_paligemmas_figures_are_those_measured() -> None:
    figures = json.loads((WEIGHTS / "paligemma" / "figures.json").read_text())
    table = re.findall(r"^\| [^|]+ \| ([0-9.]+) \| [0-9.]+ \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = ("caption", "vqa", "ocr", "mAP50", "mask IoU")
    assert [float(figure) for figure in table] == [round(figures[name], 2) for name in names]
