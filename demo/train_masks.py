"""The VQ-VAE that writes the demo's masks as sixteen codes: its encoder, and its training."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from shardsight.models.paligemma.masks import CODEBOOK, CODEBOOK_KEY, MaskDecoder, ResBlock

WIDTH = 64


class MaskEncoder(nn.Module):  # type: ignore[misc]
    """masks → codes, to make what a model is trained on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(CODEBOOK, width))
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU()),
            *(ResBlock(), ResBlock(), nn.Conv2d(128, width, 1)),
        )

    @classmethod
    def load(cls, path: str | Path) -> "MaskEncoder":
        """From the file that `save` writes."""
        with np.load(path) as file:
            state = {name: torch.from_numpy(value) for name, value in file.items() if name.startswith("encoder.")}
            state["codebook"] = torch.from_numpy(file[CODEBOOK_KEY])
        encoder = cls(state["codebook"].shape[1])
        encoder.load_state_dict(state)
        return encoder.eval()

    @torch.inference_mode()
    def encode(self, masks: np.ndarray) -> np.ndarray:
        """float (n, 64, 64) from 0 to 1, 1 inside → int64 (n, 16)."""
        vectors = self(torch.from_numpy(np.ascontiguousarray(masks, np.float32)))
        return cast(np.ndarray, nearest(vectors, self.codebook).numpy())

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, 64, 64) from 0 to 1 → (n, 16, width), not quantised yet."""
        vectors: torch.Tensor = self.encoder(2 * masks[:, None] - 1).flatten(2).transpose(1, 2)
        return vectors


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(…, width) → int64 (…), the code that lies closest."""
    distances = (codebook**2).sum(1) - 2 * vectors @ codebook.T
    return distances.argmin(-1)


def train_masks(masks: np.ndarray, path: Path, steps: int = 1200, batch: int = 24) -> None:
    """masks: uint8 (n, 64, 64), 255 inside. Writes an .npz in Google's format."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encoder, decoder = MaskEncoder(WIDTH), MaskDecoder(WIDTH)
    trained = [*encoder.encoder.parameters(), *decoder.decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    # The codebook follows the encoder by moving averages; it quantises once there is something to follow.
    codebook = decoder.codebook.data
    counts, sums = torch.zeros(CODEBOOK), torch.zeros_like(codebook)
    plain = steps // 10
    for step in range(steps):
        target = torch.from_numpy(masks[rng.integers(len(masks), size=batch)]).float() / 255
        vectors = encoder(target)
        if step < plain:
            decoded, commitment = decoder(vectors), 0.0 * vectors.sum()
        else:
            flat = vectors.detach().flatten(0, 1)
            if step == plain:
                codebook.copy_(flat[torch.randperm(len(flat))[:CODEBOOK]])
                counts.fill_(1.0)
                sums.copy_(codebook)
            codes = nearest(flat, codebook)
            chosen = F.one_hot(codes, CODEBOOK).float()
            counts.mul_(0.99).add_(chosen.sum(0), alpha=0.01)
            sums.mul_(0.99).add_(chosen.T @ flat, alpha=0.01)
            codebook.copy_(sums / counts.clamp(1e-3)[:, None])
            if step % 100 == 0 and step < steps * 0.7:  # codes that nothing uses start again where there is something
                idle = counts < 0.05
                codebook[idle] = flat[torch.randint(len(flat), (int(idle.sum()),))]
                counts[idle], sums[idle] = 0.5, 0.5 * codebook[idle]
            quantised = codebook[codes].view_as(vectors)
            commitment = F.mse_loss(vectors, quantised)
            decoded = decoder(vectors + (quantised - vectors).detach())
        loss = F.mse_loss(decoded, 2 * target - 1) + 0.25 * commitment
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print("masks", step, f"{float(loss):.4f}", flush=True)
    encoder.codebook.data.copy_(codebook)
    save(encoder, decoder, path)


def mask_iou(masks: np.ndarray, path: Path) -> float:
    """Of masks, uint8 (n, 64, 64), and what comes back from their codes; the mean."""
    back = MaskDecoder.load(path).decode(MaskEncoder.load(path).encode(masks / 255)) > 0
    inside = masks >= 128
    shared, either = (back & inside).sum((1, 2)), (back | inside).sum((1, 2))
    return float((shared / either.clip(1)).mean())


def save(encoder: MaskEncoder, decoder: MaskDecoder, path: Path) -> None:
    """In Google's format: both halves and the decoder's codebook."""
    arrays = {
        **{f"encoder.{name}": value for name, value in encoder.encoder.state_dict().items()},
        **{f"decoder.{name}": value for name, value in decoder.decoder.state_dict().items()},
        CODEBOOK_KEY: decoder.codebook.detach(),
    }
    np.savez_compressed(path, **{name: value.float().numpy() for name, value in arrays.items()})
