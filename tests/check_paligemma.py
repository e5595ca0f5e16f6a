"""What has to see inside vLLM; test_paligemma.py runs it in a process of its own."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from vllm import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.worker.gpu.attn_utils import compute_mm_prefix_ranges

from shardsight.decode.frames import TABLE
from shardsight.models.info import ModelDied, ModelError
from shardsight.models.paligemma.engine import Generated, PaliGemma
from shardsight.models.paligemma.prefix import Prefix, split, unsuited
from shardsight.models.paligemma.prompts import Prompt
from shardsight.row import Failure
from tests.conftest import WEIGHTS
from tests.small_paligemma import make, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make(tmp_path_factory.mktemp("models") / "second", "gemma2", seed=4)
    shutil.copy(WEIGHTS / "paligemma" / "vae-oid.npz", model)
    return model


@pytest.mark.parametrize(
    "computed, tokens, prompts, expected",
    [
        # (tokens of the part, tokens that it sees, causal), of each part
        ([0], [20], [20], [(20, 20, False)]),
        ([20], [1], [20], [(1, 21, True)]),
        ([0], [25], [20], [(20, 20, False), (5, 25, True)]),  # computed again after a preemption
        ([30, 0, 0, 50], [1, 22, 20, 1], [20, 20, 20, 50], [(1, 31, True), (20, 20, False), (2, 22, True),
                                                             (20, 20, False), (1, 51, True)]),
    ],
)  # fmt: skip
def test_batch_split(
    computed: list[int], tokens: list[int], prompts: list[int], expected: list[tuple[int, int, bool]]
) -> None:
    """A prompt sees all of itself, and never what was generated; that sees what stands before it."""
    start = [0, *np.cumsum(tokens).tolist()]
    length = [before + count for before, count in zip(computed, tokens, strict=True)]
    parts = split(start, length, {n: [(0, prompt - 1)] for n, prompt in enumerate(prompts)})
    assert list(zip(np.diff(parts.start).tolist(), parts.length, parts.causal, strict=True)) == expected
    assert parts.start[-1] == start[-1]


@pytest.mark.parametrize(
    "computed, tokens, ranges",
    [(0, 10, [(0, 19)]), (10, 10, [(0, 19)]), (0, 20, [(4, 12)]), (0, 20, []), (0, 20, [(0, 7), (9, 12)])],
)
def test_batch_refused(computed: int, tokens: int, ranges: list[tuple[int, int]]) -> None:
    """A prompt in pieces, or of a length that was lost on the way, is an error rather than a wrong answer."""
    with pytest.raises(RuntimeError, match="prompt"):
        split([0, tokens], [computed + tokens], {0: ranges})


def test_ranges_that_cuda_computes() -> None:
    """Both generations of vLLM's GPU runner ask the picture; and it says the same in the process of another device."""
    position = Prefix(0, 17, torch.tensor([True] * 16 + [False]), 24)
    for one in (position, pickle.loads(pickle.dumps(position))):
        assert one.extract_embeds_range() == [(0, 23)] and one.get_num_embeds() == 16
        feature = MultiModalFeatureSpec(data=None, modality="image", identifier="", mm_position=one)
        assert compute_mm_prefix_ranges(["a"], {"a": [feature]}, sliding_window=None) == {0: [(0, 23)]}
        assert compute_mm_prefix_ranges(["a"], {"a": [feature]}, sliding_window=24) == {0: [(0, 23)]}


RIGHT: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "dtype": "float32",
}


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, None),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"max_model_len": 257}, "sliding window of 256"),
    ],
)
def test_configuration_refused(folder: Path, change: dict[str, Any], said: str | None) -> None:
    """What would break the mask silently is refused before weights are read, in vLLM itself and by name."""
    reason = unsuited(EngineArgs(model=str(folder), **(RIGHT | change)).create_engine_config())
    assert reason is None if said is None else said in (reason or "")


def test_another_process_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineArgs(model=str(folder), **RIGHT).create_engine_config()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert "VLLM_ENABLE_V1_MULTIPROCESSING=0" in (unsuited(config) or "")


def test_table(folder: Path) -> None:
    """Rows in, the same rows out: answers to each prompt in its order; errors are passed on and made."""
    frames = pictures(3)
    rows: list[dict[str, Any]] = [
        {"id": str(n), "width": 640, "height": 480, "frame": frame.tobytes()}
        | {"frame_height": frame.shape[0], "frame_width": frame.shape[1]}
        for n, frame in enumerate(frames)
    ]
    rows.insert(1, {"id": "broken", "error": Failure("TruncatedImage", "half of it is missing").row("decode")})
    table = pa.Table.from_arrays(
        [pa.array([row.get(field.name) for row in rows], field.type) for field in TABLE], schema=TABLE
    )
    model = PaliGemma(str(folder), ["caption en", "detect car ; dog"], max_tokens=8, precision="fp32", threads=1)
    done = model(table).to_pylist()
    assert [row["id"] for row in done] == ["0", "broken", "1", "2"]
    assert done[1]["error"]["stage"] == "decode" and done[1]["answers"] is None
    for row, frame in zip([done[0], *done[2:]], frames, strict=True):
        assert row["error"] is None and "frame" not in row
        assert [answer["prompt"] for answer in row["answers"]] == ["caption en", "detect car ; dog"]
        for answer, prompt in zip(row["answers"], model.prompts, strict=True):
            alone = model.ask(frame, prompt).result()
            assert answer["text"] == model.vocabulary.decode(alone.ids).strip()
            assert answer["finish_reason"] in ("stop", "length")
            assert answer["score"] == pytest.approx(np.mean(alone.logprobs), abs=1e-4)
    said = "<loc0256><loc0512><loc0768><loc1023>" + "<seg007>" * 16 + " dog"
    ids = model.tokenizer.encode(said, add_special_tokens=False)
    answer = model.answer(Prompt.of("segment car ; dog"), Generated(ids, [-0.5] * len(ids), "stop"), 640, 480)
    (one,) = answer["detections"]
    assert answer["text"] == said and (one["label"], one["class_id"]) == ("dog", 1)
    assert one["score"] == pytest.approx(np.exp(-0.5))
    assert [one[side] for side in ("x1", "y1", "x2", "y2")] == pytest.approx([320.3, 120.1, 640, 360.4], abs=0.05)
    assert (one["mask"]["width"], one["mask"]["height"]) == (640, 480)

    model.prompts = [Prompt.of("caption en"), Prompt.of("what is it? " * 400)]
    for row in model(table).to_pylist():
        assert row["answers"] is None
        assert row["error"]["type"] == ("TruncatedImage" if row["id"] == "broken" else "PromptTooLong")
        assert row["error"]["stage"] == ("decode" if row["id"] == "broken" else "paligemma")
    model.close()
    with pytest.raises(ModelDied):
        model.ask(frames[0], Prompt.of("caption en")).result()


def test_model_refused(folder: Path, tmp_path: Path) -> None:
    """One sentence, before an engine starts."""
    with pytest.raises(ModelError, match="no room for a prompt and 250"):
        PaliGemma(str(folder), max_tokens=250)
    with pytest.raises(ModelError, match="is no LoRA adapter"):
        PaliGemma(str(folder), max_tokens=8, adapter=str(tmp_path))
