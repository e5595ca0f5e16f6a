"""Train the VQ-VAE that writes the demo's masks as sixteen codes."""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from shardsight.models.paligemma.masks import CODEBOOK, MaskDecoder, MaskEncoder, nearest, save

WIDTH = 64


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
