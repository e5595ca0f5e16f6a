"""The page of an evaluation: what evaluation.js draws, from report.json and rows/*.parquet."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from shardsight.storage import Storage
from shardsight.viewer.job import thumbnails
from shardsight.viewer.page import document
from shardsight.viewer.published import published

_SCRIPTS = ("picture.js", "player.js", "viewer.js", "charts.js", "evaluation.js")
_STYLES = ("viewer.css", "evaluation.css")
SIDE = 640  # pixels of a picture
DIFFERENT, WORST = 8, 4  # pictures of a gallery: where models differ, and where one of them fails
MODELS = 6  # beside one another in a picture's card
LEAST, KEPT = 0.25, 0.05  # score: that is seen at first, and that is on the page at all
EXAMPLES = 20  # names of a fault
CLASSES = 30  # of the confusion matrix
LOWER = ("CER", "WER")  # measures that are better when they are lower
Rows = Callable[[str, set[str]], Mapping[str, Mapping[str, Any]]]  # (model, ids) → id → row of LABELLED


def page_of(report: Mapping[str, Any], rows: Rows, storage: Storage) -> str:
    """report: of report.json, done. rows: a model's rows of some pictures."""
    truth, machine = report["truth"], report["machine"]
    size = [f"{truth['pictures']:,} pictures", truth["objects"] and f"{truth['objects']:,} objects", truth["task"]]
    where = machine.get("gpu") or machine.get("cpu")
    subtitle = [*filter(None, size), where, report["started"].replace("T", " ").replace("+00:00", " UTC")]
    columns, table = _table(report)
    data = {
        "title": f"Evaluation on {truth['data'].rpartition('/')[2]}",
        "subtitle": " · ".join(filter(None, subtitle)),
        "verdict": report["recommendation"],
        **{"columns": columns, "rows": table, "note": _note(report)},
        **{"figures": list(_figures(report)), "confusions": list(_confusions(report)), "classes": _classes(report)},
        **{"galleries": [], "answers": [], "least": LEAST},
        **{"faults": list(_faults(report)), "published": published(report)},
        **{"facts": list(_facts(report)), "command": report["command"]},
    }
    data |= _pictures(report, rows, storage)
    return document(data, _SCRIPTS, _STYLES, "evaluation")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _measures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, measure) of what was measured, the main kind first."""
    kinds = list(report["models"][0]["figures"])
    kinds.sort(key=lambda kind: kind != report["main"]["kind"])
    return [(kind, name) for kind in kinds for name in report["models"][0]["figures"][kind]["measures"]]


def _figure(model: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = model["figures"][kind]["measures"][name]
    return found


# --- Tables


def _table(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    models = report["models"]
    columns, cells = [], []
    for kind, name in _measures(report):
        found = [_figure(model, kind, name) for model in models]
        better = min if name in LOWER else max
        best = better((one["value"] for one in found if one["value"] is not None), default=None)
        columns.append({"group": kind.capitalize(), "name": name, "title": f"{name} of {kind}, in percent"})
        cells.append([_cell(one, best if len(models) > 1 else None) for one in found])
    for group, name, title, values in _costs(report):
        columns.append({"group": group, "name": name, "title": title})
        cells.append(values)
    rows = []
    for number, model in enumerate(models):
        failed = sum(model["errors"].values())
        note = f"{failed:,} {'picture' if failed == 1 else 'pictures'} failed" if failed else None
        rows.append({"model": number, "name": model["name"], "note": note, "cells": [one[number] for one in cells]})
    return columns, rows


def _cell(figure: Mapping[str, Any], best: float | None) -> dict[str, Any]:
    span = figure["interval"]
    small = f"{_percent(span[0])}–{_percent(span[1])}" if span else None
    return {"text": _percent(figure["value"]), "small": small, "best": best is not None and figure["value"] == best}


def _costs(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """(group, name, title, cells) of speed and of what a model takes; none where nothing of it was measured."""
    models = report["models"]
    for group, name, title, form, better, value in _COSTS:
        values = [value(model) for model in models]
        best = better((one for one in values if one is not None), default=None)
        if best is None:
            continue
        cells = []
        for model, one in zip(models, values, strict=True):
            span = (model["speed"] or {}).get("pictures_per_second_range") if name == "pictures/s" else None
            small = f"{span[0]:,.1f}–{span[1]:,.1f}" if span else None
            text = "–" if one is None else format(one, form)
            cells.append({"text": text, "small": small, "best": len(models) > 1 and one == best})
        yield group, name, title, cells


def _of_speed(*names: str) -> Callable[[Mapping[str, Any]], Any]:
    """What a model's `speed` holds under these names, one within the other; None where there is none."""

    def value(model: Mapping[str, Any]) -> Any:
        found: Any = model["speed"]
        for name in names:
            found = (found or {}).get(name)
        return found

    return value


# (group, name, title, format, which is best, value)
_COSTS: list[tuple[str, str, str, str, Any, Callable[[Mapping[str, Any]], Any]]] = [
    (
        *("Speed", "pictures/s", "the model alone, at its batch size; below, the slowest and the fastest round"),
        *(",.1f", max, _of_speed("pictures_per_second")),
    ),
    *(
        ("Speed", f"{p} ms", f"{p} of one picture at a time", ",.1f", min, _of_speed("latency_ms", p))
        for p in ("p50", "p90", "p99")
    ),
    (
        *("Speed", "job, /s", "pictures per second of the whole job, from its start: reading and decoding, too"),
        *(",.1f", max, lambda model: (model["job"] or {}).get("pictures_per_second")),
    ),
    ("Takes", "MB", "most memory of the process", ",.0f", min, _of_speed("peak_memory_mb")),
    ("Takes", "GPU MB", "most memory of the GPU", ",.0f", min, _of_speed("peak_gpu_memory_mb")),
    ("Takes", "J", "joules a picture", ",.2f", min, _of_speed("joules_per_picture")),
    (
        *("Takes", "per million", "cost of a million pictures at the given price per hour, of the model alone"),
        *(",.2f", min, lambda model: model["cost_per_million"]),
    ),
]


def _note(report: Mapping[str, Any]) -> str:
    figures = report["models"][0]["figures"][report["main"]["kind"]]
    measured = report["configuration"]["rounds"]
    speed = f" Speed: the median of {measured} alternating rounds, at a score from 0.25." if measured else ""
    return (
        f"Accuracy in percent; small, its 95 % interval by {figures['resamples']:,} bootstrap samples of the pictures. "
        f"★ is the highest figure, or the lowest where lower is better, also where chance may have put it there.{speed}"
    )


def _classes(report: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = report["main"]["kind"]
    own = [model["figures"][kind].get("classes") for model in report["models"]]
    if not own[0]:
        return None
    name = report["main"]["measure"]
    rows = []
    for each in zip(*own, strict=True):
        best = max((one[name] for one in each if one[name] is not None), default=None)
        cells = [{"text": _percent(one[name]), "best": len(each) > 1 and best is not None and one[name] == best}
                 for one in each]  # fmt: skip
        rows.append({"name": each[0]["name"], "cells": [{"text": f"{each[0]['objects']:,}"}, *cells]})
    return {"columns": [f"{name} of {kind}", "objects", *(model["name"] for model in report["models"])], "rows": rows}


# --- Charts


def _figures(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    main, models = report["main"], list(enumerate(report["models"]))
    points = []
    for number, model in models:
        own, speed = _figure(model, main["kind"], main["measure"]), (model["speed"] or {}).get("pictures_per_second")
        if own["value"] is not None and speed:
            low, high = own["interval"] or (own["value"], own["value"])
            points.append(
                {
                    **{"model": number, "name": model["name"], "x": speed, "y": 100 * own["value"]},
                    **{"low": 100 * low, "high": 100 * high, "front": model["name"] in report["front"]},
                }
            )
    if points:
        yield {
            **{"title": "Accuracy against speed", "choices": [{"name": "", "points": points}]},
            "x": {"label": "pictures per second, the model alone", "log": True},
            "y": {"label": f"{main['said']}, %"},
            "note": "Upright lines are 95 % intervals. The dashed line joins the models that no other beats in both.",
        }
    curves = {number: model["figures"][main["kind"]].get("curve") or {} for number, model in models}
    names = dict.fromkeys(name for own in curves.values() for name in own)
    if names:
        choices = [
            {"name": name or "all classes", "lines": [
                {"model": number, "name": model["name"],
                 "points": [[n / 100, value] for n, value in enumerate(curves[number][name])]}
                for number, model in models if name in curves[number]]}
            for name in sorted(names)
        ]  # fmt: skip
        axes = {"x": {"label": "recall", "min": 0, "max": 1}, "y": {"label": "precision", "min": 0, "max": 1}}
        yield {"title": "Precision and recall at IoU 0.5", "choices": choices, **axes}
    yield from _reliability(report)


def _reliability(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    kind = report["main"]["kind"]
    found = [(n, one, one["figures"][kind].get("calibration")) for n, one in enumerate(report["models"])]
    known = [(number, model, own) for number, model, own in found if own and own["bins"]]
    if known:
        lines = [
            {"model": n, "name": one["name"], "points": [[each["score"], each["right"]] for each in own["bins"]]}
            for n, one, own in known
        ]
        errors = ", ".join(f"{model['name']} {_percent(own['error'])}" for _, model, own in known)
        yield {
            **{
                "title": "Is a score the chance to be right?",
                "diagonal": True,
                "choices": [{"name": "", "lines": lines}],
            },
            **{"x": {"label": "score", "min": 0, "max": 1}, "y": {"label": "share that is right", "min": 0, "max": 1}},
            "note": f"On the dotted line it is. Expected calibration error, in points: {errors}.",
        }


def _confusions(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for number, model in enumerate(report["models"]):
        found = next((one["confusion"] for one in model["figures"].values() if "confusion" in one), None)
        if found is None:
            continue
        counts, labels = found["counts"], found["labels"]
        order = sorted(range(len(labels)), key=lambda n: -sum(counts[n]))[:CLASSES]
        kept = [*sorted(order), len(labels)]
        note = f"Boxes at IoU 0.5, from the score {found['conf']:.2f} on, where F1 is best." if "conf" in found else ""
        if len(labels) > CLASSES:
            note += f" The {CLASSES} most frequent of {len(labels)} classes."
        rows = [[counts[a][b] for b in kept] for a in kept]
        rows = rows if "conf" in found else rows[:-1]
        yield {
            **{"model": number, "name": model["name"], "labels": [labels[n] for n in sorted(order)]},
            **{"others": "(missed)" if "conf" in found else "(none)", "counts": rows, "note": note},
        }


# --- Pictures


def _pictures(report: Mapping[str, Any], rows: Rows, storage: Storage) -> dict[str, Any]:
    """galleries, or of a set of questions answers: where the models differ most, and where each fails worst."""
    models = report["models"]
    failed = {id for model in models for id in model["failed"]}
    scores = [{id: value for id, value in model["pictures"].items() if id not in failed} for model in models]
    wanted: list[tuple[str, str, list[int], list[str]]] = []
    if len(models) > 1:
        spread = {id: max(own[id] for own in scores) - min(own[id] for own in scores) for id in scores[0]}
        ids = [id for id in sorted(spread, key=lambda id: -spread[id])[:DIFFERENT] if spread[id] > 0]
        shown = list(range(len(models)))[:MODELS]
        wanted.append(("Where the models differ most", "By how right each is on the picture.", shown, ids))
    for number, (model, own) in enumerate(zip(models, scores, strict=True)):
        ids = [id for id in sorted(own, key=lambda id: own[id])[:WORST] if own[id] < 1]
        note = "Pictures that could not be read are not among them."
        wanted.append((f"Where {model['name']} fails worst", note, [number], ids))
    wanted = [one for one in wanted if one[3]]
    every = {id for *_, ids in wanted for id in ids}
    found = [rows(model["name"], every) for model in models]
    seen = thumbnails([dict(found[0][id]) for id in sorted(every) if id in found[0]], storage, SIDE, None)
    seen = {found[0][id]["uri"]: seen[found[0][id]["id"]] for id in every if id in found[0]}
    words = report["truth"]["task"] == "text"
    make = _questions if words else _items
    groups = [
        {"title": title, "note": note, "items": [item for id in ids for item in make(id, numbers, report, found, seen)]}
        for title, note, numbers, ids in wanted
    ]
    return {"answers": groups} if words else {"galleries": groups}


def _items(
    id: str, numbers: list[int], report: Mapping[str, Any], found: Sequence[Mapping[str, Any]], seen: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One picture: its truth, and each model's row of it."""
    row = found[numbers[0]][id]
    place = {name: row[name] for name in ("id", "uri", "width", "height")}
    true = [{"label": row["true_class"], "class_id": None, "score": None}] if row["true_class"] is not None else None
    task = report["truth"]["task"]
    drawn = {"mask": task == "segment", "keypoints": task == "pose"}  # what no model looks for would hide the boxes
    objects = row["truth"] and [
        {name: value for name, value in one.items() if drawn.get(name, True)} for one in row["truth"]
    ]
    rows = [{"model": "truth", "row": place | {"truth": objects, "classes": true}}]
    for number in numbers:
        own = found[number][id]
        kept = {name: own[name] for name in (*place, "classes", "error")}
        kept["detections"] = own["detections"] and [one for one in own["detections"] if one["score"] >= KEPT]
        kept["answers"] = own["answers"]
        rows.append({"model": report["models"][number]["name"], "row": kept})
    yield {**seen[id], "rows": rows}


def _questions(
    id: str, numbers: list[int], report: Mapping[str, Any], found: Sequence[Mapping[str, Any]], seen: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One picture's prompts that some model answers otherwise than is right to the letter."""
    for asked in found[numbers[0]][id]["true_answers"] or ():
        right = [one.strip() for one in asked["answers"]]
        said = []
        for number in numbers:
            answers = found[number][id]["answers"] or ()
            text = next((one["text"] or "" for one in answers if one["prompt"] == asked["prompt"]), "")
            is_right = text.strip() in right
            name = report["models"][number]["name"]
            said.append({"model": number, "name": name, "text": text or "(nothing)", "right": is_right})
        if asked["prompt"].startswith(("detect ", "segment ")) or all(one["right"] for one in said):
            continue
        truth = " / ".join(one for one, _ in groupby(sorted(right)))
        yield {**seen[id], "id": id, "question": asked["prompt"], "truth": truth or "(nothing)", "said": said}


# --- What else there is to say


def _faults(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for reason, names in report["faults"].items():
        distinct = Counter(names)
        examples = [name if count == 1 else f"{name} ({count} times)" for name, count in distinct.items()]
        more = [f"and {len(examples) - EXAMPLES:,} more, see report.json"] if len(examples) > EXAMPLES else []
        what, _, fate = reason.partition("; ")
        yield {"name": what, "text": f"{len(names):,}: {fate}", "examples": [*examples[:EXAMPLES], *more]}
    for model in report["models"]:
        unknown, missing = model["classes"]["unknown"], model["classes"]["missing"]
        if unknown:
            text = f"classes that the labels lack, left out of the figures; {sum(unknown.values()):,} detections"
            names = [f"{name}: {count:,}" for name, count in unknown.items()]
            yield {"name": model["name"], "text": text, "examples": names}
        if missing:
            text = "does not have these classes of the labels, whose objects it therefore misses"
            yield {"name": model["name"], "text": text, "examples": missing}
        for error, count in model["errors"].items():
            failed = "picture failed" if count == 1 else "pictures failed"
            yield {"name": model["name"], "text": f"{count:,} {failed}, {error}", "examples": []}


def _facts(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    machine = report["machine"]
    if machine:
        yield {"name": "CPU", "text": f"{machine['cpu']}, {machine['cores']} cores"}
        yield {"name": "GPU", "text": machine["gpu"] or "none"}
        yield {"name": "system", "text": machine["system"]}
    for model in report["models"]:
        speed = model["speed"] or {}
        parts = [f"sha256 {model['sha256'][:16]}…", model["path"]]
        if speed.get("batch_size"):
            count = speed["latency_ms"]["pictures"]
            parts.append(f"batches of {speed['batch_size']}, latency of {count:,} pictures one at a time")
        if speed.get("reason"):
            parts.append(f"speed not measured: {speed['reason']}")
        best = next((one["best_conf"] for one in model["figures"].values() if "best_conf" in one), None)
        if best and best["conf"] is not None:
            parts.append(f"--conf {best['conf']:.2f} maximises F1, {_percent(best['f1'])}")
        yield {"name": model["name"], "text": "; ".join(parts)}
    reasons = {(model["speed"] or {}).get("joules_reason") for model in report["models"]} - {None}
    if reasons:
        yield {"name": "energy", "text": f"not measured: {'; '.join(sorted(map(str, reasons)))}"}
    yield {"name": "versions", "text": ", ".join(f"{name} {number}" for name, number in report["versions"].items())}
