"""What a job says while it runs."""

import io

from rich.console import Console

from shardsight.progress import Progress


def test_an_estimate_below_what_has_come_is_not_said() -> None:
    """ "127 of 51 rows" is nonsense: the first units written may be smaller than the others."""
    with Progress(Console(file=io.StringIO())) as progress:
        progress.begin(0, None)
        progress.add(2, 0, 51)
        assert str(progress).startswith("2 of 51 rows, ")
        progress.add(125, 0, 51)
        assert str(progress).startswith("127 rows, ") and "left" not in str(progress)
