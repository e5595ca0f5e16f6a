"""PaliGemmas of random weights: the true architecture, small, with answers that vary with picture and prompt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GemmaTokenizer,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

IMAGE_SIZE, PATCH = 56, 14
TEXT = "caption describe answer question detect segment what is in the picture red blue car dog cat person; & é ü 0123"
Frames = np.ndarray | list[np.ndarray]  # of one prompt: RGB uint8 (h, w, 3), or several
PROMPTS = [
    "caption en",
    "caption de",
    "ocr",
    "describe en",
    "answer en what colour is the car?",
    "answer en how many dogs are there in the picture?",
    "question en two",
    "detect car ; dog",
    "segment the red car",
    "what is in the picture, and is it in front of the person or behind?",
]


def tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer with a vocabulary of its own: some hundred merges, bytes for the rest."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trained.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trained.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    state = json.loads(trained.to_str())["model"]
    made = GemmaTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    made.add_tokens([AddedToken(f"<loc{n:04}>", normalized=False) for n in range(1024)])
    made.add_tokens([AddedToken(f"<seg{n:03}>", normalized=False) for n in range(128)])
    return made


def make(
    folder: Path,
    kind: str = "gemma",
    seed: int = 0,
    ends: bool = True,
    size: int = IMAGE_SIZE,
    tower: dict[str, int] | None = None,
    **text: Any,
) -> Path:
    """Write a model, its tokenizer and its processor into `folder`.

    kind: gemma (PaliGemma 1) or gemma2 (2). ends: one token in fifteen ends an answer, so that lengths differ.
    size: of its input, pixels. tower, text: other shapes of its two parts.
    """
    torch.manual_seed(seed)
    image = SiglipImageProcessor(size={"height": size, "width": size})
    image.image_seq_length = (size // PATCH) ** 2
    processor = PaliGemmaProcessor(image_processor=image, tokenizer=tokenizer())
    words = len(processor.tokenizer)
    shape = {
        "vocab_size": words,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    } | text
    if kind == "gemma2":
        shape = {"sliding_window": 256, "query_pre_attn_scalar": 32} | shape
    config = PaliGemmaConfig(
        text_config=(Gemma2Config if kind == "gemma2" else GemmaConfig)(**shape),
        vision_config=SiglipVisionConfig(
            **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
            | (tower or {}),
            image_size=size,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        image_token_index=processor.image_token_id,
        projection_dim=shape["hidden_size"],
        hidden_size=shape["hidden_size"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name or "layer_norm" in name or name.endswith("norm.weight"):
                # Gemma 2's norms behind its layers; where they are small, an answer repeats its last token for ever.
                after = "post_attention" in name or "post_feedforward" in name
                weight.add_(torch.randn_like(weight) * 0.2 + (2 if after and kind == "gemma2" else 0))
            elif "embed_tokens" in name:
                weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5)
            elif weight.dim() > 1:
                gain = 4 if "vision_tower" in name or "projector" in name else 2
                weight.copy_(torch.randn_like(weight) * gain * weight[0].numel() ** -0.5)
    stops = [1, *range(6, words, 15)] if ends else [1]
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=2, eos_token_id=stops)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def as_published(folder: Path) -> Path:
    """Rename the weights to the layout of Google's own uploads, which transformers before 4.52 wrote."""
    weights = load_file(folder / "model.safetensors")
    save_file({original_name(name): weight for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def with_head(folder: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Store an output layer, made of the embedding and scaled like it, with the weights."""
    weights = load_file(folder / "model.safetensors")
    [embedding] = [weight for name, weight in weights.items() if name.endswith("embed_tokens.weight")]
    made = head(embedding)
    save_file(weights | {"lm_head.weight": made * (embedding.std() / made.std())}, folder / "model.safetensors")
    return folder


def original_name(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model.") and not name.startswith("language_model.model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return name


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """RGB uint8 (h, w, 3) of several shapes, none of them square: coloured rectangles over noise."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = random.integers(60, 140, 2)
        frame = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for _ in range(4):
            y, x = random.integers(0, height - 30), random.integers(0, width - 30)
            frame[y : y + random.integers(10, 40), x : x + random.integers(10, 40)] = random.integers(0, 256, 3)
        made.append(frame)
    return made


class Reference:
    """Hugging Face's own processor, model and `generate`, float32, one pair at a time."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        torch.set_num_threads(1)
        self.processor = PaliGemmaProcessor.from_pretrained(folder)
        # The attention that knows Gemma 2's softcapping; PyTorch's own, the default, leaves it out.
        self.model: Any = PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def answer(self, frames: Frames, prompt: str, max_tokens: int) -> tuple[list[int], list[float]]:
        """(token ids, their log-probabilities) of the greedy answer about all frames, its end included."""
        images = [Image.fromarray(frame) for frame in ([frames] if isinstance(frames, np.ndarray) else frames)]
        inputs = self.processor(images=images, text="<image>" * len(images) + prompt, return_tensors="pt")
        inputs.pop("labels", None)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                max_new_tokens=max_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        rows = [logits[0].log_softmax(-1) for logits in out.logits]
        return ids, [float(row[token]) for row, token in zip(rows, ids, strict=True)]


def adapter(base: Path, folder: Path, everywhere: bool = False, seed: int = 0) -> Path:
    """Write a LoRA that changes most answers, by peft; of the language model, or of the vision tower too."""
    torch.manual_seed(seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = names if everywhere else rf".*language_model.*\.({'|'.join(names)})"
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5 * 0.7)
    made.save_pretrained(folder)
    return folder
