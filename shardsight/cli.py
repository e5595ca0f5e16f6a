"""The command `shardsight`, for who installed the wheel; `jobs/` has the same commands for who has the repository."""

import signal
import sys
from typing import Any

from rich.console import Console

from shardsight import cluster
from shardsight.errors import UsageError
from shardsight.job import JobError, JobInterrupted, run
from shardsight.progress import Progress, summary
from shardsight.settings import help_text, parse

COMMANDS = (
    "Usage: shardsight annotate INPUT... --output PATH [--yolo PATH] [--paligemma PATH]; see also annotate --help"
)


def main(arguments: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "annotate":
        return annotate(rest, "shardsight annotate")
    if command in ("-h", "--help"):
        print(COMMANDS)
        return 0
    print(f"shardsight: there is no command {command}; {COMMANDS}", file=sys.stderr)
    return 2


def annotate(arguments: list[str] | None = None, command: str = "python -m jobs.annotate") -> int:
    """Run the job as its command line says; returns the exit code of the contract: 0, 1, 2, 3 or 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text(command))
        return 0
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:  # what a scheduler sends first is an interrupt, too
        signal.signal(kind, _interrupt)
    try:
        return _annotate(arguments)
    except KeyboardInterrupt:  # before there was a job
        return 130
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _annotate(arguments: list[str]) -> int:
    alone = not cluster.joined()
    try:
        settings = parse(arguments)
        with Progress() as progress:
            made = run(settings, progress)
        code = 3 if made.too_many_errors else 0
        said = f"{made.failed:,} of {made.inputs:,} inputs failed, more than --max-error-rate {settings.max_error_rate}"
        said = f"{said}; their rows say why" if code else ""
    except JobInterrupted as error:
        made, code, said = error.job, 130, str(error)
    except JobError as error:
        made, code = error.job, 1
        said = f"{error}; nothing finished is lost, and the same command goes on from here"
    except UsageError as error:
        print(f"shardsight: {error}", file=sys.stderr)
        return 2
    finally:
        if alone:
            cluster.leave()
    summary(made.content, made.out, Console(stderr=True))
    if said:
        print(f"shardsight: {said}", file=sys.stderr)
    return code


def _interrupt(*_: Any) -> None:
    """The first interrupt ends the job; what follows it must not stop its results from being written."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt
