"""The whole flow on made-up scenes and two photographs: `make demo`, or `python -m demo.run OUT`.

Writes shards with a handful of broken files among them, annotates them with both models in one pass, and follows shapes
through clips. Prints the accuracy against the truth, and leaves pages to look at.
"""

import importlib.util
import io
import shlex
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from demo.clips import write_clips
from demo.questions import DETECT_ALL
from demo.scenes import Scene, scenes
from demo.score import answer_figures, average_precision, tracks_of
from demo.writers import jpeg, write
from shardsight.cli import annotate, show
from shardsight.measures.tracks import read_mot, scores

SEED = 7
CLIPS = 2
EACH = 40  # scenes in the tars, in Parquet and in the folder
PROMPTS = [
    *("caption en", "ocr", "answer en how many shapes are there", "answer en what shape is red"),
    *(DETECT_ALL, "segment star"),
]
WEIGHTS = Path(__file__).parent / "weights"


def main(arguments: list[str] | None = None) -> int:
    out = Path((sys.argv[1:] if arguments is None else arguments)[0]).absolute()
    shards, results = out / "shards", out / "annotated"
    shutil.rmtree(shards, ignore_errors=True)
    made = list(scenes(3 * EACH, SEED))
    for number, format in enumerate(("tar", "parquet", "folder")):
        write(made[number * EACH : (number + 1) * EACH], shards / format, format)
    _break_some(shards, made[0])
    command = [str(shards), *map(str, photographs()), "--output", str(results), "--yolo", str(WEIGHTS / "detect.pt")]
    command += ["--paligemma", str(WEIGHTS / "paligemma"), *(part for one in PROMPTS for part in ("--prompt", one))]
    print(f"python -m jobs.annotate {shlex.join(command)}", flush=True)
    code = annotate([*command, "--overwrite"])
    if code:
        return code
    rows = _rows(results, made)
    for model, figures in {
        "YOLO's boxes": average_precision(made, {name: row["detections"] or [] for name, row in rows.items()}),
        "PaliGemma's answers": answer_figures(made, {name: row["answers"] or [] for name, row in rows.items()}),
    }.items():
        said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{model} against the truth of {len(made)} scenes: {said}")
    return show([str(results), "--page", str(out / "page.html")]) or _track(out)


def _track(out: Path) -> int:
    """Annotate made-up clips, tracked. Returns the exit code."""
    clips, results = out / "clips", out / "tracked"
    shutil.rmtree(clips, ignore_errors=True)
    write_clips(CLIPS, SEED, clips)
    command = [str(clips), "--output", str(results), "--yolo", str(WEIGHTS / "detect.pt"), "--track", "botsort"]
    print(f"python -m jobs.annotate {shlex.join(command)}", flush=True)
    if code := annotate([*command, "--overwrite"]):
        return code
    found = tracks_of(results / "results")
    truth = {name: read_mot(clips / name / "gt" / "gt.txt", len(video)) for name, video in found.items()}
    said = ", ".join(f"{name} {value:.3g}" for name, value in scores(truth, found).items())
    print(f"Tracks against the truth of {CLIPS} clips: {said}")
    return show([str(results), "--page", str(out / "tracks.html")])


def photographs() -> list[Path]:
    """The two that ship inside ultralytics."""
    package = importlib.util.find_spec("ultralytics")
    assert package and package.origin
    return [Path(package.origin).parent / "assets" / name for name in ("bus.jpg", "zidane.jpg")]


def _break_some(shards: Path, scene: Scene) -> None:
    whole = jpeg(scene)
    (shards / "folder" / "images" / "empty.jpg").touch()
    (shards / "folder" / "images" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (shards / "folder" / "images" / "text.jpg").write_text("no picture")
    with tarfile.open(shards / "tar" / "cut.tar", "w") as tar:
        for name in ("whole.jpg", "lost.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(whole)
            tar.addfile(member, io.BytesIO(whole))
    data = (shards / "tar" / "cut.tar").read_bytes()
    (shards / "tar" / "cut.tar").write_bytes(data[: len(whole) * 3 // 2])


def _rows(results: Path, made: list[Scene]) -> dict[str, dict[str, Any]]:
    """Rows by scene; one from Parquet is known by its position there, the others by their file."""
    rows = ds.dataset(results / "results", format="parquet").to_table(columns=["id", "detections", "answers"])
    found: dict[str, dict[str, Any]] = {scene.name: {"detections": [], "answers": []} for scene in made}
    for row in rows.to_pylist():
        stem = row["id"].rpartition("/")[2].rpartition("#")[2].removesuffix(".jpg")
        if ".parquet#" in row["id"]:
            stem = made[EACH + int(stem)].name
        if stem in found:
            found[stem] = row
    return found


if __name__ == "__main__":
    sys.exit(main())
