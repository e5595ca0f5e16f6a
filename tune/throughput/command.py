"""The command line of the search for throughput."""

import sys

from shardsight.errors import Fault, UsageError
from tune.command import failed, terminable


def main(arguments: list[str] | None = None, command: str = "python -m tune.throughput") -> int:
    """Search as the command line says; returns the exit code of the contract: 0, 1, 2 or 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with terminable():
        try:
            return _main(arguments, command)
        except KeyboardInterrupt:
            print("tune.throughput: interrupted; the same command goes on from here", file=sys.stderr)
            return 130


def _main(arguments: list[str], command: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rich.console import Console

    from shardsight import cluster
    from shardsight.settings import parse_as
    from shardsight.storage import Storage
    from tune.throughput import report
    from tune.throughput.request import Settings, help_text
    from tune.throughput.run import run

    if {"-h", "--help"} & set(arguments):
        print(help_text(command))
        return 0
    alone, console = not cluster.joined(), Console(stderr=True)
    try:
        settings = parse_as(Settings, arguments)
        content = run(settings, console)
    except (Fault, UsageError) as error:
        return failed("tune.throughput", error, "nothing measured is lost")
    finally:
        if alone:
            cluster.leave()
    table = pq.read_table(pa.BufferReader(Storage(settings.storage).read(f"{settings.output}/{report.TABLE}")))
    report.show(table.to_pylist(), settings.output, content, console)
    return 0
