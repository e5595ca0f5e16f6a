"""Fine-tune PaliGemma: `python -m tune.paligemma --data train.jsonl --model paligemma2-3b-pt-448 --output DIR`.

`--help` has the rest.
"""

import sys
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliToggleFlag

from shardsight.errors import UsageError
from shardsight.sources import absolute
from shardsight.storage import Storage
from tune import command
from tune.space import Range

_OF = (
    "image, prefix and suffix as JSONL, Parquet or WebDataset tars; VQA JSON; or labelled objects, as COCO JSON, a "
    "data.yaml or RefCOCO's refs.json"
)
_LR = {"all": (3e-6, 3e-5), "decoder": (3e-6, 3e-5), "lora": (3e-5, 1e-3)}  # of the default space


class Settings(command.Sweeping):
    """Search the hyperparameters of PaliGemma's fine-tuning. With --samples 1 --space none it is one training."""

    data: str = Field(description=f"what to learn, local or in a store: {_OF}")
    val: str | None = Field(None, description="what to measure on, likewise; by default pictures of --data")
    split: float = Field(0.1, gt=0, lt=1, description="share of the pictures of --data to measure on, without --val")
    task: Literal["detect", "segment"] = Field(
        "detect", description="how labelled objects are asked for; segment needs masks, and vae-oid.npz in the model"
    )
    model: str | None = Field(
        None, description="a PaliGemma 1 or 2 to start from: a folder, a store's prefix, or its name on the hub"
    )
    epochs: int = Field(10, ge=1, description="epochs of a trial that is not stopped")
    space: str | dict[str, Any] | None = Field(
        None,
        description="YAML with hyperparameters, as `lr: loguniform 3e-6 3e-5`, `weights: choice all decoder`; `none` "
        "searches nothing; by default lr, label_smoothing, dropout and weight_decay as in PaliGemma's papers",
    )
    search: Literal["optuna", "random", "grid"] | None = Field(None, description="optuna; random with --scheduler pbt")
    train: dict[str, str] = Field(
        {},
        description="hyperparameters, repeatable, as weights=lora: weights (all, decoder, lora), lr, batch, "
        "micro_batch (pictures in memory), warmup, clip, label_smoothing, dropout, weight_decay, rank, checkpointing",
    )
    merge: CliToggleFlag[bool] = Field(False, description="fold the LoRA into its model: best/ is a whole model")
    max_length: int = Field(512, ge=8, description="tokens of a prompt with its answer; longer ones are left out")
    augment: list[Literal["flip", "crop"]] = Field(
        [],
        description="repeatable, flip or crop: pictures with their boxes and masks, anew each epoch; only of detect "
        "and segment, and not where a prompt or answer says where something is, as `left`",
    )
    noise_boxes: int = Field(
        0, ge=0, description="boxes of an answer to detect, filled up with random ones of the label noise; 0 for none"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of computing; auto is bf16 where the machine has it. Trained weights are fp32"
    )
    workers: int = Field(
        1, ge=1, description="processes of a trial, which share each batch; each has --gpus-per-trial and a model"
    )
    save_steps: int = Field(500, ge=0, description="steps between checkpoints within an epoch; 0 for none")

    @field_validator("data", "val")
    @classmethod
    def _place(cls, value: str | None) -> str | None:
        return None if value is None else absolute(value)

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.workers > 1 and 0 < (self.gpus_per_trial or 0) < 1:
            raise ValueError("--workers each take a whole GPU: leave --gpus-per-trial out, or give 1")
        return self


_HELP = (
    {
        **{
            "data": "PATH",
            "val": "PATH",
            "split": "0..1",
            "task": "detect|segment",
            "model": "PATH or NAME",
            "output": "PATH",
        },
        **{"max_length": "N", "storage": "KEY=VALUE"},
    },
    {
        "epochs": "N",
        "train": "NAME=VALUE",
        "merge": "",
        "augment": "NAME",
        "noise_boxes": "N",
        "precision": "auto|fp32|bf16",
        "save_steps": "N",
        "workers": "N",
    },
)
_EXAMPLES = """Examples:
  {command} --data train.jsonl --model paligemma-3b-pt-224 --output sweep
  {command} --data train.jsonl --model pt-224 --output lora --samples 1 --space none --train weights=lora
  {command} --data coco.json --model pt-448 --output sweep --space space.yaml --gpus-per-trial 1
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep as the command line says; returns the exit code."""
    return command.main("tune.paligemma", Settings, plan, _HELP, _EXAMPLES, arguments)


def plan(settings: Settings) -> Any:
    """The sweep (sweep.Sweep) that the settings ask for, after a look at model and data. Raises UsageError."""
    from transformers import AutoTokenizer

    from shardsight.models.paligemma.info import inspect
    from tune import paligemma_training as training
    from tune import search
    from tune.paligemma_data import Asked, Changes, inspect_data

    lr = _LR.get(settings.train.get("weights", "all"), _LR["all"])
    ranges = {"lr": Range("loguniform", lr), "label_smoothing": Range("choice", (0.0, 0.1, 0.3))}
    ranges |= {"dropout": Range("choice", (0.0, 0.1, 0.3)), "weight_decay": Range("choice", (0.0, 0.1))}
    missing = "give a PaliGemma to start from, a folder or its name on the hub"
    models, space = command.models_of(settings, command.space_of(settings, training.HYPERPARAMETERS, ranges), missing)
    weights = space.ranges["weights"].values if "weights" in space.ranges else [space.fixed.get("weights", "all")]
    if unknown := [one for one in weights if one not in training.LR]:
        raise UsageError(f"weights {unknown[0]}: choose from {', '.join(training.LR)}")
    if settings.merge and list(weights) != ["lora"]:
        raise UsageError("--merge folds a LoRA in: give --train weights=lora, too")
    storage = Storage(settings.storage)
    info = inspect(models[0], storage=storage)
    tokenizer = AutoTokenizer.from_pretrained(info.path)
    asked = Asked(
        *(settings.data, settings.val, settings.split, settings.task, settings.max_length), settings.noise_boxes
    )
    data = inspect_data(asked, info, tokenizer, storage)
    request = training.Request(
        model=models[0],
        train=data.train,
        val=data.val,
        epochs=settings.epochs,
        seed=settings.seed,
        longest=data.longest,
        settings=space.fixed,
        changes=Changes(tuple(settings.augment), settings.noise_boxes),
        merge=settings.merge,
        precision=settings.precision,
        save_steps=settings.save_steps,
        threads=settings.cpus_per_trial,
        workers=settings.workers,
        storage=settings.storage,
    )
    trainable = partial(training.train, request=request)
    defaults = training.HYPERPARAMETERS | {"lr": training.LR[weights[0]], "model": models[0]}
    searcher = partial(search.searcher, settings.chosen, space, settings.seed, defaults)
    base = {"model": settings.model, "sha256": info.sha256}
    about = {"task": "text", "base": base, "data": data.about(settings.data)}
    packages = ("transformers", "peft")
    return command.sweep_of(settings, space, trainable, searcher, about, packages, settings.workers)


if __name__ == "__main__":
    sys.exit(main())
