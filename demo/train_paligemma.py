"""Train the demo's PaliGemma on made-up scenes: `python -m demo.train_paligemma --work DIR`.

Scenes are drawn, the masks' VQ-VAE is trained, then the tower alone (paligemma_tower.py), then the whole model
(paligemma_talk.py); the result replaces demo/weights/paligemma, with what it reached on scenes that
it never saw in figures.json. Each stage leaves a checkpoint in DIR, so that a stopped run goes on where it was.
With `--further SEED` training starts from the weights that are there, on scenes of that seed.

Each core trains by itself on parameters that all share, without waiting for the others (Hogwild, Niu et al.,
arXiv 1106.5730): on a machine with other work, two threads that wait for each other get a third as much done.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch.nn import functional as F

from demo.paligemma_answers import answers
from demo.paligemma_data import Drawn, Shards, draw_shards
from demo.paligemma_model import build, parameters, processor, tokenizer
from demo.paligemma_start import READ, reading_losses, start_projector, start_tower, told
from demo.paligemma_talk import WORTH, Teacher, Writer, collate, conversation, pack
from demo.paligemma_tower import PATCH, Probe, augment, targets
from demo.questions import about
from demo.scenes import scenes
from demo.score import answer_figures
from demo.train_masks import MaskEncoder, train_masks
from shardsight.models.info import computes_bf16

TRAIN_SEED, UNSEEN_SEED = 30000, 31000
SHARDS = 80  # of 250 scenes
BATCH = 8  # pictures
TALKS = 4  # pictures, of a dozen questions each
# Matrices in bf16 where the CPU computes in it: half the time.
HALVES = computes_bf16()
WEIGHTS, VQVAE = Path(__file__).parent / "weights" / "paligemma", "vae-oid.npz"


class Learner:
    """A model in training: what the processes share, and what is kept between runs."""

    def __init__(self, work: Path, name: str, minutes: float, vqvae: Path) -> None:
        self.model, self.minutes, self.vqvae = build(), minutes, vqvae
        self.probe = Probe(self.model.config.vision_config.hidden_size, self.model.config.text_config.hidden_size)
        self.path = work / f"{name}.pt"
        self.work = work
        self.spent = mp.get_context("spawn").Value("d", 0.0)  # minutes of wall clock
        self.seen = mp.get_context("spawn").Value("q", 0)  # pictures
        self.optimizer_state: dict[str, Any] | None = None
        self.averaged: dict[str, torch.Tensor] | None = None
        if self.path.exists():
            state = torch.load(self.path, weights_only=False)
            self.model.load_state_dict(state["model"])
            self.probe.load_state_dict(state["probe"])
            self.spent.value, self.seen.value = state["spent"], state["seen"]
            self.optimizer_state, self.averaged = state["optimizer"], state["averaged"]

    def save(self, optimizer: Any) -> None:
        state = {"model": self.model.state_dict(), "probe": self.probe.state_dict(), "averaged": self.averaged}
        state |= {"optimizer": optimizer.state_dict(), "spent": self.spent.value, "seen": self.seen.value}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.path)

    @property
    def part(self) -> float:
        """Of the time, how much is over."""
        return float(min(self.spent.value / self.minutes, 1))


def together(learner: Learner, loop: Callable[[Learner, int], None]) -> None:
    """Run the loop in as many processes as there are cores, this one among them."""
    torch.set_num_threads(1)
    learner.model.share_memory()
    learner.probe.share_memory()
    others = [
        mp.get_context("spawn").Process(target=_other, args=(loop, learner, rank), daemon=True)
        for rank in range(1, os.cpu_count() or 1)
    ]
    for process in others:
        process.start()
    loop(learner, 0)
    for process in others:
        process.join()


def _other(loop: Callable[[Learner, int], None], learner: Learner, rank: int) -> None:
    torch.set_num_threads(1)
    loop(learner, rank)


def steps(learner: Learner, rank: int, optimizer: Any, batch: int) -> Iterator[int]:
    """Numbers of steps until the time is over; sets learning rates, keeps time, speaks and saves on the way."""
    if learner.optimizer_state:
        optimizer.load_state_dict(learner.optimizer_state)
    last = saved = time.monotonic()
    step = 0
    while learner.part < 1:
        for group in optimizer.param_groups:
            warm = min(1.0, learner.seen.value / 2000 + 0.02)
            group["lr"] = group["most"] * warm * (0.03 + 0.97 * _cosine(learner.part))
        yield step
        step += 1
        with learner.seen.get_lock():
            learner.seen.value += batch
        now = time.monotonic()
        if rank == 0:
            learner.spent.value += min(now - last, 30) / 60  # not what it stood still
            if now - saved > 120 or learner.part >= 1:
                learner.save(optimizer)
                saved = now
        else:
            _follow_first()
        last = now


def _follow_first() -> None:
    """What stops the first process, a SIGSTOP, stops all; what ends it, too."""
    first = mp.parent_process()
    assert first is not None
    status = Path(f"/proc/{first.pid}/stat")
    while first.is_alive() and status.exists() and status.read_text().rpartition(")")[2].split()[0] == "T":
        time.sleep(0.5)
    if not first.is_alive():
        raise SystemExit


def train_tower(learner: Learner, rank: int) -> None:
    rng = np.random.default_rng([learner.seen.value, rank])
    torch.manual_seed(rank)
    tower, probe = learner.model.model.vision_tower, learner.probe
    slow, quick = _by_pace(tower)
    groups = [{"params": slow, "most": 1e-4}, {"params": [*quick, *probe.parameters()], "most": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98), fused=True)
    pictures = _patches(Shards(learner.work / "scenes"), rng)
    table, means = _locations(learner.model, Writer(tokenizer()).loc0), Means()
    for step in steps(learner, rank, optimizer, BATCH):
        images, wanted = next(pictures)
        # At first those that gather learn from the truth, then more and more from what was read.
        which = torch.rand(len(images)) < 1 - 4 * learner.part
        with torch.autocast("cpu", torch.bfloat16, enabled=HALVES):
            features, read, early = _through(tower, images, wanted, which)
        losses = probe.losses(features.float(), wanted, table) | reading_losses(read, wanted)
        sooner = probe.losses(early.float(), wanted, table)
        losses |= {f"{name} sooner": sooner[name] for name in ("kind", "box", "letters")}
        _descend(optimizer, _weighed(losses))
        means.add(losses)
        if rank == 0 and step % 100 == 99:
            means.say("tower", learner)
        if rank == 0 and step % 400 == 399:
            _examine(learner)


def _by_pace(tower: Any) -> tuple[list[Any], list[Any]]:
    """Parameters that must not move fast, and the others. A step of 1e-3 in the weight of each of a patch's 1,728
    pixels, which are alike, would move its vector by its own length; and whom to look at is known from the start."""
    slow = {id(parameter) for parameter in tower.embeddings.parameters()}
    slow |= {id(one) for name, one in tower.named_parameters() if "q_proj" in name or "k_proj" in name}
    parameters = [*tower.parameters()]
    return [one for one in parameters if id(one) in slow], [one for one in parameters if id(one) not in slow]


def _through(
    tower: Any, images: torch.Tensor, wanted: dict[str, torch.Tensor], which: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tower's features, what was read, and features two layers before the last; `which` are told the truth."""
    stream = tower.embeddings(pixels(images))
    streams: list[torch.Tensor] = []
    for layer in tower.encoder.layers:
        if len(streams) == READ:
            stream = told(stream, wanted, which)
        stream = layer(stream, None)
        streams.append(stream)
    return tower.post_layernorm(stream), streams[READ - 1], tower.post_layernorm(streams[-3])


_WEIGHTS = {"order": 0.5, "order of kind": 0.3, "words before": 0.3, "of kind": 0.3, "shapes": 0.3, "largest": 0.5}
_WEIGHTS |= {"kind sooner": 0.5, "box sooner": 0.5, "letters sooner": 0.5}


def _weighed(losses: dict[str, torch.Tensor]) -> Any:
    return sum(_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items())


def _patches(shards: Shards, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Pictures with words printed on them, and what their patches should answer, for ever."""
    while True:
        order = rng.permutation(len(shards))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            changed = [augment(shards[int(number)], rng, words=True) for number in order[start : start + BATCH]]
            yield _stack([drawn.image for drawn, _ in changed]), _dense(changed)


def _dense(changed: list[tuple[Drawn, Any]]) -> dict[str, torch.Tensor]:
    wanted = [targets(drawn, readable) for drawn, readable in changed]
    return {name: _stack([one[name] for one in wanted]) for name in wanted[0]}


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


@torch.no_grad()
def _examine(learner: Learner) -> None:
    """Say how much of it the patches of unseen pictures answer rightly."""
    shards = Shards(learner.work / "scenes-unseen")
    drawn = [shards[number] for number in range(64)]
    words = [[(str(s.word), box) for s, box in zip(one.shapes, one.words, strict=True) if box] for one in drawn]
    images = pixels(_stack([one.image for one in drawn]))
    features = learner.model.model.vision_tower(images).last_hidden_state
    _say("unseen", learner, learner.probe.right(features, _dense(list(zip(drawn, words, strict=True)))))


def train_words(learner: Learner, rank: int) -> None:
    """Teach the decoder to answer, and the tower with it."""
    rng = np.random.default_rng([learner.seen.value, rank, 1])
    torch.manual_seed(rank)
    model, probe = learner.model, learner.probe
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    writer = Writer(tokenizer())
    teacher = Teacher(model, writer.loc0)
    slow, gentle = _by_pace(tower)
    known = {id(parameter) for parameter in tower.parameters()}
    quick = [parameter for parameter in model.parameters() if id(parameter) not in known] + [*probe.parameters()]
    groups = [{"params": slow, "most": 1e-4}, {"params": gentle, "most": 3e-4}, {"params": quick, "most": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    if learner.averaged is None:
        learner.averaged = {name: value.clone() for name, value in model.state_dict().items()}
    pictures = _patches(Shards(learner.work / "scenes"), rng)
    talks = _talks(learner, writer, MaskEncoder.load(learner.vqvae), rng)
    locations, means = _locations(model, writer.loc0), Means()
    for step in steps(learner, rank, optimizer, TALKS):
        images, wanted, packed, alone = next(talks)
        # What a decoder wants that has learnt nothing yet would undo what the tower has learnt.
        alone_first = learner.part < 0.45
        with torch.autocast("cpu", torch.bfloat16, enabled=HALVES):
            with torch.set_grad_enabled(not alone_first):
                features = tower(pixels(images)).last_hidden_state
            projected = projector(features)
            losses = teacher(projected, packed, wanted["owner"], alone=False)
        loss = sum(WORTH[name] * value for name, value in losses.items())
        dense: dict[str, torch.Tensor] = {}
        if not alone_first:
            dense = probe.losses(features.float(), wanted, locations)
            loss = loss + 0.5 * _weighed(dense)
            if step % 2 == 0:  # scenes have few words, and the tower would forget how to read
                printed, readable = next(pictures)
                with torch.autocast("cpu", torch.bfloat16, enabled=HALVES):
                    features = tower(pixels(printed)).last_hidden_state
                loss = loss + 0.5 * _weighed(probe.losses(features.float(), readable, locations))
        if step % 3 == 0:
            with torch.autocast("cpu", torch.bfloat16, enabled=HALVES):
                each = teacher(projected, alone, wanted["owner"], alone=True)
            loss = loss + 0.5 * sum(WORTH[name] * value for name, value in each.items())
            losses |= {f"{name} alone": value for name, value in each.items()}
        before = locations.clone()
        _descend(optimizer, loss)
        # Whole steps would soon undo the likeness of neighbouring <loc> tokens, whose vectors are of that size.
        with torch.no_grad():
            locations.lerp_(before, 0.9)
        means.add(losses | {f"tower {name}": dense[name] for name in ("kind", "box", "word here") if dense})
        if rank == 0:
            _average(learner.averaged, model.state_dict(), min(0.99, 1 - 2 / (step + 2)))
            if step % 50 == 49:
                means.say("words", learner)


@torch.no_grad()
def _average(averaged: dict[str, torch.Tensor], now: dict[str, torch.Tensor], keep: float) -> None:
    for name, value in now.items():
        averaged[name].lerp_(value, 1 - keep)


def _talks(
    learner: Learner, writer: Writer, encoder: MaskEncoder, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, Any, Any, Any]]:
    """Pictures, what their patches should answer, all questions packed, and one question of each alone."""
    shards = Shards(learner.work / "scenes")
    while True:
        order = rng.permutation(len(shards))
        for start in range(0, len(order) - TALKS + 1, TALKS):
            numbers = [int(number) for number in order[start : start + TALKS]]
            changed = [augment(shards[number], rng, words=False) for number in numbers]
            written = [
                [
                    writer.write(prefix, suffix, [drawn.shapes.index(one) for one in about(prefix, drawn.shapes)])
                    for prefix, suffix in conversation(drawn, encoder.encode(drawn.masks / 255), rng)
                ]
                for drawn, _ in changed
            ]
            alone = [pack([one[rng.integers(len(one))]]) for one in written]
            images = _stack([drawn.image for drawn, _ in changed])
            yield images, _dense(changed), collate([pack(one) for one in written]), collate(alone)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, H, W, 3) → float32 (n, 3, H, W) in [-1, 1], as the processor makes them."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


class Means:
    """Losses, averaged over the last fifty steps or so."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, loss in losses.items():
            self._means[name] = self._means.get(name, loss.item()) * 0.98 + 0.02 * loss.item()

    def say(self, what: str, learner: Learner) -> None:
        _say(what, learner, self._means)


def _say(what: str, learner: Learner, figures: dict[str, float]) -> None:
    line = " ".join(f"{name.replace(' ', '-')} {value:.3f}" for name, value in figures.items())
    print(f"{what} {learner.spent.value:.1f} min {learner.seen.value} pictures: {line}", flush=True)


def _descend(optimizer: Any, loss: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def _locations(model: Any, first: int) -> torch.Tensor:
    """The vectors of the `<loc>` tokens; first: the id of `<loc0000>`."""
    table: torch.Tensor = model.get_input_embeddings().weight[first : first + 1024].detach()
    return table


def _cosine(part: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * part)


def publish(learner: Learner, out: Path = WEIGHTS) -> None:
    """The averaged weights in bf16, the processor and the masks' VQ-VAE, as a model folder."""
    assert learner.averaged is not None
    model = build()
    model.load_state_dict(learner.averaged)
    for old in out.glob("model*"):
        old.unlink()
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="9MB")  # as no file here is larger than 10
    processor().save_pretrained(out)
    if learner.vqvae.resolve() != (out / VQVAE).resolve():
        shutil.copy(learner.vqvae, out / VQVAE)
    for part in out.glob("model*.safetensors"):
        part.chmod(0o644)  # written as a temporary file


def measure(learner: Learner, count: int, out: Path = WEIGHTS) -> dict[str, Any]:
    """The folder's answers about unseen scenes against their truth; written to figures.json in it."""
    torch.set_num_threads(os.cpu_count() or 1)
    made = list(scenes(count, UNSEEN_SEED + 1))
    figures: dict[str, Any] = answer_figures(made, answers(out, made))
    figures |= {"scenes": count, "seed": UNSEEN_SEED + 1, "parameters": parameters(learner.model)}
    for stage in (Learner(learner.work, "tower", 1, learner.vqvae), learner):
        figures |= {
            f"{stage.path.stem}: pictures": stage.seen.value,
            f"{stage.path.stem}: minutes": round(stage.spent.value),
        }
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where scenes and checkpoints go")
    parser.add_argument("--tower-minutes", type=float, default=40, help="for the tower alone")
    parser.add_argument("--minutes", type=float, default=120, help="for the whole model")
    parser.add_argument("--unseen", type=int, default=200, help="scenes to measure on")
    parser.add_argument("--further", type=int, metavar="SEED", help="go on from the weights that are there")
    parser.add_argument("--publish", action="store_true", help="train no more: measure the last checkpoint as it is")
    args = parser.parse_args()
    name = "words" if args.further is None else f"words-{args.further}"
    work = args.work if args.further is None else args.work / str(args.further)
    vqvae = work / VQVAE if args.further is None else WEIGHTS / VQVAE
    if not args.publish:
        draw_shards(work / "scenes-unseen", range(1), UNSEEN_SEED)
        draw_shards(work / "scenes", range(SHARDS), TRAIN_SEED if args.further is None else args.further)
        _train(args, work, name, vqvae)
    learner = Learner(work, name, args.minutes, vqvae)
    publish(learner)
    print(json.dumps(measure(learner, args.unseen)))


def _train(args: argparse.Namespace, work: Path, name: str, vqvae: Path) -> None:
    if not vqvae.exists():
        masks = [np.load(path) for path in sorted((work / "scenes").glob("*-masks.npy"))[:30]]
        train_masks(np.concatenate(masks), vqvae)
    torch.manual_seed(0)
    words = Learner(work, name, args.minutes, vqvae)
    if not words.seen.value and args.further is not None:
        words.model.load_state_dict(_published())
        torch.nn.init.zeros_(words.probe.linear.weight)  # it is new, and must not pull at a tower that is not
    elif not words.seen.value:
        tower = Learner(work, "tower", args.tower_minutes, vqvae)
        shards = Shards(work / "scenes")
        some = pixels(_stack([shards[number * 40].image for number in range(100)]))
        if not tower.seen.value:
            start_tower(tower.model.model.vision_tower, F.unfold(some, PATCH, stride=PATCH).mT.flatten(0, 1))
        if tower.part < 1:
            together(tower, train_tower)
        words.model.load_state_dict(tower.model.state_dict())
        words.probe.load_state_dict(tower.probe.state_dict())
        with torch.no_grad():
            features = words.model.model.vision_tower(some).last_hidden_state.flatten(0, 1)
        start_projector(words.model.model.multi_modal_projector, words.probe, features)
    together(words, train_words)


def _published() -> dict[str, torch.Tensor]:
    from transformers import PaliGemmaForConditionalGeneration

    return dict(PaliGemmaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).state_dict())


if __name__ == "__main__":
    main()
