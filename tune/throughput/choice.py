"""Which configuration to take, such that noise does not choose: from rounds in which two are timed, alternating."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from shardsight.evaluation.recommend import Contender, front
from shardsight.measures import bootstrap
from tune.throughput.configurations import Configuration

Rounds = list[tuple[float, float]]  # pictures per second of one and of the other, a round each
SIGNIFICANT = 0.001  # of a one-sided test: how rarely what is no faster may pass for faster
GAIN = 1.05  # how many times as fast: whole jobs differ by more from run to run, so that less is not worth a change
FINALISTS = 3


@dataclass
class Trial:
    """A configuration, and what was measured of it.

    status: pending, done or failed, and then error says why. accuracy: the main measure, 0 to 1. rounds: alternating
    with the defaults'; of the defaults themselves with themselves. memory: see speed.peak_memory, of all of its
    processes. seconds: that measuring it took.
    """

    number: int
    configuration: Configuration
    status: str = "pending"
    accuracy: float | None = None
    rounds: Rounds = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the defaults; None where it was not timed."""
        return ratio(self.rounds) if self.rounds else None


@dataclass(frozen=True)
class Final:
    """A finalist's rounds against the fastest before it, none where it failed. challenger, incumbent: of trials."""

    challenger: int
    incumbent: int
    rounds: Rounds

    @property
    def won(self) -> bool:
        return bool(self.rounds) and is_faster(self.rounds)


Duel = Callable[[Trial, Trial], Final]  # challenger, incumbent → rounds that are measured for the choice alone


def ratio(rounds: Rounds) -> float:
    """How many times as fast the first is: the median of the rounds."""
    return float(np.exp(np.median(_logs(rounds))))


def interval(rounds: Rounds) -> tuple[float, float]:
    """The 95 % interval of `ratio`, over resampled rounds."""
    logs = np.array(_logs(rounds))
    drawn = np.random.default_rng(bootstrap.SEED).choice(logs, (bootstrap.RESAMPLES, len(logs)))
    low, high = np.exp(np.percentile(np.median(drawn, axis=1), bootstrap.PERCENTILES))
    return float(low), float(high)


def is_faster(rounds: Rounds) -> bool:
    """Whether the first is more than GAIN times as fast as the other beyond doubt, by Wilcoxon's signed-rank test of
    the paired rounds."""
    beyond = np.array(_logs(rounds)) - math.log(GAIN)
    return bool(wilcoxon(beyond, alternative="greater", zero_method="zsplit").pvalue < SIGNIFICANT)


def _logs(rounds: Rounds) -> list[float]:
    return [math.log(one / other) for one, other in rounds]


def choose(trials: Sequence[Trial], within: float, duel: Duel) -> tuple[Trial, list[Final]]:
    """The fastest trial that loses no more than `within` points of accuracy against the defaults, trials[0].

    The fastest by their rounds are the finalists, of which each has to beat the fastest so far, at first the defaults,
    in rounds of its own: the best of many noisy figures is too good to be true.
    """
    incumbent, finals = trials[0], []
    faster = [trial for trial in accurate(trials, within) if (trial.ratio or 0.0) > GAIN]
    for challenger in sorted(faster, key=lambda trial: -(trial.ratio or 0.0))[:FINALISTS]:
        finals.append(duel(challenger, incumbent))
        if finals[-1].won:
            incumbent = challenger
    return incumbent, finals


def accurate(trials: Sequence[Trial], within: float) -> list[Trial]:
    """Those that lose no more than `within` points against the first."""
    least = (trials[0].accuracy or 0.0) - within / 100 - 1e-12
    return [trial for trial in trials if trial.accuracy is not None and trial.accuracy >= least]


def pareto(trials: Sequence[Trial]) -> set[int]:
    """The numbers of the trials than which no other is both as fast and as accurate, and better in one of the two."""
    contenders = [
        Contender(str(trial.number), trial.accuracy, speed=trial.ratio)
        for trial in trials
        if trial.accuracy is not None
    ]
    return {int(name) for name in front(contenders)}
