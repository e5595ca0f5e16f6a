"""PaliGemma's JSONL: what `detect` should answer about each picture, as tune.paligemma and jobs.evaluate take it."""

import json
from collections.abc import Iterable
from contextlib import ExitStack

from shardsight.models.paligemma.prompts import SEPARATOR, class_prompts, detect_answer
from shardsight.results.formats.sample import Contents, Report, Sample
from shardsight.results.formats.target import Target


def write(samples: Iterable[Sample], contents: Contents, target: Target, report: Report) -> None:
    """train.jsonl and, with a share for it, val.jsonl: a line of `image`, `prefix` and `suffix` for each 20 classes,
    boxes by their upper edges from top to bottom. Pictures are in images/. Masks are not written."""
    known = {n: name for n, name in enumerate(contents.names) if name.strip() and not SEPARATOR.search(name)}
    with ExitStack() as files:
        train = files.enter_context(target.open("train.jsonl"))
        val = files.enter_context(target.open("val.jsonl")) if contents.validation else train
        for sample in samples:
            assert sample.picture
            image = f"images/{sample.file}"
            target.put(image, sample.picture)
            strange = sum(found.category not in known for found in sample.found)
            report.leave_out("objects whose label has a `;`, which separates objects", sample.id, strange)
            for prefix, part in class_prompts(known):
                things = [(found.box, known[found.category], ()) for found in sample.found if found.category in part]
                suffix, empty = detect_answer(things, sample.width, sample.height)
                report.leave_out("boxes without area", sample.id, empty)
                line = {"image": image, "prefix": prefix, "suffix": suffix}
                file = val if contents.validates(sample) else train
                file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
                report.written.update(lines=1, objects=len(things) - empty)
            report.written["pictures"] += 1
