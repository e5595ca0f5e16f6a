"""PaliGemma's tokens are Hugging Face's, whatever shares the engine with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ask_paligemma import Answered, Asked, ask
from tests.small_paligemma import PROMPTS, Reference, adapter, as_published, make, pictures

TOKENS, LONG = 16, 120  # of an answer; LONG takes more of vLLM's blocks than its prompt does
SHAPES = [
    (11, {}),
    (12, {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}),
    (13, {"hidden_size": 96, "head_dim": 64, "intermediate_size": 160}),
]
Pairs = list[tuple[np.ndarray, str]]


def pairs_of(count: int, seed: int = 0) -> Pairs:
    """Each picture under several prompts in a row."""
    return [(frame, prompt) for frame in pictures(count, seed) for prompt in PROMPTS]


def compare(answered: Answered, reference: Reference, pairs: Pairs, max_tokens: int = TOKENS) -> tuple[int, float]:
    """(pairs whose tokens are the reference's, the largest difference of their log-probabilities)."""
    equal, worst = 0, 0.0
    for (ids, logprobs), (frame, prompt) in zip(answered.answers, pairs, strict=True):
        expected, scores = reference.answer(frame, prompt, max_tokens)
        if ids == expected:
            equal += 1
            worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, scores, strict=True)))
    return equal, worst


def same(answered: Answered, reference: Reference, pairs: Pairs, max_tokens: int = TOKENS) -> None:
    """All tokens equal, of answers that can tell a wrong mask: most of them differ from each other."""
    assert len({tuple(ids) for ids, _ in answered.answers}) > 0.8 * len(pairs)
    equal, worst = compare(answered, reference, pairs, max_tokens)
    print(f"{equal} of {len(pairs)} pairs equal, log-probabilities within {worst:.1e}")
    assert equal == len(pairs) and worst < 1e-3


def test_same_tokens_as_hugging_face(tmp_path: Path) -> None:
    """PaliGemma 1 in the layout of Google's uploads with a LoRA, and 2 as transformers 5 saves it; preempted too."""
    first = as_published(make(tmp_path / "first", "gemma", seed=3))
    second = make(tmp_path / "second", "gemma2", seed=4)
    endless = make(tmp_path / "endless", "gemma2", seed=5, ends=False)
    lora = adapter(first, tmp_path / "lora")
    pairs, long = pairs_of(2), pairs_of(1)[:5]
    runs = [
        Asked(first, pairs, {"adapter": str(lora), "max_tokens": TOKENS, "batch_size": 4}),
        Asked(second, pairs, {"max_tokens": TOKENS, "batch_size": 4}),
        Asked(endless, long, {"max_tokens": LONG, "prompt_tokens": 60}, little=True),
    ]
    with_lora, without, again = ask(runs, tmp_path)
    same(with_lora, Reference(first, lora), pairs)
    same(without, Reference(second), pairs)
    assert again.preempted > 0
    same(again, Reference(endless), long, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("seed, shape", SHAPES)
def test_same_tokens_for_many_pairs(kind: str, seed: int, shape: dict[str, Any], tmp_path: Path) -> None:
    """200 pairs a model: each alone, in mixed batches, with a LoRA of the vision tower too, and preempted."""
    model = make(tmp_path / "model", kind, seed, **shape)
    endless = make(tmp_path / "endless", kind, seed, ends=False, **shape)
    lora = adapter(model, tmp_path / "lora", everywhere=True, seed=seed)
    pairs, long = pairs_of(20, seed), pairs_of(2, seed)
    limits = {"max_tokens": TOKENS, "batch_size": 8}
    runs = [
        Asked(model, pairs, limits),
        Asked(model, pairs, limits, alone=True),
        Asked(model, pairs, limits | {"adapter": str(lora)}),
        Asked(endless, long, {"max_tokens": LONG, "prompt_tokens": 60}, little=True),
    ]
    mixed, alone, with_lora, again = ask(runs, tmp_path)
    reference = Reference(model)
    same(mixed, reference, pairs)
    assert [ids for ids, _ in alone.answers] == [ids for ids, _ in mixed.answers]
    same(with_lora, Reference(model, lora), pairs)
    assert again.preempted > 0
    same(again, Reference(endless), long, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_other_tokens_with_stock_vllm(kind: str, tmp_path: Path) -> None:
    """What the comparison is worth: without the plugin it fails for nearly all pairs."""
    model = as_published(make(tmp_path / "model", kind, seed=4))
    pairs = pairs_of(2)
    [answered] = ask([Asked(model, pairs, {"max_tokens": TOKENS})], tmp_path, stock=True)
    assert compare(answered, Reference(model), pairs)[0] < 0.2 * len(pairs)
