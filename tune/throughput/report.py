"""What a search for throughput leaves besides best.yaml: trials.parquet and report.html."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from shardsight.evaluation.recommend import points
from shardsight.viewer.page import document
from tune.throughput.choice import GAIN, Final, Trial, interval, pareto, ratio

BEST, TABLE, PAGE, JSON = "best.yaml", "trials.parquet", "report.html", "sweep.json"
_SCRIPTS = ("picture.js", "charts.js", "sweep.js", "throughput.js")
_STYLES = ("viewer.css", "evaluation.css", "sweep.css")


def usual_rate(trials: Sequence[Trial]) -> float:
    """Pictures per second of the defaults: the median of all of their rounds."""
    return statistics.median(other for trial in trials for _, other in trial.rounds)


def table_of(trials: Sequence[Trial], chosen: Trial) -> bytes:
    """trials.parquet, one row a trial. pictures_per_second: the defaults', by how many times as fast the trial is, so
    that trials which were measured at different moments can be compared."""
    front, rate = pareto(trials), usual_rate(trials)
    rows = [
        {
            **{"trial": trial.number, "name": trial.configuration.name, "status": trial.status},
            "config": asdict(trial.configuration)
            | {"imgsz": trial.configuration.imgsz and [*trial.configuration.imgsz]},
            **{"accuracy": trial.accuracy, "times_as_fast": trial.ratio},
            "times_as_fast_range": [*interval(trial.rounds)] if trial.rounds else None,
            "pictures_per_second": trial.ratio and trial.ratio * rate,
            **{"peak_memory_mb": trial.memory.get("peak_memory_mb")},
            **{"peak_gpu_memory_mb": trial.memory.get("peak_gpu_memory_mb")},
            **{"front": trial.number in front, "best": trial is chosen, "error": trial.error},
            **{"rounds": [[*pair] for pair in trial.rounds], "seconds": trial.seconds},
        }
        for trial in trials
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    data: bytes = buffer.getvalue().to_pybytes()
    return data


def sentence(content: dict[str, Any], defaults: Trial) -> str:
    """The choice, and why. content: of sweep.json."""
    best, measure = content["best"], content["measure"]
    usual = f"{measure} {points(defaults.accuracy or 0)}"
    if best["trial"] == defaults.number:
        return f"The defaults, {usual}: nothing as accurate is {GAIN - 1:.0%} faster beyond doubt"
    said = f"{best['times_as_fast']:.2f} times as fast as the defaults"
    return f"{best['name']}: {said}, {measure} {points(best['accuracy'])} against {points(defaults.accuracy or 0)}"


def page(trials: Sequence[Trial], finals: Sequence[Final], chosen: Trial, content: dict[str, Any]) -> str:
    """The page. content: of sweep.json."""
    rate = usual_rate(trials)
    failed = sum(trial.status == "failed" for trial in trials)
    data = {
        "title": "Throughput: accuracy against speed",
        "subtitle": f"begun {content['started']}",
        "sentence": content["best"]["sentence"],
        "reasons": [_reason(final, trials) for final in finals],
        "numbers": [
            {"name": "trials", "value": str(len(trials))},
            {"name": "failed", "value": str(failed), "good": None if not failed else False},
            {"name": "pictures/s of the defaults", "value": f"{rate:.1f}"},
            {"name": "times as fast", "value": f"{content['best']['times_as_fast']:.2f}", "good": True},
            {"name": "hours", "value": f"{content['seconds'] / 3600:.2f}"},
        ],
        "front": _front(trials, chosen, rate, content["measure"]),
        "table": _table(trials, chosen, rate, content["measure"]),
        "facts": _facts(content),
    }
    return document(data, _SCRIPTS, _STYLES, "throughput")


def _reason(final: Final, trials: Sequence[Trial]) -> str:
    one, other = (trials[number - 1].configuration.name for number in (final.challenger, final.incumbent))
    if not final.rounds:
        return f"{one} failed in its final."
    low, high = interval(final.rounds)
    said = f"{ratio(final.rounds):.2f} times as fast as {other} (95 % interval {low:.2f} to {high:.2f})"
    doubt = "beyond doubt" if final.won else "which may be chance, or is too little to matter"
    return f"{one} was {said} in {len(final.rounds)} alternating rounds, {doubt}."


def _front(trials: Sequence[Trial], chosen: Trial, rate: float, measure: str) -> dict[str, Any]:
    front = pareto(trials)
    points_of = [
        {
            **{"number": trial.number, "name": trial.configuration.name, "front": trial.number in front},
            **{"best": trial is chosen, "usual": trial is trials[0]},
            **{"x": trial.ratio * rate, "y": 100 * trial.accuracy},
        }
        for trial in trials
        if trial.ratio is not None and trial.accuracy is not None
    ]
    note = (
        "A point is a configuration; those on the line are neither slower nor less accurate than any other. The ring "
    )
    note += "is the defaults, the largest point the choice."
    return {"points": points_of, "x": "pictures per second", "y": measure, "note": note}


def _table(trials: Sequence[Trial], chosen: Trial, rate: float, measure: str) -> dict[str, Any]:
    front = pareto(trials)
    rows = sorted(trials, key=lambda trial: (-(trial.ratio or 0.0), trial.number))
    columns = ["configuration", "status", measure, "pictures/s", "times as fast", "95 % interval", "MB", "GPU MB"]
    return {
        "columns": [*columns, "Pareto front"],
        "rows": [
            {
                **{"best": trial is chosen, "error": trial.error, "status": trial.status},
                "cells": [
                    *(trial.configuration.name, trial.status, points(trial.accuracy) if trial.accuracy else ""),
                    *_speed(trial, rate),
                    *(_number(trial.memory.get(f"peak_{name}memory_mb")) for name in ("", "gpu_")),
                    "yes" if trial.number in front else "",
                ],
            }
            for trial in rows
        ],
    }


def _speed(trial: Trial, rate: float) -> list[str]:
    if trial.ratio is None:
        return ["", "", ""]
    low, high = interval(trial.rounds)
    return [f"{trial.ratio * rate:.1f}", f"{trial.ratio:.2f}", f"{low:.2f}–{high:.2f}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _facts(content: dict[str, Any]) -> list[list[str]]:
    machine, data = content["machine"], content["data"]
    return [
        ["labelled set", f"{data['path']}, {data['pictures']:,} pictures, sha256 {data['sha256']}"],
        *([model, f"sha256 {sha256}"] for model, sha256 in content["models"].items()),
        ["machine", ", ".join(filter(None, (machine["cpu"], f"{machine['cores']} cores", machine["gpu"])))],
        *(["left out", reason] for reason in content["left_out"]),
        ["speed", "from encoded bytes to rows, as a job does; reading and writing are left out"],
        ["versions", ", ".join(f"{name} {number}" for name, number in content["versions"].items())],
    ]


def show(trials: Sequence[dict[str, Any]], out: str, content: dict[str, Any], console: Console) -> None:
    """The end, from the rows of trials.parquet: the Pareto front, the errors, the choice, and where things are."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("configuration", content["measure"], "pictures/s", "times as fast", "MB"):
        shown.add_column(column, justify="left" if column == "configuration" else "right")
    for row in sorted(trials, key=lambda row: row["times_as_fast"] or 0.0):
        if row["front"] or row["best"]:
            speed = f"{row['pictures_per_second']:.1f}", f"{row['times_as_fast']:.2f}"
            shown.add_row(row["name"], points(row["accuracy"]), *speed, _number(row["peak_memory_mb"]))
    console.print(shown, highlight=False)
    for row in trials:
        if row["error"]:
            console.print(f"failed: {row['name']}: {row['error']}"[:300], highlight=False, soft_wrap=True)
    console.print(content["best"]["sentence"], highlight=False, soft_wrap=True)
    console.print(f"{out}/{BEST}\n{out}/{PAGE}", highlight=False, soft_wrap=True)
