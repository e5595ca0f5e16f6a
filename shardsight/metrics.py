"""A job's figures as Prometheus metrics, which Ray exports; deploy/grafana-jobs.json draws them."""

from collections.abc import Mapping

from ray.util import metrics

_TAGS = ("job", "stage")


class JobMetrics:
    """Of a job, by its output, and its stages."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.rows = metrics.Counter("shardsight_job_rows", "Rows that a stage processed", _TAGS)
        self.errors = metrics.Counter("shardsight_job_errors", "Rows that a stage failed", _TAGS)
        self.cpu = metrics.Counter("shardsight_job_cpu_seconds", "CPU time that a stage took", _TAGS)
        self.busy = metrics.Gauge("shardsight_job_busy", "Share of its processes' time in which a stage worked", _TAGS)
        self.queue = metrics.Gauge("shardsight_job_queue", "Blocks that wait before a stage", _TAGS)
        self.processes = metrics.Gauge("shardsight_job_processes", "Processes of a stage", _TAGS)

    def written(self, stages: Mapping[str, Mapping[str, float]], errors: Mapping[tuple[str, str], int]) -> None:
        """Count what was written: rows and cpu_seconds of each stage, and errors by stage and type."""
        for stage, spent in stages.items():
            self._add(self.rows, stage, spent["rows"])
            self._add(self.cpu, stage, spent["cpu_seconds"])
        for (stage, _), count in errors.items():
            self._add(self.errors, stage, count)

    def now(self, busy: Mapping[str, float], queue: Mapping[str, int], processes: Mapping[str, int]) -> None:
        for gauge, values in ((self.busy, busy), (self.queue, queue), (self.processes, processes)):
            for stage, value in values.items():
                gauge.set(value, {"job": self.job, "stage": stage})

    def _add(self, counter: metrics.Counter, stage: str, amount: float) -> None:
        if amount > 0:  # Ray's counters refuse 0
            counter.inc(amount, {"job": self.job, "stage": stage})
