"""An evaluation: each model's job over the labelled pictures, measures of its rows, speed, recommendation, report.

OUT/report.json has, of `models`, for each: name, path, task, sha256, errors (stage: type → pictures), classes (unknown,
missing), figures (kind → measures → {value, interval}; classes, curve, best_conf, calibration, confusion), pictures
(id → 0 to 1), failed, speed (see speed.measure), job (pictures per second with reading and decoding), behind (the best,
by the main figure) and cost_per_million; and besides them recommendation, front, main, truth, faults, machine,
versions, configuration and command.
"""

import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from shardsight import job, truth
from shardsight.errors import UsageError
from shardsight.evaluation.measuring import Rows, classes_of, main_of, measure, pictures_of
from shardsight.evaluation.recommend import Contender, front, points, recommend
from shardsight.evaluation.request import Candidate, Evaluation, command_of
from shardsight.measures import bootstrap, objects
from shardsight.models import selection
from shardsight.models.paligemma.info import MASKS, PaliGemmaInfo
from shardsight.models.paligemma.prompts import class_prompts
from shardsight.models.staging import stage
from shardsight.models.yolo.info import YoloInfo
from shardsight.settings import settings_as
from shardsight.sources.metadata import plain
from shardsight.storage import Storage, is_remote
from shardsight.truth import MISSING, OTHER_SIZE, Truth
from shardsight.viewer import evaluation as viewer
from shardsight.viewer.labelled import LABELLED, with_truth

CONF = 0.25  # with which speed is measured, as jobs.annotate has it
UNREADABLE = "pictures that cannot be read or decoded; counted as pictures with nothing found"
NOT_MEASURED = "answers to segment; asked, but not measured, as no model has a vae-oid.npz, which decodes masks"


@dataclass(frozen=True)
class Report:
    """What an evaluation found. content: of report.json."""

    out: str
    content: dict[str, Any]

    @property
    def page(self) -> str:
        return f"{self.out}/report.html"

    @property
    def models(self) -> list[dict[str, Any]]:
        return list(self.content["models"])

    def print(self, console: Console) -> None:
        """A short table, and the recommendation."""
        kind, name = self.content["main"]["kind"], self.content["main"]["measure"]
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("model", f"{name} of {kind}", "pictures/s", "errors"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for model in self.models:
            value = model["figures"].get(kind, {}).get("measures", {}).get(name, {}).get("value")
            speed = (model["speed"] or {}).get("pictures_per_second")
            shown = "-" if value is None else points(value), "-" if speed is None else f"{speed:.1f}"
            table.add_row(model["name"], *shown, f"{sum(model['errors'].values()):,}")
        console.print(table, highlight=False)
        console.print(self.content["recommendation"]["sentence"], highlight=False, soft_wrap=True)


def evaluate(data: str | os.PathLike[str], *, output: str | os.PathLike[str], **options: Any) -> Report:
    """Compare models on labelled pictures; the names of options are those of `shardsight evaluate`.

    Goes on with what an earlier call left in `output`. Raises UsageError for a wrong request, and JobError where a
    fault stops a model's job.
    """
    for name in {"yolo", "paligemma", "adapter"} & options.keys():
        if isinstance(options[name], (str, os.PathLike)):
            options[name] = [str(options[name])]
    return run(settings_as(Evaluation, data=data, output=output, **options))


def run(request: Evaluation, watcher: job.Watcher | None = None, say: Callable[[str], None] = lambda _: None) -> Report:
    """say: is told which model is next. Raises UsageError, JobError and JobInterrupted."""
    return _Run(request, watcher, say).report()


@dataclass
class _Run:
    request: Evaluation
    watcher: job.Watcher | None
    say: Callable[[str], None]
    models: list[dict[str, Any]] = field(default_factory=list)
    replicates: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def report(self) -> Report:
        began, request = time.monotonic(), self.request
        self.storage = Storage(request.storage)
        self.out = request.output.rstrip("/")
        self.candidates = request.candidates()
        self._check_output()
        self.infos = {one.name: self._inspect(one) for one in self.candidates}
        self.decode = self._decode()
        self.truth = self._truth()
        content = self._begun()
        inputs = self._inputs()
        self.settings = {one.name: request.job(one, **inputs) for one in self.candidates}
        for number, one in enumerate(self.candidates, 1):
            self.say(f"{one.name}: {number} of {len(self.candidates)}")
            self._annotate(one)
        machine = self._speed()
        content |= self._compared() | {"machine": machine, "faults": self._faults(), "models": self.models}
        content |= {"status": "done", "seconds": round(time.monotonic() - began, 1)}
        self._write("report.json", json.dumps(plain(content), ensure_ascii=False, indent=1).encode())
        self._write("report.html", viewer.page_of(content, self._rows_of, self.storage).encode())
        return Report(self.out, content)

    # --- The request

    def _check_output(self) -> None:
        """Raises UsageError where the output is of something else."""
        if self.storage.exists(f"{self.out}/job.json"):
            raise UsageError(f"{self.out} holds a job: choose another --output")
        before = self._read("report.json")
        if before and not self.request.overwrite and before["configuration"]["data"] != self.request.data:
            raise UsageError(
                f"{self.out} holds an evaluation on {before['configuration']['data']}: choose another --output, or "
                "--overwrite it"
            )

    def _inspect(self, one: Candidate) -> Any:
        found = selection.inspect(self.request.job(one, inputs=["-"]))
        return next(iter(found.values()))

    def _decode(self) -> objects.Decode | None:
        """What decodes masks in right answers: that of the first model which has one. Raises UsageError."""
        having = (info for info in self.infos.values() if isinstance(info, PaliGemmaInfo) and MASKS in info.files)
        path = next((info.path for info in having), None)
        if path is None:
            return None
        file = stage(path, self.storage) / MASKS
        from shardsight.models.paligemma.masks import MaskDecoder, MaskError, paste  # imports torch

        try:
            decoder = MaskDecoder.load(file)
        except MaskError as error:
            raise UsageError(str(error)) from None
        return lambda codes, box, width, height: paste(decoder.decode(np.array([codes]))[0], box, width, height)

    def _truth(self) -> Truth:
        """The labelled set, for the task of the models. Raises UsageError where they do not match."""
        tasks = {info.task for info in self.infos.values() if isinstance(info, YoloInfo)}
        common = {"detect", "segment", "pose"}
        talks = any(one.paligemma for one in self.candidates)
        if len(tasks) > 1 and not tasks <= common:
            raise UsageError(f"the models are for {' and '.join(sorted(tasks))}: compare models for one task")
        form = any(prompt.startswith("segment ") for prompt in self.request.prompt)
        task = tasks.pop() if len(tasks) == 1 else "segment" if form else "detect"
        task = "detect" if talks and task in common and not (form and task == "segment") else task
        found = truth.read(self.request.data, self.storage, task)
        for name, info in self.infos.items():
            own = info.task if isinstance(info, YoloInfo) else "text"
            fits = own == found.task or (own in common | {"text"} and found.task in common)
            if not fits:
                raise UsageError(f"{self.request.data} is labelled for {found.task}, and {name} is for {own}")
        samples = found.samples[: self.request.limit]
        asked = [prompt for sample in samples for prompt in sample.asked]
        if asked and not self.decode and all(prompt.startswith("segment ") for prompt in asked):
            raise UsageError(f"{self.request.data} asks for masks alone, and no model has a vae-oid.npz to decode them")
        return Truth(**{**vars(found), "samples": samples})

    def _begun(self) -> dict[str, Any]:
        """The start of report.json, which also says whose output this is."""
        if not is_remote(self.out):
            os.makedirs(f"{self.out}/rows", exist_ok=True)
        configuration = self.request.record()
        content = {
            **{"status": "running", "started": datetime.now(UTC).isoformat(timespec="seconds")},
            **{"configuration": configuration, "command": command_of(configuration), "versions": job.versions()},
            "truth": {
                **{"data": self.request.data, "task": self.truth.task, "pictures": len(self.truth.samples)},
                **{"objects": self.truth.objects, "classes": list(self.truth.names.values())},
            },
        }
        if not self._read("report.json"):
            self._write("report.json", json.dumps(plain(content), indent=1).encode())
        return content

    def _inputs(self) -> dict[str, Any]:
        """The labelled pictures as a job's inputs, and what it asks about them."""
        if self.truth.task == "text":
            table = pa.table(
                {
                    "image": [sample.id for sample in self.truth.samples],
                    "asked": pa.array([list(sample.asked) for sample in self.truth.samples], pa.list_(pa.string())),
                }
            )
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            self._write("samples.parquet", buffer.getvalue())
            given = {"inputs": [f"{self.out}/samples.parquet"], "uri_column": "image"}
            return given if self.request.prompt else given | {"prompt_column": "asked"}
        lines = "".join(json.dumps({"uri": sample.id}) + "\n" for sample in self.truth.samples)
        self._write("pictures.jsonl", lines.encode())
        return {"inputs": [f"{self.out}/pictures.jsonl"]}

    # --- The models

    def _annotate(self, one: Candidate) -> None:
        """Run a model's job, measure its rows, and write them with their truth."""
        info, settings = self.infos[one.name], self.settings[one.name]
        if one.paligemma and not settings.prompt_column and not self.request.prompt:
            settings = self.settings[one.name] = settings.model_copy(update={"prompt": self._prompts()})
        done = job.run(settings, self.watcher)
        rows = self._join(one, done)
        names = list(info.names.values()) if isinstance(info, YoloInfo) else None
        own = Rows(rows, names)
        self.sizes |= own.sizes()
        measured = measure(self.truth, own, self.decode)
        kind, name = main_of(measured)
        self.replicates[one.name] = measured[kind]["measures"][name]["replicates"]
        content, computed = done.content, done.rows - done.content["resumed_rows"]
        errors = Counter(f"{row['error']['stage']}: {row['error']['type']}" for row in rows.values() if row["error"])
        self.models.append(
            {
                **{"name": one.name, "path": one.path, "base": one.paligemma if one.adapter else None},
                **{"kind": "yolo" if one.yolo else "paligemma", "sha256": info.sha256, "errors": dict(errors)},
                "task": info.task if isinstance(info, YoloInfo) else "text",
                "classes": classes_of(self.truth, own) if self.truth.names else {"unknown": {}, "missing": []},
                **{"pictures": pictures_of(self.truth, measured), "figures": _without_replicates(measured)},
                "failed": sorted(id for id, row in rows.items() if row["error"]),
                "job": {"pictures_per_second": content["rows_per_second"], "seconds": content["seconds"]}
                if computed
                else None,
            }
        )

    def _prompts(self) -> list[str]:
        form = "segment" if self.truth.task == "segment" else "detect"
        return [prompt for prompt, _ in class_prompts(self.truth.names, form)]

    def _join(self, one: Candidate, done: job.Job) -> dict[str, dict[str, Any]]:
        """Sample.id → the model's row; and rows/NAME.parquet, in the order of the labelled set."""
        wanted = {sample.id for sample in self.truth.samples}
        rows = {row["uri"]: row for row in done.results().to_table().to_pylist() if row["uri"] in wanted}
        samples = [sample for sample in self.truth.samples if sample.id in rows]
        labelled = [with_truth(rows[sample.id], self.truth, sample) for sample in samples]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(labelled, LABELLED), buffer, compression="zstd")
        self._write(f"rows/{one.folder}.parquet", buffer.getvalue())
        return rows

    def _rows_of(self, name: str, ids: set[str]) -> dict[str, dict[str, Any]]:
        """Sample.id → a model's row with its truth, of some pictures."""
        folder = next(one.folder for one in self.candidates if one.name == name)
        with self.storage.open(f"{self.out}/rows/{folder}.parquet") as file:
            table = pq.read_table(file, filters=[("uri", "in", list(ids))])
        return {row["uri"]: row for row in table.to_pylist()}

    # --- Speed

    def _speed(self) -> dict[str, Any]:
        """Fill in the models' speed, measured now unless it was with the same models and settings; the machine."""
        key = {model["name"]: [model["sha256"], self.settings[model["name"]].record()] for model in self.models}
        key = plain(json.loads(json.dumps(key)))
        before = {} if self.request.overwrite else self._read("speed.json") or {}
        for model in self.models:
            model["job"] = model["job"] or before.get("jobs", {}).get(model["name"])
        if before.get("key") != key or before.get("rounds") != self.request.rounds:
            machine, figures = self._measured_speed() if self.request.rounds else ({}, {})
            before = {"key": key, "rounds": self.request.rounds, "machine": machine, "models": figures}
        before["jobs"] = {model["name"]: model["job"] for model in self.models}
        self._write("speed.json", json.dumps(before, indent=1).encode())
        for model in self.models:
            model["speed"] = found = before["models"].get(model["name"])
            rate = (found or {}).get("pictures_per_second")
            price = self.request.price
            model["cost_per_million"] = round(price / (3600 * rate) * 1e6, 4) if price and rate else None
        return dict(before["machine"])

    def _measured_speed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from shardsight import cluster
        from shardsight.evaluation import speed

        cluster.join(self.request.verbose)
        self.say(f"speed, in {self.request.rounds} rounds")
        chosen = np.unique(np.linspace(0, len(self.truth.samples) - 1, speed.PICTURES).astype(int))
        asked = {}
        for one in self.candidates:
            settings = self.settings[one.name].model_copy(update={"conf": CONF, "multi_label": False})
            found = selection.inspect(settings)
            ((kind, arguments),) = selection.arguments(found, settings).items()
            pictures = [(sample.id, list(sample.asked)) for sample in (self.truth.samples[n] for n in chosen)]
            asked[one.name] = speed.Asked(kind, arguments, pictures, self.storage)
        return speed.measure(asked, self.request.rounds)

    # --- The comparison

    def _compared(self) -> dict[str, Any]:
        figures = self.models[0]["figures"]
        kind, name = main_of(figures)
        values = {model["name"]: model["figures"][kind]["measures"][name] for model in self.models}
        known = {model: one for model, one in values.items() if one["value"] is not None}
        best = max(known, key=lambda model: known[model]["value"], default="")
        contenders = []
        for model in (model for model in self.models if model["name"] in known):
            own, speed = known[model["name"]], model["speed"] or {}
            behind = model["name"] != best
            between = bootstrap.between(self.replicates[best], self.replicates[model["name"]]) if behind else None
            contenders.append(
                Contender(
                    *(model["name"], own["value"], _pair(own["interval"]), known[best]["value"] - own["value"]),
                    *(_pair(between), speed.get("pictures_per_second"), _pair(speed.get("pictures_per_second_range"))),
                )
            )
            model["behind"] = {"value": contenders[-1].behind, "interval": between}
        said = f"{name} of {kind}" if kind != "classes" else f"{name} accuracy"
        return {
            "recommendation": recommend(contenders, said, len(self.truth.samples)),
            **{"front": front(contenders), "main": {"kind": kind, "measure": name, "said": said}},
        }

    def _faults(self) -> dict[str, list[str]]:
        """Reason → names: of the labels, and what the jobs found."""
        faults = {reason: list(names) for reason, names in self.truth.faults.items()}
        missing = set(faults.get(MISSING, ()))
        unread = {id for model in self.models for id in model["failed"]} - missing
        if unread:
            faults[UNREADABLE] = sorted(unread)
        if others := self.truth.other_sizes(self.sizes):
            faults[OTHER_SIZE] = others
        masks = [f"{one.id}: {prompt}" for one in self.truth.samples for prompt in one.asked
                 if prompt.startswith("segment ") and not self.decode]  # fmt: skip
        return faults | ({NOT_MEASURED: masks} if masks else {})

    # --- Files

    def _read(self, name: str) -> dict[str, Any] | None:
        if not self.storage.exists(f"{self.out}/{name}"):
            return None
        found: dict[str, Any] = json.loads(self.storage.read(f"{self.out}/{name}"))
        return found

    def _write(self, name: str, data: bytes) -> None:
        """Unless that is there already: a job takes an input that was written anew for a changed one."""
        path = f"{self.out}/{name}"
        if not self.storage.exists(path) or self.storage.read(path) != data:
            self.storage.write(path, data)


def _without_replicates(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """For report.json, but for `pictures`, which stand beside them."""
    return {
        kind: {name: value for name, value in one.items() if name not in ("measures", "pictures")}
        | {
            "measures": {
                name: {part: figure[part] for part in ("value", "interval")} for name, figure in one["measures"].items()
            }
        }
        for kind, one in measured.items()
    }


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return (values[0], values[1]) if values else None
