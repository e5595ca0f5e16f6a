"""The same work by each contender: `python -m benchmarks.contenders NAME FOLDER OUT WEIGHTS IMGSZ`.

The pictures of a folder → YOLOv8 → Parquet with label, score and box of each detection. Peers are written
as their own guides write them, and note when they are done with a picture.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import done

BATCH = 16


def annotate(folder: str, out: str, *options: object, each: int = 1) -> None:
    """Our job's command. A row is done when the driver has it, and with it so many things. Exits where it fails."""
    from shardsight import cli, progress

    class Noting(progress.Progress):
        def add(self, rows: int, errors: int, total: int | None) -> None:
            done(rows * each)
            super().add(rows, errors, total)

    progress.Progress = Noting  # type: ignore[misc]
    if code := cli.annotate([folder, "--output", out, *map(str, options)]):
        sys.exit(code)


def shardsight(folder: str, out: str, weights: str, imgsz: int, *options: str) -> None:
    """Our job's command, with its defaults."""
    annotate(folder, out, "--yolo", weights, "--imgsz", imgsz, *options)


def shardsight_exact(folder: str, out: str, weights: str, imgsz: int) -> None:
    """Our job at the peers' precision, with every picture decoded in full."""
    shardsight(folder, out, weights, imgsz, "--precision", "fp32", "--no-scaled-decode")


def shardsight_int8(folder: str, out: str, weights: str, imgsz: int) -> None:
    """Our job in int8, whose calibration is kept from the first run over these pictures."""
    shardsight(folder, out, weights, imgsz, "--precision", "int8")


def ultralytics(
    folder: str, out: str, weights: str, imgsz: int, told: Callable[[Any], Any] = lambda yolo: yolo
) -> None:
    """`predict(stream=True)` over the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ultralytics import YOLO

    from demo.writers import batched

    results = told(YOLO(weights)).predict(folder, stream=True, imgsz=imgsz, batch=BATCH, verbose=False)
    rows = [
        {"path": result.path, "detections": found}
        for some in batched(results, BATCH)
        for result, found in zip(some, noted(some), strict=True)
    ]
    Path(out).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), f"{out}/results.parquet")


def ultralytics_all(folder: str, out: str, weights: str, imgsz: int) -> None:
    """The same on every core."""
    ultralytics(folder, out, weights, imgsz, on_every_core)


def on_every_core(yolo: Any) -> Any:
    """ultralytics' YOLO, told to compute on every core. On a CPU it takes all but one by itself, and eight at most."""
    import numpy as np
    import torch

    yolo.predict(np.zeros((64, 64, 3), np.uint8), verbose=False)  # in which it sets its own number
    torch.set_num_threads(os.cpu_count() or 1)
    return yolo


def ray_data(folder: str, out: str, weights: str, imgsz: int) -> None:
    """read_images → a class in an actor pool → write_parquet."""
    import ray
    from ray.data import ActorPoolStrategy

    class Detect:
        def __init__(self) -> None:
            from ultralytics import YOLO

            self.model = YOLO(weights)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            images = [image[..., ::-1] for image in batch.pop("image")]  # ultralytics takes BGR
            results = self.model.predict(images, imgsz=imgsz, verbose=False)
            return batch | {"detections": noted(results)}

    ray.init("local")  # and not what an earlier `ray start` left behind
    images = ray.data.read_images(folder, mode="RGB", include_paths=True)
    found = images.map_batches(Detect, batch_size=BATCH, compute=ActorPoolStrategy(size=1), num_cpus=1)
    found.write_parquet(out)


def daft(folder: str, out: str, weights: str, imgsz: int) -> None:
    """from_glob_path → download and decode → a class as UDF → write_parquet."""
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
            results = self.model.predict([image[..., ::-1] for image in images.to_pylist()], imgsz=imgsz, verbose=False)
            return noted(results)

    frame = daft.from_glob_path(f"{folder}/*.jpg")
    frame = frame.with_column("image", col("path").download().decode_image(mode="RGB"))
    frame.select("path", Detect(col("image")).alias("detections")).write_parquet(out)


def limit(folder: str, out: str, weights: str, imgsz: int) -> None:
    """The model alone at our best precision: its input is in memory, its output is dropped."""
    import numpy as np
    import torch

    from shardsight.models.yolo.model import Yolo

    count = len(list(Path(folder).iterdir()))
    batches = -(-count // BATCH)
    model = Yolo(weights, imgsz=imgsz)
    width, height = model.input.place(1280, 720).outer
    pictures = np.random.default_rng(0).integers(0, 255, (BATCH, height, width, 3), np.uint8)
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(model.dtype).to(model.predictor.device)
    compute = partial(model.compiled, pictures) if model.compiles else partial(model.backend, batch)
    with torch.inference_mode():
        for _ in range(batches + 1):  # the first warms up
            compute()
            done(BATCH)


def noted(results: Any) -> list[list[dict[str, Any]]]:
    """Detections of each picture, which are done."""
    found = [detections(result) for result in results]
    done(len(found))
    return found


def detections(result: Any) -> list[dict[str, Any]]:
    boxes = result.boxes
    rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
    return [
        {"label": result.names[int(label)], "score": score, **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))}
        for label, score, box in rows
    ]


CONTENDERS = {
    function.__name__: function
    for function in (shardsight, shardsight_exact, shardsight_int8, ultralytics, ultralytics_all, ray_data, daft, limit)
}

if __name__ == "__main__":
    name, folder, out, weights, imgsz = sys.argv[1:]
    CONTENDERS[name](folder, out, weights, int(imgsz))
