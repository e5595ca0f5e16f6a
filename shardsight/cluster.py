"""What a process gets of the machine that it runs on."""


def gpu_memory(gpus: float) -> float:
    """The share of a GPU's memory that a model may take, which has `gpus` of it to itself and leaves the rest to those
    it shares it with; 0, without a GPU, and more than one count as one."""
    return 0.9 * min(gpus or 1.0, 1.0)
