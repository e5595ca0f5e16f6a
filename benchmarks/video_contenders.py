"""The same work on videos by each contender: `python -m benchmarks.video_contenders TASK NAME FOLDER OUT WEIGHTS`.

`detect`: every frame of a folder's MP4s → YOLO → Parquet with label, score and box of each detection. `crops`: the
pipeline that Daft and Ray have published as their video benchmark: every frame, stretched to 640×640 → YOLO → Parquet
with each detection's label, confidence, box and pixels as a PNG. Their scripts write the position of a detection in
place of its class, and Daft's takes a box's second corner for its width and height; here both are right. Ray Data
decodes with PyAV, as Daft does: `read_videos` needs decord, whose last release is of 2021. `decode`, `decode_full`: the
frames alone in RGB, at the size that YOLO needs and at their own, on one thread, by ours and by FFmpeg's command.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contenders
from benchmarks.contenders import BATCH, noted
from benchmarks.measuring import done

SIDE = 640
IMGSZ = 640
HEIGHT, WIDTH = 720, 1280  # of the clips
SMALL = 640  # the width at which YOLO needs them


def shardsight(folder: str, out: str, weights: str) -> None:
    """Our job, with its defaults."""
    contenders.shardsight(folder, out, weights, IMGSZ)


def shardsight_exact(folder: str, out: str, weights: str) -> None:
    """Our job at the peers' precision, with every frame decoded in full."""
    contenders.shardsight_exact(folder, out, weights, IMGSZ)


def ultralytics(folder: str, out: str, weights: str) -> None:
    """`predict(stream=True)` over the folder, on every core."""
    contenders.ultralytics_all(folder, out, weights, IMGSZ)


def ray_data(folder: str, out: str, weights: str) -> None:
    """Paths → a row a frame → a class in an actor pool → write_parquet."""

    class Detect:
        def __init__(self) -> None:
            from ultralytics import YOLO

            self.model = YOLO(weights)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            images = [image[..., ::-1] for image in batch.pop("frame")]  # ultralytics takes BGR
            results = self.model.predict(images, imgsz=IMGSZ, verbose=False)
            return batch | {"detections": noted(results)}

    _in_actor(_ray_frames(folder, WIDTH, HEIGHT), Detect).write_parquet(out)


def daft(folder: str, out: str, weights: str) -> None:
    """read_video_frames → a class as UDF → write_parquet."""
    import daft
    from daft import DataType, col

    kind = {"label": DataType.string(), "score": DataType.float64()}
    kind |= {side: DataType.float64() for side in ("x1", "y1", "x2", "y2")}

    @daft.udf(return_dtype=DataType.list(DataType.struct(kind)), batch_size=BATCH)
    class Detect:
        def __init__(self) -> None:
            from ultralytics import YOLO

            self.model = YOLO(weights)

        def __call__(self, images: Any) -> list[Any]:
            results = self.model.predict([image[..., ::-1] for image in images.to_pylist()], imgsz=IMGSZ, verbose=False)
            return noted(results)

    frame = _daft_frames(folder, WIDTH, HEIGHT)
    frame.select("path", "frame_index", Detect(col("data")).alias("detections")).write_parquet(out)


def decoding(folder: str, out: str, weights: str) -> None:
    """PyAV alone, every frame to RGB: what no contender on one thread can pass."""
    for _ in _frames(folder, WIDTH, HEIGHT):
        done(1)


def shardsight_decode(folder: str, out: str, weights: str, needed: tuple[int, int] | None = (SMALL, 0)) -> None:
    """What a process of our job does for each video."""
    from shardsight.decode.video import Sampling, read

    for path in sorted(Path(folder).glob("*.mp4")):
        with path.open("rb") as file:
            done(sum(1 for _ in read(file, Sampling(), needed and (lambda width, height: needed))))


def shardsight_decode_full(folder: str, out: str, weights: str) -> None:
    shardsight_decode(folder, out, weights, None)


def ffmpeg_decode(folder: str, out: str, weights: str, scale: str = f"scale={SMALL}:-1:flags=area,") -> None:
    """FFmpeg's frames are counted, and dropped."""
    for path in sorted(Path(folder).glob("*.mp4")):
        command = ["ffmpeg", "-nostdin", "-threads", "1", "-filter_threads", "1", "-i", str(path)]
        command += ["-vf", f"{scale}format=rgb24", "-f", "null", "-"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        done(int(re.findall(r"frame= *(\d+)", said)[-1]))


def ffmpeg_decode_full(folder: str, out: str, weights: str) -> None:
    ffmpeg_decode(folder, out, weights, "")


def shardsight_crops(folder: str, out: str, weights: str, precision: str = "auto") -> None:
    """Our frames and our YOLO in a Ray Data pipeline of one's own."""
    import ray
    from ray.data import ActorPoolStrategy

    import shardsight

    ray.init("local")
    frames = shardsight.read(folder).map_batches(squash, batch_size=None, batch_format="pyarrow")
    found = frames.map_batches(
        shardsight.Yolo,
        fn_constructor_args=(weights,),
        fn_constructor_kwargs={"precision": precision, "imgsz": IMGSZ},
        compute=ActorPoolStrategy(size=1),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
    )
    found.map_batches(crops, batch_size=None, batch_format="pyarrow").write_parquet(out)


def shardsight_exact_crops(folder: str, out: str, weights: str) -> None:
    """The same at the peers' precision."""
    shardsight_crops(folder, out, weights, "fp32")


def squash(table: Any) -> Any:
    """A table of frames, each stretched to SIDE × SIDE."""
    import cv2
    import pyarrow as pa

    from shardsight.row import FRAME, frame_columns, frames_of, with_column

    squashed = {index: frame_columns(cv2.resize(frame, (SIDE, SIDE)), SIDE, SIDE) for index, frame in frames_of(table)}
    for name in ("width", "height", *dict(FRAME)):
        values = [squashed.get(index, {}).get(name) for index in range(len(table))]
        table = with_column(table, name, pa.array(values, table.schema.field(name).type))
    return table


def crops(table: Any) -> Any:
    """A table of frames with detections → a row a detection; frames with an error have none."""
    import pyarrow as pa

    from shardsight.row import frames_of

    ids, indices, found = (table[name].to_pylist() for name in ("uri", "frame_index", "detections"))
    rows = [
        {"path": ids[row], "frame_index": indices[row], **_crop(frame, one["label"], one["score"], box)}
        for row, frame in frames_of(table)
        for one in found[row] or []
        for box in [[one[side] for side in ("x1", "y1", "x2", "y2")]]
    ]
    done(len(table))
    schema = [("path", pa.string()), ("frame_index", pa.int32()), ("label", pa.string()), ("confidence", pa.float64())]
    return pa.Table.from_pylist(rows, pa.schema([*schema, ("bbox", pa.list_(pa.float64())), ("object", pa.binary())]))


def ultralytics_crops(folder: str, out: str, weights: str) -> None:
    """A loop over PyAV's frames, as one process."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from demo.writers import batched

    model, rows = _Model(weights), []
    for batch in batched(_frames(folder, SIDE, SIDE), BATCH):
        for row, found in zip(batch, model.features([row["frame"] for row in batch]), strict=True):
            place = {"path": row["path"], "frame_index": row["frame_index"]}
            rows += [place | _crop(row["frame"], one["label"], one["confidence"], one["bbox"]) for one in found]
    Path(out).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), f"{out}/results.parquet")


def ray_data_crops(folder: str, out: str, weights: str) -> None:
    """As its authors wrote it: frame → features → a row a detection → PNG."""

    class Features:
        def __init__(self) -> None:
            self.model = _Model(weights)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch | {"features": self.model.features(list(batch["frame"]))}

    def cut(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        frame, found = row.pop("frame"), row.pop("features")
        for one in found:
            yield row | _crop(frame, one["label"], one["confidence"], one["bbox"])

    _in_actor(_ray_frames(folder, SIDE, SIDE), Features).flat_map(cut).write_parquet(out)


def daft_crops(folder: str, out: str, weights: str) -> None:
    """As its authors wrote it: frame → features → explode → Daft's own crop and PNG."""
    import daft
    from daft import DataType, col

    kind = {"label": DataType.string(), "confidence": DataType.float64(), "bbox": DataType.list(DataType.float64())}
    kind |= {"place": DataType.list(DataType.uint32())}  # x, y, width, height

    @daft.udf(return_dtype=DataType.list(DataType.struct(kind)), batch_size=BATCH)
    class Features:
        def __init__(self) -> None:
            self.model = _Model(weights)

        def __call__(self, images: Any) -> list[Any]:
            found = self.model.features(images.to_pylist())
            return [[one | {"place": self.place(*one["bbox"])} for one in features] for features in found]

        def place(self, x1: float, y1: float, x2: float, y2: float) -> list[int]:
            left, top, right, bottom = _corners([x1, y1, x2, y2])
            return [left, top, right - left, bottom - top]

    frame = _daft_frames(folder, SIDE, SIDE)
    frame = frame.with_column("features", Features(col("data"))).explode("features")
    frame = frame.where(col("features").not_null())  # of frames without a detection
    frame = frame.with_column("object", col("data").crop(col("features")["place"]).encode_image("png"))
    frame.select("path", "frame_index", "features", "object").write_parquet(out)


class _Model:
    """The peers' model, as they call it: on a tensor of frames of one size, RGB in 0 to 1."""

    def __init__(self, weights: str) -> None:
        from ultralytics import YOLO

        self.model = YOLO(weights)

    def features(self, frames: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        import torch
        from torchvision.transforms.functional import to_tensor

        results = self.model(torch.stack([to_tensor(frame) for frame in frames]), verbose=False)
        done(len(frames))
        return [
            [
                {"label": result.names[int(label)], "confidence": confidence, "bbox": box}
                for label, confidence, box in zip(*(part.tolist() for part in _parts(result)), strict=True)
            ]
            for result in results
        ]


def _parts(result: Any) -> tuple[Any, Any, Any]:
    return result.boxes.cls, result.boxes.conf, result.boxes.xyxy


def _crop(frame: np.ndarray, label: str, confidence: float, box: list[float]) -> dict[str, Any]:
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(frame).crop(_corners(box)).save(png, "PNG")
    return {"label": label, "confidence": confidence, "bbox": list(box), "object": png.getvalue()}


def _corners(box: list[float]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in whole pixels; at least one wide and high."""
    x1, y1, x2, y2 = map(int, box)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


def _frames(folder: str, width: int, height: int) -> Iterator[dict[str, Any]]:
    for path in sorted(Path(folder).glob("*.mp4")):
        yield from _frames_of({"path": str(path)}, width, height)


def _frames_of(row: dict[str, Any], width: int, height: int) -> Iterator[dict[str, Any]]:
    """A row with the path of a video → a row a frame: `frame` is RGB uint8 (height, width, 3)."""
    import av
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    with av.open(row["path"]) as file:
        for index, frame in enumerate(file.decode(video=0)):
            picture = reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
            yield {"path": row["path"], "frame_index": index, "frame": picture}


def _ray_frames(folder: str, width: int, height: int) -> Any:
    import ray

    ray.init("local")  # and not what an earlier `ray start` left behind
    paths = [{"path": str(path)} for path in sorted(Path(folder).glob("*.mp4"))]
    return ray.data.from_items(paths).flat_map(_frames_of, fn_kwargs={"width": width, "height": height})


def _daft_frames(folder: str, width: int, height: int) -> Any:
    # Daft 0.7.26 hangs where as many videos are opened at once as there are cores, of which two are enough.
    os.environ["DAFT_SCANTASK_MAX_PARALLEL"] = "1"
    import daft

    return daft.read_video_frames(f"{folder}/*.mp4", image_height=height, image_width=width)


def _in_actor(frames: Any, model: type) -> Any:
    from ray.data import ActorPoolStrategy

    return frames.map_batches(model, batch_size=BATCH, compute=ActorPoolStrategy(size=1), num_cpus=1)


TASKS = {
    "detect": {
        function.__name__: function
        for function in (shardsight, shardsight_exact, ultralytics, ray_data, daft, decoding)
    },
    "crops": {
        function.__name__.removesuffix("_crops"): function
        for function in (shardsight_crops, shardsight_exact_crops, ultralytics_crops, ray_data_crops, daft_crops)
    },
    "decode": {"shardsight": shardsight_decode, "ffmpeg": ffmpeg_decode},
    "decode_full": {"shardsight": shardsight_decode_full, "ffmpeg": ffmpeg_decode_full},
}

if __name__ == "__main__":
    task, name, folder, out, weights = sys.argv[1:]
    TASKS[task][name](folder, out, weights)
