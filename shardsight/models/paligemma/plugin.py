"""What vLLM loads of us in each of its processes, through the entry point group `vllm.general_plugins`.

PaliGemma attends in both directions over picture and prompt; stock vLLM lets it do so over the picture at most.
"""

MODEL = "PaliGemmaForConditionalGeneration"
_MODULE = "shardsight.models.paligemma.prefix"


def register() -> None:
    """Put our classes in the place of vLLM's, by name: they are imported where a PaliGemma is loaded."""
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    ModelRegistry.register_model(MODEL, f"{_MODULE}:PaliGemma")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{_MODULE}.CPUPrefixBackend")


def loaded() -> bool:
    """Whether vLLM has loaded it in this process; it only logs when it cannot, or is told not to (VLLM_PLUGINS)."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # type: ignore[no-untyped-call]
    return getattr(ModelRegistry.models.get(MODEL), "module_name", None) == _MODULE
