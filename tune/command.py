"""What the commands of sweeps share: settings, models, hyperparameters, the sweep itself, and exit codes."""

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliToggleFlag, SettingsConfigDict

from shardsight.errors import Fault, UsageError
from shardsight.settings import Declared, help_of, parse_as
from shardsight.sources import absolute
from shardsight.storage import Storage
from tune.space import Range, Space, check_name, load_space, parse_space, yaml_value

# What another run may have otherwise, and go on with the same sweep.
_FREE = {"output", "storage", "overwrite", "config", "verbose", "max_error_rate", "gpus_per_trial", "cpus_per_trial"}
_FREE |= {"mlflow", "wandb"}
_SHARED_HELP = {
    "Search": {
        **{"samples": "N", "space": "FILE|none", "search": "NAME", "scheduler": "NAME", "seed": "N"},
    },
    "The sweep": {
        **{"gpus_per_trial": "F", "cpus_per_trial": "N", "max_error_rate": "0..1", "mlflow": "URI", "wandb": "PROJECT"},
        **{"config": "FILE", "overwrite": "", "verbose": ""},
    },
}
_END = """
The same command goes on where an interrupted one stopped. Exit codes: 0 done, 1 stopped by a fault and resumable, 2 the
request is wrong, 3 more trials failed than --max-error-rate, 130 interrupted and resumable."""


class Sweeping(Declared):
    """The settings of every sweep."""

    model_config = SettingsConfigDict(
        extra="forbid", cli_kebab_case=True, cli_avoid_json=True, cli_hide_none_type=True, protected_namespaces=()
    )

    data: str
    model: str | None = None
    output: str = Field(
        description="folder or prefix for best/, trials.parquet, report.html and the trials' checkpoints"
    )
    samples: int | None = Field(None, ge=1, description="trials; 20, or with --search grid every combination")
    epochs: int = Field(50, ge=1, description="epochs of a trial that is not stopped")
    seed: int = Field(0, ge=0, description="of the search and of each training")
    space: str | dict[str, Any] | None = None
    search: str | None = None
    scheduler: Literal["asha", "pbt", "median", "none"] = Field(
        "asha", description="asha and median stop trials that fall behind; pbt has them copy the best"
    )
    train: dict[str, str] = Field({})
    gpus_per_trial: float | None = Field(None, ge=0, le=1, description="1 where there are GPUs; less lets trials share")
    cpus_per_trial: int = Field(1, ge=1, description="threads of a trial")
    max_error_rate: float = Field(0.5, ge=0, le=1, description="share of failed trials above which the exit code is 3")
    mlflow: str | None = Field(None, description="tracking uri of MLflow, where the trials are logged, too")
    wandb: str | None = Field(None, description="project of Weights & Biases, where the trials are logged, too")
    storage: dict[str, str] = Field({}, description="of an object store, as for jobs.annotate")
    overwrite: CliToggleFlag[bool] = Field(False, description="delete the sweep in the output and start again")
    config: str | None = Field(None, description="YAML with these names, or an earlier sweep.json; flags win")
    verbose: CliToggleFlag[bool] = Field(False, description="show what Ray logs, too")

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        return absolute(value)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if isinstance(self.space, str) and self.space != "none":
            self.space = load_space(self.space)  # in full, so that a changed file is another sweep
        if self.scheduler == "pbt" and self.search not in (None, "random"):
            raise ValueError("--scheduler pbt changes hyperparameters itself: leave out --search")
        if self.search == "grid" and self.samples:
            raise ValueError("--search grid tries every combination once: leave out --samples")
        for name, package in (("mlflow", "mlflow"), ("wandb", "wandb")):
            if getattr(self, name) and not importlib.util.find_spec(package):
                raise ValueError(f"--{name} needs the Python module {package}: pip install {package}")
        return self

    @property
    def chosen(self) -> str:
        """The search: optuna, random, grid or genetic."""
        return self.search or ("random" if self.scheduler == "pbt" else "optuna")


def main(
    name: str,
    kind: type[Sweeping],
    plan: Callable[[Any], Any],
    groups: tuple[dict[str, str], dict[str, str]],
    examples: str,
    arguments: list[str] | None,
) -> int:
    """Run the sweep as the command line says; returns the exit code of the contract: 0, 1, 2, 3 or 130.

    name: of the module. plan: makes the sweep (sweep.Sweep) that settings of `kind` ask for. groups: of --help, as in
    settings.help_of, those of data and model, and those of training. examples: of --help, with {command}.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        command = f"python -m {name}"
        usage = f"{command} --data PATH --model MODEL --output PATH [--space FILE] [--samples N]"
        help_groups = {"Data and model": groups[0], "Search": _SHARED_HELP["Search"], "Training": groups[1]}
        help_groups |= _SHARED_HELP
        print(help_of(kind, help_groups, usage, examples.format(command=command) + _END))
        return 0
    with terminable():
        try:
            return _main(name, kind, plan, arguments)
        except KeyboardInterrupt:  # before there was a sweep, or a second time
            return 130


@contextmanager
def terminable() -> Iterator[None]:
    """Within it, SIGTERM, which a scheduler sends, is an interrupt."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failed(name: str, error: Fault | UsageError, kept: str) -> int:
    """Tell of it; returns the exit code. kept: what a fault leaves, as `no trial is lost`."""
    fault = isinstance(error, Fault)
    resumable = f"; {kept}, and the same command goes on from here" if fault else ""
    print(f"{name}: {error}{resumable}", file=sys.stderr)
    return 1 if fault else 2


def _main(name: str, kind: type[Sweeping], plan: Callable[[Any], Any], arguments: list[str]) -> int:
    from rich.console import Console

    from shardsight import cluster
    from tune import sweep
    from tune.progress import Progress, summary
    from tune.report import page

    alone = not cluster.joined()
    try:
        settings = parse_as(kind, arguments)
        made = plan(settings)
        if settings.overwrite:
            sweep.clear(settings.output, made.storage)
        with Progress(settings.epochs) as progress:
            result = sweep.run(made, progress, page)
    except (Fault, UsageError) as error:
        return failed(name, error, "no trial is lost")
    finally:
        if alone:
            cluster.leave()
    summary(result.trials, result.content, made.out, settings.epochs, Console(stderr=True))
    if result.status == "interrupted":
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    lost = result.content["trials"]["failed"]
    if lost / len(result.trials) > settings.max_error_rate:
        said = f"{lost} of {len(result.trials)} trials failed, more than --max-error-rate {settings.max_error_rate}"
        print(f"{name}: {said}; trials.parquet says why", file=sys.stderr)
        return 3
    return 0


def sweep_of(
    settings: Sweeping,
    space: Space,
    trainable: Callable[[dict[str, Any]], None],
    searcher: Callable[[], Any],
    about: dict[str, Any],
    packages: tuple[str, ...],
    workers: int = 1,
) -> Any:
    """The sweep (sweep.Sweep) of a space. searcher, about, packages, workers: as there. Raises UsageError."""
    from tune import search, sweep

    chosen = settings.chosen
    scheduler = partial(search.scheduler, settings.scheduler, space, settings.epochs)
    scheduler()  # raises what is wrong with it
    combinations = math.prod(len(values.values) for values in space.ranges.values())
    return sweep.Sweep(
        out=settings.output,
        storage=Storage(settings.storage),
        configuration={name: value for name, value in settings.record().items() if name not in _FREE},
        about=about,
        trainable=trainable,
        searcher=searcher,
        scheduler=scheduler,
        space=search.param_space(chosen, space),
        ranges=space.ranges,
        samples=1 if chosen == "grid" else settings.samples or 20,
        total=combinations if chosen == "grid" else settings.samples or 20,
        epochs=settings.epochs,
        cpus=settings.cpus_per_trial,
        gpus=settings.gpus_per_trial,
        workers=workers,
        packages=packages,
        loggers=partial(_loggers, settings),
        verbose=settings.verbose,
    )


def space_of(settings: Sweeping, known: Mapping[str, Any], default: Mapping[str, Range]) -> Space:
    """The hyperparameters that are searched, and every setting that is fixed. default: the ranges without --space, of
    which those that --train fixes are left out. Raises UsageError."""
    given = {name: yaml_value(value) for name, value in settings.train.items()}
    for name in given:
        check_name(name, known)
    if settings.space is None:
        space = Space({name: values for name, values in default.items() if name not in given}, {})
    else:
        space = parse_space(settings.space if isinstance(settings.space, dict) else {}, known)
    if twice := sorted(given.keys() & (space.ranges | space.fixed).keys()):
        raise UsageError(f"{twice[0]} is in --space and in --train: give it once")
    return Space(space.ranges, given | space.fixed)


def models_of(settings: Sweeping, space: Space, missing: str) -> tuple[list[str], Space]:
    """The models that trials start from, the first where the space says nothing; and the space with their paths.
    Raises UsageError, of --model saying what is `missing`."""
    fixed, ranges = dict(space.fixed), dict(space.ranges)
    named = fixed.pop("model", settings.model)
    if "model" in ranges:
        ranges["model"] = Range("choice", tuple(_model(one) for one in ranges["model"].values))
        return list(ranges["model"].values), Space(ranges, fixed)
    if not named:
        raise UsageError(f"--model is missing: {missing}")
    return [_model(named)], Space(ranges, fixed)


def _model(name: Any) -> str:
    """Absolute, as a trial may run in another folder; what is no file, as the name of an architecture, as it is."""
    path = Path(str(name)).expanduser()
    return str(path.absolute()) if path.exists() or path.suffix == ".pt" else str(name)


def _loggers(settings: Sweeping) -> list[Any]:
    """Tune's own callbacks for MLflow and Weights & Biases."""
    found: list[Any] = []
    if settings.mlflow:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        class MLflow(MLflowLoggerCallback):  # type: ignore[misc]  # Ray has no types
            def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
                super().log_trial_result(iteration, trial, {_mlflow_name(name): one for name, one in result.items()})

        found.append(MLflow(tracking_uri=settings.mlflow, experiment_name=Path(settings.output).name))
    if settings.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found.append(WandbLoggerCallback(project=settings.wandb))
    return found


def _mlflow_name(name: str) -> str:
    """MLflow refuses names such as metrics/mAP50(B)."""
    return name.replace("(", "_").replace(")", "")
