"""A job's results as a page to look at: `python -m jobs.show OUT`."""

import argparse
import sys

from shardsight.settings import UsageError
from shardsight.storage import StorageError
from shardsight.viewer.job import show


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.show", description=__doc__)
    parser.add_argument("out", metavar="OUT", help="a job's --output: a folder, or a prefix as s3://bucket/job")
    parser.add_argument("--page", metavar="PATH", help="OUT/page.html by default; ./page.html where OUT is in a store")
    parser.add_argument("--count", metavar="N", type=int, default=24, help="pictures on the page; 24 by default")
    parser.add_argument(
        "--storage", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="of the store; as for the job"
    )
    args = parser.parse_args(arguments)
    try:
        if wrong := [pair for pair in args.storage if "=" not in pair]:
            raise UsageError(f"--storage {wrong[0]}: expected KEY=VALUE, as endpoint_url=http://localhost:9000")
        print(show(args.out, args.page, args.count, dict(pair.split("=", 1) for pair in args.storage)))
    except (UsageError, StorageError) as error:
        print(f"shardsight: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
