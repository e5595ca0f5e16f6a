"""The command `shardsight`, for who installed the wheel; `jobs/` has the same commands for who has the repository."""

import argparse
import signal
import sys
from typing import Any

from shardsight.errors import UsageError

# The rest is imported by each command, in seconds during which an interrupt is already handled.

COMMANDS = (
    "Usage: shardsight annotate INPUT... --output PATH [--yolo PATH] [--paligemma PATH], shardsight show OUT, "
    "or shardsight convert OUT --to FORMAT --output DIR; see also annotate --help, show --help and convert --help"
)


def main(arguments: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "annotate":
        return annotate(rest, "shardsight annotate")
    if command == "show":
        return show(rest, "shardsight show")
    if command == "convert":
        return convert(rest, "shardsight convert")
    if command in ("-h", "--help"):
        print(COMMANDS)
        return 0
    print(f"shardsight: there is no command {command}; {COMMANDS}", file=sys.stderr)
    return 2


def annotate(arguments: list[str] | None = None, command: str = "python -m jobs.annotate") -> int:
    """Run the job as its command line says; returns the exit code of the contract: 0, 1, 2, 3 or 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        from shardsight.settings import help_text

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
            if signal.getsignal(kind) is _interrupt:  # after an interrupt, further ones stay ignored until the exit
                signal.signal(kind, handler)


def _annotate(arguments: list[str]) -> int:
    from rich.console import Console

    from shardsight import cluster
    from shardsight.job import JobError, JobInterrupted, run
    from shardsight.progress import Progress, summary
    from shardsight.settings import parse

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


def show(arguments: list[str] | None = None, command: str = "python -m jobs.show") -> int:
    """Write a job's page and print where it is; returns the exit code of the contract: 0 or 2."""
    from shardsight.viewer import job as viewer

    parser = argparse.ArgumentParser(prog=command, description="A job's results as a page to look at.")
    parser.add_argument("out", metavar="OUT", help="a job's --output: a folder, or a prefix as s3://bucket/job")
    parser.add_argument("--page", metavar="PATH", help="OUT/page.html by default; ./page.html where OUT is in a store")
    parser.add_argument("--count", metavar="N", type=int, default=24, help="pictures on the page; 24 by default")
    _add_storage(parser)
    args = parser.parse_args(arguments)
    try:
        print(viewer.show(args.out, args.page, args.count, _storage(args.storage)))
    except UsageError as error:
        print(f"shardsight: {error}", file=sys.stderr)
        return 2
    return 0


def convert(arguments: list[str] | None = None, command: str = "python -m jobs.convert") -> int:
    """Write a job's results in another tool's format and print where; returns the exit code of the contract: 0 or 2."""
    from rich.console import Console

    from shardsight.conversion import FORMATS, convert
    from shardsight.progress import converted

    parser = argparse.ArgumentParser(prog=command, description="A job's results in the format of another tool.")
    parser.add_argument("out", metavar="OUT", help="a job's --output: a folder, or a prefix as s3://bucket/job")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("--output", required=True, metavar="DIR", help="an empty folder, or a prefix in a store")
    parser.add_argument(
        "--from", dest="source", choices=("detections", "answers"), default="detections", help="YOLO's or PaliGemma's"
    )
    parser.add_argument("--min-score", metavar="F", type=float, default=0.0, help="leave out objects below; 0")
    parser.add_argument("--label", metavar="NAME", action="append", default=[], help="only these; repeatable")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="only its answers; repeatable")
    parser.add_argument("--split", metavar="F", type=float, help="share of pictures for validation; 0.2")
    parser.add_argument("--link", action="store_true", help="link to local pictures instead of copying them")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier conversion in DIR")
    _add_storage(parser)
    args = vars(parser.parse_args(arguments))
    try:
        report = convert(**args | {"storage": _storage(args["storage"])})
    except UsageError as error:
        print(f"shardsight: {error}", file=sys.stderr)
        return 2
    converted(report, Console(stderr=True))
    print(args["output"])
    return 0


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="of the store; as for the job"
    )


def _storage(pairs: list[str]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise UsageError(f"--storage {wrong[0]}: expected KEY=VALUE, as endpoint_url=http://localhost:9000")
    return dict(pair.split("=", 1) for pair in pairs)


def _interrupt(*_: Any) -> None:
    """End the job; further interrupts are ignored, as they would stop its results from being written."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt
