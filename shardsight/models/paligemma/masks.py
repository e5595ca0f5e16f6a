"""PaliGemma's `<seg>` codes and masks: sixteen codes are a mask of 64×64 within its box.

By the decoder of a VQ-VAE (Ning et al., "All in Tokens", arXiv 2301.02229), in the format of Google's `vae-oid.npz`.
The names of its arrays are those that big_vision reads: `encoder.*` in pp/proj/paligemma/segmentation.py, `decoder.*`
in evaluators/proj/paligemma/transfers/segmentation.py. Its kernels have torch's order of axes.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import nn

CODES, CODEBOOK, SIZE = 16, 128, 64
CODEBOOK_KEY = "_vq_vae._embedding"


class MaskError(Exception):
    """A VQ-VAE that cannot be used: one sentence for the user."""


class MaskDecoder(nn.Module):  # type: ignore[misc]
    """width: of the codebook's vectors, 512 in Google's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(CODEBOOK, width))
        self.decoder = nn.Sequential(
            *(nn.Conv2d(width, 128, 1), nn.ReLU(), ResBlock(), ResBlock()),
            *(nn.ConvTranspose2d(128, 128, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU()),
            nn.Conv2d(16, 1, 1),
        )

    @classmethod
    def load(cls, path: str | Path) -> "MaskDecoder":
        """From an `.npz` with `decoder.0.weight` … and `_vq_vae._embedding`. Raises MaskError."""
        state = _half(path, "decoder")
        return _filled(cls(state["codebook"].shape[1]), state, path)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int (n, 16), row after row of the 4×4 grid → float32 (n, 64, 64), about -1 to 1, above 0 inside.

        Raises ValueError for other shapes, and for codes outside 0 to 127.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != CODES:
            raise ValueError(f"expected codes of shape (n, {CODES}), found {codes.shape}")
        if not len(codes):
            return np.zeros((0, SIZE, SIZE), np.float32)
        if codes.min() < 0 or codes.max() >= CODEBOOK:
            raise ValueError(f"expected codes from 0 to {CODEBOOK - 1}, found {codes.min()} to {codes.max()}")
        vectors = self.codebook[torch.from_numpy(codes.astype(np.int64))]
        return cast(np.ndarray, self(vectors).numpy())

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, 16, width) → (n, 64, 64)."""
        grid = vectors.transpose(1, 2).unflatten(2, (4, 4))
        masks: torch.Tensor = self.decoder(grid)[:, 0]
        return masks


class MaskEncoder(nn.Module):  # type: ignore[misc]
    """Masks → codes, to make what a model is trained on. width: of the codebook's vectors. channels: of the layers that
    halve the mask."""

    def __init__(self, width: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(CODEBOOK, width))
        halving = [(nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()) for before, after in pairwise((1, *channels))]
        layers = [layer for pair in halving for layer in pair]
        self.encoder = nn.Sequential(*layers, ResBlock(), ResBlock(), nn.Conv2d(channels[-1], width, 1))

    @classmethod
    def load(cls, path: str | Path) -> "MaskEncoder":
        """From the same `.npz`. Raises MaskError."""
        state = _half(path, "encoder")
        kernels = [state.get(f"encoder.{layer}.weight", torch.zeros(0)) for layer in (0, 2, 4, 6)]
        return _filled(cls(state["codebook"].shape[1], [len(kernel) for kernel in kernels]), state, path)

    @torch.inference_mode()
    def encode(self, masks: np.ndarray) -> np.ndarray:
        """float (n, 64, 64) from 0 to 1, 1 inside → int64 (n, 16), row after row of the 4×4 grid."""
        pixels = torch.from_numpy(np.ascontiguousarray(masks, np.float32))
        vectors = self.encoder(2 * pixels[:, None] - 1).flatten(2).transpose(1, 2)
        distances = (self.codebook**2).sum(1) - 2 * vectors @ self.codebook.T
        return cast(np.ndarray, distances.argmin(-1).numpy())


def _half(path: str | Path, name: str) -> dict[str, torch.Tensor]:
    """The arrays of one half of the VQ-VAE, and its codebook. Raises MaskError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise MaskError(f"{path} cannot be read as an .npz file: {error}") from None
    codebook = arrays.get(CODEBOOK_KEY, np.zeros(0))
    if codebook.ndim != 2 or len(codebook) != CODEBOOK:
        raise MaskError(
            f"{path}: expected {CODEBOOK_KEY}, the codebook, of shape ({CODEBOOK}, width), found "
            f"{codebook.shape if CODEBOOK_KEY in arrays else 'none'}"
        )
    chosen = {key: value for key, value in arrays.items() if key.startswith(f"{name}.")} | {"codebook": codebook}
    return {key: torch.from_numpy(value) for key, value in chosen.items()}


def _filled(model: Any, state: dict[str, torch.Tensor], path: str | Path) -> Any:
    """Raises MaskError where the weights are of another model."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise MaskError(f"{path} is not PaliGemma's mask VQ-VAE: {' '.join(str(error).split())}") from None
    return model.eval()


class ResBlock(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 128, 1)
        self.net = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.net(x)
        return y


def crop(mask: np.ndarray, box_xyxy: Sequence[float]) -> np.ndarray | None:
    """The reverse of `paste`, for an encoder: a picture's mask, (h, w) of 0 and 1 → its part in the box, float32
    (64, 64) from 0 to 1; None where the box holds no pixel. Edges and resizing as in big_vision's refcoco_mask2str."""
    height, width = mask.shape
    limits = width, height, width, height
    x1, y1, x2, y2 = (min(max(round(edge), 0), limit) for edge, limit in zip(box_xyxy, limits, strict=True))
    if x2 <= x1 or y2 <= y1:
        return None
    part = Image.fromarray(mask[y1:y2, x1:x2] * np.uint8(255))
    return np.asarray(part.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / 255


def paste(mask64: np.ndarray, box_xyxy: tuple[float, float, float, float], width: int, height: int) -> dict[str, Any]:
    """A decoded mask, and its box in pixels of a picture → COCO compressed RLE of the picture's size.

    Resized bilinearly, inside where above 0, as in big_vision; but edges are rounded to whole pixels, not truncated,
    which would shift a mask by half a pixel.
    """
    limits = width, height, width, height
    x1, y1, x2, y2 = (min(max(round(edge), 0), limit) for edge, limit in zip(box_xyxy, limits, strict=True))
    canvas = np.zeros((height, width), np.uint8, order="F")
    if x2 > x1 and y2 > y1:
        resized = Image.fromarray(mask64.astype(np.float32)).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
        canvas[y1:y2, x1:x2] = np.asarray(resized) > 0
    return {"height": height, "width": width, "counts": rle.encode(canvas)["counts"].decode()}
