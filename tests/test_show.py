"""The page: opens from a disk, shows what was found, and asks nothing of the net."""

import json
import re
from pathlib import Path

from jobs import show
from shardsight.decode.frames import Load
from shardsight.models.yolo.model import Yolo
from shardsight.results.coverage import Coverage
from shardsight.results.writer import Results
from shardsight.sources import Listing, read
from shardsight.storage import Storage
from tests.conftest import WEIGHTS, write_tar


def test_page(tmp_path: Path, jpegs: list[bytes]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_tar(folder / "t.tar", [("<b>.jpg", jpegs[0]), ("bad.jpg", b"<script>")])
    (folder / "a.jpg").write_bytes(jpegs[1])
    model, storage = Yolo(str(WEIGHTS / "detect.pt")), Storage()
    load = Load(storage, model.input)
    units = Listing([str(folder)], storage).left(Coverage())
    rows = model(load.table([load.row(record) for unit in units for record in read(unit, storage)]))
    results = Results(str(out), storage)
    results.prepare()
    results.write(rows, 100)
    results.save_job(
        {
            **{"inputs": 3, "rows": 3, "errors": {"decode": {"NotAnImage": 1}}, "rows_per_second": 1.0},
            **{"exactly_once": True, "started": "now", "models": {"yolo": {"path": "m.pt"}}},
        }
    )
    assert show.main([str(out)]) == 0
    text = (out / "page.html").read_text()
    assert text.count("<img ") == 2 and text.count("data:image/jpeg;base64,") == 2
    assert "NotAnImage" in text and "<script" not in text and "<b>" not in text
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[^']*", "", text))
    labels = {d["label"] for row in rows.to_pylist() for d in row["detections"] or []}
    assert labels and all(label in text for label in labels)


def test_no_job_is_one_sentence(tmp_path: Path, capsys: object) -> None:
    assert show.main([str(tmp_path)]) == 2
    (tmp_path / "job.json").write_text(json.dumps({"status": "running"}))
    assert show.main([str(tmp_path)]) == 2
