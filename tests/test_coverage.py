"""Coverage, the evidence that every input is there once."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardsight.results.coverage import Coverage, Hashes, among, hashes, merge

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1])))


@given(RANGES)
def test_merge_is_the_union(ranges: list[tuple[int, int]]) -> None:
    merged = merge(ranges)
    assert {p for start, stop in merged for p in range(start, stop)} == {p for a, b in ranges for p in range(a, b)}
    assert all(a < b for a, b in merged)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))


def row(unit: int, position: int, total: int) -> dict[str, object]:
    place = {"unit": f"u{unit}", "position": position, "last": position + 1 == total, "id": f"u{unit}#{position}"}
    return place | {"error": {"stage": "decode", "type": "X"} if position % 7 == 3 else None}


@given(st.data())
def test_any_order_split_and_repetition_of_batches(data: st.DataObject) -> None:
    """Rows arrive in any order, in files of any size, some twice, some never: what is missing is known exactly."""
    totals = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    everything = [row(unit, position, total) for unit, total in enumerate(totals) for position in range(total)]
    everything += [{"unit": None, "position": 0, "last": False, "id": f"f{n}", "error": None} for n in range(5)]
    chosen = data.draw(st.lists(st.sampled_from(everything), max_size=60))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(chosen)), max_size=5)))
    files = [chosen[a:b] for a, b in zip([0, *cuts], [*cuts, len(chosen)], strict=True)]
    done = Coverage.union(Coverage.loads(Coverage.of(file).dumps()) for file in files)

    ids = {entry["id"] for entry in chosen}
    assert done.positions == len(ids)
    assert done.rows == len(chosen)
    for unit, total in enumerate(totals):
        there = {p for p in range(total) if f"u{unit}#{p}" in ids}
        assert {p for a, b in done.units.get(f"u{unit}", []) for p in range(a, b)} == there
        assert done.complete(f"u{unit}") == (len(there) == total)
    assert done.has(hashes(f"f{n}" for n in range(5))).tolist() == [f"f{n}" in ids for n in range(5)]
    assert sum(done.errors.values()) == sum(1 for entry in chosen if entry["error"])


@given(st.lists(st.lists(st.integers(0, 30)), max_size=12), st.integers(0, 40) | st.none())
def test_hashes_is_a_set(batches: list[list[int]], room: int | None) -> None:
    known: set[int] = set()
    ours = Hashes()
    for batch in batches:
        new = ours.add(hashes(map(str, batch)), None if room is None else room - len(known))
        for value, is_new in zip(batch, new, strict=True):
            expected = value not in known and (room is None or len(known) < room)
            assert bool(is_new) == expected
            if expected:
                known.add(value)
    assert len(ours) == len(known)
    everything = np.sort(hashes(map(str, range(31))))
    assert ours.within(everything)
    assert ours.within(everything[1:]) == (not any(everything[0] == h for h in hashes(map(str, known))))


def test_hashes_that_end_in_zero_bytes_are_told_apart() -> None:
    """numpy's byte strings drop trailing zeros; two hashes must not become one by it."""
    first, second = b"a" * 15 + b"\0", b"a" * 14 + b"\0\0"
    array = np.frombuffer(first + second, "S16")
    assert len(np.unique(array)) == 2
    assert among(array[:1], np.sort(array[1:])).tolist() == [False]
