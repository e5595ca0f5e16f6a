"""PaliGemma in vLLM 0.29 with its own attention mask.

The mask (Hugging Face's modeling_paligemma.py, big_vision's `make_attn_mask`): each token of the pictures and the
prompt attends to all of both; a generated token attends to itself and all tokens before it. Both generations of vLLM's
runner ask a request's pictures which positions attend in both directions (`PlaceholderRange.extract_embeds_range`), and
the attention on CUDA applies that. So the first picture's placeholder range answers with the whole prompt, and our
attention backend for the CPU applies it there, where vLLM's own does not.

Every other layer of Gemma 2 has a sliding window of W tokens, which a picture of 896 pixels, or a clip of 16 frames of
224, fills (W = 4096):

- transformers 5.16.1 (masking_utils.py, `create_sliding_window_causal_mask`): (causal and within the window) or both in
  the prompt. So tokens of picture and prompt attend to all of both, however far apart; a generated token attends to
  itself and the W - 1 tokens before it, of the prompt too.
- vLLM's CPU kernel (`cpu_attention_with_kv_cache`) takes one window per call: as above for a causal request, and
  |query - key| < W for one that is not causal. So a batch with a prompt longer than W takes two calls, the one for the
  prompts without a window.
- vLLM's runner for the CPU (gpu_model_runner.py) drops ranges longer than W, unless the model declares that its
  attention handles them (`mm_prefix_clamp_sliding_window`). On CUDA the default runner
  (worker/gpu/attn_utils.py, `compute_mm_prefix_ranges`) always drops them, which makes such a prompt causal;
  therefore requests longer than W are refused there.
"""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import paligemma
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    ProcessorInputs,
    PromptIndexTargets,
    PromptInsertion,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

VERSION = "0.29.0"
# Request → (first, last) positions that attend in both directions, both inclusive.
Ranges = Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True, eq=False)
class Prefix(PlaceholderRange):
    """A picture's place in its prompt, all of whose `prompt_length` tokens attend to each other; the first picture says
    so for all."""

    prompt_length: int = 0

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        return [(0, self.prompt_length - 1)] if self.offset == 0 else []


class Info(paligemma.PaliGemmaProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class Processor(paligemma.PaliGemmaMultiModalProcessor):
    """Pictures' tokens one after another, start token, prompt and newline, as Hugging Face's processor orders them."""

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        # Not with a picture's tokens, as in vLLM: its cache would repeat it with each picture that was once the last.
        start = [self.info.get_tokenizer().bos_token_id]
        return prompt if prompt[:1] == start else start + prompt

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()  # type: ignore[no-untyped-call]
        token, side = config.image_token_index, config.vision_config.image_size
        count = self.info.get_num_image_tokens(image_width=side, image_height=side)
        tokens = PromptUpdateDetails.select_token_id([token] * count, embed_token_id=token)
        return [PromptInsertion("image", PromptIndexTargets.start(), tokens)]

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        made = super().apply(inputs, timing_ctx)
        length = len(made["prompt_token_ids"])
        made["mm_placeholders"] = {
            modality: [Prefix(one.offset, one.length, one.is_embed, length) for one in ranges]
            for modality, ranges in made["mm_placeholders"].items()
        }
        return made


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=paligemma.PaliGemmaDummyInputsBuilder)
class PaliGemma(paligemma.PaliGemmaForConditionalGeneration):
    # Names of weights in Google's uploads, as saved by transformers 4.52 and by transformers 5 → vLLM's.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"): "vision_tower.vision_model.",
            re.compile(r"^(model\.)?language_model\.(?!lm_head)(model\.)?"): "language_model.model.",
            re.compile(r"^model\.multi_modal_projector\."): "multi_modal_projector.",
            re.compile(r"^lm_head\."): "language_model.lm_head.",
        }
    )
    # Read by vLLM's runner: this model's attention handles ranges longer than the sliding window.
    mm_prefix_clamp_sliding_window = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        reason = unsuited(vllm_config)
        if reason:
            raise ValueError(f"PaliGemma would give wrong answers: {reason}")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Hugging Face's PaliGemma has no cap on the final logits, unlike Gemma 2: other probabilities, the same tokens.
        self.language_model.logits_processor.soft_cap = None
        text = self.config.text_config
        if text.model_type == "gemma2" and not self.config.tie_word_embeddings:
            # Unlike its Gemma, vLLM's Gemma 2 always uses its embedding as its output layer.
            name = maybe_prefix(prefix, "language_model.lm_head")
            self.language_model.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=name)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        language = self.language_model
        head = getattr(language, "lm_head", language.model.embed_tokens)
        return language.logits_processor(head, hidden_states)


def unsuited(config: VllmConfig) -> str | None:
    """What in vLLM's configuration would silently break the mask, and what to do; None if all is well."""
    if vllm.__version__.partition("+")[0] != VERSION:
        return f"its attention is written for vLLM {VERSION}, and this is {vllm.__version__}; install that one"
    if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        return "a prompt's length does not reach an engine in another process; set VLLM_ENABLE_V1_MULTIPROCESSING=0"
    if config.scheduler_config.enable_chunked_prefill:
        return "a prompt computed in pieces cannot see its own end; set enable_chunked_prefill=False"
    length = config.model_config.max_model_len
    if config.scheduler_config.max_num_batched_tokens < length:
        return f"a prompt and its answer must fit one step; set max_num_batched_tokens to {length} or more"
    if config.cache_config.enable_prefix_caching:
        return "the cached values of a picture depend on the prompt after it; set enable_prefix_caching=False"
    scheduler = config.scheduler_config
    if (
        scheduler.async_scheduling
        and config.model_config.get_multimodal_config().get_limit_per_prompt("image") > 1
        and scheduler.encoder_cache_size < 2 * scheduler.max_num_batched_tokens
    ):
        return "a prompt's pictures may come in several steps; set async_scheduling=False, or limit them to one"
    window = getattr(config.model_config.hf_text_config, "sliding_window", None)
    if window is not None and window < length and not current_platform.is_cpu():
        return (
            f"vLLM {VERSION} drops the mask of requests longer than the sliding window of {window} tokens on this "
            f"device; set max_model_len, {length}, to {window}, or use a CPU"
        )
    if config.speculative_config is not None:
        return "the mask does not cover drafted tokens; leave speculative_config out"
    if current_platform.is_cpu() and AttentionBackendEnum.CPU_ATTN.get_class() is not CPUPrefixBackend:
        return "another plugin has replaced the attention of the CPU; set VLLM_PLUGINS=shardsight"
    return None


@dataclass(frozen=True)
class Part:
    """Tokens of one request in a batch, start ≤ token < end, that are all causal or all not.

    request: its index. length: number of the request's tokens that the last of them attends to.
    """

    request: int
    start: int
    end: int
    length: int
    causal: bool


def split(start: Sequence[int], length: Sequence[int], ranges: Ranges) -> list[Part]:
    """Split requests into prompts, which are not causal, and generated tokens, which are: the kernel takes only whole
    requests as either. A request has both in one batch when it is computed again after a preemption.

    start: of each request's tokens in the batch, and the end of the last. length: of each request, with the tokens that
    are computed already. Raises RuntimeError where a prompt is not whole, or its length did not arrive.
    """
    parts: list[Part] = []
    for request, total in enumerate(length):
        first, last = start[request], start[request + 1]
        computed = total - (last - first)
        found = ranges.get(request, ())
        if len(found) != 1 or found[0][0] != 0:
            raise RuntimeError(f"a prompt's length did not reach the attention: its ranges are {list(found)}")
        prompt = found[0][1] + 1
        if computed >= prompt:
            parts.append(Part(request, first, last, total, True))
            continue
        if computed or total < prompt:
            raise RuntimeError(f"of a prompt of {prompt} tokens, those from {computed} to {total} came alone")
        parts.append(Part(request, first, first + prompt, prompt, False))
        if total > prompt:
            parts.append(Part(request, first + prompt, last, total, True))
    return parts


@dataclass
class WindowedMetadata(CPUAttentionMetadata):
    """Of a batch with a prompt longer than the sliding window, in layers with a window.

    calls: (its tokens in the batch, their metadata), for the prompts and for the generated tokens.
    """

    calls: Sequence[tuple[torch.Tensor, CPUAttentionMetadata]] = ()


def _part_of(common: CommonAttentionMetadata, parts: Sequence[Part], causal: Any) -> CommonAttentionMetadata:
    """The batch as if each part was a request. causal: of all parts, or a tensor with that of each."""
    start = list(itertools.accumulate((part.end - part.start for part in parts), initial=0))
    return replace(
        common,
        num_reqs=len(parts),
        num_actual_tokens=start[-1],
        query_start_loc=common.query_start_loc.new_tensor(start),
        seq_lens=common.seq_lens.new_tensor([part.length for part in parts]),
        block_table_tensor=common.block_table_tensor[[part.request for part in parts]],
        causal=causal,
    )


class CPUPrefixBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        # Unchanged for other models in this process, and for the vision tower, which has no requests.
        if self.vllm_config.model_config.hf_config.model_type != "paligemma" or common.mm_req_doc_ranges is None:
            return super().build(common_prefix_len, common, fast_build)
        parts = split(common.query_start_loc.tolist(), common.seq_lens.tolist(), common.mm_req_doc_ranges)
        causal = torch.tensor([part.causal for part in parts])
        made = super().build(0, _part_of(common, parts, causal))
        window = getattr(self.kv_cache_spec, "sliding_window", None)
        if window is None or all(part.causal or part.length <= window for part in parts):
            return made
        prompts, generated = ([part for part in parts if part.causal is each] for each in (False, True))
        calls = [self._call(common, prompts, -1)]
        if generated:
            calls.append(self._call(common, generated, self.window_size))
        return WindowedMetadata(**vars(made), calls=calls)

    def _call(
        self, common: CommonAttentionMetadata, parts: Sequence[Part], window: int
    ) -> tuple[torch.Tensor, CPUAttentionMetadata]:
        builder = copy.copy(self)
        builder.window_size = window
        metadata = CPUAttentionMetadataBuilder.build(builder, 0, _part_of(common, parts, parts[0].causal))
        return torch.cat([torch.arange(part.start, part.end) for part in parts]), metadata


class CPUPrefixImpl(CPUAttentionBackendImpl):
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = output_scale, output_block_scale
        if self.sliding_window < 0 or not isinstance(attn_metadata, WindowedMetadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        unlimited = copy.copy(self)
        unlimited.sliding_window = -1
        for tokens, metadata in attn_metadata.calls:
            one = self if metadata.causal else unlimited
            out = torch.empty_like(output[tokens])
            output[tokens] = one.forward(layer, query[tokens], key, value, kv_cache, metadata, out, *scales)
        return output


class CPUPrefixBackend(CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUPrefixBuilder

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUPrefixImpl
