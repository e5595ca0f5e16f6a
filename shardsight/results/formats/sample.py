"""What every format is written from: samples, and what is known of all of them before the first."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from shardsight.row import digest, video_of

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the picture as shown

EXAMPLES = 100  # ids that are named for each reason
VISIBLE = 0.5  # score from which a keypoint counts as visible


@dataclass(frozen=True)
class Picture:
    """An encoded picture. ending: of its format, with the dot. link: the local file that holds these bytes, where a
    link to it is wanted instead of a copy."""

    data: bytes
    ending: str
    link: str | None = None


@dataclass(frozen=True)
class Found:
    """A detection. category: index in Contents.names. box: cut to the picture. corners: x, y of an oriented box's four
    corners, in order around it. mask: {height, width, counts} of COCO's compressed RLE. keypoints: x, y, score."""

    category: int
    box: Box
    score: float | None = None
    track_id: int | None = None
    corners: list[float] | None = None
    mask: dict[str, Any] | None = None
    keypoints: list[dict[str, float | None]] | None = None


@dataclass(frozen=True)
class Sample:
    """A picture, or a frame of a video: its row's id, uri, place and size in pixels as shown, and what was found in it.

    category, score: of the whole picture, from a classifier; index in Contents.names. picture: for the formats that
    hold pictures.
    """

    id: str
    uri: str
    width: int
    height: int
    frame_index: int | None = None
    pts_seconds: float | None = None
    found: tuple[Found, ...] = ()
    category: int | None = None
    score: float | None = None
    picture: Picture | None = None

    @property
    def video(self) -> str:
        """The id of its video; of a picture its own."""
        return self.id if self.frame_index is None else video_of(self.id)

    @property
    def name(self) -> str:
        """A name for files: the same for an id whenever it is converted, and another for every other id."""
        stem = self.id.rstrip("/").rpartition("/")[2]
        if self.frame_index is None:
            stem = stem.rpartition(".")[0] or stem
        return f"{safe(stem)}-{digest(self.id)[:8].hex()}"

    @property
    def file(self) -> str:
        """The name with its picture's ending."""
        assert self.picture
        return f"{self.name}{self.picture.ending}"

    def relative(self, x: float, y: float) -> tuple[float, float]:
        """Pixels → shares of the picture's width and height, cut to 0 … 1."""
        return min(max(x / self.width, 0.0), 1.0), min(max(y / self.height, 0.0), 1.0)


@dataclass(frozen=True)
class Contents:
    """What is known before the first sample.

    names: of the classes, by category. classes: whether whole pictures are classified instead of objects found. masks,
    corners, tracks: whether any object has them. keypoints: of an object, at most. model: the name of what found them.
    validation: the share of pictures for it.
    """

    names: list[str]
    classes: bool = False
    masks: bool = False
    corners: bool = False
    tracks: bool = False
    keypoints: int = 0
    model: str = ""
    validation: float = 0.0

    def validates(self, sample: Sample) -> bool:
        """Whether a sample is for validation: by a hash of its id, so that it stays so in a larger set; the frames of a
        video go together, as they look alike."""
        return int.from_bytes(digest(sample.video)[8:]) < self.validation * 2**64


@dataclass
class Report:
    """written: what → how many. left_out: reason → how many. examples: reason → the first ids. notes: sentences for the
    user."""

    written: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, id: str, count: int = 1) -> None:
        if not count:
            return
        self.left_out[reason] += count
        if len(self.examples[reason]) < EXAMPLES and id not in self.examples[reason][-1:]:
            self.examples[reason].append(id)


def safe(text: str) -> str:
    """A text as part of a file's name: of letters, digits and - _, which every system and tool takes."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60].strip("_") or "x"


def visible(keypoint: dict[str, float | None]) -> bool:
    score = keypoint["score"]
    return score is None or score >= VISIBLE
