"""Progress of a sweep: on a terminal a live table of trials, elsewhere a line every ten seconds; and the outcome."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune.sweep import Trial, best_of

EVERY = 10.0  # seconds between lines where there is no terminal
REFRESH = 0.5  # seconds between tables
_COLOURS = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red", "pending": "dim"}


@dataclass
class Progress:
    """Shows a sweep's progress (a sweep.Watcher). epochs: of a trial that is not stopped."""

    epochs: int
    console: Console = field(default_factory=lambda: Console(stderr=True))
    said: float = field(default_factory=time.monotonic)
    began: float | None = None
    before: int = 0  # epochs that were there when it began

    def __enter__(self) -> "Progress":
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, trials: list[Trial], total: int) -> None:
        if self.began is None:
            self.began, self.before = time.monotonic(), _epochs(trials)
        since = time.monotonic() - self.said
        if since < (REFRESH if self.live else EVERY):
            return
        self.said = time.monotonic()
        if self.live:
            rows = max(4, self.console.height - 6)
            shown = [trial for trial in trials if not trial.ended] + sorted(
                (trial for trial in trials if trial.ended), key=lambda trial: -(trial.fitness or 0.0)
            )
            self.live.update(Group(Text(self.line(trials, total)), table(shown[:rows], self.epochs)), refresh=True)
        else:
            self.console.print(self.line(trials, total), highlight=False, soft_wrap=True)

    def line(self, trials: list[Trial], total: int) -> str:
        """Trials that have ended and are running, the best so far, and the time left."""
        counts = {status: sum(trial.status == status for trial in trials) for status in _COLOURS}
        ended = sum(trial.ended for trial in trials)
        said = [f"{ended} of {total} trials ended", f"{counts['running']} running"]
        said += [f"{counts[status]} {status}" for status in ("stopped", "failed") if counts[status]]
        if best := best_of(trials):
            said.append(f"best {best.fitness:.4f} (trial {best.number})")
        if left := self._left(trials, total):
            said.append(f"about {left} left")
        return ", ".join(said)

    def _left(self, trials: list[Trial], total: int) -> str:
        """As long as the epochs so far took, if further trials are stopped as early as those that have ended."""
        made = _epochs(trials) - self.before
        ended = [len(trial.epochs) for trial in trials if trial.ended]
        if not made or self.began is None:
            return ""
        usual = sum(ended) / len(ended) if ended else float(self.epochs)
        running = sum(max(0.0, usual - len(trial.epochs)) for trial in trials if not trial.ended)
        seconds = round((running + usual * (total - len(trials))) * (time.monotonic() - self.began) / made)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds} s"


def _epochs(trials: list[Trial]) -> int:
    return sum(len(trial.epochs) for trial in trials)


def table(trials: list[Trial], epochs: int, most: int = 5) -> Table:
    """A row a trial, with the first few of its hyperparameters."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.config))[:most]
    made = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("trial", "status", "epoch", "fitness", *names):
        made.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
    for trial in trials:
        made.add_row(
            *(str(trial.number), Text(trial.status, style=_COLOURS[trial.status])),
            f"{trial.epochs[-1]['epoch'] if trial.epochs else 0}/{epochs}",
            "" if trial.fitness is None else f"{trial.fitness:.4f}",
            *(value_text(trial.config.get(name)) for name in names),
        )
    return made


def value_text(value: Any) -> str:
    """A hyperparameter's value, short."""
    if isinstance(value, str) and "/" in value:
        return value.rpartition("/")[2]
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def summary(trials: list[Trial], content: dict[str, Any], out: str, epochs: int, console: Console) -> None:
    """The tables at the end: the best trials, the errors, and where things are."""
    best = sorted((trial for trial in trials if trial.epochs), key=lambda trial: -(trial.fitness or 0.0))
    if best:
        console.print(table(best[:10], epochs), highlight=False)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(justify="right", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("trials", ", ".join(f"{count} {status}" for status, count in content["trials"].items() if count))
    for trial in [trial for trial in trials if trial.error][:5]:
        facts.add_row("failed", f"trial {trial.number}: {trial.error}"[:300])
    facts.add_row("seconds", f"{content['seconds']:,.1f}")
    if content.get("best"):
        facts.add_row("best", f"{out}/best, of trial {content['best']['trial']}")
    facts.add_row("table", f"{out}/trials.parquet")
    facts.add_row("report", f"{out}/report.html")
    facts.add_row("TensorBoard", f"tensorboard --logdir {out}/trials")
    console.print(facts, highlight=False)
