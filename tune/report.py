"""report.html of a sweep: learning curves, parallel coordinates, importance of hyperparameters, and every trial."""

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsight.viewer.page import document
from tune.progress import value_text
from tune.space import Range
from tune.sweep import Trial, best_of

_SCRIPTS = ("picture.js", "charts.js", "sweep.js")
_STYLES = ("viewer.css", "evaluation.css", "sweep.css")
_FEWEST = 6  # trials from which importance is computed
_AXES = 8  # most hyperparameters of the parallel coordinates


def page(trials: list[Trial], ranges: Mapping[str, Range], content: dict[str, Any]) -> str:
    """The page. content: of sweep.json."""
    best, weights = best_of(trials), importance(trials, ranges)
    names = list(dict.fromkeys(name for trial in trials for name in trial.config))
    shown = sorted(names, key=lambda name: -weights.get(name, 0.0))[:_AXES]
    data = {
        "title": f"Sweep: {len(trials)} trials",
        "subtitle": f"begun {content['started']}, {content['status']}",
        "numbers": _numbers(trials, best, content),
        "best": _best(best),
        "curves": _curves(trials, best),
        "importance": {
            "bars": [{"name": name, "value": value} for name, value in weights.items()],
            "note": "How much of the differences in fitness each hyperparameter explains (PED-ANOVA). Trials that were "
            "stopped count with the fitness that they had reached."
            if weights
            else f"Importance needs {_FEWEST} trials that differ in their fitness.",
        },
        "parallel": _parallel(trials, best, shown, ranges, len(names)),
        "table": _table(trials, best, names),
        "facts": _facts(content),
    }
    return document(data, _SCRIPTS, _STYLES, "sweep")


def importance(trials: list[Trial], ranges: Mapping[str, Range]) -> dict[str, float]:
    """Hyperparameter → its share, most important first; {} where there are too few trials."""
    ended = [trial for trial in trials if trial.fitness is not None and trial.ended]
    varied = {
        name: values for name, values in ranges.items() if len({str(trial.config.get(name)) for trial in ended}) > 1
    }
    if len(ended) < _FEWEST or len({trial.fitness for trial in ended}) < 2 or not varied:
        return {}
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)
    study = optuna.create_study(direction="minimize")  # the evaluator looks at the lowest values
    space = {name: values.distribution() for name, values in varied.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental parts of Optuna
        for trial in ended:
            params = {name: values.clip(trial.config[name]) for name, values in varied.items()}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=space, value=-float(trial.fitness or 0.0))
            )
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _numbers(trials: list[Trial], best: Trial | None, content: dict[str, Any]) -> list[dict[str, Any]]:
    counts = content["trials"]
    found: list[dict[str, Any]] = [
        {"name": "trials", "value": f"{len(trials)} of {content['total']}"},
        {"name": "done", "value": str(counts["done"])},
        {"name": "stopped early", "value": str(counts["stopped"])},
        {"name": "failed", "value": str(counts["failed"]), "good": None if not counts["failed"] else False},
        {"name": "epochs", "value": str(sum(len(trial.epochs) for trial in trials))},
        {"name": "hours", "value": f"{content['seconds'] / 3600:.2f}"},
    ]
    if best:
        found.insert(1, {"name": "best fitness", "value": f"{best.fitness:.4f}", "good": True})
    return found


def _best(best: Trial | None) -> dict[str, Any] | None:
    if best is None or best.best is None:
        return None
    figures = {name: value for name, value in best.best.items() if name.startswith(("metrics/", "val/"))}
    return {
        "title": f"Trial {best.number}, epoch {best.best['epoch']}",
        "config": [[name, value_text(value)] for name, value in best.config.items()],
        "figures": [[name, f"{value:.4f}"] for name, value in figures.items()],
    }


def _curves(trials: list[Trial], best: Trial | None) -> list[dict[str, Any]]:
    """One a metric, the fitness first: lines of trials."""
    names = dict.fromkeys(["fitness"])
    names |= dict.fromkeys(
        name
        for trial in trials
        for epoch in trial.epochs
        for name in epoch
        if "/" in name and not name.startswith("lr/")
    )
    return [
        {
            "name": name,
            "lines": [
                {
                    **{"number": trial.number, "status": trial.status, "best": trial is best},
                    "points": [[epoch["epoch"], epoch[name]] for epoch in trial.epochs if name in epoch],
                }
                for trial in trials
                if trial.epochs
            ],
        }
        for name in names
    ]


def _parallel(
    trials: list[Trial], best: Trial | None, names: list[str], ranges: Mapping[str, Range], total: int
) -> dict[str, Any]:
    axes: list[dict[str, Any]] = []
    for name in names:
        values = [trial.config.get(name) for trial in trials]
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        log = name in ranges and ranges[name].kind == "loguniform"
        labels = None if numbers and ranges.get(name, Range("", ())).kind != "choice" else _ordered(values)
        axes.append({"name": name, "log": log, "labels": labels})
    lines = [
        {
            **{"number": trial.number, "best": trial is best, "fitness": trial.fitness},
            "values": [
                value_text(trial.config.get(name)) if axis["labels"] else trial.config.get(name)
                for name, axis in zip(names, axes, strict=True)
            ],
        }
        for trial in trials
        if trial.fitness is not None
    ]
    note = "A line is a trial; the stronger its colour, the higher its fitness."
    if len(names) < total:
        note += f" The {len(names)} most important of {total} hyperparameters."
    return {"axes": axes, "lines": lines, "note": note}


def _ordered(values: list[Any]) -> list[str]:
    """Each value once, as text; numbers by size."""
    numbers = all(isinstance(value, (int, float)) for value in values)
    return list(dict.fromkeys(value_text(value) for value in sorted(values, key=None if numbers else str)))


def _table(trials: list[Trial], best: Trial | None, names: list[str]) -> dict[str, Any]:
    rows = sorted(trials, key=lambda trial: (-(trial.fitness if trial.fitness is not None else -1.0), trial.number))
    return {
        "columns": ["trial", "status", "fitness", "best epoch", "epochs", "minutes", *names],
        "rows": [
            {
                **{"best": trial is best, "error": trial.error, "status": trial.status},
                "cells": [
                    *(str(trial.number), trial.status, "" if trial.fitness is None else f"{trial.fitness:.4f}"),
                    *(str(trial.best["epoch"]) if trial.best else "", str(len(trial.epochs))),
                    f"{trial.seconds / 60:.1f}",
                    *(value_text(trial.config.get(name)) for name in names),
                ],
            }
            for trial in rows
        ],
    }


def _facts(content: dict[str, Any]) -> list[list[str]]:
    facts = [[name, value_text(value) if value != "" else "–"] for name, value in content["configuration"].items()
             if isinstance(value, (str, int, float))]  # fmt: skip
    data = content.get("data") or {}
    if data:
        facts += [["data set", Path(data["path"]).name], ["data set's sha256", data["sha256"]]]
        facts.append(["pictures", ", ".join(f"{count} {split}" for split, count in data["pictures"].items())])
        if data["problems"]:
            counts = "; ".join(f"{count:,} {reason}" for reason, count in data.get("counts", {}).items())
            first = f"{len(data['problems'])}: {data['problems'][0][:300]}"
            facts.append(["left out or changed", f"{counts}; first {first}" if counts else first])
    return [*facts, ["versions", ", ".join(f"{name} {number}" for name, number in content["versions"].items())]]
