"""Made-up clips with their truth: the shapes of scenes.py in motion, the same for the same seed.

Two shapes of one kind meet twice, one leaves the picture and returns, and others wander behind and in front of them.
Files are in MOTChallenge's format, which trackers' measures read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from demo.scenes import COLOURS, KINDS, WORDS, Outline, background, paint, print_word, stack, surface

WIDTH, HEIGHT, FPS = 640, 480, 25
SECONDS = 4, 6  # shortest and longest
SMALLEST, LARGEST = 60, 150  # of a shape's side, pixels
MARGIN = LARGEST  # around the picture, where shapes are drawn too, so that what leaves is cut by the edge
CANVAS = WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN
LEAST_VISIBLE = 0.1  # the share of a shape that must be seen for it to be in the truth


@dataclass(frozen=True)
class Track:
    """What is seen of a shape in a frame. id: from 1, of the shape throughout its clip. box: x1, y1, x2, y2 of its
    visible pixels. visibility: their share of the whole shape."""

    id: int
    kind: str
    colour: str
    box: tuple[int, int, int, int]
    visibility: float


@dataclass(frozen=True)
class Frame:
    """image: RGB uint8 (HEIGHT, WIDTH, 3). tracks: the shapes that are seen, the farthest first."""

    image: np.ndarray
    tracks: list[Track]


@dataclass(frozen=True)
class _Actor:
    """A moving shape. path: its centre in each frame, pixels, (n, 2). angles: radians, (n,)."""

    id: int
    kind: str
    colour: str
    word: str | None
    side: float
    path: np.ndarray
    angles: np.ndarray

    def outline(self, number: int) -> Outline:
        x, y = (self.path[number] + MARGIN).tolist()
        return Outline(self.kind, (x, y), self.side, float(self.angles[number]))


class Clip:
    """A clip of a seed. Its frames are drawn as they are asked for, and may be asked for again."""

    def __init__(self, index: int, seed: int = 0) -> None:
        self.name = f"clip-{seed:04d}-{index:03d}"
        self._seed = [seed, index]
        rng = np.random.default_rng(self._seed)
        self.length = int(rng.integers(SECONDS[0] * FPS, SECONDS[1] * FPS + 1))
        self._actors = _actors(rng, self.length)

    def frames(self) -> Iterator[Frame]:
        rng = np.random.default_rng([*self._seed, 1])
        empty = background(rng, *CANVAS)
        surfaces = [surface(rng, actor.colour, *CANVAS) for actor in self._actors]
        for number in range(self.length):
            yield self._frame(number, empty.copy(), surfaces, rng)

    def _frame(self, number: int, image: np.ndarray, surfaces: list[np.ndarray], rng: np.random.Generator) -> Frame:
        outlines = [actor.outline(number) for actor in self._actors]
        shown = np.s_[MARGIN : MARGIN + HEIGHT, MARGIN : MARGIN + WIDTH]
        tracks = []
        for actor, outline, colours, (whole, covered) in zip(
            self._actors, outlines, surfaces, stack(outlines, *CANVAS), strict=True
        ):
            paint(image, outline.alpha(*CANVAS), colours)
            if actor.word:
                print_word(actor.word, image, outline, whole, actor.colour)
            seen = (whole & ~covered)[shown]
            visibility = float(seen.sum() / max(1, whole.sum()))
            if visibility >= LEAST_VISIBLE:
                tracks.append(Track(actor.id, actor.kind, actor.colour, _box(seen), visibility))
        picture = image[shown] + 2 * rng.standard_normal((HEIGHT, WIDTH, 3), np.float32)
        return Frame(np.clip(picture, 0, 255).astype(np.uint8), tracks)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _actors(rng: np.random.Generator, length: int) -> list[_Actor]:
    """Five to seven, no two of one colour, the farthest first."""
    sides = rng.uniform(SMALLEST, LARGEST, int(rng.integers(5, 8)))
    kinds = rng.choice(KINDS, len(sides)).tolist()
    kinds[1] = kinds[0]  # so that the class does not tell the two that meet apart
    paths = [*_meeting(rng, length), _leaving(rng, length, sides[2])]
    paths += [_wandering(rng, length) for _ in sides[3:]]
    colours = rng.permutation(list(COLOURS)).tolist()
    actors = []
    for number, (side, kind, path) in enumerate(zip(sides.tolist(), kinds, paths, strict=True)):
        round_ = kind in ("circle", "ring")
        # At most 30 degrees, as in scenes.
        angles = np.zeros(length) if round_ else np.pi / 6 * _swing(rng, length)
        word = str(rng.choice(WORDS)) if rng.random() < 0.8 else None
        actors.append(_Actor(number + 1, kind, colours[number], word, side, path, angles))
    return [actors[number] for number in rng.permutation(len(actors))]


def _swing(rng: np.random.Generator, length: int) -> np.ndarray:
    """A slow wave between -1 and 1, (n,)."""
    return np.sin(2 * np.pi * (rng.uniform(0.4, 1.0) * np.linspace(0, 1, length) + rng.random()))


def _meeting(rng: np.random.Generator, length: int) -> list[np.ndarray]:
    """Two paths that cross from side to side and back, and meet in the middle."""
    wave = np.cos(2 * np.pi * np.linspace(0, 1, length)) * WIDTH * rng.uniform(0.3, 0.38)
    y = rng.uniform(0.3, 0.7) * HEIGHT
    rise = rng.uniform(-40, 40, 2)[:, None] * wave / WIDTH
    return [np.column_stack([WIDTH / 2 + way * wave, y + rise[one]]) for one, way in enumerate((1, -1))]


def _leaving(rng: np.random.Generator, length: int, side: float) -> np.ndarray:
    """Out over the left or the right edge, out of sight for a fifth of the time, and in again."""
    home = rng.uniform(0.3, 0.5) * WIDTH
    away = np.sin(np.pi * np.linspace(0, 1, length)) * (home + 0.75 * side) / np.cos(0.1 * np.pi)
    x = home - away
    x = x if rng.random() < 0.5 else WIDTH - x
    return np.column_stack([x, HEIGHT * (rng.uniform(0.25, 0.75) + 0.08 * _swing(rng, length))])


def _wandering(rng: np.random.Generator, length: int) -> np.ndarray:
    reach = rng.uniform(0.1, 0.32, 2) * (WIDTH, HEIGHT)
    centre = rng.uniform(0.38, 0.62, 2) * (WIDTH, HEIGHT)
    return centre + reach * np.column_stack([_swing(rng, length), _swing(rng, length)])


def write_clips(count: int, seed: int, out: Path) -> None:
    """NAME.mp4, NAME/gt/gt.txt and NAME/seqinfo.ini of each clip.

    A line of gt.txt is frame, id, x, y, width, height, 1, class, visibility: frames from 1, pixels from 0 as everywhere
    here, class n + 1 is KINDS[n]. Boxes hold what is visible, as those of the still scenes do.
    """
    for index in range(count):
        clip = Clip(index, seed)
        (out / clip.name / "gt").mkdir(parents=True, exist_ok=True)
        with (out / clip.name / "gt" / "gt.txt").open("w") as truth:
            frames = _written(clip.frames(), out / f"{clip.name}.mp4")
            for number, frame in enumerate(frames, 1):
                truth.writelines(_line(number, track) for track in frame.tracks)
        (out / clip.name / "seqinfo.ini").write_text(
            f"[Sequence]\nname={clip.name}\nimDir=img1\nframeRate={FPS}\nseqLength={clip.length}\n"
            f"imWidth={WIDTH}\nimHeight={HEIGHT}\nimExt=.jpg\n"
        )


def _line(number: int, track: Track) -> str:
    x1, y1, x2, y2 = track.box
    place = f"{number},{track.id},{x1},{y1},{x2 - x1},{y2 - y1}"
    return f"{place},1,{KINDS.index(track.kind) + 1},{track.visibility:.3f}\n"


def _written(frames: Iterator[Frame], path: Path) -> Iterator[Frame]:
    """The frames, each after it was encoded."""
    with av.open(path, "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1  # its number decides the bytes
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image, format="rgb24")))
            yield frame
        file.mux(stream.encode())
