"""The README's commands, as they stand."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import shardsight
from demo.scenes import COLOURS, KINDS, WORDS, scenes
from demo.writers import TASKS, write
from tests.conftest import BIN, ROOT, S3, S3_KEY, S3_SECRET, WEIGHTS, hear_interrupts, rows_of
from tests.small_paligemma import make

# As the demo's PaliGemma was trained to say it; random weights, or another prompt form, do not.
CAPTION = f"an? ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})( that says ({'|'.join(WORDS)}))?"
TEXT = (ROOT / "README.md").read_text()
COMMANDS = {
    section.partition("\n")[0]: re.findall(r"```(bash|python)\n(.*?)```", section, re.DOTALL)
    for section in re.split(r"^##? ", TEXT, flags=re.MULTILINE)
}
FIRST = "Shardsight"
# What takes minutes, and is shown in small by other tests too.
SLOW = ("Other tools' formats", "Exports", "Which model?", "Tune")
Type = Callable[[str], None]
pytestmark = pytest.mark.timeout(900)  # the first to run has `make demo` before it


@pytest.fixture(scope="module")
def type_in(one_ray: str, s3: S3, jpegs: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Type]:
    """Types a section's commands as a stranger would, `make demo` before all others. Only the bucket's names are
    another's, and PaliGemma, of which a small one of random weights has to do."""
    shutil.rmtree(ROOT / "demo-output", ignore_errors=True)  # of another version, perhaps
    small = make(tmp_path_factory.mktemp("models") / "small")
    (s3.bucket("bucket") / "shards").mkdir()
    (s3.bucket("bucket") / "shards" / "a.jpg").write_bytes(jpegs[0])
    replaced = {
        "http://127.0.0.1:9000": s3.url,
        "--yolo weights.pt": f"--yolo {WEIGHTS}/detect.pt",
        "google/paligemma2-3b-mix-448": f"{small} --max-tokens 8",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"RAY_ADDRESS": one_ray}  # one cluster for all of them, as starting one takes ten seconds
    environment |= {"AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    with ExitStack() as services:

        def run(section: str) -> None:
            for language, command in COMMANDS[section]:
                for words, others in replaced.items():
                    command = command.replace(words, others)
                if command == "make serve\n":
                    services.enter_context(_service(environment))
                    continue
                arguments = ["bash", "-ec", command] if language == "bash" else [BIN / "python", "-c", command]
                done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, (command, done.stdout, done.stderr)
                if "/v1/annotate" in command:
                    assert json.loads(done.stdout)["answers"]
            services.close()  # as the jobs after it need its cores

        run(FIRST)
        yield run


@contextmanager
def _service(environment: dict[str, str]) -> Iterator[None]:
    """`make serve`, once it answers."""
    own: dict[str, Any] = {"start_new_session": True, "preexec_fn": hear_interrupts}
    service = subprocess.Popen(["make", "serve"], cwd=ROOT, env=environment, **own)
    try:
        for _ in range(1500):
            assert service.poll() is None
            with suppress(OSError):
                if b"ok" in urllib.request.urlopen("http://127.0.0.1:8000/healthz", timeout=5).read():
                    break
            time.sleep(0.2)
        else:
            raise AssertionError("the service did not start within five minutes")
        yield
    finally:
        os.killpg(service.pid, signal.SIGINT)
        service.wait(60)


def test_the_demo(type_in: Type) -> None:
    assert (ROOT / "demo-output" / "page.html").stat().st_size > 100_000
    assert (ROOT / "demo-output" / "mine" / "page.html").exists()
    captions = [row["answers"][0]["text"] for row in rows_of(ROOT / "demo-output" / "annotated") if row["answers"]]
    in_form = [text for text in captions if re.fullmatch(CAPTION, text)]
    assert len(captions) > 120 and len(in_form) > 110


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(section, marks=[pytest.mark.slow] if section in SLOW else [])
        for section, commands in COMMANDS.items()
        if commands and section != FIRST
    ],
)
def test_commands(section: str, type_in: Type) -> None:
    type_in(section)


MODELS = re.findall(rf"^\| ({'|'.join(TASKS)}) \| [^|]+ \| ([0-9.]+) \| ([0-9.]+) \|$", TEXT, re.MULTILINE)


def test_the_models_are_all_there() -> None:
    assert {task for task, _, _ in MODELS} == set(TASKS)
    for task, _, size in MODELS:
        assert float(size) == round((WEIGHTS / f"{task}.pt").stat().st_size / 1e6, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "figure"), [(task, figure) for task, figure, _ in MODELS])
def test_the_models_figures_are_those_measured(task: str, figure: str, one_ray: str, tmp_path: Path) -> None:
    """Weights that are trained anew, or a table that is not, would leave a figure that nobody measured."""
    data = tmp_path / "in"
    write(scenes(500, 2000), data, "yolo", task)
    exact: dict[str, Any] = {"precision": "fp32", "scaled_decode": False, "rounds": 0}
    report = shardsight.evaluate(
        data if task == "classify" else data / "data.yaml",
        output=tmp_path / "out",
        yolo=WEIGHTS / f"{task}.pt",
        **exact,
    )
    kind, name = report.content["main"]["kind"], report.content["main"]["measure"]
    value = report.models[0]["figures"][kind]["measures"][name]["value"]
    print(f"{task}: {name} of {kind} {value:.4f}")
    assert abs(value - float(figure)) < 0.002


def test_the_benchmarks_table_is_the_one_that_was_recorded() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    card = results.partition("\n## Pictures, AVX512-BF16, 2 cores\n")[2].partition("\n## ")[0].strip()
    assert card.startswith("| |") and card in (ROOT / "README.md").read_text()


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
