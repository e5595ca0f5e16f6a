"""Results → one HTML page that opens from a disk: `python -m jobs.show OUT`."""

import argparse
import base64
import html
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import supervision as sv
from pycocotools import mask as rle

from shardsight.decode.pictures import decode
from shardsight.results.writer import Results
from shardsight.row import Failure
from shardsight.sources import Unit, read
from shardsight.storage import Storage

SIDE = 480  # pixels of a picture on the page, at the most
MOST_ERRORS = 200  # listed one by one

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1.5rem; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
p { margin: 0 0 1rem; overflow-wrap: anywhere; opacity: .75; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.25rem 0; }
.numbers div { display: flex; flex-direction: column-reverse; }
.numbers dt { opacity: .7; font-size: .85rem; } .numbers dd { margin: 0; font-size: 1.5rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.25rem; }
figure { margin: 0; } img { width: 100%; border-radius: 6px; display: block; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; margin-top: .35rem; }
figcaption span { opacity: .7; display: block; }
figcaption dl { margin: .35rem 0 0; } figcaption dt { opacity: .7; } figcaption dd { margin: 0 0 .25rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } td.count { text-align: right; width: 5rem; }
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.show", description=__doc__)
    parser.add_argument("out", help="what a job wrote: the folder with job.json and results/")
    parser.add_argument("--page", type=Path, help="where to write it; OUT/page.html by default")
    parser.add_argument("--count", type=int, default=24, help="pictures on the page; 24 by default")
    args = parser.parse_args(arguments)
    out = Path(args.out).absolute()
    storage = Storage()
    job = Results(str(out), storage).job()
    if job is None or "inputs" not in job:
        print(f"shardsight: {out} holds no finished job: give the --output of one", file=sys.stderr)
        return 2
    target = args.page or out / "page.html"
    target.write_text(page(out, job, storage, args.count), encoding="utf-8")
    print(target)
    return 0


def page(out: Path, job: dict[str, Any], storage: Storage, count: int) -> str:
    rows = ds.dataset(out / "results", format="parquet")
    bad = (
        rows.to_table(columns=["id", "error"], filter=pc.is_valid(pc.field("error"))).slice(0, MOST_ERRORS).to_pylist()
    )
    # Spread over all there is: units in their order, then loose files.
    chosen = np.unique(np.linspace(0, rows.count_rows() - 1, count).astype(int))
    good = [row for row in rows.take(chosen).to_pylist() if not row["error"]]
    labels = _labels(rows)
    numbers = {
        "inputs": f"{job['inputs']:,}",
        "rows": f"{job['rows']:,}",
        "errors": f"{sum(n for types in job['errors'].values() for n in types.values()):,}",
        "rows per second": f"{job['rows_per_second']:,.1f}",
        "each input exactly once": "yes" if job["exactly_once"] else "no",
    }
    models = html.escape(" · ".join(model["path"] for model in job["models"].values()))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Shardsight: {html.escape(out.name)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(out.name)}</h1><p>{models}, {job['started']}</p>",
        "<dl class=numbers>" + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in numbers.items()) + "</dl>",
        "<h2>What was found</h2>" + _table(("label", "count"), [(label, f"{n:,}") for label, n in labels]),
        "<h2>Pictures</h2><div class=pictures>" + "".join(_figure(row, storage) for row in good) + "</div>",
    ]
    if bad:
        entries = [(row["error"]["stage"], row["error"]["type"], row["id"], row["error"]["message"]) for row in bad]
        parts.append("<h2>Errors</h2>" + _table(("stage", "type", "input", "message"), entries))
    return "\n".join(parts) + "\n</html>\n"


def _labels(rows: ds.Dataset) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for batch in rows.to_batches(columns=["detections", "classes", "answers"]):
        answered = pc.struct_field(pc.list_flatten(batch["answers"]), "detections")
        for detections in (batch["detections"], answered):
            found.update(pc.struct_field(pc.list_flatten(detections), "label").to_pylist())
        found.update(classes[0]["label"] for classes in batch["classes"].to_pylist() if classes)
    return found.most_common()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=table><table><tr>{cells}</tr>{body}</table></div>"


def _figure(row: dict[str, Any], storage: Storage) -> str:
    name = html.escape(row["id"].rpartition("/")[2])
    try:
        picture = _draw(row, _bytes(row, storage))
    except (Failure, OSError) as error:
        return f"<figure><figcaption>{name}<span>{html.escape(f'cannot be read: {error}')}</span></figcaption></figure>"
    _, encoded = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    source = f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
    found = row["classes"][:1] if row["classes"] else row["detections"] or []
    counts = Counter(one["label"] for one in found)
    words = html.escape(
        ", ".join(f"{n} {label}" for label, n in counts.items()) or ("" if row["answers"] else "nothing")
    )
    said = [(answer["prompt"], answer["text"]) for answer in row["answers"] or []]
    said += [(f"{one['label']} {number}", one["text"]) for number, one in enumerate(found, 1) if one.get("text")]
    answers = "".join(f"<dt>{html.escape(asked)}</dt><dd>{html.escape(text) or '–'}</dd>" for asked, text in said)
    caption = f"<figcaption>{name}<span>{words}</span>{answers and f'<dl>{answers}</dl>'}</figcaption>"
    return f"<figure><img alt='{name}: {words}' src='{source}'>{caption}</figure>"


def _bytes(row: dict[str, Any], storage: Storage) -> bytes:
    """The encoded picture: kept in the row, or read again from where it came."""
    if row["image"] is not None:
        return bytes(row["image"])
    uri = row["uri"]
    kind = "tar" if uri.endswith(".tar") else "parquet" if uri.endswith(".parquet") else None
    if kind is None:
        return storage.read(uri)
    for record in read(Unit(kind, uri), storage):
        if record.id == row["id"] and record.data is not None:
            return record.data
    raise Failure("FileNotFoundError", f"{row['id']} is not there")


def _draw(row: dict[str, Any], data: bytes) -> np.ndarray:
    """RGB uint8, no larger than SIDE, with everything that was found drawn over it."""
    scale = min(1.0, SIDE / max(row["width"], row["height"]))
    size = max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale))
    frame = cv2.resize(decode(data, lambda *_: size)[0], size, interpolation=cv2.INTER_AREA)
    for found in (row["detections"], *(answer["detections"] for answer in row["answers"] or [])):
        frame = _annotate(frame, found, scale) if found else frame
    return frame


def _annotate(frame: np.ndarray, found: list[dict[str, Any]], scale: float) -> np.ndarray:
    """Detections of one model, drawn by supervision over an RGB uint8 frame of that scale."""
    size = frame.shape[1], frame.shape[0]
    masks = [
        cv2.resize(rle.decode({"size": [m["height"], m["width"]], "counts": m["counts"].encode()}), size)
        for m in (one["mask"] for one in found)
        if m
    ]
    corners = [np.reshape(one["corners"], (4, 2)) * scale for one in found if one["corners"]]
    detections = sv.Detections(
        xyxy=np.array([[one["x1"], one["y1"], one["x2"], one["y2"]] for one in found]) * scale,
        mask=np.array(masks, bool) if len(masks) == len(found) else None,
        confidence=np.array([one["score"] for one in found]),
        class_id=np.array([one["class_id"] or 0 for one in found]),
        data={"xyxyxyxy": np.array(corners)} if corners else {},
    )
    frame = frame[:, :, ::-1].copy()  # supervision draws on BGR
    if detections.mask is not None:
        frame = sv.MaskAnnotator(opacity=0.45).annotate(frame, detections)
    box = sv.OrientedBoxAnnotator(thickness=2) if corners else sv.BoxAnnotator(thickness=2)
    frame = box.annotate(frame, detections)
    keypoints = [[(p["x"] * scale, p["y"] * scale) for p in one["keypoints"]] for one in found if one["keypoints"]]
    if keypoints:
        frame = sv.VertexAnnotator(radius=3).annotate(frame, sv.KeyPoints(xy=np.array(keypoints, np.float32)))
    labels = [f"{one['label'] or ''} {one['score']:.2f}" for one in found]
    labeller = sv.LabelAnnotator(text_scale=0.35, text_padding=2, text_thickness=1)
    return np.ascontiguousarray(labeller.annotate(frame, detections, labels)[:, :, ::-1])


if __name__ == "__main__":
    sys.exit(main())
