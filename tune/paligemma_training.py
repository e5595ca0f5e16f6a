"""One trial: PaliGemma fine-tuned whole, without its tower, or by LoRA; reported each epoch, resumed to the step.

As in PaliGemma's papers (arXiv 2407.07726, 3.2.4; 2412.03555): pictures and prompts see all of each other, answers what
is before them, and only answers are learnt; Adam, cosine with warm-up, gradients clipped. The loss is the mean over the
tokens of all answers of a step, however many parts it is computed in, as Hugging Face's `num_items_in_batch` has it;
big_vision takes the mean of each answer first.
"""

import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray import tune
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)

from shardsight.errors import UsageError
from shardsight.evaluation.measuring import Rows, main_of, measure
from shardsight.models.info import computes_bf16
from shardsight.models.paligemma.answers import Answers, Generated
from shardsight.models.paligemma.info import MASKS, PaliGemmaInfo, inspect
from shardsight.models.paligemma.masks import paste
from shardsight.models.paligemma.prompts import Prompt
from shardsight.sources.files import ahead
from shardsight.storage import Storage
from shardsight.truth import Sample, Truth
from tune.paligemma_data import Changes, Collator, Draw, Example, ordered
from tune.paligemma_workers import ALONE, Group, WorkerDied, started
from tune.sweep import report_failure

# Hyperparameters, and what they are by default; see also LR.
HYPERPARAMETERS: dict[str, Any] = {
    **{"model": None, "weights": "all", "lr": None, "batch": 16, "micro_batch": 4, "warmup": 0.05, "clip": 1.0},
    **{"label_smoothing": 0.0, "dropout": 0.0, "weight_decay": 0.0, "rank": 8, "checkpointing": None},
}
LR = {"all": 1e-5, "decoder": 1e-5, "lora": 1e-4}  # by what is trained
# Those of the language model alone, which every server of LoRAs takes; a list of names would hit the tower, too.
_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
_STATE, _BEST = "state.pt", "best"  # what a trial goes on from; what its sweep may take
_OTHER_FILES = ("generation_config.json", MASKS)  # of a model, besides what Hugging Face saves
_SHARD = "2GB"


@dataclass
class Progress:
    """What a trial has done. step: of the optimizer. best: fitness. loss, tokens, seconds: sums over the epoch so
    far."""

    step: int = 0
    best: float = 0.0
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """What all trials have in common.

    settings: hyperparameters, where a trial says nothing. changes: of what is learnt, anew each epoch. longest: tokens
    of a right answer, at most. merge: fold a LoRA into its model. precision: auto, fp32 or bf16. save_steps: steps
    between checkpoints within an epoch; 0 for none. workers: processes of a trial, which share each batch.
    """

    model: str
    train: Sequence[Example]
    val: Sequence[Example]
    epochs: int
    seed: int
    longest: int
    settings: dict[str, Any] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)
    merge: bool = False
    precision: str = "auto"
    save_steps: int = 0
    threads: int = 1
    workers: int = 1
    storage: dict[str, str] = field(default_factory=dict)


def train(config: dict[str, Any], request: Request) -> None:
    """Tune's trainable. config: the trial's hyperparameters.

    Reports each epoch's metrics and a checkpoint; a failure as sweep.report_failure does. Only a process that dies is
    restarted.
    """
    try:
        work = functools.partial(_train, config, request, tune.get_checkpoint())
        with started(request.workers, work) as group:
            work(group)
    except WorkerDied:
        raise  # and Tune starts the trial again, as if this process had died
    except torch.OutOfMemoryError as error:
        report_failure(error, "the GPU's memory is too small: lower micro_batch, or train weights=lora")
    except UsageError as error:
        report_failure(error, " ".join(str(error).split()))
    except Exception as error:
        report_failure(error)


def _train(config: dict[str, Any], request: Request, saved: tune.Checkpoint | None, group: Group) -> None:
    """The part of one process in a trial, the first of which reports."""
    torch.set_num_threads(request.threads)
    with tempfile.TemporaryDirectory(prefix="shardsight-trial-") as name:
        run = Path(name)
        if saved:
            saved.to_directory(run)

        def report(values: dict[str, Any]) -> None:
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(run))

        Trial(run, request, config, report, group).train()


def load(info: PaliGemmaInfo, settings: dict[str, Any], bf16: bool, device: str) -> Any:
    """The model, in fp32 where it is trained. Raises UsageError where it cannot fit the memory."""
    needed = memory(info, settings, bf16)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"{info.path} takes at least {needed / 2**30:.1f} GiB to train with weights={settings['weights']}, and "
            f"{free / 2**30:.1f} are free: train weights=lora, or a smaller model, or on a larger machine"
        )
    # The attention that knows Gemma 2's softcapping, as vLLM does; PyTorch's own leaves it out.
    attention = "sdpa" if info.window is None else "eager"
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        info.path, dtype=torch.float32, attn_implementation=attention
    )
    model = prepared(model, settings)
    if bf16:
        for weight in model.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)
    chosen = settings["checkpointing"]
    if device == "cuda" if chosen is None else chosen:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device)


def prepared(model: Any, settings: dict[str, Any]) -> Any:
    """The model with its trained weights chosen: all, all but the tower's (decoder), or a LoRA of the decoder's."""
    if settings["weights"] not in LR:
        raise UsageError(f"weights is {settings['weights']}: choose from {', '.join(LR)}")
    if settings["weights"] == "lora":
        rank = int(settings["rank"])
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=settings["dropout"], target_modules=_TARGETS)
        return get_peft_model(model, lora)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = settings["dropout"]
    model.model.vision_tower.requires_grad_(settings["weights"] == "all")
    return model


def memory(info: PaliGemmaInfo, settings: dict[str, Any], bf16: bool) -> int:
    """Bytes of weights, gradients and Adam's two means; activations come on top. From the config alone."""
    with torch.device("meta"):
        model = prepared(PaliGemmaForConditionalGeneration(AutoConfig.from_pretrained(info.path)), settings)
    return sum(one.numel() * (16 if one.requires_grad else 2 if bf16 else 4) for one in model.parameters())


def loss_of(model: Any, inputs: Any, smoothing: float) -> torch.Tensor:
    """The sum over the answers' tokens. inputs: of Collator.train, padded left.

    smoothing: shared among all other tokens, as in big_vision; PyTorch's own counts the right one among them.
    """
    labels = inputs.pop("labels")
    count = labels.shape[1] - int((labels >= 0).any(0).nonzero()[0])  # a place in an answer may have no label
    # Only where answers are: logits of all places would be 257,152 numbers for each token of the picture.
    logits = model(**inputs, logits_to_keep=count + 1, use_cache=False).logits[:, :-1].float()
    words = logits.shape[-1]
    shared = smoothing * words / (words - 1)
    return F.cross_entropy(logits.flatten(0, 1), labels[:, -count:].flatten(), reduction="sum", label_smoothing=shared)


def optimizer_of(model: Any, weight_decay: float) -> torch.optim.AdamW:
    """Weights decay, biases and norms do not."""
    trained = [one for one in model.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in trained if one.dim() > 1], "weight_decay": weight_decay},
        {"params": [one for one in trained if one.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def rate(step: int, total: int, warmup: float) -> float:
    """The share of the learning rate: linear to 1 over the share `warmup` of the steps, then a cosine to 0."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


class Trial:
    """A training that goes on from what is in `run`, a folder of this process. report: is given the metrics of each
    epoch, or that it is `partial`, when the folder holds a checkpoint. group: of processes that train together, of
    which the first reports."""

    def __init__(
        self,
        run: Path,
        request: Request,
        config: dict[str, Any],
        report: Callable[[dict[str, Any]], None],
        group: Group = ALONE,
    ) -> None:
        self.run, self.request, self.report, self.group = run, request, report, group
        self.settings = HYPERPARAMETERS | request.settings | config
        self.storage = Storage(request.storage)
        self.base: str = self.settings["model"] or request.model
        self.info = inspect(self.base, storage=self.storage)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        automatic = torch.cuda.is_bf16_supported() if self.device == "cuda" else computes_bf16()
        self.bf16 = request.precision == "bf16" or (request.precision == "auto" and automatic)
        self.processor = PaliGemmaProcessor.from_pretrained(self.info.path)
        self.collator = Collator(
            self.processor, self.info, self.storage, [*request.train, *request.val], request.changes
        )
        self.reader = Answers(self.processor.tokenizer, self.info.path)
        torch.manual_seed(request.seed)  # a LoRA starts at random
        self.model = load(self.info, self.settings, self.bf16, self.device)
        self.optimizer = optimizer_of(self.model, self.settings["weight_decay"])
        self.batches = math.ceil(len(request.train) / self.settings["batch"])  # in an epoch
        self.done = Progress()
        self._restore()

    def train(self) -> None:
        """Until the last epoch; PBT also wakes trials that are through."""
        every = self.request.save_steps
        for epoch in range(self.done.step // self.batches, self.request.epochs):
            began = time.monotonic()
            for batch in self._steps(epoch):
                self.step(batch)
                inside = self.done.step % self.batches
                if every and inside and inside % every == 0:
                    self.done.seconds += time.monotonic() - began
                    began = time.monotonic()
                    self._report({"partial": True, "fitness": self.done.best, "epoch": epoch})
            self._end(epoch, began)

    def _steps(self, epoch: int) -> Iterator[list[Any]]:
        """The parts of each step of an epoch that is still to be done, as far as this process computes them."""
        size, part = self.settings["batch"], self.settings["micro_batch"]
        examples = ordered(self.request.train, self.request.seed, epoch)[self.done.step % self.batches * size :]
        steps = (self.group.share(examples[n : n + size]) for n in range(0, len(examples), size))
        yield from ahead(
            lambda step: [self.collator.train(step[n : n + part]) for n in range(0, len(step), part)], steps, 2
        )

    def step(self, batch: list[Any]) -> float:
        """One step of the optimizer, on all parts of its batch; its loss."""
        step = self.done.step
        # Dropout follows from the step alone, and differs between processes.
        torch.manual_seed((self.request.seed * 1_000_003 + step) * self.group.count + self.group.rank)
        self.model.train()
        tokens = int(self.group.sum(sum(int((part["labels"] >= 0).sum()) for part in batch))[0])
        total = 0.0
        for part in batch:
            with self._autocast():
                loss = loss_of(self.model, part.to(self.device), self.settings["label_smoothing"]) / tokens
            loss.backward()
            total += float(loss.detach())
        (total,) = self.group.sum(total)
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss of step {step + 1} is {total}: lower lr")
        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        self.group.sum_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, self.settings["clip"])
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done.step += 1
        self.done.loss += total * tokens
        self.done.tokens += tokens
        return total

    def _rate(self, step: int) -> float:
        lr: float = self.settings["lr"] or LR[self.settings["weights"]]
        return lr * rate(step, self.batches * self.request.epochs, self.settings["warmup"])

    def _autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()

    def _end(self, epoch: int, began: float) -> None:
        """Measure, keep the best, report."""
        measured = self.measure()
        done, fitness = self.done, measured["fitness"]
        if self.group.rank == 0 and (not (self.run / _BEST).exists() or fitness > done.best):
            self._keep(self.run / _BEST)
        metrics = {"train/loss": done.loss / done.tokens, "lr/all": self._rate(done.step - 1)} | measured
        seconds = done.seconds + time.monotonic() - began
        self.done = Progress(done.step, max(fitness, done.best))
        more = {"best_fitness": self.done.best, "epoch": epoch + 1, "last": epoch + 1 == self.request.epochs}
        self._report(metrics | more | {"batch": self.settings["batch"], "seconds": seconds})

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        """fitness, by the main measure of jobs.evaluate; all of its measures; and the loss, of the right answers."""
        self.model.eval()
        val, size = self.request.val, self.settings["micro_batch"]
        own = self.group.share([val[n : n + size] for n in range(0, len(val), size)])
        loss, tokens = 0.0, 0
        answers: list[tuple[str, dict[str, Any]]] = []
        for part in own:
            inputs = self.collator.train([Draw(one, one.suffixes[0]) for one in part])
            tokens += int((inputs["labels"] >= 0).sum())
            with self._autocast():
                loss += float(loss_of(self.model, inputs.to(self.device), 0.0))
            answers += zip((one.image for one in part), self._answers(part), strict=True)
        loss, count = self.group.sum(loss, tokens)
        rows: dict[str, dict[str, Any]] = {}
        for image, answer in self.group.gather(answers):
            row = rows.setdefault(image, {"width": answer.pop("width"), "height": answer.pop("height")})
            row.setdefault("answers", []).append(answer)
        asked: dict[str, dict[str, list[str]]] = {}
        for one in val:
            asked.setdefault(one.image, {})[one.prefix] = list(one.suffixes)
        truth = Truth("text", {}, [Sample(image, asked=prompts) for image, prompts in asked.items()], {})
        found = measure(truth, Rows(rows, None), self._mask if self.reader.masks else None)
        kind, name = main_of(found)
        return {
            **{"val/loss": loss / count, "fitness": float(found[kind]["measures"][name]["value"] or 0.0)},
            **{
                f"metrics/{kind}: {name}": float(figure["value"] or 0.0)
                for kind, one in found.items()
                for name, figure in one["measures"].items()
            },
        }

    def _answers(self, part: Sequence[Example]) -> list[dict[str, Any]]:
        """Greedy answers, as rows have them, with the picture's width and height."""
        pictures = self.collator.frames(part)
        inputs = self.collator.ask([frame for frame, *_ in pictures], [one.prefix for one in part]).to(self.device)
        scores = _Scores()
        with self._autocast():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=self.request.longest + 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([scores]),
            )
        ends = self.model.generation_config.eos_token_id
        rows = []
        for n, (one, (_, width, height)) in enumerate(zip(part, pictures, strict=True)):
            own = ids[n, inputs["input_ids"].shape[1] :].tolist()
            stop = next((at + 1 for at, token in enumerate(own) if token in _listed(ends)), None)
            logprobs = [float(step[n]) for step in scores.best][:stop]
            generated = Generated(own[:stop], logprobs, "stop" if stop else "length")
            row = self.reader.row(Prompt.of(one.prefix), generated, width, height)
            rows.append(row | {"width": width, "height": height})
        return rows

    def _mask(self, codes: Sequence[int], box: Any, width: int, height: int) -> dict[str, Any]:
        assert self.reader.masks
        return paste(self.reader.masks.decode(torch.tensor([list(codes)]).numpy())[0], box, width, height)

    def _keep(self, folder: Path) -> None:
        """The model as `--paligemma` takes it, in its own precision; or the LoRA, as `--adapter` does."""
        shutil.rmtree(folder, ignore_errors=True)
        weights = self.model.state_dict()
        if self.settings["weights"] == "lora":
            place = Path(self.base)  # of this machine
            self.model.peft_config["default"].base_model_name_or_path = place.name if place.is_dir() else self.base
            self.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the hub about the base
            (folder / "README.md").unlink()  # a template, with that place in it
            if not self.request.merge:
                return
            weights = merged(self.info.path, folder)
            shutil.rmtree(folder)
        save(weights, self.info.path, self.processor, folder)

    def _report(self, values: dict[str, Any]) -> None:
        if self.group.rank:
            return
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        state = {
            "done": asdict(self.done),
            "model": {name: value for name, value in self.model.state_dict().items() if name in trained},
            "optimizer": self.optimizer.state_dict()["state"],
        }
        torch.save(state, self.run / _STATE)
        self.report(values)

    def _restore(self) -> None:
        path = self.run / _STATE
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.done = Progress(**state["done"])
        self.model.load_state_dict(state["model"], strict=False)
        # The groups stay those of this trial's weight decay, which PBT may have changed.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]})


class _Scores(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Keeps the log-probability of the likeliest token of each step, (answers,); all logits would be gigabytes."""

    def __init__(self) -> None:
        self.best: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.best.append(scores.float().log_softmax(-1).amax(-1).cpu())
        return scores


def merged(model: str, adapter: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a model with a LoRA folded into them, in fp32."""
    base = PaliGemmaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    return weights


def save(weights: dict[str, torch.Tensor], source: str, processor: Any, folder: Path) -> None:
    """A model like the one in the folder `source`, in its precision, with these weights."""
    kept = PaliGemmaForConditionalGeneration.from_pretrained(source, dtype="auto")
    kept.load_state_dict(weights)
    kept.save_pretrained(folder, max_shard_size=_SHARD)
    processor.save_pretrained(folder)
    for name in _OTHER_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
