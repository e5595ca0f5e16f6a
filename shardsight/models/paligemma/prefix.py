"""PaliGemma in vLLM 0.29 with its own attention mask.

The mask (Hugging Face's modeling_paligemma.py, big_vision's `make_attn_mask`): each token of picture and prompt sees
all of both; a generated token sees what stands before it. vLLM's runners, of both generations, ask a request's picture
which positions attend in both directions (`PlaceholderRange.extract_embeds_range`), and the attention of CUDA follows.
So the picture is made to answer with the whole prompt, and the attention of the CPU, which does not ask, is taught to.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.inputs import MultiModalInput
from vllm.model_executor.models import paligemma
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import AttentionBackendEnum

VERSION = "0.29.0"
# Request → (first, last) positions that attend in both directions, both inclusive.
Ranges = Mapping[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True, eq=False)
class Prefix(PlaceholderRange):
    """Where a picture stands in its prompt, and that all `prompt_length` tokens of the prompt see each other."""

    prompt_length: int = 0

    def extract_embeds_range(self) -> list[tuple[int, int]]:
        return [(0, self.prompt_length - 1)]


class Processor(paligemma.PaliGemmaMultiModalProcessor):
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        made = super().apply(inputs, timing_ctx)
        length = len(made["prompt_token_ids"])
        made["mm_placeholders"] = {
            modality: [Prefix(one.offset, one.length, one.is_embed, length) for one in ranges]
            for modality, ranges in made["mm_placeholders"].items()
        }
        return made


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=paligemma.PaliGemmaProcessingInfo, dummy_inputs=paligemma.PaliGemmaDummyInputsBuilder
)
class PaliGemma(paligemma.PaliGemmaForConditionalGeneration):
    # The names in Google's uploads, in what transformers 4.52 wrote, and in what transformers 5 writes, as vLLM's.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"): "vision_tower.vision_model.",
            re.compile(r"^(model\.)?language_model\.(?!lm_head)(model\.)?"): "language_model.model.",
            re.compile(r"^model\.multi_modal_projector\."): "multi_modal_projector.",
            re.compile(r"^lm_head\."): "language_model.lm_head.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        reason = unsuited(vllm_config)
        if reason:
            raise ValueError(f"PaliGemma would give wrong answers: {reason}")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Hugging Face's PaliGemma leaves Gemma 2's cap of the last logits out: the same tokens, by other probabilities.
        self.language_model.logits_processor.soft_cap = None


def unsuited(config: VllmConfig) -> str | None:
    """What in vLLM's configuration would break the mask without a word, and what to do."""
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
        return "what is kept of a picture depends on the prompt after it; set enable_prefix_caching=False"
    window = getattr(config.model_config.hf_text_config, "sliding_window", None)
    if window is not None and window < length:
        return f"its sliding window of {window} tokens is shorter than max_model_len, {length}; set that to {window}"
    if config.speculative_config is not None:
        return "drafted tokens have no mask of their own; leave speculative_config out"
    if current_platform.is_cpu() and AttentionBackendEnum.CPU_ATTN.get_class() is not CPUPrefixBackend:
        return "another plugin has replaced the attention of the CPU; set VLLM_PLUGINS=shardsight"
    return None


@dataclass(frozen=True)
class Split:
    """A batch for a kernel that knows only whole requests as causal or not: a request may become two.

    request: which one each part is of. start: of each part's tokens, and the end. length: how many tokens each part
    sees. causal: how.
    """

    request: list[int]
    start: list[int]
    length: list[int]
    causal: list[bool]


def split(start: Sequence[int], length: Sequence[int], ranges: Ranges) -> Split:
    """Prompts apart from what was generated after them, which a request computes again once it was preempted.

    start: of each request's tokens in the batch, and the end. length: of each request, with what is computed already.
    Raises RuntimeError where a prompt is not whole, or its length did not arrive.
    """
    made = Split([], [start[0]], [], [])

    def part(request: int, end: int, length: int, causal: bool) -> None:
        made.request.append(request)
        made.start.append(end)
        made.length.append(length)
        made.causal.append(causal)

    for request, total in enumerate(length):
        first, last = start[request], start[request + 1]
        computed = total - (last - first)
        found = ranges.get(request, ())
        if len(found) != 1 or found[0][0] != 0:
            raise RuntimeError(f"a prompt's length did not reach the attention: its ranges are {list(found)}")
        prompt = found[0][1] + 1
        if computed >= prompt:
            part(request, last, total, True)
            continue
        if computed or total < prompt:
            raise RuntimeError(f"of a prompt of {prompt} tokens, those from {computed} to {total} came alone")
        part(request, first + prompt, prompt, False)
        if total > prompt:
            part(request, last, total, True)
    return made


class CPUPrefixBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        # Of other models in this process nothing changes, nor of the vision tower, which has no requests.
        if self.vllm_config.model_config.hf_config.model_type == "paligemma" and common.mm_req_doc_ranges is not None:
            parts = split(common.query_start_loc.tolist(), common.seq_lens.tolist(), common.mm_req_doc_ranges)
            common = replace(
                common,
                num_reqs=len(parts.request),
                query_start_loc=common.query_start_loc.new_tensor(parts.start),
                seq_lens=common.seq_lens.new_tensor(parts.length),
                block_table_tensor=common.block_table_tensor[parts.request],
                causal=torch.tensor(parts.causal),
            )
        return super().build(common_prefix_len, common, fast_build)


class CPUPrefixBackend(CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUPrefixBuilder
