"""The demo's PaliGemma as transformers builds it: configuration, tokenizer, processor.

Seven million parameters in PaliGemma 1's own classes. 336 pixels and patches of 24 make 196 picture tokens: at
224 pixels the smallest words are three pixels high, and patches of 14 would make both models four times slower.
"""

import string
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import Unigram
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from demo.paligemma_data import SIZE
from demo.paligemma_tower import GRID, PATCH
from demo.questions import plural
from demo.scenes import COLOURS, KINDS, WORDS

WIDTH = 192
_LOCATIONS, _CODES = 1024, 128
_TEMPLATES = "caption ocr answer detect segment en a an that says what colour is the shape shapes how many are there"
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words for what the demo asks and answers, characters and bytes for everything else.

    As Gemma's, it writes a space as ▁ and puts none in front; a newline is a token of its own, and `<loc…>`
    and `<seg…>` are ordinary added tokens.
    """
    words = [*_TEMPLATES.split(), "word", "on", "yes", "no", *KINDS, *map(plural, KINDS), *COLOURS, *WORDS]
    whole = [form for word in dict.fromkeys([*words, *map(str, range(9)), ";"]) for form in (word, f"▁{word}")]
    pieces = dict.fromkeys([*whole, "▁;▁", "▁", *string.ascii_letters, *string.digits, *string.punctuation])
    scores = {piece: -8.0 if len(piece) == 1 else -1.0 - 0.01 * len(piece) for piece in pieces}
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    model = Unigram([*((name, 0.0) for name in _SPECIAL), *scores.items(), *bytes_], unk_id=3, byte_fallback=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (*_SPECIAL, "<image>")])
    added = ["\n", *(f"<loc{n:04}>" for n in range(_LOCATIONS)), *(f"<seg{n:03}>" for n in range(_CODES))]
    made.add_tokens([AddedToken(name, normalized=False) for name in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        extra_special_tokens={"image_token": "<image>"},
        **{"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False},
        **{"model_max_length": 1024, "padding_side": "left"},
    )


def processor() -> PaliGemmaProcessor:
    size = {"height": SIZE, "width": SIZE}
    pictures = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
    pictures.image_seq_length = GRID * GRID
    return PaliGemmaProcessor(pictures, tokenizer())


def vision_config() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        **{"hidden_size": 320, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 10},
        **{"image_size": SIZE, "patch_size": PATCH, "projection_dim": WIDTH, "vision_use_head": False},
    )


def build() -> PaliGemmaForConditionalGeneration:
    """With random weights, but for neighbouring `<loc>` tokens, which start alike."""
    words = tokenizer()
    text = GemmaConfig(
        **{"vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": 448, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True},
    )
    config = PaliGemmaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        **{"vocab_size": len(words), "projection_dim": WIDTH, "hidden_size": WIDTH},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    )
    model = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    first = words.convert_tokens_to_ids("<loc0000>")
    model.get_input_embeddings().weight.data[first : first + _LOCATIONS] = _smooth(_LOCATIONS, WIDTH)
    return model


def _smooth(count: int, width: int) -> torch.Tensor:
    """Vectors that change slowly from one to the next, float32 (count, width): waves from one over all of them
    to one over ten."""
    waves = torch.pi * torch.linspace(0, 1, count)[:, None] * torch.logspace(0, 2.3, 48)
    features = torch.cat([waves.cos(), waves.sin()], 1)
    vectors = features @ torch.linalg.qr(torch.randn(width, features.shape[1]))[0].T
    return 0.05 * vectors / vectors.std()


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
