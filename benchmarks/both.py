"""Both models over the same pictures, in our one pass and by hand: `python -m benchmarks.both`.

JPEGs of 1280×720 → YOLOv8n's boxes and the demo PaliGemma's captions → Parquet. By hand is what a user writes:
ultralytics' `predict` over the folder, then Hugging Face's `generate` over the folder, in batches, both told to use
every core, of which ultralytics leaves one to others by itself. A picture is done when its second model is; those of
the first are part of what the user waits for. See measuring.py.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.contenders import annotate, detections, on_every_core
from benchmarks.measuring import done
from benchmarks.throughput import copies, objects
from demo.run import WEIGHTS
from demo.writers import batched

PROMPT, TOKENS, BATCH, IMGSZ = "caption en", 32, 8, 640
NAMES = {
    "shardsight": "Shardsight, one pass",
    "shardsight_exact": "Shardsight, one pass, fp32, full decoding",
    "by_hand": "ultralytics, then Hugging Face, fp32",
    "by_hand_bf16": "ultralytics, then Hugging Face in bf16",
}


def shardsight(folder: str, out: str, *options: str) -> None:
    """Our job, with its defaults."""
    models = ("--yolo", WEIGHTS / "detect.pt", "--imgsz", IMGSZ, "--paligemma", WEIGHTS / "paligemma")
    annotate(folder, out, *models, "--prompt", PROMPT, "--max-tokens", TOKENS, *options)


def shardsight_exact(folder: str, out: str) -> None:
    shardsight(folder, out, "--precision", "fp32", "--no-scaled-decode")


def by_hand(folder: str, out: str, dtype: str = "float32") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ultralytics import YOLO

    paligemma, yolo = _PaliGemma(dtype), on_every_core(YOLO(WEIGHTS / "detect.pt"))
    results = yolo.predict(folder, stream=True, imgsz=IMGSZ, batch=16, verbose=False)
    rows: list[dict[str, Any]] = [{"path": result.path, "detections": detections(result)} for result in results]
    for some in batched(rows, BATCH):
        for row, answer in zip(some, paligemma([row["path"] for row in some]), strict=True):
            row["answer"] = answer
        done(len(some))
    Path(out).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), f"{out}/results.parquet")


def by_hand_bf16(folder: str, out: str) -> None:
    by_hand(folder, out, "bfloat16")


class _PaliGemma:
    """As its model card shows."""

    def __init__(self, dtype: str) -> None:
        from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

        self.processor = PaliGemmaProcessor.from_pretrained(WEIGHTS / "paligemma")
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(WEIGHTS / "paligemma", dtype=dtype).eval()

    def __call__(self, paths: list[str]) -> list[str]:
        import torch
        from PIL import Image

        images = [Image.open(path).convert("RGB") for path in paths]
        asked = self.processor(images=images, text=[f"<image>{PROMPT}"] * len(images), return_tensors="pt")
        asked["pixel_values"] = asked["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**asked, max_new_tokens=TOKENS, do_sample=False)
        made = tokens[:, asked["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(made, skip_special_tokens=True))


CONTENDERS: dict[str, Callable[[str, str], None]] = {
    function.__name__: function for function in (shardsight, shardsight_exact, by_hand, by_hand_bf16)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=(16, 600), help="numbers of pictures")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = measuring.arguments(parser)
    if args.run:
        name, folder, out = args.run
        CONTENDERS[name](folder, out)
        return
    sizes, rounds = ([16, 100], 1) if args.quick else (sorted(args.sizes), args.rounds)
    with tempfile.TemporaryDirectory() as work:
        folders = copies(Path(work), sizes)

        def command(name: str, size: int) -> list[object]:
            shutil.rmtree(Path(work) / "out", ignore_errors=True)
            return ["benchmarks.both", "--run", name, folders[size], Path(work) / "out"]

        def found(name: str, size: int) -> int:
            return objects(Path(work) / "out", size)

        runs = measuring.contest(list(CONTENDERS), sizes, rounds, command, found)
    models = f"YOLOv8n at {IMGSZ} and the demo's PaliGemma, `{PROMPT}`"
    work_done = f"JPEGs of 1280×720, {models}, median of {rounds} rounds"
    said = measuring.conditions(work_done, ("ultralytics", "vllm", "transformers", "ray", "torch"))
    made = measuring.table(runs, NAMES, ("by_hand", "by_hand_bf16"), "pictures", rate=False)
    text = f"{made}\n\n{said}. {measuring.noise(runs)}\n"
    print(text)
    if args.record:
        measuring.record(measuring.card("Both models", args), text)


if __name__ == "__main__":
    main()
