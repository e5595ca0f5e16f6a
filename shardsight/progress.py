"""Progress of a running job: a live bar on a terminal, elsewhere a line every ten seconds."""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shardsight.results.formats.sample import Report

EVERY = 10.0  # seconds between lines where there is no terminal


@dataclass
class Progress:
    """Shows a job's progress (a job.Watcher)."""

    console: Console = field(default_factory=lambda: Console(stderr=True))
    before: int = 0  # rows that were there when the pass began
    total: int | None = None
    rows: int = 0
    errors: int = 0
    started: float = field(default_factory=time.monotonic)
    stages: str = ""

    def __enter__(self) -> "Progress":
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        if self.live:
            self.live.start()
        self.said = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def begin(self, done: int, total: int | None) -> None:
        self.before, self.total, self.rows, self.errors = done, total, 0, 0
        self.started = time.monotonic()

    def use(self, line: str) -> None:
        self.stages = line

    def wait(self, line: str) -> None:
        if line:
            self.console.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, soft_wrap=True)

    def add(self, rows: int, errors: int, total: int | None) -> None:
        self.rows, self.errors = self.rows + rows, self.errors + errors
        # A total estimated from the first units that were written may be less than the rows that have come since.
        self.total = total if total and total >= self.before + self.rows else None
        if self.live:
            self.live.update(Text(f"{self._bar()} {self}\n{self.stages}"), refresh=True)
        elif time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            said = ", ".join(part for part in (str(self), self.stages) if part)
            self.console.print(said, highlight=False, soft_wrap=True)

    def _bar(self, width: int = 30) -> str:
        if not self.total:
            return ""
        full = min(width, width * (self.before + self.rows) // self.total)
        return "━" * full + "─" * (width - full)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        of = f" of {self.total:,}" if self.total else ""
        left = ""
        if self.total and self.rows:
            rest = (self.total - self.before - self.rows) * seconds / self.rows
            left = f", {_clock(max(0.0, rest))} left"
        done = self.before + self.rows
        return f"{done:,}{of} rows, {self.rows / seconds:,.1f} rows/s, {self.errors:,} errors{left}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def summary(job: dict[str, Any], where: str, console: Console) -> None:
    """The table at the end."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    errors = Counter({f"{stage}: {type}": n for stage, types in job["errors"].items() for type, n in types.items()})
    table.add_row("inputs", f"{job['inputs']:,}")
    table.add_row(
        "rows", f"{job['rows']:,}" + (f" ({job['resumed_rows']:,} were there)" if job["resumed_rows"] else "")
    )
    table.add_row("errors", f"{errors.total():,}")
    for kind, count in errors.most_common():
        table.add_row("", f"{count:,} {kind}")
    if job["ignored"]:
        table.add_row("left out", f"{sum(job['ignored'].values()):,}")
        for reason, count in job["ignored"].items():
            table.add_row("", f"{count:,} {reason}")
    if job.get("changed_rows"):
        table.add_row("changed", f"{job['changed_rows']:,} rows of inputs that changed since were made anew")
    table.add_row("seconds", f"{job['seconds']:,.1f}")
    table.add_row("rows/s", f"{job['rows_per_second']:,.1f}")
    if int8 := job["models"].get("yolo", {}).get("int8"):
        said = (
            f"agrees with fp32 on {int8['agreement']:.1%} of {int8['objects']:,} objects in {int8['checked']} pictures"
        )
        table.add_row("int8", said)
    if job["bottleneck"]:
        table.add_row("bottleneck", job["advice"])
    table.add_row("exactly once", "yes" if job["exactly_once"] else "no")
    table.add_row("results", f"{where}/results/*.parquet")
    console.print(table, highlight=False)


def converted(report: Report, console: Console) -> None:
    """The table at the end of a conversion; of each reason it names the first three."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for what, count in sorted((+report.written).items()):
        table.add_row(what, f"{count:,}")
    for reason, count in report.left_out.most_common():
        table.add_row("left out", Text(f"{count:,} {reason}"))
        for id in report.examples[reason][:3]:
            table.add_row("", Text(f"  {id}"))
    for note in report.notes:
        table.add_row("note", Text(note))
    console.print(table, highlight=False)
