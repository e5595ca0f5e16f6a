"""Search the hyperparameters of YOLO training: `python -m tune.yolo --data data.yaml --model yolov8n.pt --output DIR`.

`--help` has the rest.
"""

import importlib.util
import math
import os
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, CliToggleFlag, PydanticBaseSettingsSource, SettingsConfigDict

from shardsight.errors import Fault, UsageError
from shardsight.settings import SECRET, help_of, parse_as
from shardsight.sources import absolute
from shardsight.storage import Storage
from tune.space import Range, Space, check_name, load_space, parse_space, yaml_value

# What another run may have otherwise, and go on with the same sweep.
_FREE = {"output", "storage", "overwrite", "config", "verbose", "max_error_rate", "gpus_per_trial", "cpus_per_trial"}
_FREE |= {"mlflow", "wandb"}


class Settings(BaseSettings):
    """Search the hyperparameters of YOLO training with Ray Tune. With --samples 1 --space none it is one training."""

    model_config = SettingsConfigDict(
        extra="forbid", cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True, protected_namespaces=()
    )

    data: str = Field(description="data.yaml as ultralytics has it; for classify, a folder with train/ and val/")
    model: str | None = Field(None, description="weights to start from (.pt), or an architecture, as yolov8n.yaml")
    output: str = Field(
        description="folder or prefix for best/, trials.parquet, report.html and the trials' checkpoints"
    )
    samples: int | None = Field(None, ge=1, description="trials; 20, or with --search grid every combination")
    epochs: int = Field(50, ge=1, description="epochs of a trial that is not stopped")
    imgsz: int = Field(640, ge=32, description="size of the pictures, pixels")
    seed: int = Field(0, ge=0, description="of the search and of each training")
    space: str | dict[str, Any] | None = Field(
        None,
        description="YAML with hyperparameters, as `lr0: loguniform 1e-5 1e-1`, `batch: choice 8 16`, `mosaic: 0`; "
        "`none` searches nothing; by default the space of ultralytics' own tuner",
    )
    search: Literal["optuna", "random", "grid", "genetic"] | None = Field(
        None, description="optuna; random with --scheduler pbt. genetic is ultralytics' own algorithm"
    )
    scheduler: Literal["asha", "pbt", "median", "none"] = Field(
        "asha", description="asha and median stop trials that fall behind; pbt has them copy the best"
    )
    train: dict[str, str] = Field(
        {}, description="any training setting of ultralytics, repeatable, as batch=32; batch=16 and optimizer=AdamW"
    )
    callbacks: list[str] = Field(
        [], description="module:function, repeatable: called with each trial's YOLO, to add callbacks to its trainer"
    )
    gpus_per_trial: float | None = Field(None, ge=0, le=1, description="1 where there are GPUs; less lets trials share")
    cpus_per_trial: int = Field(1, ge=1, description="threads of a trial")
    max_error_rate: float = Field(0.5, ge=0, le=1, description="share of failed trials above which the exit code is 3")
    mlflow: str | None = Field(None, description="tracking uri of MLflow, where the trials are logged, too")
    wandb: str | None = Field(None, description="project of Weights & Biases, where the trials are logged, too")
    storage: dict[str, str] = Field({}, description="of an object store, as for jobs.annotate")
    overwrite: CliToggleFlag[bool] = Field(False, description="delete the sweep in the output and start again")
    config: str | None = Field(None, description="YAML with these names, or an earlier sweep.json; flags win")
    verbose: CliToggleFlag[bool] = Field(False, description="show what Ray logs, too")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # no environment

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        return absolute(value)

    @field_validator("data")
    @classmethod
    def _data(cls, value: str) -> str:
        return str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _together(self) -> Self:
        if isinstance(self.space, str) and self.space != "none":
            self.space = load_space(self.space)  # in full, so that a changed file is another sweep
        if self.scheduler == "pbt" and self.search not in (None, "random"):
            raise ValueError("--scheduler pbt changes hyperparameters itself: leave out --search")
        if self.search == "grid" and self.samples:
            raise ValueError("--search grid tries every combination once: leave out --samples")
        for name in self.callbacks:
            if not all(part.isidentifier() for part in name.replace(":", ".").split(".")) or name.count(":") != 1:
                raise ValueError(f"--callbacks {name}: expected module:function")
        for name, package in (("mlflow", "mlflow"), ("wandb", "wandb")):
            if getattr(self, name) and not importlib.util.find_spec(package):
                raise ValueError(f"--{name} needs the Python module {package}: pip install {package}")
        return self

    def record(self) -> dict[str, Any]:
        """Every setting, for sweep.json; secrets are left out."""
        values = self.model_dump(exclude={"overwrite", "config", "verbose"})
        values["storage"] = {name: value for name, value in self.storage.items() if name not in SECRET}
        return values


_HELP = {
    "Data and model": {
        **{"data": "PATH", "model": "PATH or NAME", "output": "PATH", "storage": "KEY=VALUE"},
    },
    "Search": {
        **{"samples": "N", "space": "FILE|none", "search": "NAME", "scheduler": "NAME", "seed": "N"},
    },
    "Training": {
        **{"epochs": "N", "imgsz": "N", "train": "NAME=VALUE", "callbacks": "module:function"},
    },
    "The sweep": {
        **{"gpus_per_trial": "F", "cpus_per_trial": "N", "max_error_rate": "0..1", "mlflow": "URI", "wandb": "PROJECT"},
        **{"config": "FILE", "overwrite": "", "verbose": ""},
    },
}
_EXAMPLES = """Examples:
  {command} --data data.yaml --model yolov8n.pt --output sweep
  {command} --data data.yaml --model yolov8n.pt --output sweep --space space.yaml --samples 50 --gpus-per-trial 0.25
  {command} --data data.yaml --model yolov8n.yaml --output training --samples 1 --space none --train lr0=0.002

The same command goes on where an interrupted one stopped. Exit codes: 0 done, 1 stopped by a fault and resumable, 2 the
request is wrong, 3 more trials failed than --max-error-rate, 130 interrupted and resumable."""


def main(arguments: list[str] | None = None, command: str = "python -m tune.yolo") -> int:
    """Run the sweep as the command line says; returns the exit code of the contract: 0, 1, 2, 3 or 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        usage = f"{command} --data PATH --model MODEL --output PATH [--space FILE] [--samples N]"
        print(help_of(Settings, _HELP, usage, _EXAMPLES.format(command=command)))
        return 0
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # what a scheduler sends
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # before there was a sweep, or a second time
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(arguments: list[str]) -> int:
    from rich.console import Console

    from shardsight import cluster
    from tune import sweep
    from tune.progress import Progress, summary
    from tune.report import page

    alone = not cluster.joined()
    try:
        settings = parse_as(Settings, arguments)
        made = plan(settings)
        with Progress(settings.epochs) as progress:
            result = sweep.run(made, progress, page)
    except (Fault, UsageError) as error:
        fault = isinstance(error, Fault)
        resumable = "; no trial is lost, and the same command goes on from here" if fault else ""
        print(f"tune.yolo: {error}{resumable}", file=sys.stderr)
        return 1 if fault else 2
    finally:
        if alone:
            cluster.leave()
    summary(result.trials, result.content, made.out, settings.epochs, Console(stderr=True))
    if result.status == "interrupted":
        print("tune.yolo: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    failed = result.content["trials"]["failed"]
    if failed / len(result.trials) > settings.max_error_rate:
        said = f"{failed} of {len(result.trials)} trials failed, more than --max-error-rate {settings.max_error_rate}"
        print(f"tune.yolo: {said}; trials.parquet says why", file=sys.stderr)
        return 3
    return 0


def plan(settings: Settings) -> Any:
    """The sweep (sweep.Sweep) that the settings ask for, after a look at model and data. Raises UsageError."""
    from tune import search, sweep, training
    from tune.data import inspect_data, inspect_model

    training.quiet()
    storage = Storage(settings.storage)
    chosen = settings.search or ("random" if settings.scheduler == "pbt" else "optuna")
    models, space = _models(settings, _space(settings, chosen, training))
    tasks = {model: inspect_model(model) for model in models}
    if len(set(tasks.values())) > 1:
        raise UsageError(f"the models are for different tasks, {tasks}: give models for one")
    _check_callbacks(settings.callbacks, training)
    data = inspect_data(settings.data, tasks[models[0]])
    scheduler = partial(search.scheduler, settings.scheduler, space, settings.epochs)
    scheduler()  # raises what is wrong with it
    request = training.Request(
        model=models[0],
        data=data.path,
        epochs=settings.epochs,
        seed=settings.seed,
        settings={"imgsz": settings.imgsz, **space.fixed},
        callbacks=settings.callbacks,
        folder=str(Path.cwd()),
        threads=settings.cpus_per_trial,
    )
    combinations = math.prod(len(values.values) for values in space.ranges.values())
    made = sweep.Sweep(
        out=settings.output,
        storage=storage,
        configuration={name: value for name, value in settings.record().items() if name not in _FREE},
        about={"task": tasks[models[0]], "data": asdict(data)},
        trainable=partial(training.train, request=request),
        searcher=lambda: search.searcher(chosen, space, settings.seed, _evolution(settings, space, training)),
        scheduler=scheduler,
        space=search.param_space(chosen, space),
        ranges=space.ranges,
        samples=1 if chosen == "grid" else settings.samples or 20,
        total=combinations if chosen == "grid" else settings.samples or 20,
        epochs=settings.epochs,
        cpus=settings.cpus_per_trial,
        gpus=settings.gpus_per_trial,
        loggers=partial(_loggers, settings),
        verbose=settings.verbose,
    )
    if settings.overwrite:
        sweep.clear(settings.output, storage)
    return made


def _check_callbacks(names: list[str], training: Any) -> None:
    """Raises UsageError for what cannot be imported."""
    for name in names:
        try:
            training.callback(name, str(Path.cwd()))
        except (ImportError, AttributeError) as error:
            raise UsageError(f"--callbacks {name} cannot be imported from {Path.cwd()}: {error}") from error


def _space(settings: Settings, chosen: str, training: Any) -> Space:
    """The hyperparameters that are searched, and every setting that is fixed."""
    known: frozenset[str] = training.HYPERPARAMETERS
    given = {name: yaml_value(value) for name, value in settings.train.items()}
    for name in given:
        check_name(name, known)
    if settings.space is None:
        own = training.Evolution().space
        ranges = {
            name: Range("int", (int(low), int(high)))
            if name in training.CFG_INT_KEYS
            else Range("uniform", (low, high))
            for name, (low, high, *_) in own.items()
        }
        space = Space({name: values for name, values in ranges.items() if name not in given}, {})
    else:
        space = parse_space(settings.space if isinstance(settings.space, dict) else {}, known)
    if twice := sorted(given.keys() & (space.ranges | space.fixed).keys()):
        raise UsageError(f"{twice[0]} is in --space and in --train: give it once")
    if chosen == "genetic":
        for name, values in space.ranges.items():
            if values.kind not in ("uniform", "int"):
                raise UsageError(
                    f"--search genetic takes `uniform` and `int` alone, and {name} is a {values.kind}: choose another"
                )
    return Space(space.ranges, given | space.fixed)


def _models(settings: Settings, space: Space) -> tuple[list[str], Space]:
    """The models that trials start from, the first where the space says nothing; and the space with their paths."""
    fixed, ranges = dict(space.fixed), dict(space.ranges)
    named = fixed.pop("model", settings.model)
    if "model" in ranges:
        ranges["model"] = Range("choice", tuple(_model(one) for one in ranges["model"].values))
        return list(ranges["model"].values), Space(ranges, fixed)
    if not named:
        raise UsageError("--model is missing: give weights (.pt), or an architecture, as yolov8n.yaml")
    return [_model(named)], Space(ranges, fixed)


def _model(name: Any) -> str:
    """Absolute, as a trial may run in another folder; the name of an architecture of ultralytics as it is."""
    path = Path(str(name)).expanduser()
    return str(path.absolute()) if path.exists() or path.suffix == ".pt" else str(name)


def _evolution(settings: Settings, space: Space, training: Any) -> Any:
    """ultralytics' genetic algorithm over the space."""
    if settings.search != "genetic" or not space.ranges:
        return None
    own = training.Evolution().space if settings.space is None else {}  # with how much each is mutated
    return training.Evolution({name: own.get(name, values.values) for name, values in space.ranges.items()})


def _loggers(settings: Settings) -> list[Any]:
    """Tune's own callbacks for MLflow and Weights & Biases."""
    found: list[Any] = []
    if settings.mlflow:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        found.append(MLflowLoggerCallback(tracking_uri=settings.mlflow, experiment_name=Path(settings.output).name))
    if settings.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found.append(WandbLoggerCallback(project=settings.wandb))
    return found


if __name__ == "__main__":
    sys.exit(main())
