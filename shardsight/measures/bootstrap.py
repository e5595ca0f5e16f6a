"""How sure a figure is: 95 % intervals over resampled pictures."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
SEED = 0
PERCENTILES = (2.5, 97.5)


def weights(pictures: int, resamples: int = RESAMPLES) -> np.ndarray:
    """int32 (resamples, pictures): how often each picture is drawn, with replacement; the same for each model."""
    draws = np.random.default_rng(SEED).multinomial(pictures, np.full(pictures, 1 / pictures), resamples)
    return draws.astype(np.int32)


def interval(replicates: np.ndarray) -> list[float] | None:
    """[2.5th, 97.5th] percentile of a figure over the resamples; None where it is undefined in all of them."""
    known = replicates[np.isfinite(replicates)]
    return [float(bound) for bound in np.percentile(known, PERCENTILES)] if len(known) else None


def between(one: np.ndarray, other: np.ndarray) -> list[float] | None:
    """The interval of how much a model is ahead of another, each picture drawn as often for both. A model that finds
    much has fewer resamples: the first of the same."""
    both = min(len(one), len(other))
    return interval(one[:both] - other[:both])


def figure(value: float, replicates: np.ndarray | None = None) -> dict[str, Any]:
    """{value, interval, replicates}: of a measure in report.json, but for the replicates, which compare models."""
    known = float(value) if np.isfinite(value) else None
    return {"value": known, "interval": None if replicates is None else interval(replicates), "replicates": replicates}


def ratio(parts: ArrayLike, wholes: ArrayLike, of: Callable[[Any], Any] = lambda share: share) -> dict[str, Any]:
    """`of` Σ parts / Σ wholes, with its interval; a part and a whole for each picture. A mean has wholes of 1."""
    part, whole = np.asarray(parts, float), np.asarray(wholes, float)
    drawn = weights(len(part)) if len(part) else np.zeros((1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return figure(of(part.sum() / whole.sum()), of((drawn @ part) / (drawn @ whole)))
