"""The models' exceptions, and the precision that this machine supports."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def cache(kind: str) -> Path:
    """This user's folder for what takes long to make or to fetch, and can be made again. Raises ModelError."""
    whole = Path(tempfile.gettempdir()) / f"shardsight-{os.getuid()}"
    whole.mkdir(0o700, exist_ok=True)
    if whole.stat().st_uid != os.getuid():  # what somebody else could change would be loaded as a model
        raise ModelError(f"{whole} belongs to another user: remove it, or set TMPDIR to a folder of yours")
    (whole / kind).mkdir(exist_ok=True)
    return whole / kind


def made_once(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of that key in the cache, which `make` fills where it is missing. Safe when several processes start at
    once: it appears whole. Raises ModelError, and what `make` raises."""
    folder = cache(kind) / key
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            make(whole)
            with suppress(OSError):  # another process was faster
                whole.rename(folder)
    return folder


def key_of(folder: Path, *made_of: Any) -> str:
    """A name for what is made of these, JSON, by the code in a folder and the libraries that models are loaded with."""
    code = [sha256_of(file) for file in sorted(folder.glob("*.py"))]
    versions = [version(package) for package in ("ultralytics", "torch", "openvino")]
    return hashlib.sha256(json.dumps([made_of, code, versions]).encode()).hexdigest()


def answer(found: Callable[[], dict[str, Any]]) -> None:
    """For a process of its own, which a model is loaded in: print what is found as a JSON object, or a ModelError's
    sentence as its `error`, and nothing else to standard output."""
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output, too
    try:
        said = found()
    except ModelError as error:
        said = {"error": str(error)}
    with stdout:
        json.dump(said, stdout)


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_of(path: Path) -> Path:
    """The file of weights that a folder with one `.pt` stands for, such as the `best/` of a sweep; else the path.

    Raises ModelError where there are several.
    """
    found = sorted(path.glob("*.pt")) if path.is_dir() else []
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} .pt files: name the one to use, as {found[0]}")
    return found[0] if len(found) == 1 else path
