"""Loaded by vLLM in each of its processes, through the entry point group `vllm.general_plugins`.

PaliGemma attends in both directions over picture and prompt; stock vLLM does so over the picture at most.
"""

MODEL = "PaliGemmaForConditionalGeneration"
_MODULE = "shardsight.models.paligemma.prefix"


def register() -> None:
    """Replace vLLM's classes by ours, by name, so that they are imported only where a PaliGemma is loaded."""
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    ModelRegistry.register_model(MODEL, f"{_MODULE}:PaliGemma")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{_MODULE}.CPUPrefixBackend")


def loaded() -> bool:
    """Whether vLLM has loaded this plugin. Where it cannot, or VLLM_PLUGINS excludes it, vLLM only logs that."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # type: ignore[no-untyped-call]
    return getattr(ModelRegistry.models.get(MODEL), "module_name", None) == _MODULE
