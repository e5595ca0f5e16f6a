"""What all models share: how they fail, and what this machine computes in."""

from pathlib import Path

from shardsight.errors import UsageError


class ModelError(UsageError):
    """Weights that cannot be used: one sentence for the user."""


class ModelDied(Exception):
    """A model failed as a whole, and not because of a picture: its process has to end and be replaced."""


def computes_bf16() -> bool:
    """Whether this machine's CPU does."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags
