"""The models' exceptions, the precision that this machine supports, the cache of what takes long to make, digests of
files, and what a process of its own answers."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardsight.errors import UsageError

KEPT = 30 * 86_400  # seconds for which the cache keeps what nobody uses


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
    folder = own_folder() / kind
    folder.mkdir(exist_ok=True)
    return folder


def own_folder() -> Path:
    """This user's folder among the temporary ones. Raises ModelError where others could change what is in it, which
    would be loaded as a model."""
    folder = Path(tempfile.gettempdir()) / f"shardsight-{os.getuid()}"
    folder.mkdir(0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        why = "belongs to another user" if found.st_uid != os.getuid() else "can be written to by other users"
        raise ModelError(f"{folder} {why}: remove it, or set TMPDIR to a folder of yours")
    return folder


def made_once(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of that key in the cache, which `make` fills where it is missing. Safe when several processes start at
    once: it appears whole. What was not used for KEPT then goes. Raises ModelError, and what `make` raises."""
    folder = cache(kind) / key
    try:
        os.utime(folder)
    except FileNotFoundError:
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            make(whole)
            with suppress(OSError):  # another process was faster
                whole.rename(folder)
            for entry in folder.parent.iterdir():
                with suppress(OSError):  # as above
                    if time.time() - entry.stat().st_mtime > KEPT:
                        entry.rename(Path(temporary) / entry.name)  # vanishes whole, too
    return folder


def key_of(folder: Path, *made_of: Any) -> str:
    """A name for what is made of these, JSON, by the code in a folder and the libraries that models are loaded with."""
    code = [sha256_of(file) for file in sorted(folder.glob("*.py"))]
    versions = [version(package) for package in ("ultralytics", "torch", "openvino", "nncf")]
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
