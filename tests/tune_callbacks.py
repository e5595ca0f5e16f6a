"""What the sweeps of test_tune.py have their trials do: `--callbacks tests.tune_callbacks:NAME`.

Their notes lie beside data.yaml.
"""

import os
import signal
from pathlib import Path
from typing import Any

from ray import tune


def die_once(yolo: Any) -> None:
    """The process of a trial that finds the file `die` dies as by `kill -9`, in its second epoch."""

    def die(trainer: Any) -> None:
        order = Path(trainer.args.data).with_name("die")
        if trainer.epoch == 1 and order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    yolo.add_callback("on_train_batch_end", die)


def note(yolo: Any) -> None:
    """Each epoch that begins is a line in the file `begun`: the trial's id, and the epoch, from 1."""

    def begun(trainer: Any) -> None:
        with Path(trainer.args.data).with_name("begun").open("a") as file:
            file.write(f"{tune.get_context().get_trial_id()} {trainer.epoch + 1}\n")

    yolo.add_callback("on_train_epoch_start", begun)
