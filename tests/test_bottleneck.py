"""What a job names as its bottleneck, from what its stages did."""

from typing import Any

import pytest

from shardsight.bottleneck import Use

# A minute with four processes that read and decode, and two actors a model.
SLOTS = {"decode": 240.0, "yolo": 120.0, "paligemma": 120.0}


def use(busy: dict[str, float], **others: Any) -> Use:
    idle = {"read": 0.0, "decode": 0.0, "yolo": 0.0, "paligemma": 0.0, "write": 0.0}
    return Use(idle | busy, SLOTS, 60.0, **others)


@pytest.mark.parametrize(
    ("made", "stage", "said"),
    [
        (
            use({"read": 12, "decode": 209, "yolo": 47}),
            "decode",
            "decoding: 92% of its slots busy, yolo waited 61% of the time: add CPU nodes",
        ),
        (use({"read": 200, "decode": 20, "yolo": 30}), "read", "waiting for the storage, yolo waited 75% of the time"),
        (use({"read": 12, "decode": 60, "yolo": 115}), "yolo", "yolo: 96% of its time busy, reading and decoding 30%"),
        (use({"decode": 24, "yolo": 80, "paligemma": 119}, gpu=True), "paligemma", "add GPU nodes"),
        (use({"decode": 48, "yolo": 60, "write": 200}, blocked=48.0), "write", "waited for it 80% of the time, yolo"),
        (use({"decode": 48, "yolo": 30}, held=25.0, made=1e9, spilled=2e6), "memory", "held reading back 42%"),
        (use({"decode": 48, "yolo": 110}, held=25.0), "yolo", "yolo: 92% of its time busy"),
        (use({"decode": 200, "yolo": 30}, made=1e9, spilled=8e8), "memory", "800 MB of frames went to the disk"),
    ],
)
def test_cases(made: Use, stage: str, said: str) -> None:
    found = made.bottleneck()
    assert found and found[0] == stage and said in found[1]


def test_nothing_computed_has_no_bottleneck() -> None:
    assert use({}).bottleneck() is None and use({}, blocked=10.0).bottleneck() is None


def test_the_line_while_it_runs() -> None:
    made = use({"decode": 120, "yolo": 30})
    assert made.line({"yolo": 2}) == "busy: decode 50%, yolo 25% (2 queued)"
    assert use({}).line({}) == ""


def test_shares_are_never_above_one() -> None:
    """Before the first look at a short job there are no slots yet."""

    def made(slots: dict[str, float]) -> Use:
        return Use({"decode": 3.0, "write": 9.0}, slots, 0.0, blocked=1.0)

    assert made({}).shares() == made({"decode": 1.0}).shares() == {"decode": 1.0, "write": 1.0}
