"""What a user types, word for word; what is wrong, in one sentence."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsight.settings import UsageError, parse

FINE = ["--output", "out", "--yolo", "y.pt"]


@given(st.lists(st.text(min_size=1).filter(lambda text: not text.startswith("-")), min_size=1, max_size=4))
def test_inputs_are_taken_word_for_word(inputs: list[str]) -> None:
    """Commas, brackets, quotes and braces occur in file names."""
    assert parse([*inputs[:1], *FINE, *inputs[1:]]).inputs == inputs


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "inputs: [a, 'b c']\noutput: o\nyolo: y.pt\nconf: 0.5\nmax-det: 7\nclasses: [1, 2]\nimgsz: [320, 640]\n"
    )
    monkeypatch.setenv("OUTPUT", "elsewhere")
    settings = parse(["--config", str(path), "--conf", "0.1"])
    assert (settings.inputs, settings.conf, settings.max_det) == (["a", "b c"], 0.1, 7)
    assert (settings.output, settings.yolo) == (os.path.abspath("o"), os.path.abspath("y.pt"))
    assert (settings.classes, settings.imgsz) == ([1, 2], [320, 640])
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"status": "done", "configuration": settings.record()}))
    assert parse(["--config", str(job)]).record() == settings.record()


def test_lists_and_switches() -> None:
    settings = parse(["a", *FINE, "--classes", "0,2", "--classes", "5", "--imgsz", "320", "--no-scaled-decode"])
    assert (settings.classes, settings.imgsz, settings.scaled_decode) == ([0, 2, 5], 320, False)
    assert parse(["a", *FINE, "--storage", "anon=true", "--storage", "endpoint_url=http://x"]).storage == {
        "anon": "true",
        "endpoint_url": "http://x",
    }


def test_secrets_are_not_recorded() -> None:
    record = parse(["a", *FINE, "--storage", "key=K", "--storage", "secret=S", "--storage", "endpoint_url=u"]).record()
    assert record["storage"] == {"endpoint_url": "u"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (FINE, "no input"),
        (["a", "--output", "o"], "give --yolo MODEL"),
        (["a", "--yolo", "y"], "--output is missing"),
        (["a", *FINE, "--nonsense"], "--nonsense"),
        (["a", *FINE, "--conf", "much"], "--conf"),
        (["a", *FINE, "--imgsz", "1,2,3"], "HEIGHT,WIDTH"),
        (["a", *FINE, "--yolo-actors", "4:1"], "MIN:MAX"),
        (["a", *FINE, "--storage", "colour=red"], "unknown key colour"),
        (["a", *FINE, "--prompt", "caption en"], "--paligemma MODEL"),
        (["a", *FINE, "--adapter", "lora"], "--paligemma MODEL"),
        (["a", "--output", "o", "--paligemma", "p", "--prompt", "detect"], "detect NAME ; NAME"),
        (["a", "--output", "o", "--paligemma", "p", "--on", "regions"], "both --yolo and --paligemma"),
        (
            ["a", *FINE, "--paligemma", "p", "--on", "regions", "--prompt", "ocr", "--prompt", "caption en"],
            "one --prompt",
        ),
        (["a", *FINE, "--track", "botsort", "--multi-label"], "leave one out"),
        (["a", *FINE, "--config", "nowhere.yaml"], "does not exist"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
