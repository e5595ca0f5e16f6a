"""The models' exceptions, and the precision that this machine supports."""

import hashlib
from pathlib import Path

from shardsight.errors import UsageError


class ModelError(UsageError):
    """A model that cannot be used; one sentence for the user."""


class ModelDied(Exception):
    """A model that has failed for every picture: its process has to end and be replaced."""


def computes_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def automatic(cuda: bool) -> str:
    """The precision `auto`: fp16 on CUDA, bf16 on a CPU that computes in it, else fp32."""
    return "fp16" if cuda else "bf16" if computes_bf16() else "fp32"


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_of(path: Path) -> Path:
    """The file of weights that a folder with one `.pt` stands for, such as the `best/` of a sweep; else the path."""
    found = list(path.glob("*.pt")) if path.is_dir() else []
    return found[0] if len(found) == 1 else path
