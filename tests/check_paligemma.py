"""What has to see inside vLLM; test_paligemma.py runs it in a process of its own."""

import io
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from vllm import EngineArgs, SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.worker.gpu.attn_utils import compute_mm_prefix_ranges

from shardsight.decode.frames import TABLE
from shardsight.models.info import ModelDied, ModelError
from shardsight.models.paligemma import engine, prefix
from shardsight.models.paligemma.answers import Generated
from shardsight.models.paligemma.info import inspect
from shardsight.models.paligemma.model import PaliGemma
from shardsight.models.paligemma.prefix import Prefix, split, unsuited
from shardsight.models.paligemma.prompts import Prompt, Sampling
from shardsight.row import Failure, frame_columns
from tests.conftest import WEIGHTS
from tests.small_paligemma import make, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make(tmp_path_factory.mktemp("models") / "second", "gemma2", seed=4)
    shutil.copy(WEIGHTS / "paligemma" / "vae-oid.npz", model)
    return model


@pytest.fixture(scope="module")
def started(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PaliGemma, list[str]]]:
    """A model, and what its start has left in the temporary directory."""
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        limits: dict[str, Any] = {"max_tokens": 12, "precision": "fp32", "threads": 1, "clip_frames": 3}
        model = PaliGemma(str(folder), ["caption en", "detect car ; dog"], **limits)
        left = [path.name for path in temporary.iterdir()]
    yield model, left
    model.close()


@pytest.fixture
def model(started: tuple[PaliGemma, list[str]]) -> PaliGemma:
    return started[0]


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
    assert [(part.end - part.start, part.length, part.causal) for part in parts] == expected
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])] and parts[-1].end == start[-1]


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
        second = MultiModalFeatureSpec(data=None, modality="image", identifier="", mm_position=Prefix(16, 16, None, 40))
        first = replace(second, mm_position=Prefix(0, 16, None, 40))
        assert compute_mm_prefix_ranges(["a"], {"a": [first, second]}) == {0: [(0, 39)]}


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
        ({"max_model_len": 257}, None),  # longer than its sliding window, on a CPU
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


def test_longer_than_the_window_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There vLLM would compute the prompt as causal, without a word."""
    config = EngineArgs(model=str(folder), **(RIGHT | {"max_model_len": 257})).create_engine_config()
    monkeypatch.setattr(prefix, "current_platform", Mock(is_cpu=lambda: False))
    assert "sliding window of 256 tokens on this device" in (unsuited(config) or "")


def test_several_pictures_in_several_steps_refused(folder: Path) -> None:
    """A GPU's steps overlap: vLLM's own room for pictures may then hold only half of a prompt's."""
    config = EngineArgs(model=str(folder), **(RIGHT | {"limit_mm_per_prompt": {"image": 2}})).create_engine_config()
    assert unsuited(config) is None
    config.scheduler_config.async_scheduling = True
    assert "a prompt's pictures may come in several steps" in (unsuited(config) or "")
    config.scheduler_config.encoder_cache_size = 1024
    assert unsuited(config) is None


def test_a_prompt_comes_whole(folder: Path) -> None:
    """Also while the step before still holds its pictures, as on a GPU, where nothing would notice."""
    config = engine.configured(inspect(str(folder)), engine.Limits("fp32", 256, 64, 1, 0.9, 1, pictures=5))
    config.cache_config.num_gpu_blocks, size = 1000, config.cache_config.block_size
    group = KVCacheGroupSpec(["layer"], FullAttentionSpec(size, num_kv_heads=1, head_size=32, dtype=torch.float32))
    scheduler = AsyncScheduler(config, KVCacheConfig(1000, [], [group]), Mock(), size)
    for name in range(60):
        spans = [Prefix(16 * each, 16, None, 85) for each in range(5)]
        seen = [MultiModalFeatureSpec(None, "image", f"{name} {span.offset}", span) for span in spans]
        scheduler.add_request(Request(str(name), [5] * 85, SamplingParams(max_tokens=4), None, mm_features=seen))
    steps = [scheduler.schedule(), scheduler.schedule()]
    tokens = [[step.num_scheduled_tokens[one.req_id] for one in step.scheduled_new_reqs] for step in steps]
    assert tokens == [[85] * 24, [85] * 23]  # of 2048; one token each of the first 24


def test_nothing_left_behind(started: tuple[PaliGemma, list[str]]) -> None:
    """Each start of vLLM left a file in the temporary directory: on a cluster that runs for months, thousands."""
    assert started[1] == []


def test_table(model: PaliGemma) -> None:
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
    done = model(table).to_pylist()
    assert [row["id"] for row in done] == ["0", "broken", "1", "2"]
    assert done[1]["error"]["stage"] == "decode" and done[1]["answers"] is None
    for row, frame in zip([done[0], *done[2:]], frames, strict=True):
        assert row["error"] is None and row["paligemma_clock_seconds"] > 0
        assert [answer["prompt"] for answer in row["answers"]] == ["caption en", "detect car ; dog"]
        for answer, prompt in zip(row["answers"], model.prompts, strict=True):
            alone = model.ask(frame, prompt).result()
            assert answer["text"] == model.reader.vocabulary.decode(alone.ids).strip()
            assert answer["finish_reason"] in ("stop", "length")
            assert answer["score"] == pytest.approx(np.mean(alone.logprobs), abs=1e-4)
    for row in model(table, ["caption en", "what is it? " * 400]).to_pylist():
        assert row["answers"] is None
        assert row["error"]["type"] == ("TruncatedImage" if row["id"] == "broken" else "PromptTooLong")
        assert row["error"]["stage"] == ("decode" if row["id"] == "broken" else "paligemma")


def test_clips(model: PaliGemma) -> None:
    """A clip's frames are asked about together, in the row that holds them; a video's other rows are not asked about,
    and pictures as ever."""
    frames = pictures(4)
    each = [frame_columns(frame, 640, 480) for frame in frames]
    clip = [one | {"frame_index": 10 * n} for n, one in enumerate(each[:3])]
    failure = Failure("TruncatedVideo", "half of it is missing").row("decode")
    rows: list[dict[str, Any]] = [
        each[0] | {"id": "clip", "frame_index": 0, "clip": clip},
        each[1] | {"id": "in it", "frame_index": 10},
        each[3] | {"id": "picture"},
        each[0] | {"id": "broken", "frame_index": 0, "clip": clip, "error": failure},
        {"id": "another", "width": 640, "height": 480, "frame_index": 40, "clip": clip[::-1]},
    ]
    done = {row["id"]: row for row in model(pa.Table.from_pylist(rows, TABLE)).to_pylist()}
    for name, shown, indices in [
        ("clip", frames[:3], [0, 10, 20]),
        ("another", frames[2::-1], [20, 10, 0]),
        ("picture", frames[3], None),
    ]:
        asked = [(prompt.text, model.reader.text(model.ask(shown, prompt).result())) for prompt in model.prompts]
        assert [(answer["prompt"], answer["text"]) for answer in done[name]["answers"]] == asked
        assert [answer["frames"] for answer in done[name]["answers"]] == [indices] * 2 and not done[name]["error"]
    assert done["in it"]["answers"] is None and done["in it"]["error"] is None
    assert done["broken"]["answers"] is None and done["broken"]["error"] == failure
    with pytest.raises(Failure, match="At most 3 image"):
        model.ask(frames, model.prompts[0]).result()


def test_pictures(model: PaliGemma) -> None:
    """Arrays, Pillow's pictures and encoded bytes have the same answers; bytes that are no picture an error."""
    frame = pictures(1)[0]
    png = io.BytesIO()
    Image.fromarray(frame).save(png, "PNG")
    *rows, broken = model([frame, Image.fromarray(frame), png.getvalue(), b"no picture"], prompts=["ocr"])
    alone = model.ask(frame, Prompt.of("ocr")).result()
    assert {row["answers"][0]["text"] for row in rows} == {model.reader.text(alone)}
    assert [row["width"] for row in rows] == [frame.shape[1]] * 3
    assert broken["answers"] is None and broken["error"]["stage"] == "decode"
    assert [answer["prompt"] for answer in model(frame)[0]["answers"]] == ["caption en", "detect car ; dog"]


def test_boxes_and_masks(model: PaliGemma) -> None:
    """An answer's locations and codes, in a picture's pixels."""
    said = "<loc0256><loc0512><loc0768><loc1023>" + "<seg007>" * 16 + " dog"
    ids = model.tokenizer.encode(said, add_special_tokens=False)
    answer = model.reader.row(Prompt.of("segment car ; dog"), Generated(ids, [-0.5] * len(ids), "stop"), 640, 480)
    (one,) = answer["detections"]
    assert answer["text"] == said and (one["label"], one["class_id"]) == ("dog", 1)
    assert one["score"] == pytest.approx(np.exp(-0.5))
    assert [one[side] for side in ("x1", "y1", "x2", "y2")] == pytest.approx([320.3, 120.1, 640, 360.4], abs=0.05)
    assert (one["mask"]["width"], one["mask"]["height"]) == (640, 480)


def test_stop_texts(model: PaliGemma) -> None:
    """The answer ends before a stop text, of which a stream shows nothing; one that never comes changes nothing."""
    ended = 0
    for frame in pictures(6, seed=5):
        prompt = Prompt.of("describe en")
        whole = model.ask(frame, prompt).result()
        text = model.reader.vocabulary.decode(whole.ids)
        heard: list[Generated] = []
        stop = (text[-3:], "never said")
        cut = model.ask(frame, prompt, Sampling(stop=stop), heard.append).result()
        assert cut.text == text[: text.index(stop[0])] and cut.finish_reason == "stop"
        assert all(cut.text.startswith(one.text or "") and len(one.ids) <= len(cut.ids) for one in heard)
        assert cut.ids == whole.ids[: len(cut.ids)] and len(cut.logprobs) == len(cut.ids)
        assert model.reader.vocabulary.decode(cut.ids).startswith(cut.text)
        ended += len(cut.ids) < len(whole.ids)
        other = model.ask(frame, prompt, Sampling(stop=("never said",))).result()
        assert (other.ids, other.finish_reason, other.text) == (whole.ids, whole.finish_reason, text)
    assert ended


def test_seed(model: PaliGemma) -> None:
    """The same seed draws the same answer, alone and among others; another seed another; top_p 0 the likeliest."""
    frames, prompt = pictures(4, seed=6), Prompt.of("describe en")

    def drawn(seed: int | None, top_p: float = 1.0) -> list[list[int]]:
        asked = [model.ask(frame, prompt, Sampling(None, 1.0, top_p, seed)) for frame in frames]
        return [one.result().ids for one in asked]

    for seed in (7, -1):
        alone = [model.ask(frame, prompt, Sampling(temperature=1.0, seed=seed)).result().ids for frame in frames]
        assert drawn(seed) == alone
    assert drawn(7) != drawn(8) and drawn(None) != drawn(None)
    assert drawn(None, top_p=0) == [model.ask(frame, prompt).result().ids for frame in frames]


def test_engine_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests, running, waiting or yet to come, raise what ends and replaces the process; none waits for ever."""
    broken = Mock(step=Mock(side_effect=RuntimeError("CUDA error")))
    monkeypatch.setattr(engine, "load", lambda *_: broken)
    failed = engine.Engine(inspect(str(folder)), engine.Limits("fp32", 256, 1, 1, 0.9, 1))
    asked = [failed.submit(engine.Request(frame, [5], Sampling(4))) for frame in pictures(5)]
    for future in asked:
        with pytest.raises(ModelDied, match=r"CUDA error|has ended"):
            future.result(timeout=60)
    failed.thread.join()
    with pytest.raises(ModelDied, match="has ended"):
        failed.submit(engine.Request(pictures(1)[0], [5], Sampling(4))).result(timeout=60)


def test_model_refused(folder: Path, tmp_path: Path) -> None:
    """One sentence, before an engine starts."""
    with pytest.raises(ModelError, match="leaves too few for a prompt and 500 of an answer"):
        PaliGemma(str(folder), max_tokens=500)
    with pytest.raises(ModelError, match="480 of them those of a clip's 30 frames"):
        PaliGemma(str(folder), max_tokens=30, clip_frames=30)
    with pytest.raises(ModelError, match="is no LoRA adapter"):
        PaliGemma(str(folder), max_tokens=8, adapter=str(tmp_path))


def test_closed(model: PaliGemma) -> None:
    """Who asks an engine that has ended is told so, rather than left waiting; last here, as it ends the shared one."""
    model.close()
    with pytest.raises(ModelDied):
        model.ask(pictures(1)[0], Prompt.of("caption en")).result()
