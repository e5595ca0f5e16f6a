"""PaliGemma's tokens are Hugging Face's, whatever shares the engine with them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demo.run import PROMPTS as DEMO_PROMPTS
from demo.scenes import scenes
from demo.writers import jpeg
from shardsight.decode.pictures import decode
from shardsight.models import selection
from shardsight.models.info import ModelError, sha256_of
from shardsight.models.paligemma.info import fits, inspect, request_length
from shardsight.settings import Settings
from tests.ask_paligemma import ROOT, Answered, Asked, ask
from tests.conftest import WEIGHTS
from tests.small_paligemma import (
    IMAGE_SIZE,
    PROMPTS,
    Frames,
    Reference,
    adapter,
    as_published,
    make,
    pictures,
    with_head,
)

TOKENS, LONG = 16, 120  # of an answer; LONG takes more of vLLM's blocks than its prompt does
SHAPES = [
    (11, {}),
    (12, {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}),
    (13, {"hidden_size": 96, "head_dim": 64, "intermediate_size": 160}),
]
Pairs = list[tuple[Frames, str]]


def pairs_of(count: int, seed: int = 0) -> Pairs:
    """Each picture under several prompts in a row."""
    return [(frame, prompt) for frame in pictures(count, seed) for prompt in PROMPTS]


def clips_of(count: int, frames: int, seed: int = 0) -> Pairs:
    """Each prompt about one to `frames` of a few pictures, in any order: some are repeated, in a clip and in others."""
    random, few = np.random.default_rng(seed), pictures(3 * frames, seed)
    drawn = [random.choice(len(few), 1 + index % frames) for index in range(count)]
    return [([few[one] for one in clip], PROMPTS[index % len(PROMPTS)]) for index, clip in enumerate(drawn)]


def compare(answered: Answered, reference: Reference, pairs: Pairs, max_tokens: int = TOKENS) -> tuple[int, float]:
    """(pairs whose tokens are the reference's, the largest difference of their log-probabilities)."""
    equal, worst = 0, 0.0
    for (ids, logprobs), (frame, prompt) in zip(answered.answers, pairs, strict=True):
        expected, scores = reference.answer(frame, prompt, max_tokens)
        if ids == expected:
            equal += 1
            worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, scores, strict=True)))
    return equal, worst


def same(answered: Answered, reference: Reference, pairs: Pairs, max_tokens: int = TOKENS, differ: float = 0.8) -> None:
    """All tokens equal, of answers that can tell a wrong mask: most of them differ from each other."""
    assert len({tuple(ids) for ids, _ in answered.answers}) > differ * len(pairs)
    equal, worst = compare(answered, reference, pairs, max_tokens)
    print(f"{equal} of {len(pairs)} pairs equal, log-probabilities within {worst:.1e}")
    assert equal == len(pairs) and worst < 1e-3


def test_same_tokens_as_hugging_face(tmp_path: Path) -> None:
    """PaliGemma 1 in the layout of Google's uploads with a LoRA, and 2 as transformers 5 saves it, of pictures and
    of clips; preempted too."""
    first = as_published(make(tmp_path / "first", "gemma", seed=3))
    second = make(tmp_path / "second", "gemma2", seed=4)
    endless = make(tmp_path / "endless", "gemma2", seed=5, ends=False)
    lora = adapter(first, tmp_path / "lora")
    pairs, long = pairs_of(1) + clips_of(12, frames=4), pairs_of(1)[:5]
    limits = {"max_tokens": TOKENS, "batch_size": 4, "clip_frames": 4}
    runs = [
        Asked(first, pairs, limits | {"adapter": str(lora)}),
        Asked(second, pairs, limits),
        Asked(endless, long, {"max_tokens": LONG, "prompt_tokens": 60}, little=True),
    ]
    with_lora, without, again = ask(runs, tmp_path)
    same(with_lora, Reference(first, lora), pairs)
    same(without, Reference(second), pairs)
    assert again.preempted > 0
    same(again, Reference(endless), long, LONG)


def test_same_tokens_beyond_the_sliding_window(tmp_path: Path) -> None:
    """Of PaliGemma 2 at 896 pixels, whose picture alone fills Gemma 2's window of 4,096 tokens; and of small ones whose
    window ends within the picture, within the prompt (with a LoRA), and within the answer, preempted too; and of clips
    whose frames are a window apart."""
    large = make(
        tmp_path / "large", "gemma2", seed=6, size=896, num_hidden_layers=2, sliding_window=4096,
        max_position_embeddings=8192,
    )  # fmt: skip
    picture = make(tmp_path / "picture", "gemma2", seed=4, sliding_window=8)
    prompt = make(tmp_path / "prompt", "gemma2", seed=7, sliding_window=20)
    answer = make(tmp_path / "answer", "gemma2", seed=5, ends=False, sliding_window=60)
    lora = adapter(prompt, tmp_path / "lora")
    pairs, long = pairs_of(1), pairs_of(1)[:5]
    clips = pairs[:2] + clips_of(8, frames=4)
    limits = {"max_tokens": TOKENS, "batch_size": 4}
    runs = [
        Asked(large, pairs[:2], limits | {"prompt_tokens": 60}),
        Asked(picture, clips, limits | {"clip_frames": 4}),
        Asked(prompt, pairs, limits | {"adapter": str(lora)}),
        Asked(answer, long, {"max_tokens": LONG, "prompt_tokens": 60}, little=True),
    ]
    at_896, in_picture, in_prompt, in_answer = ask(runs, tmp_path)
    same(at_896, Reference(large), pairs[:2])
    # A picture's features are the same whatever is asked about it.
    assert at_896.encoded == 1 and in_prompt.encoded == len({frame.tobytes() for frame, _ in pairs}) < len(pairs)
    same(in_picture, Reference(picture), clips)
    same(in_prompt, Reference(prompt, lora), pairs)
    assert in_answer.preempted > 0
    same(in_answer, Reference(answer), long, LONG)


@pytest.mark.slow
def test_same_tokens_with_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """Weights with an lm_head that is not the embedding, said so in config.json or not; or that is, as some trainers
    save it."""
    first = with_head(make(tmp_path / "first", "gemma", seed=8), torch.randn_like)
    second = with_head(make(tmp_path / "second", "gemma2", seed=9), torch.randn_like)
    _edit("config.json", lambda config: config.update(tie_word_embeddings=False))(second)
    copied = with_head(make(tmp_path / "copied", "gemma2", seed=4), torch.clone)
    lora = adapter(second, tmp_path / "lora")
    pairs, limits = pairs_of(1), {"max_tokens": TOKENS, "batch_size": 4}
    runs = [Asked(model, pairs, limits) for model in (first, second, copied)]
    runs.append(Asked(second, pairs, limits | {"adapter": str(lora)}))
    answered = ask(runs, tmp_path)
    for one, reference in zip(
        answered, [*map(Reference, (first, second, copied)), Reference(second, lora)], strict=True
    ):
        same(one, reference, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("seed, shape", SHAPES)
def test_same_tokens_for_many_pairs(kind: str, seed: int, shape: dict[str, Any], tmp_path: Path) -> None:
    """200 pairs a model: each alone, in mixed batches, with a LoRA of the vision tower too, and preempted."""
    model = make(tmp_path / "model", kind, seed, **shape)
    endless = make(tmp_path / "endless", kind, seed, ends=False, **shape)
    lora = adapter(model, tmp_path / "lora", everywhere=True, seed=seed)
    pairs = pairs_of(20, seed)
    limits = {"max_tokens": TOKENS, "batch_size": 8}
    runs = [
        Asked(model, pairs, limits),
        Asked(model, pairs, limits, alone=True),
        Asked(model, pairs, limits | {"adapter": str(lora)}),
        Asked(endless, pairs, {"max_tokens": LONG, "prompt_tokens": 60}, little=True),
    ]
    mixed, alone, with_lora, again = ask(runs, tmp_path)
    reference = Reference(model)
    same(mixed, reference, pairs)
    assert [ids for ids, _ in alone.answers] == [ids for ids, _ in mixed.answers]
    same(with_lora, Reference(model, lora), pairs)
    assert again.preempted > 0
    same(again, Reference(endless), pairs, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("seed, shape", SHAPES)
def test_same_tokens_for_many_clips(kind: str, seed: int, shape: dict[str, Any], tmp_path: Path) -> None:
    """100 clips a model: each alone, in mixed batches, with a LoRA of the vision tower too, and preempted."""
    model = make(tmp_path / "model", kind, seed, **shape)
    endless = make(tmp_path / "endless", kind, seed, ends=False, **shape)
    lora = adapter(model, tmp_path / "lora", everywhere=True, seed=seed)
    clips = clips_of(100, frames=6, seed=seed)
    limits = {"max_tokens": TOKENS, "batch_size": 8, "clip_frames": 6}
    runs = [
        Asked(model, clips, limits),
        Asked(model, clips, limits, alone=True),
        Asked(model, clips, limits | {"adapter": str(lora)}),
        Asked(endless, clips, limits | {"max_tokens": LONG, "prompt_tokens": 60}, little=True),
    ]
    mixed, alone, with_lora, again = ask(runs, tmp_path)
    same(mixed, Reference(model), clips)
    assert [ids for ids, _ in alone.answers] == [ids for ids, _ in mixed.answers]
    same(with_lora, Reference(model, lora), clips)
    assert again.preempted > 0
    same(again, Reference(endless), clips, LONG)


@pytest.mark.slow
def test_same_tokens_of_the_demos_model(tmp_path: Path) -> None:
    """The trained one, asked what the demo asks of 40 scenes, alone and in mixed batches; many answers are alike."""
    frames = [decode(jpeg(scene))[0] for scene in scenes(40, seed=88)]
    pairs = [(frame, prompt) for frame in frames for prompt in DEMO_PROMPTS]
    runs = [
        Asked(WEIGHTS / "paligemma", pairs, {"max_tokens": LONG, "batch_size": 8}, alone=one) for one in (False, True)
    ]
    mixed, alone = ask(runs, tmp_path)
    assert [ids for ids, _ in alone.answers] == [ids for ids, _ in mixed.answers]
    same(mixed, Reference(WEIGHTS / "paligemma"), pairs, LONG, differ=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_other_tokens_with_stock_vllm(kind: str, tmp_path: Path) -> None:
    """What the comparison is worth: without the plugin it fails for nearly all pairs."""
    model = as_published(make(tmp_path / "model", kind, seed=4))
    pairs = pairs_of(2)
    [answered] = ask([Asked(model, pairs, {"max_tokens": TOKENS})], tmp_path, stock=True)
    assert compare(answered, Reference(model), pairs)[0] < 0.2 * len(pairs)


def test_inside_vllm() -> None:
    """The mask's parts, the refusals and the table, in check_paligemma.py: vLLM changes the process it is in."""
    command = [sys.executable, "-m", "pytest", "tests/check_paligemma.py"]
    # Of pytest's own variables one may name the folder that this run's tests are using.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
def test_refused_without_the_plugin(tmp_path: Path) -> None:
    """vLLM only logs that it could not load a plugin; the answers would be wrong."""
    model = make(tmp_path / "model")
    code = f"from shardsight.models.paligemma.model import PaliGemma; PaliGemma({str(model)!r}, max_tokens=8)"
    environment = os.environ | {"VLLM_PLUGINS": "none"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "vLLM did not load shardsight's plugin" in done.stderr


def test_known_before_it_is_loaded(tmp_path: Path) -> None:
    """What job.json says of a model and the driver checks; of both layouts of weights."""
    model = make(tmp_path / "model", "gemma2", seed=1)
    info = inspect(str(model))
    assert (info.input.size, info.image_tokens, info.length, info.window) == (IMAGE_SIZE, 16, 512, 256)
    assert info.kv_values == 2 * 3 * 1 * 32 and len(info.sha256) == 64
    assert info.parameters == sum(weight.numel() for weight in Reference(model).model.parameters())
    fits(info, "bf16", available=10 * info.parameters, tokens=256)
    with pytest.raises(ModelError, match=r"are free: use a smaller model, or --precision bf16$"):
        fits(info, "fp32", available=4 * info.parameters, tokens=256)
    with pytest.raises(ModelError, match=r"are free: use a smaller model$"):
        fits(info, "fp16", available=2 * info.parameters, tokens=256)
    fits(info, "fp32", available=4 * info.parameters, tokens=256, devices=2)
    published = inspect(str(as_published(model)))
    assert published.parameters == info.parameters and published.sha256 != info.sha256


def test_most_tokens_of_a_request(tmp_path: Path) -> None:
    """PaliGemma 2 at 896 pixels runs on a CPU; on a GPU, where vLLM drops its mask, it is refused in a sentence."""
    info = replace(inspect(str(make(tmp_path / "model", "gemma2"))), image_tokens=4096, length=8192, window=4096)
    assert request_length(info, prompt_tokens=256, max_tokens=256, cuda=False) == 4096 + 256 + 2 + 256
    with pytest.raises(ModelError, match=r"takes 4096 tokens on a GPU, .* or run it on a CPU"):
        request_length(info, prompt_tokens=256, max_tokens=256, cuda=True)
    at_448 = replace(info, image_tokens=1024)
    assert request_length(at_448, prompt_tokens=256, max_tokens=256, cuda=True) == 1024 + 256 + 2 + 256
    assert request_length(at_448, prompt_tokens=256, max_tokens=3000, cuda=True) == 4096
    with pytest.raises(ModelError, match=r"takes 8192 tokens, 4096 of them a picture's.* and 4094 of an answer"):
        request_length(info, prompt_tokens=256, max_tokens=4094, cuda=False)
    at_224 = replace(info, image_tokens=256)
    assert request_length(at_224, prompt_tokens=60, max_tokens=60, cuda=True, clip_frames=15) == 15 * 256 + 122
    with pytest.raises(
        ModelError, match=r"on a GPU, .* 4096 of them those of a clip's 16 frames.*: ask for fewer frames"
    ):
        request_length(at_224, prompt_tokens=60, max_tokens=60, cuda=True, clip_frames=16)
    assert request_length(at_224, prompt_tokens=256, max_tokens=256, cuda=False, clip_frames=30) == 8192


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "vae-oid.npz", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    ],
)
def test_all_that_decides_the_answers_is_hashed(name: str, tmp_path: Path) -> None:
    """A tokenizer or adapter replaced at the same path would mix two models' answers in one output."""
    model = make(tmp_path / "model")
    shutil.copy(WEIGHTS / "paligemma" / "vae-oid.npz", model)
    lora = adapter(model, tmp_path / "lora")
    before = inspect(str(model), adapter=str(lora))
    (model / "figures.json").write_text("{}")  # decides nothing
    assert inspect(str(model), adapter=str(lora)).files == before.files
    assert before.sha256 == hashlib.sha256(bytes.fromhex(before.files["model.safetensors"])).hexdigest()
    file = lora / name.removeprefix("adapter/") if name.startswith("adapter/") else model / name
    data = bytearray(file.read_bytes())
    data[-2:] = b" }" if name.endswith(".json") else bytes([data[-2] ^ 1, data[-1]])
    file.write_bytes(data)
    after = inspect(str(model), adapter=str(lora)).files
    assert {key for key in before.files if after[key] != before.files[key]} == {
        name
    } and after.keys() == before.files.keys()
    with pytest.raises(ModelError, match=f"^{file} is not the file that the job began with: its SHA-256 is another"):
        inspect(str(model), adapter=str(lora), files=before.files)


COMMIT = "c0ffee" + 34 * "0"


def cached(home: Path, model: Path, branch: str) -> Path:
    """A folder as Hugging Face's hub keeps it of COMMIT; `main` is now a branch's. Returns HF_HUB_CACHE."""
    kept = home / "hub" / "models--small--paligemma"
    snapshot = kept / "snapshots" / COMMIT
    for folder in (kept / "refs", kept / "blobs", snapshot):
        folder.mkdir(parents=True)
    (kept / "refs" / "main").write_text(branch)
    for file in model.iterdir():
        shutil.copy(file, kept / "blobs" / sha256_of(file))
        (snapshot / file.name).symlink_to(f"../../blobs/{sha256_of(file)}")
    return home / "hub"


def test_each_node_has_its_own_copy_of_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the driver's commit, also where `main` has moved on since; and only if it is the driver's."""
    model, there = make(tmp_path / "model"), {"HF_HOME": str(tmp_path / "there"), "HF_HUB_OFFLINE": "1"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cached(tmp_path / "here", model, COMMIT)))
    snapshot = cached(tmp_path / "there", model, 40 * "d") / "models--small--paligemma" / "snapshots" / COMMIT
    settings = Settings(inputs=["-"], output=str(tmp_path / "out"), paligemma=["small/paligemma"])
    (given,) = selection.arguments(selection.inspect(settings), settings).values()
    shutil.rmtree(tmp_path / "here")  # as another node has none of the driver's folders

    def on_another_node() -> subprocess.CompletedProcess[str]:
        asked = {name: given[name] for name in ("model", "revision", "files")}
        code = f"from shardsight.models.paligemma.info import inspect; print(inspect(**{asked}).path)"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, env=os.environ | there, capture_output=True, text=True)

    done = on_another_node()
    assert done.stdout.strip() == str(snapshot), done.stderr
    with (snapshot / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert "tokenizer.json is not the file that the job began with" in on_another_node().stderr


def _edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = json.loads((folder / name).read_text())
        change(state)
        (folder / name).write_text(json.dumps(state))

    return edit


@pytest.mark.parametrize(
    "spoil, said",
    [
        (shutil.rmtree, "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as a PaliGemma"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .*safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be read as a PaliGemma"),
        (_edit("config.json", lambda config: config.update(tie_word_embeddings=False)), r"lack lm_head\.weight"),
        (_edit("config.json", lambda config: config.update(model_type="gemma")), "is a gemma, not a PaliGemma"),
        (
            _edit("config.json", lambda config: config["vision_config"].update(image_size=224)),
            "sees 224 .*: make the two",
        ),
    ],
)
def test_folder_refused(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    """One sentence each."""
    model = make(tmp_path / "model")
    spoil(model)
    with pytest.raises(ModelError, match=said):
        inspect(str(model))


def test_driver_stays_free_of_torch() -> None:
    """It would cost it seconds and half a gigabyte."""
    code = "import sys, shardsight.models.paligemma.info, shardsight.models.paligemma.prompts; "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
