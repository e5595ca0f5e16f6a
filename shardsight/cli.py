"""The command `shardsight`, for who installed the wheel; `jobs/` has the same commands for who has the repository."""

import argparse
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from shardsight.errors import UsageError

# The rest is imported by each command, in seconds during which an interrupt is already handled.

COMMANDS = (
    "Usage: shardsight COMMAND ..., where COMMAND is annotate, show, convert, evaluate or export; each has --help"
)


def main(arguments: list[str] | None = None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    commands = {"annotate": annotate, "show": show, "convert": convert, "evaluate": evaluate, "export": export}
    if command in commands:
        return commands[command](rest, f"shardsight {command}")
    if command in ("-h", "--help"):
        print(COMMANDS)
        return 0
    print(f"shardsight: there is no command {command}; {COMMANDS}", file=sys.stderr)
    return 2


def annotate(arguments: list[str] | None = None, command: str = "python -m jobs.annotate") -> int:
    """Run the job as its command line says; returns the exit code of the contract: 0, 1, 2, 3 or 130."""
    return _run(_annotate, arguments, command, "shardsight.settings")


def evaluate(arguments: list[str] | None = None, command: str = "python -m jobs.evaluate") -> int:
    """Evaluate models as the command line says; returns the exit code of the contract: 0, 1, 2 or 130."""
    return _run(_evaluate, arguments, command, "shardsight.evaluation.request")


def _run(
    run: Callable[[list[str], str], int], arguments: list[str] | None, command: str, help: str | None = None
) -> int:
    """A command, whose interrupts and wrong requests are told by its exit code. help: the module of its `help_text`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if help and {"-h", "--help"} & set(arguments):
        print(import_module(help).help_text(command))
        return 0
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in before:  # what a scheduler sends first is an interrupt, too
        signal.signal(kind, _interrupt)
    try:
        return run(arguments, command)
    except UsageError as error:
        print(f"shardsight: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a job
        return 130
    finally:
        for kind, handler in before.items():
            if signal.getsignal(kind) is _interrupt:  # after an interrupt, further ones stay ignored until the exit
                signal.signal(kind, handler)


def _annotate(arguments: list[str], command: str) -> int:
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
        rate = f"--max-error-rate {settings.max_error_rate}"
        said = f"{made.failed:,} of {made.rows:,} rows have an error, which says why: more than {rate}" if code else ""
    except JobInterrupted as error:
        made, code, said = error.job, 130, str(error)
    except JobError as error:
        made, code = error.job, 1
        said = f"{error}; nothing finished is lost, and the same command goes on from here"
    finally:
        if alone:
            cluster.leave()
    summary(made.content, made.out, Console(stderr=True))
    if said:
        print(f"shardsight: {said}", file=sys.stderr)
    return code


def _evaluate(arguments: list[str], command: str) -> int:
    from rich.console import Console

    from shardsight import cluster
    from shardsight.evaluation.request import Evaluation
    from shardsight.evaluation.run import run
    from shardsight.job import JobError, JobInterrupted
    from shardsight.progress import Progress
    from shardsight.settings import parse_as

    alone = not cluster.joined()
    try:
        with Progress() as progress:
            made = run(parse_as(Evaluation, arguments), progress, progress.console.print)
    except (JobInterrupted, JobError) as error:
        resumable = (
            "" if isinstance(error, JobInterrupted) else "; nothing finished is lost, and the same command goes on"
        )
        print(f"shardsight: {error.job.out}: {error}{resumable}", file=sys.stderr)
        return 130 if isinstance(error, JobInterrupted) else 1
    finally:
        if alone:
            cluster.leave()
    made.print(Console(stderr=True))
    print(made.page)
    return 0


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
    """Write a job's results in another tool's format and print where; returns the exit code: 0, 2 or 130."""
    return _run(_convert, arguments, command)


def _convert(arguments: list[str], command: str) -> int:
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
    report = convert(**args | {"storage": _storage(args["storage"])})
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


_EXPORT_EXAMPLES = """Examples:
  {command} best.pt --format onnx,openvino --output exports
  {command} best.pt --format openvino --precision fp32,int8 --data data.yaml --within 0.3 --output exports

Nothing is downloaded or installed: what a format needs and this machine lacks is named. Exit codes: 0 done, 1 stopped
by a fault, 2 the request is wrong, 3 done and some exports failed, 130 interrupted."""


def export(arguments: list[str] | None = None, command: str = "python -m jobs.export") -> int:
    """Export a YOLO as the command line says; returns the exit code of the contract: 0, 1, 2, 3 or 130."""
    return _run(_export, arguments, command)


def _export(arguments: list[str], command: str) -> int:
    from rich.console import Console

    from shardsight import cluster
    from shardsight.exporting import Request, run
    from shardsight.job import JobError, JobInterrupted
    from shardsight.sources import absolute

    args = vars(_export_parser(command).parse_args(arguments))
    alone, console = not cluster.joined(), Console(stderr=True)
    options = {name: args.pop(name) for name in ("imgsz", "batch", "dynamic", "nms", "opset", "fraction")}
    try:
        data = args["data"] and absolute(args["data"])
        several = {name: args[name].split(",") for name in ("formats", "precisions")}
        paths = {name: absolute(args[name].rstrip("/")) for name in ("model", "output")}
        storage = _storage(args["storage"])
        given = {name: value for name, value in options.items() if value not in (None, False)}
        made = run(Request(**args | several | paths | {"data": data, "storage": storage, "options": given}), console)
    except (JobInterrupted, JobError) as error:
        print(f"shardsight: {error}; the exports are there", file=sys.stderr)
        return 130 if isinstance(error, JobInterrupted) else 1
    finally:
        if alone:
            cluster.leave()
    made.print(console)
    print(made.page or made.out)
    return 3 if made.failed else 0


def _export_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command,
        description="A YOLO in other formats, and their speed and accuracy beside the original's.",
        epilog=_EXPORT_EXAMPLES.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="YOLOv8 weights (.pt), local or in a store")
    add(
        "--format",
        dest="formats",
        metavar="NAME,...",
        required=True,
        help="as ultralytics names them: onnx, openvino, …",
    )
    add("--precision", dest="precisions", metavar="NAME,...", default="", help="fp32, fp16, int8, w8a16, w8a32")
    add("--output", metavar="DIR", required=True, help="an empty folder, or a prefix in a store")
    add("--data", metavar="PATH", help="labelled pictures: calibrate int8, and compare all; or pictures to calibrate")
    add("--within", metavar="POINTS", type=float, help="name the fastest export that loses no more than this")
    add("--limit", metavar="N", type=int, help="compare on the first N pictures only")
    add("--rounds", metavar="N", type=int, default=5, help="in which speed is measured; 5")
    add("--imgsz", metavar="N or H,W", type=_imgsz, help="input size; the model's own by default")
    add("--batch", metavar="N", type=int, help="pictures at once; with --dynamic, at most")
    add("--dynamic", action="store_true", help="any input size")
    add("--nms", action="store_true", help="with non-maximum suppression inside")
    add("--opset", metavar="N", type=int, help="of ONNX")
    add("--fraction", metavar="0..1", type=float, help="share of the calibration pictures")
    add("--overwrite", action="store_true", help="delete earlier exports in DIR")
    _add_storage(parser)
    return parser


def _imgsz(text: str) -> int | list[int]:
    sides = [int(side) for side in text.split(",")]
    return sides[0] if len(sides) == 1 else sides


def _interrupt(*_: Any) -> None:
    """End the job; further interrupts are ignored, as they would stop its results from being written."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt
