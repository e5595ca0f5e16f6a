"""The job, noting in the file $COUNTED the id of each picture that it decodes: python -m tests.chaos.counted …"""

import os
import sys
from typing import Any

from shardsight.cli import annotate
from shardsight.decode.frames import Load
from shardsight.models import selection
from shardsight.sources import Record


class Counted(Load):
    def row(self, record: Record) -> dict[str, Any]:
        with open(os.environ["COUNTED"], "a") as file:
            file.write(record.id + "\n")
        return super().row(record)


if __name__ == "__main__":
    selection.Load = Counted  # type: ignore[misc]
    sys.exit(annotate())
