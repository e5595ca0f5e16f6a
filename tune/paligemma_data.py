"""What PaliGemma is trained on: questions about pictures with their right answers, checked before a trial begins."""

import hashlib
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shardsight.decode.pictures import decode
from shardsight.errors import UsageError
from shardsight.models.paligemma.info import MASKS, PaliGemmaInfo
from shardsight.models.paligemma.masks import MaskEncoder, MaskError
from shardsight.models.paligemma.prompts import BINS, CODES, LOCATIONS, Prompt, parts_of
from shardsight.row import Failure
from shardsight.sources import pictures
from shardsight.sources.files import AHEAD, ahead, fetch
from shardsight.storage import Storage
from shardsight.truth import MISSING, Sample, Truth
from shardsight.truth.labels import UNREADABLE
from shardsight.truth.text import NO_OBJECT
from tune.paligemma_augment import LEAST_SIDE, Change, Masks, augment, with_noise
from tune.paligemma_questions import SEMICOLON, read_questions

BOTH = "pictures that are both learnt and measured on; kept, measures are too good"
GONE = "pictures that are not there; left out"
WITHOUT_AREA = "answers that hold a box without area; left out"
MALFORMED = "answers to detect or segment that are not <loc> ×4, perhaps <seg> ×16, and a label; left out"
NOT_ASKED = "labels that their prompt does not ask for; left out"
UNKNOWN = "words that the model's tokenizer does not know; left out"
RESERVED = "answers with a token that the model adds itself; left out"
TOO_LONG = "prompts with answers of more tokens than --max-length or than the model's window; left out"
_RESERVED = re.compile(r"<(image|bos|eos|pad|unk)>")


@dataclass(frozen=True)
class Example:
    """A question about a picture, and the answers that are right, of which each epoch draws one. image, shard: as
    truth.Sample has `id` and `shard`."""

    image: str
    prefix: str
    suffixes: tuple[str, ...]
    shard: str | None = None


@dataclass(frozen=True)
class Data:
    """train, val: what a model learns from, and what it is measured on. problems: what was left out or changed, and
    why. counts: reason → how many. sha256: of prompts, answers and the pictures' contents. longest: tokens of an
    answer, at most."""

    train: list[Example]
    val: list[Example]
    problems: list[str]
    counts: dict[str, int]
    sha256: str
    longest: int

    def about(self, path: str) -> dict[str, Any]:
        """For sweep.json and best.json."""
        pictures = {name: len({one.image for one in part}) for name, part in (("train", self.train), ("val", self.val))}
        problems = {"problems": self.problems, "counts": self.counts}
        return {"path": path, "pictures": pictures, **problems, "sha256": self.sha256}


@dataclass(frozen=True)
class Asked:
    """What to learn. path, val: as truth.read takes them, or tars and Parquet files as truth.text.read_shards does.
    split: the share of pictures to measure on, where there is no `val`, nor one in `path`. task: how labelled objects
    are asked for, detect or segment. max_length: tokens of a prompt with its answer. noise_boxes: as in Changes."""

    path: str
    val: str | None = None
    split: float = 0.1
    task: str = "detect"
    max_length: int = 512
    noise_boxes: int = 0


def inspect_data(asked: Asked, info: PaliGemmaInfo, tokenizer: Any, storage: Storage) -> Data:
    """Read the labels, and every picture once; whatever a model could not learn from is left out and named. Raises
    UsageError."""
    encoder = _encoder(info) if asked.task == "segment" else None
    truths = {"train": read_questions(asked.path, "train", encoder, storage)}
    if asked.val or {"train", "val"} <= set(truths["train"].splits):
        truths["val"] = read_questions(asked.val or asked.path, "val", encoder, storage)
    problems: list[tuple[str, str]] = []  # what, and why
    hashes: dict[str, bytes] = {}
    found: dict[str, list[Example]] = {}
    longest = 0
    for name, truth in truths.items():
        checks = _Checks(info, tokenizer, asked.max_length, asked.noise_boxes)
        checks.faults |= {
            reason: list(names) for reason, names in truth.faults.items() if reason not in (MISSING, NO_OBJECT)
        }
        found[name] = checks.kept(truth, hashes, storage)
        problems += [(f"{name}: {one}", reason) for reason, names in checks.faults.items() for one in names]
        longest = max(longest, checks.longest)
        if not found[name]:
            first = "; " + ": ".join(problems[0]) if problems else ""
            where = asked.path if name == "train" else asked.val or asked.path
            raise UsageError(f"{where} holds nothing that PaliGemma could be trained on{first}")
    if "val" not in found:
        found["train"], found["val"] = _split(found["train"], asked.split, hashes)
    learnt = {hashes[one.image] for one in found["train"]}
    problems += [(f"val: {one}", BOTH) for one in {one.image: 0 for one in found["val"]} if hashes[one] in learnt]
    said = repr([(name, one.prefix, one.suffixes, hashes[one.image]) for name, some in found.items() for one in some])
    return Data(
        *(found["train"], found["val"], [": ".join(one) for one in problems]),
        *(Counter(reason for _, reason in problems), hashlib.sha256(said.encode()).hexdigest(), longest),
    )


def _encoder(info: PaliGemmaInfo) -> MaskEncoder:
    """Of masks. Raises UsageError."""
    if MASKS not in info.files:
        raise UsageError(f"--task segment needs Google's {MASKS}, which encodes masks: put it into {info.path}")
    try:
        return MaskEncoder.load(Path(info.path) / MASKS)
    except MaskError as error:
        raise UsageError(str(error)) from None


@dataclass
class _Checks:
    """What is asked and answered, tried on a model's tokenizer. faults: reason → names. longest: tokens of an
    answer."""

    info: PaliGemmaInfo
    tokenizer: Any
    max_length: int
    noise_boxes: int

    def __post_init__(self) -> None:
        self.faults: dict[str, list[str]] = {}
        self.longest = 0
        self.most = min(self.max_length, self.info.length - self.info.image_tokens - 1)  # <bos>

    def kept(self, truth: Truth, hashes: dict[str, bytes], storage: Storage) -> list[Example]:
        """The examples of which nothing is wrong. hashes: of the pictures' contents, filled in."""
        missing = set(truth.faults.get(MISSING, ()))
        examples: list[Example] = []
        for sample in truth.samples:
            if sample.id in missing:
                self.faults.setdefault(GONE, []).append(sample.id)
                continue
            examples += self._examples(sample)
        for image, said in ahead(
            self._hashed, encoded((one for one in examples if one.image not in hashes), storage), AHEAD
        ):
            if isinstance(said, Failure):
                self.faults.setdefault(UNREADABLE, []).append(f"{image} ({said.type})")
            else:
                hashes[image] = said
        return [one for one in examples if one.image in hashes]

    def _examples(self, sample: Sample) -> Iterator[Example]:
        for prompt, answers in sample.asked.items():
            right = []
            for answer in map(str.strip, answers):
                if reason := self._fault(prompt, answer):
                    self.faults.setdefault(reason, []).append(f"{sample.id}, {prompt}")
                else:
                    right.append(answer)
            if right:
                yield Example(sample.id, prompt, tuple(right), sample.shard)

    def _fault(self, prompt: str, answer: str) -> str | None:
        if _RESERVED.search(answer):
            return RESERVED
        if answer and prompt.startswith(("detect ", "segment ")) and (reason := _malformed(prompt, answer)):
            return reason
        answer, _ = with_noise(prompt, answer, self.noise_boxes, np.random.default_rng(0))  # as long as any other
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{prompt}\n", answer)]
        unknown = self.tokenizer.unk_token_id
        if unknown in ids[0] or unknown in ids[1]:
            return UNKNOWN
        length = len(ids[1]) + 1  # <eos>
        if len(ids[0]) + length > self.most:
            return TOO_LONG
        self.longest = max(self.longest, length)
        return None

    def _hashed(self, picture: tuple[str, bytes | Failure]) -> tuple[str, bytes | Failure]:
        """The hash of the bytes instead of them, where they can be decoded."""
        image, data = picture
        try:
            if isinstance(data, bytes):
                decode(data, self.info.input.needed_size)
        except Failure as failure:
            return image, failure
        return image, data if isinstance(data, Failure) else hashlib.sha256(data).digest()


def encoded(examples: Iterable[Example], storage: Storage) -> Iterator[tuple[str, bytes | Failure]]:
    """(image, its file's content or why there is none) of each picture once; each shard is read once."""
    where = {one.image: one.shard or one.image for one in examples}
    return pictures([{"id": image, "uri": uri} for image, uri in where.items()], storage)


def _malformed(prompt: str, answer: str) -> str | None:
    """Why an answer to `detect` or `segment` would teach what cannot be read; None where nothing is wrong with it."""
    names = Prompt.of(prompt).names
    for number, (bins, codes, label) in enumerate(parts_of(answer)):
        if number and not bins and not codes and label and "<" not in label:
            return SEMICOLON
        if len(bins) != LOCATIONS or len(codes) not in (0, CODES) or "<" in label:
            return MALFORMED
        if bins[2] <= bins[0] or bins[3] <= bins[1]:
            return WITHOUT_AREA
        if label and label not in names:
            return NOT_ASKED
    return None


def _split(
    examples: Sequence[Example], share: float, hashes: Mapping[str, bytes]
) -> tuple[list[Example], list[Example]]:
    """(to learn from, to measure on): whole pictures, by the hashes of their contents, as in shards each question has
    its own copy of its picture. Raises UsageError."""
    images = sorted({hashes[one.image] for one in examples})
    if len(images) < 2:
        raise UsageError("one picture cannot be both trained and measured on: give --val another set")
    held = set(images[: min(max(1, round(share * len(images))), len(images) - 1)])
    train = [one for one in examples if hashes[one.image] not in held]
    return train, [one for one in examples if hashes[one.image] in held]


class Draw(NamedTuple):
    """An example with one of its answers. seed: of how both are changed; None leaves them as they are."""

    example: Example
    answer: str
    seed: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Changes:
    """augment: of augment.augment. noise_boxes: of an answer to `detect`, with those that are true; 0 for none."""

    augment: tuple[Change, ...] = ()
    noise_boxes: int = 0


def ordered(examples: Sequence[Example], seed: int, epoch: int) -> list[Draw]:
    """Each example once, with one of its answers, in an order that follows from the seed and the epoch alone."""
    random = np.random.default_rng([seed, epoch])
    order, draws = random.permutation(len(examples)).tolist(), random.integers(0, 1 << 30, len(examples)).tolist()
    return [
        Draw(one := examples[n], one.suffixes[draw % len(one.suffixes)], (seed, epoch, n + 1))
        for n, draw in zip(order, draws, strict=True)
    ]


class Collator:
    """Examples → a model's inputs, by Hugging Face's processor; pictures decoded as a job decodes them.

    The pictures of shards, which cannot be read in any order, are first unpacked into a folder of their own. Raises
    UsageError where one is not there any more.
    """

    def __init__(
        self,
        processor: Any,
        info: PaliGemmaInfo,
        storage: Storage,
        examples: Iterable[Example] = (),
        changes: Changes | None = None,
    ) -> None:
        self.processor, self.info, self.storage, self.changes = processor, info, storage, changes or Changes()
        self.masks = Masks.load(Path(info.path) / MASKS) if self.changes.augment and MASKS in info.files else None
        ids = processor.tokenizer.convert_tokens_to_ids([f"<loc{n:04}>" for n in range(BINS)])
        self.locations = torch.tensor(ids)
        processor.tokenizer.padding_side = "left"  # so that answers end together
        self.unpacked: dict[str, Path] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="shardsight-pictures-")  # deleted with the Collator
        for number, (image, data) in enumerate(encoded((one for one in examples if one.shard), storage)):
            if isinstance(data, Failure):
                raise UsageError(f"{image} could be read before, and now cannot: {data}")
            self.unpacked[image] = Path(self.folder.name) / str(number)
            self.unpacked[image].write_bytes(data)

    def frames(self, examples: Iterable[Example]) -> list[tuple[np.ndarray, int, int]]:
        """RGB uint8 (h, w, 3), and width and height of the picture, of each."""
        return [decode(self._read(one.image), self.info.input.needed_size) for one in examples]

    def _read(self, image: str) -> bytes:
        return self.unpacked[image].read_bytes() if image in self.unpacked else fetch(image, self.storage)

    def train(self, batch: Sequence[Draw]) -> Any:
        """With `labels`, -100 but for the answer's tokens; `token_type_ids`, without which all would see all."""
        frames, answers, true = zip(*map(self._drawn, batch), strict=True)
        inputs = self._inputs(list(frames), [one.example.prefix for one in batch], suffix=list(answers))
        for labels, count in zip(inputs["labels"], true, strict=True):
            if count is not None:
                places = torch.isin(labels, self.locations).nonzero()[:, 0]
                labels[places[count * LOCATIONS :]] = -100  # where noise boxes are
        return inputs

    def _drawn(self, draw: Draw) -> tuple[np.ndarray, str, int | None]:
        """The picture, the answer, and how many of its boxes are true, where others are noise."""
        example, answer, seed = draw
        augment_by = self.changes.augment if seed else ()
        frame, *_ = decode(
            self._read(example.image), self._needed_of_crops if augment_by else self.info.input.needed_size
        )
        if seed is None:
            return frame, answer, None
        random = np.random.default_rng(seed)
        frame, answer = augment(frame, example.prefix, answer, augment_by, random, self.masks)
        return frame, *with_noise(example.prefix, answer, self.changes.noise_boxes, random)

    def _needed_of_crops(self, width: int, height: int) -> tuple[int, int]:
        needed = self.info.input.needed_size(width, height)
        return min(width, math.ceil(needed[0] / LEAST_SIDE)), min(height, math.ceil(needed[1] / LEAST_SIDE))

    def ask(self, images: list[np.ndarray], prefixes: Sequence[str]) -> Any:
        """Without answers."""
        inputs = self._inputs(images, prefixes)
        inputs.pop("labels")
        return inputs

    def _inputs(self, images: list[np.ndarray], prefixes: Sequence[str], **more: Any) -> Any:
        text = [f"<image>{prefix}" for prefix in prefixes]
        return self.processor(images=images, text=text, return_tensors="pt", padding="longest", **more)
