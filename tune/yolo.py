"""Search the hyperparameters of YOLO training: `python -m tune.yolo --data data.yaml --model yolov8n.pt --output DIR`.

`--help` has the rest.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from shardsight.errors import UsageError
from tune import command
from tune.space import Range, Space


class Settings(command.Sweeping):
    """Search the hyperparameters of YOLO training with Ray Tune. With --samples 1 --space none it is one training."""

    data: str = Field(description="data.yaml as ultralytics has it; for classify, a folder with train/ and val/")
    model: str | None = Field(None, description="weights to start from (.pt), or an architecture, as yolov8n.yaml")
    imgsz: int = Field(640, ge=32, description="size of the pictures, pixels")
    space: str | dict[str, Any] | None = Field(
        None,
        description="YAML with hyperparameters, as `lr0: loguniform 1e-5 1e-1`, `batch: choice 8 16`, `mosaic: 0`; "
        "`none` searches nothing; by default the space of ultralytics' own tuner",
    )
    search: Literal["optuna", "random", "grid", "genetic"] | None = Field(
        None, description="optuna; random with --scheduler pbt. genetic is ultralytics' own algorithm"
    )
    train: dict[str, str] = Field(
        {},
        description="any training setting of ultralytics, repeatable, as batch=32; by default as its optimizer=auto",
    )
    callbacks: list[str] = Field(
        [], description="module:function, repeatable: called with each trial's YOLO, to add callbacks to its trainer"
    )

    @field_validator("data")
    @classmethod
    def _data(cls, value: str) -> str:
        return str(Path(value).expanduser().absolute())

    @field_validator("callbacks")
    @classmethod
    def _callbacks(cls, value: list[str]) -> list[str]:
        for name in value:
            if not all(part.isidentifier() for part in name.replace(":", ".").split(".")) or name.count(":") != 1:
                raise ValueError(f"--callbacks {name}: expected module:function")
        return value


_HELP = (
    {"data": "PATH", "model": "PATH or NAME", "output": "PATH", "storage": "KEY=VALUE"},
    {"epochs": "N", "imgsz": "N", "train": "NAME=VALUE", "callbacks": "module:function"},
)
_EXAMPLES = """Examples:
  {command} --data data.yaml --model yolov8n.pt --output sweep
  {command} --data data.yaml --model yolov8n.pt --output sweep --space space.yaml --samples 50 --gpus-per-trial 0.25
  {command} --data data.yaml --model yolov8n.yaml --output training --samples 1 --space none --train lr0=0.002
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep as the command line says; returns the exit code."""
    return command.main("tune.yolo", Settings, plan, _HELP, _EXAMPLES, arguments)


def plan(settings: Settings) -> Any:
    """The sweep (sweep.Sweep) that the settings ask for, after a look at model and data. Raises UsageError."""
    from tune import training
    from tune.data import inspect_data, inspect_model

    training.quiet()
    missing = "give weights (.pt), or an architecture, as yolov8n.yaml"
    models, space = command.models_of(settings, _space(settings, training), missing)
    tasks = {model: inspect_model(model) for model in models}
    if len(set(tasks.values())) > 1:
        raise UsageError(f"the models are for different tasks, {tasks}: give models for one")
    _check_callbacks(settings.callbacks, training)
    data = inspect_data(settings.data, tasks[models[0]])
    defaults = training.defaults(len(data.names), "optimizer" in space.ranges | space.fixed)
    request = training.Request(
        model=models[0],
        data=data.path,
        epochs=settings.epochs,
        seed=settings.seed,
        settings={"imgsz": settings.imgsz, **defaults, **space.fixed},
        callbacks=settings.callbacks,
        folder=str(Path.cwd()),
        threads=settings.cpus_per_trial,
    )
    trainable = partial(training.train, request=request)
    searcher = partial(_searcher, settings, space, defaults | {"model": models[0]})
    about = {"task": tasks[models[0]], "data": asdict(data)}
    return command.sweep_of(settings, space, trainable, searcher, about, ("ultralytics",))


def _check_callbacks(names: list[str], training: Any) -> None:
    """Raises UsageError for what cannot be imported."""
    for name in names:
        try:
            training.callback(name, str(Path.cwd()))
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--callbacks {name} cannot be imported from {Path.cwd()}: {error}") from error


def _space(settings: Settings, training: Any) -> Space:
    """The hyperparameters that are searched, and every setting that is fixed."""
    own = _own(settings, training)
    ranges = {
        name: Range("int", (int(low), int(high))) if name in training.CFG_INT_KEYS else Range("uniform", (low, high))
        for name, (low, high, *_) in own.items()
    }
    space = command.space_of(settings, training.HYPERPARAMETERS, ranges)
    if settings.chosen == "genetic":
        for name, values in space.ranges.items():
            if values.kind not in ("uniform", "int"):
                raise UsageError(
                    f"--search genetic takes `uniform` and `int` alone, and {name} is a {values.kind}: choose another"
                )
    return space


def _own(settings: Settings, training: Any) -> dict[str, Any]:
    """The space of ultralytics' own tuner, with how much each is mutated; {} where the user has a space."""
    return training.Evolution().space if settings.space is None else {}


def _searcher(settings: Settings, space: Space, defaults: dict[str, Any]) -> Any:
    """Decides which trials there are. defaults: where they differ from ultralytics' own."""
    from tune import search, training

    evolution = None
    if settings.chosen == "genetic" and space.ranges:
        own = _own(settings, training)
        evolution = training.Evolution({name: own.get(name, values.values) for name, values in space.ranges.items()})
    return search.searcher(settings.chosen, space, settings.seed, training.HYPERPARAMETERS | defaults, evolution)


if __name__ == "__main__":
    sys.exit(main())
