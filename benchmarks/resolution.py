"""How well `--lost-detail` finds the pictures with small words in them: `python -m benchmarks.resolution`.

Made-up scenes, with words of known height, and a PaliGemma of 224 and of 448 pixels: for several thresholds, the share
of the pictures that go to the larger one, by the height that the smallest word in them has at 224 pixels.
"""

import argparse

import cv2
import numpy as np

from demo.scenes import Scene, Shape, scenes
from shardsight.models.paligemma.routing import lost

SIZES = 224, 448
HEIGHTS = {"below 10 px": (0, 10), "10 to 14 px": (10, 14), "above": (14, 224), "no word": (224, 1e9)}


def word_box(shape: Shape, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Where scenes.py printed the word, x1, y1, x2, y2 in 0 to 1, from the same sizes; None without one."""
    if shape.word is None:
        return None
    (x, y), top = shape.keypoints[0, :2], shape.keypoints[1, :2]
    side = float(np.hypot(*(top - (x, y)))) / (0.45 if shape.kind == "square" else 0.5)
    room = {"square": 0.7, "circle": 0.7, "cross": 0.8}[shape.kind]
    (w, h), _ = cv2.getTextSize(shape.word, cv2.FONT_HERSHEY_DUPLEX, 1, 1)
    scale = min(room * side / w, (0.28 if shape.kind == "cross" else 0.5) * side / h)
    w, h = w * scale / 2, h * scale / 2
    return (x - w) / width, (y - h) / height, (x + w) / width, (y + h) / height


def height(scene: Scene) -> float:
    """Of the smallest printed word, pixels of the smaller input; far above it where there is none."""
    rows, columns = scene.image.shape[:2]
    boxes = [box for shape in scene.shapes if (box := word_box(shape, columns, rows))]
    return min(((y2 - y1) * SIZES[0] for _, y1, _, y2 in boxes), default=1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    found = [(height(one), lost(one.image, *SIZES)) for one in scenes(args.count, args.seed)]
    groups = {name: [value for tall, value in found if low <= tall < high] for name, (low, high) in HEIGHTS.items()}
    print("| `--lost-detail` | " + " | ".join(f"{name} ({len(values)})" for name, values in groups.items()) + " |")
    print("|---|" + "---:|" * len(groups))
    for threshold in (0.06, 0.08, 0.10, 0.12, 0.16):
        shares = (sum(value > threshold for value in values) / len(values) for values in groups.values())
        print(f"| {threshold:.2f} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
