"""One trial: YOLO trained by ultralytics, each epoch reported and checkpointed, going on bit for bit after a kill."""

import importlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardsight.models.info import computes_bf16
from shardsight.models.yolo.ultralytics_import import YOLO  # first: it imports ultralytics without side effects

# isort: split
from ray import tune
from ultralytics.cfg import CFG_INT_KEYS, DEFAULT_CFG_DICT
from ultralytics.engine.tuner import Tuner
from ultralytics.utils import LOGGER, SETTINGS
from ultralytics.utils.torch_utils import ModelEMA, strip_optimizer, unwrap_model

from tune.sweep import report_failure

# ultralytics' own integrations: `raytune` would report beside us, and the others send elsewhere.
_INTEGRATIONS = ("sync", "clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")
# Training settings that this module or the command sets itself.
_OURS = {
    *("task", "mode", "data", "epochs", "time", "seed", "resume", "device", "project", "name", "exist_ok", "save"),
    *("save_period", "plots", "val", "verbose", "cfg", "source", "format"),
}
__all__ = ["CFG_INT_KEYS", "HYPERPARAMETERS", "Evolution", "Request", "callback", "defaults", "quiet", "train"]
HYPERPARAMETERS = {name: value for name, value in DEFAULT_CFG_DICT.items() if name not in _OURS}  # and their defaults
_STATE, _BEST = "state.pt", Path("best", "best.pt")  # what a trial goes on from; what its sweep may take


@dataclass(frozen=True)
class Request:
    """What all trials have in common.

    model: weights or an architecture (.yaml). data: absolute. settings: of ultralytics' training. callbacks: names
    `module:function`, of functions that are called with the YOLO before it trains. folder: of modules that they are in.
    threads: of the CPU.
    """

    model: str
    data: str
    epochs: int
    seed: int
    settings: dict[str, Any]
    callbacks: list[str] = field(default_factory=list)
    folder: str = ""
    threads: int = 1


class Evolution(Tuner):  # type: ignore[misc]  # ultralytics has no types
    """ultralytics' genetic algorithm, and its search space. space: name → (low, high); ultralytics' own by default."""

    def __init__(self, space: dict[str, tuple[float, float]] | None = None) -> None:
        super().__init__({"task": "detect", "space": space}, model=torch.nn.Identity())

    def propose(self, history: list[dict[str, Any]]) -> dict[str, float]:
        """Mutations of the best in the history, a list of {fitness, hyperparameters}; without one, the defaults."""
        self.history = history
        return self._mutate()

    def _load_local_results(self) -> list[dict[str, Any]]:
        return self.history


def defaults(classes: int, optimizer: bool) -> dict[str, Any]:
    """What ultralytics' `optimizer=auto` takes for a short training of so many classes. It is named, as `auto` itself
    ignores the lr0 and momentum of a trial. optimizer: whether the user chooses another, which has its own rates.

    Source: ultralytics/engine/trainer.py, `build_optimizer`.
    """
    if optimizer:
        return {"batch": 16}
    rates = {"lr0": round(0.002 * 5 / (4 + classes), 6), "momentum": 0.9, "warmup_bias_lr": 0.0}
    return {"batch": 16, "optimizer": "AdamW", **rates}


def quiet() -> None:
    """No logs, telemetry or integrations of ultralytics in this process."""
    LOGGER.setLevel("ERROR")
    for name in _INTEGRATIONS:
        dict.__setitem__(SETTINGS, name, False)  # SETTINGS.update would write to a file


def train(config: dict[str, Any], request: Request) -> None:
    """Tune's trainable. config: the trial's hyperparameters; `model` may be among them.

    Reports each epoch's metrics and a checkpoint; a failure as sweep.report_failure does. Only a process that dies is
    restarted.
    """
    quiet()
    torch.set_num_threads(request.threads)
    run = Path(tempfile.mkdtemp(prefix="shardsight-trial-"))
    epoch = 0
    try:
        saved = tune.get_checkpoint()
        if saved:
            saved.to_directory(run / "checkpoint")
        trial = _Trial(run, request)
        epoch = trial.start_epoch
        if epoch < request.epochs:  # PBT wakes trials that are through
            trial.train(config)
    except Exception as error:
        report_failure(error, epoch=max(1, epoch))
    finally:
        shutil.rmtree(run, ignore_errors=True)


@dataclass
class _Trial:
    """run: a folder of this process; its `checkpoint` is what a trial goes on from."""

    run: Path
    request: Request

    def __post_init__(self) -> None:
        self.checkpoint = self.run / "checkpoint"
        (self.checkpoint / _BEST).parent.mkdir(parents=True, exist_ok=True)
        path = self.checkpoint / _STATE
        self.state = torch.load(path, map_location="cpu", weights_only=False) if path.exists() else None
        self.start_epoch = self.state["epoch"] if self.state else 0
        self.ended = False

    def train(self, config: dict[str, Any]) -> None:
        settings = arguments(self.request, config)
        yolo = YOLO(settings.pop("model"))
        for name in self.request.callbacks:
            callback(name, self.request.folder)(yolo)
        if settings["amp"] == "bf16" and settings["device"] == "cpu":
            settings["amp"] = False  # ultralytics knows bf16 on CUDA only
            yolo.add_callback("on_pretrain_routine_end", _compute_in_bf16)
        for event in ("on_train_start", "on_train_epoch_start", "on_fit_epoch_end"):
            yolo.add_callback(event, getattr(self, event))
        yolo.train(**settings, save_dir=str(self.run / "train"))

    def on_train_start(self, trainer: Any) -> None:
        """Put everything back that decides the epochs to come. ultralytics' own `resume` would ignore the trial's
        hyperparameters, and goes on from weights in fp16."""
        trainer.final_eval = lambda: None  # each epoch has been validated
        if not self.state:
            return
        state, model = self.state, unwrap_model(trainer.model)
        model.load_state_dict(state["model"])
        trainer.ema = ModelEMA(trainer.model)
        trainer.ema.ema.load_state_dict(state["ema"])
        trainer.ema.updates = state["updates"]
        # The groups stay those of this trial's learning rate and weight decay, which PBT may have changed.
        trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": state["optimizer"]})
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.best_fitness = state["best_fitness"]
        trainer.stopper.__dict__.update(state["stopper"])
        trainer.start_epoch = self.start_epoch
        trainer.scheduler.last_epoch = self.start_epoch - 1
        if hasattr(getattr(model, "criterion", None) or model.init_criterion(), "update"):  # whose weights change
            model.criterion = model.init_criterion()
            for _ in range(self.start_epoch):
                model.criterion.update()
        (self.run / "train" / "results.csv").write_text(state["results"])
        self.state = None

    def on_train_epoch_start(self, trainer: Any) -> None:
        """What is random in an epoch follows from the seed and the epoch, and not from the epochs before."""
        seed = self.request.seed * 1_000_003 + trainer.epoch
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        loader = trainer.train_loader
        loader.generator.manual_seed(seed)
        loader.reset()
        data = loader.dataset
        for index in getattr(data, "buffer", ()):  # recent pictures, of which mosaics are made
            if data.cache != "ram":
                data.ims[index] = data.im_hw0[index] = data.im_hw[index] = None
        if hasattr(data, "buffer"):
            data.buffer.clear()

    def on_fit_epoch_end(self, trainer: Any) -> None:
        if self.ended:
            return
        self.ended = bool(trainer.stop)
        if not np.isfinite(trainer.fitness):
            raise FloatingPointError(f"the fitness of epoch {trainer.epoch + 1} is {trainer.fitness}")
        self._save(trainer)
        measured = {**trainer.label_loss_items(trainer.tloss), **trainer.metrics, **trainer.lr}
        report = {
            **{name: float(value) for name, value in measured.items()},
            **{"fitness": float(trainer.fitness), "best_fitness": float(trainer.best_fitness)},
            **{"epoch": trainer.epoch + 1, "last": self.ended, "batch": trainer.batch_size},
            "seconds": float(trainer.epoch_time),
        }
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(self.checkpoint))

    def _save(self, trainer: Any) -> None:
        if trainer.best_fitness == trainer.fitness:
            _keep(trainer.best, self.checkpoint / _BEST)
        state = {
            "epoch": trainer.epoch + 1,
            "model": unwrap_model(trainer.model).state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "updates": trainer.ema.updates,
            "optimizer": trainer.optimizer.state_dict()["state"],
            "scaler": trainer.scaler.state_dict(),
            "best_fitness": trainer.best_fitness,
            "stopper": {name: getattr(trainer.stopper, name) for name in ("best_fitness", "best_epoch")},
            "results": trainer.csv.read_text(),
        }
        torch.save(state, self.checkpoint / _STATE)


def _compute_in_bf16(trainer: Any) -> None:
    """As on CUDA; and in the order of memory that is faster on a CPU."""
    trainer.amp = True
    for model in (trainer.model, trainer.ema.ema):  # both, as sums are rounded otherwise in another order of memory
        model.to(memory_format=torch.channels_last)


def _keep(weights: Path, target: Path) -> None:
    """Weights in half precision, for prediction, without the paths and the git repository of this machine in them."""
    content = strip_optimizer(weights, target)
    args = {name: value for name, value in content["train_args"].items() if name in HYPERPARAMETERS or name == "task"}
    args["model"] = Path(args["model"]).name
    content["train_args"] = content["model"].args = args
    for place in (content, content["model"].yaml):
        for name in ("git", "yaml_file"):
            place.pop(name, None)
    vars(content["model"]).pop("pt_path", None)
    torch.save(content, target)


def arguments(request: Request, config: dict[str, Any]) -> dict[str, Any]:
    """What ultralytics' train is called with. Of several values of a setting, the trial's own counts."""
    cuda = torch.cuda.is_available()
    bf16 = torch.cuda.is_bf16_supported() if cuda else computes_bf16()
    amp = "bf16" if bf16 else False  # True would download a model to test it
    settings = {
        **{"model": request.model, "amp": amp, "workers": 4 if cuda else 0},
        **request.settings,
        **config,
        **{"data": request.data, "epochs": request.epochs, "seed": request.seed, "device": 0 if cuda else "cpu"},
        **{"exist_ok": True, "plots": False, "val": True, "save": True, "verbose": False},
    }
    settings.setdefault("nbs", settings["batch"])  # an epoch must not leave gradients behind for the next
    return settings


def callback(name: str, folder: str) -> Callable[[Any], None]:
    """The function that `module:function` names. Raises ImportError, AttributeError."""
    module, _, function = name.partition(":")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    found: Callable[[Any], None] = getattr(importlib.import_module(module), function)
    return found
