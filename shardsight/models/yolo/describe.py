"""Says what a YOLO model is: `python -m shardsight.models.yolo.describe PATH IMGSZ`, of which IMGSZ is JSON.

Writes one JSON object: `task`, `names` and `input`, or `error`, a sentence for the user.
"""

import json
import os
import sys
from dataclasses import asdict

from shardsight.models.info import ModelError


def main(path: str, imgsz: str) -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output, too
    from shardsight.models.yolo.model import Yolo

    try:
        yolo = Yolo(path, imgsz=json.loads(imgsz), precision="fp32")
        found = {"task": yolo.task, "names": yolo.names, "input": asdict(yolo.input)}
    except ModelError as error:
        found = {"error": str(error)}
    with answer:
        json.dump(found, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
