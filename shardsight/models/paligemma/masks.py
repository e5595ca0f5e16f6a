"""PaliGemma's `<seg>` codes ↔ masks: sixteen codes are a mask of 64×64 within its box.

The VQ-VAE is that of Ning et al., "All in Tokens" (arXiv 2301.02229), as big_vision reads it: Google's
`vae-oid.npz`, whose kernels lie as torch's do.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import nn

CODES, CODEBOOK, SIZE = 16, 128, 64
_CODEBOOK_KEY = "_vq_vae._embedding"


class MaskError(Exception):
    """A VQ-VAE that cannot be used: one sentence for the user."""


class MaskDecoder(nn.Module):  # type: ignore[misc]
    """codes → masks. width: of the codebook's vectors, 512 in Google's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(CODEBOOK, width))
        self.decoder = nn.Sequential(
            *(nn.Conv2d(width, 128, 1), nn.ReLU(), _ResBlock(), _ResBlock()),
            *(nn.ConvTranspose2d(128, 128, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU()),
            nn.Conv2d(16, 1, 1),
        )

    @classmethod
    def load(cls, path: str | Path) -> "MaskDecoder":
        """From an `.npz` with `decoder.0.weight` … and `_vq_vae._embedding`. Raises MaskError."""
        return _load(cls, path, "decoder")

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
    """masks → codes, to make what a model is trained on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(CODEBOOK, width))
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU()),
            *(_ResBlock(), _ResBlock(), nn.Conv2d(128, width, 1)),
        )

    @classmethod
    def load(cls, path: str | Path) -> "MaskEncoder":
        """From the same file, `encoder.0.weight` … Raises MaskError."""
        return _load(cls, path, "encoder")

    @torch.inference_mode()
    def encode(self, masks: np.ndarray) -> np.ndarray:
        """float (n, 64, 64) from 0 to 1, 1 inside → int64 (n, 16)."""
        vectors = self(torch.from_numpy(np.ascontiguousarray(masks, np.float32)))
        return cast(np.ndarray, nearest(vectors, self.codebook).numpy())

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, 64, 64) from 0 to 1 → (n, 16, width), not quantised yet."""
        vectors: torch.Tensor = self.encoder(2 * masks[:, None] - 1).flatten(2).transpose(1, 2)
        return vectors


class _ResBlock(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 128, 1)
        self.net = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.net(x)
        return y


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(…, width) → int64 (…), the code that lies closest."""
    distances = (codebook**2).sum(1) - 2 * vectors @ codebook.T
    return distances.argmin(-1)


def paste(mask64: np.ndarray, box_xyxy: tuple[float, float, float, float], width: int, height: int) -> dict[str, Any]:
    """A decoded mask in its box, x1, y1, x2, y2 in pixels, of a picture → its COCO compressed RLE.

    Resized bilinearly and cut above 0, as big_vision does; edges are rounded to whole pixels, where it
    truncates them, which shifts a mask by half a pixel.
    """
    limits = width, height, width, height
    x1, y1, x2, y2 = (min(max(round(edge), 0), limit) for edge, limit in zip(box_xyxy, limits, strict=True))
    canvas = np.zeros((height, width), np.uint8, order="F")
    if x2 > x1 and y2 > y1:
        resized = Image.fromarray(mask64.astype(np.float32)).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)
        canvas[y1:y2, x1:x2] = np.asarray(resized) > 0
    return {"height": height, "width": width, "counts": rle.encode(canvas)["counts"].decode()}


def save(encoder: MaskEncoder, decoder: MaskDecoder, path: Path) -> None:
    """In Google's format: both halves and the decoder's codebook."""
    arrays = {
        **{f"encoder.{name}": value for name, value in encoder.encoder.state_dict().items()},
        **{f"decoder.{name}": value for name, value in decoder.decoder.state_dict().items()},
        _CODEBOOK_KEY: decoder.codebook.detach(),
    }
    np.savez_compressed(path, **{name: value.float().numpy() for name, value in arrays.items()})


def _load(half: Any, path: str | Path, name: str) -> Any:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise MaskError(f"{path} cannot be read as an .npz file: {error}") from None
    codebook = arrays.get(_CODEBOOK_KEY)
    if codebook is None or codebook.ndim != 2 or codebook.shape[0] != CODEBOOK:
        found = "none" if codebook is None else f"one of shape {codebook.shape}"
        raise MaskError(f"{path} should hold a codebook {_CODEBOOK_KEY} of shape ({CODEBOOK}, width); it has {found}")
    module = half(codebook.shape[1])
    state = {key: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{name}.")}
    try:
        module.load_state_dict({**state, "codebook": torch.from_numpy(codebook)})
    except RuntimeError as error:
        raise MaskError(f"{path} is not PaliGemma's mask VQ-VAE: {' '.join(str(error).split())}") from None
    return module.eval()
