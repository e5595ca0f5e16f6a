"""Which trials there are, and which of them are stopped early: Ray Tune's searchers and schedulers."""

import pickle
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.optuna import OptunaSearch

from shardsight.errors import UsageError
from tune.space import Range, Space

TIME = "epoch"  # what schedulers count
_AT_START = ("model", "imgsz", "batch")  # what a training cannot change halfway


def searcher(name: str, space: Space, seed: int, defaults: dict[str, Any], evolution: Any = None) -> Any:
    """name: optuna, random, grid or genetic. defaults: the first trial, where the space holds them.

    evolution: for genetic, proposes hyperparameters from a history (training.Evolution).
    """
    if name == "genetic" and space.ranges:
        return Genetic(evolution)
    within = all(one in defaults and values.holds(defaults[one]) for one, values in space.ranges.items())
    first = [{one: defaults[one] for one in space.ranges}] if space.ranges and name != "grid" and within else None
    if not space.ranges or name in ("random", "grid"):
        return BasicVariantGenerator(points_to_evaluate=first, random_state=np.random.RandomState(seed))
    return OptunaSearch(seed=seed, points_to_evaluate=first)


def param_space(name: str, space: Space) -> dict[str, Any]:
    """What Tune is told of the space; for grid, every choice. Raises UsageError."""
    if name == "grid":
        for one, values in space.ranges.items():
            if values.kind != "choice":
                raise UsageError(
                    f"--search grid tries every choice, and {one} is a range: write `{one}: choice A B ...`"
                )
        return {one: tune.grid_search(list(values.values)) for one, values in space.ranges.items()}
    return {one: values.domain() for one, values in space.ranges.items()}


def scheduler(name: str, space: Space, epochs: int) -> TrialScheduler:
    """name: asha, pbt, median or none; for trials of so many epochs. Raises UsageError."""
    grace = max(1, epochs // 8)
    if name == "asha":
        # One more than there are, so that a trial's last epoch is its own end.
        return AsyncHyperBandScheduler(time_attr=TIME, max_t=epochs + 1, grace_period=grace, reduction_factor=3)
    if name == "median":
        return MedianStoppingRule(time_attr=TIME, grace_period=grace)
    if name == "pbt":
        if fixed := [one for one in _AT_START if one in space.ranges]:
            raise UsageError(
                f"--scheduler pbt changes hyperparameters while it trains, and {fixed[0]} cannot change then"
            )
        if not space.ranges:
            raise UsageError("--scheduler pbt has nothing to change: give --space a range")
        return PopulationBasedTraining(
            time_attr=TIME,
            perturbation_interval=max(2, epochs // 5),
            hyperparam_mutations={
                one: list(values.values) if values.kind == "choice" else values.domain()
                for one, values in space.ranges.items()
            },
            custom_explore_fn=lambda config: clipped(config, space.ranges),
            log_config=False,
        )
    return FIFOScheduler()


def clipped(config: dict[str, Any], ranges: dict[str, Range]) -> dict[str, Any]:
    """Within their ranges, which PBT's factors leave."""
    return {name: ranges[name].clip(value) if name in ranges else value for name, value in config.items()}


class Genetic(Searcher):  # type: ignore[misc]  # Ray has no types
    """ultralytics' genetic algorithm, which mutates the best of the trials that have ended.

    evolution: proposes hyperparameters from a history of {fitness, hyperparameters}; the first are the defaults.
    """

    def __init__(self, evolution: Any) -> None:
        super().__init__()
        self.evolution = evolution
        self.history: list[dict[str, Any]] = []
        self.proposed: dict[str, dict[str, float]] = {}  # by trial

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        self._metric, self._mode = metric, mode
        return True

    def suggest(self, trial_id: str) -> dict[str, float]:
        # Before any trial has ended, the others are mutations of the defaults, too.
        first = [{"fitness": 0.0, "hyperparameters": one} for one in [*self.proposed.values()][:1]]
        proposed = self.evolution.propose(self.history or first)
        self.proposed[trial_id] = proposed
        return dict(proposed)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Only what a trial has reached at its end counts."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        fitness = float((result or {}).get(str(self._metric)) or 0.0)
        self.history.append({"fitness": fitness, "hyperparameters": self.proposed[trial_id]})

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump((self.history, self.proposed), file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self.history, self.proposed = pickle.load(file)
