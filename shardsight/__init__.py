"""Distributed batch vision on Ray: pictures → YOLOv8 and PaliGemma → rows.

Importing this imports neither torch nor Ray; what is named below does when it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardsight.conversion import convert as convert
    from shardsight.errors import UsageError as UsageError
    from shardsight.evaluation.run import Report as Report
    from shardsight.evaluation.run import evaluate as evaluate
    from shardsight.exporting import Exports as Exports
    from shardsight.exporting import export as export
    from shardsight.job import Job as Job
    from shardsight.job import JobError as JobError
    from shardsight.job import annotate as annotate
    from shardsight.job import load_results as load_results
    from shardsight.models.paligemma.model import PaliGemma as PaliGemma
    from shardsight.models.yolo.model import Yolo as Yolo
    from shardsight.pipeline import read as read

_WHERE = {
    "annotate": "shardsight.job",
    "convert": "shardsight.conversion",
    "evaluate": "shardsight.evaluation.run",
    "Exports": "shardsight.exporting",
    "export": "shardsight.exporting",
    "Job": "shardsight.job",
    "JobError": "shardsight.job",
    "PaliGemma": "shardsight.models.paligemma.model",
    "Report": "shardsight.evaluation.run",
    "UsageError": "shardsight.errors",
    "Yolo": "shardsight.models.yolo.model",
    "load_results": "shardsight.job",
    "read": "shardsight.pipeline",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module shardsight has no {name}: there are {', '.join(_WHERE)}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
