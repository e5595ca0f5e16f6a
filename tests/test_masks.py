"""Masks: `<seg>` codes in Google's format, decoded and pasted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch.nn import functional as F

from demo.scenes import Scene
from demo.writers import coco_rle
from shardsight.models.paligemma.masks import MaskDecoder, MaskEncoder, MaskError, crop, paste
from tests.conftest import WEIGHTS

VQVAE = WEIGHTS / "paligemma" / "vae-oid.npz"


def google_format(width: int = 512) -> dict[str, np.ndarray]:
    """Random arrays under the names and in the shapes of Google's file."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"decoder.0": (128, width, 1, 1), "decoder.12": (1, 16, 1, 1)}
    shapes |= {"encoder.10": (width, 128, 1, 1)}
    for half, blocks in (("decoder", (2, 3)), ("encoder", (8, 9))):
        for block in blocks:
            shapes |= {f"{half}.{block}.net.{n}": (128, 128, k, k) for n, k in ((0, 3), (2, 3), (4, 1))}
    channels = (128, 128, 64, 32, 16)
    for n in range(4):
        shapes[f"decoder.{4 + 2 * n}"] = (channels[n], channels[n + 1], 4, 4)  # a transposed kernel: in, out
        shapes[f"encoder.{2 * n}"] = (16 << n, 1 if n == 0 else 8 << n, 4, 4)
    arrays = {
        f"{name}.weight": (rng.normal(size=shape) / np.sqrt(shape[1] * shape[2])) for name, shape in shapes.items()
    }
    for name, shape in shapes.items():
        transposed = name in ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
        arrays[f"{name}.bias"] = rng.normal(size=shape[1 if transposed else 0]) * 0.1
    arrays["_vq_vae._embedding"] = rng.normal(size=(128, width))
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def plain_decode(arrays: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """The decoder again, from the arrays, as big_vision's is drawn: one line a layer."""
    a = {name: torch.from_numpy(value) for name, value in arrays.items()}

    def conv(x: torch.Tensor, name: str, padding: int = 0) -> torch.Tensor:
        return F.conv2d(x, a[f"{name}.weight"], a[f"{name}.bias"], padding=padding)

    x = a["_vq_vae._embedding"][torch.from_numpy(codes)].reshape(len(codes), 4, 4, -1).permute(0, 3, 1, 2)
    x = conv(x, "decoder.0").relu()
    for block in (2, 3):
        y = conv(x, f"decoder.{block}.net.0", 1).relu()
        y = conv(y, f"decoder.{block}.net.2", 1).relu()
        x = x + conv(y, f"decoder.{block}.net.4")
    for layer in (4, 6, 8, 10):
        kernel, bias = a[f"decoder.{layer}.weight"], a[f"decoder.{layer}.bias"]
        x = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1).relu()
    return conv(x, "decoder.12")[:, 0].numpy()


def test_reads_googles_format(tmp_path: Path) -> None:
    """Another order of codes, or of a kernel's axes, would draw other masks with Google's weights."""
    arrays = google_format()
    np.savez(tmp_path / "vae-oid.npz", **arrays)
    codes = np.random.default_rng(1).integers(0, 128, (3, 16))
    masks = MaskDecoder.load(tmp_path / "vae-oid.npz").decode(codes)
    assert masks.shape == (3, 64, 64) and masks.dtype == np.float32
    np.testing.assert_allclose(masks, plain_decode(arrays, codes), atol=1e-4)
    smooth = np.kron(np.random.default_rng(2).random((20, 8, 8)), np.ones((8, 8))).astype(np.float32)
    found = MaskEncoder.load(tmp_path / "vae-oid.npz").encode(smooth)
    assert found.shape == (20, 16) and len(np.unique(found)) > 10
    np.testing.assert_array_equal(found, plain_encode(arrays, smooth))


def test_crop_is_big_visions() -> None:
    """Edges to the nearest pixel, and the mean of all pixels that fall on one of the 64×64, not the nearest alone."""
    mask, rows = np.ones((200, 300), np.uint8), np.random.default_rng(0).integers(0, 2, 64)
    mask[50:114, 20:148] = rows[:, None]
    cut = crop(mask, (19.6, 50.4, 148.3, 113.7))
    assert cut is not None and cut.dtype == np.float32
    np.testing.assert_array_equal(cut, np.repeat(rows[:, None], 64, 1))
    mask[:, 84:] = 1 - mask[:, 84:]
    smooth = crop(mask, (20.0, 50.0, 148.0, 114.0))
    assert smooth is not None and 0 < np.abs(smooth[:, 31] - rows).max() < 0.5
    assert crop(mask, (5.1, 5.1, 5.3, 9.0)) is None


def test_the_grids_order() -> None:
    """The first code is the top left, the second lies to its right."""
    decoder = MaskDecoder.load(VQVAE)
    base = np.zeros((1, 16), np.int64)
    for place, (row, column) in {0: (0, 0), 1: (0, 1), 4: (1, 0), 15: (3, 3)}.items():
        changed = base.copy()
        changed[0, place] = 77
        moved = np.abs(decoder.decode(changed) - decoder.decode(base))[0]
        blocks = moved.reshape(4, 16, 4, 16).mean((1, 3))
        assert np.unravel_index(blocks.argmax(), (4, 4)) == (row, column)


@pytest.mark.parametrize(("codes", "message"), [(np.zeros((1, 15), int), "shape"), (np.full((1, 16), 128), "from 0")])
def test_wrong_codes_are_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskDecoder.load(VQVAE).decode(codes)
    assert MaskDecoder.load(VQVAE).decode(np.zeros((0, 16), int)).shape == (0, 64, 64)


def test_a_wrong_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(MaskError, match="cannot be read"):
        MaskDecoder.load(tmp_path / "text.npz")
    arrays = google_format(8)
    del arrays["decoder.4.weight"]
    np.savez(tmp_path / "part.npz", **arrays)
    with pytest.raises(MaskError, match=r"decoder\.4\.weight"):
        MaskDecoder.load(tmp_path / "part.npz")
    np.savez(tmp_path / "none.npz", weights=np.zeros(3))
    with pytest.raises(MaskError, match="codebook"):
        MaskDecoder.load(tmp_path / "none.npz")


def plain_encode(arrays: dict[str, np.ndarray], masks: np.ndarray) -> np.ndarray:
    """The encoder as big_vision has it, pp/proj/paligemma/segmentation.py: channels last, and TensorFlow's padding
    SAME, half of what is lacking on either side."""
    a = {name: torch.from_numpy(value) for name, value in arrays.items()}

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel, size = a[f"{name}.weight"], x.shape[1]
        lacking = max((-(-size // stride) - 1) * stride + kernel.shape[2] - size, 0)
        sides = [lacking // 2, lacking - lacking // 2]
        padded = F.pad(x.permute(0, 3, 1, 2), sides * 2)
        return F.conv2d(padded, kernel, a[f"{name}.bias"], stride=stride).permute(0, 2, 3, 1)

    x = 2.0 * (torch.from_numpy(masks)[..., None] - 0.5)
    for layer in range(4):
        x = conv(x, f"encoder.{2 * layer}", 2).relu()
    for block in (8, 9):
        y = conv(x, f"encoder.{block}.net.0").relu()
        y = conv(y, f"encoder.{block}.net.2").relu()
        x = conv(y, f"encoder.{block}.net.4") + x
    flat = conv(x, "encoder.10").reshape(-1, a["_vq_vae._embedding"].shape[1])
    return torch.cdist(flat, a["_vq_vae._embedding"]).argmin(1).reshape(-1, 16).numpy()


def plain_paste(mask64: np.ndarray, box: tuple[int, int, int, int], width: int, height: int) -> np.ndarray:
    """Pixel by pixel, for boxes no smaller than the mask: the mean of the four nearest values, by nearness."""
    x1, y1, x2, y2 = box
    canvas = np.zeros((height, width), bool)
    for y in range(max(y1, 0), min(y2, height)):
        for x in range(max(x1, 0), min(x2, width)):
            v = np.clip((y + 0.5 - y1) * 64 / (y2 - y1) - 0.5, 0, 63)
            u = np.clip((x + 0.5 - x1) * 64 / (x2 - x1) - 0.5, 0, 63)
            v0, u0 = int(v), int(u)
            v1, u1 = min(v0 + 1, 63), min(u0 + 1, 63)
            upper = mask64[v0, u0] * (1 - (u - u0)) + mask64[v0, u1] * (u - u0)
            lower = mask64[v1, u0] * (1 - (u - u0)) + mask64[v1, u1] * (u - u0)
            canvas[y, x] = upper * (1 - (v - v0)) + lower * (v - v0) > 0
    return canvas


def read(pasted: dict[str, object]) -> np.ndarray:
    size = [pasted["height"], pasted["width"]]
    return rle.decode({"size": size, "counts": str(pasted["counts"]).encode()}).astype(bool)


@pytest.mark.parametrize("box", [(20, 10, 120, 90), (0, 0, 160, 120), (96, 3, 160, 120)])
def test_paste_against_a_plain_reference(box: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(2)
    smooth = np.kron(rng.normal(size=(8, 8)), np.ones((8, 8)))
    mask64 = (smooth + 0.1 * rng.normal(size=(64, 64))).astype(np.float32)
    found, wanted = read(paste(mask64, box, 160, 120)), plain_paste(mask64, box, 160, 120)
    assert found.shape == (120, 160) and 0.2 < wanted[box[1] : box[3], box[0] : box[2]].mean() < 0.8
    assert (found != wanted).sum() <= 2  # where a value is zero but for rounding


def test_paste_at_the_edges() -> None:
    """A box of no size, or one that sticks out, is a mask all the same; its edges go to the nearest pixels."""
    full = np.ones((64, 64), np.float32)
    assert not read(paste(full, (5, 5, 5, 9), 20, 10)).any()
    assert read(paste(full, (-4, -4, 40, 40), 20, 10)).all()
    filled = np.argwhere(read(paste(full, (2.6, 1.4, 7.4, 5.6), 20, 10)))
    assert filled.min(0).tolist() == [1, 3] and filled.max(0).tolist() == [5, 6]


def test_the_demos_masks_come_back(some_scenes: list[Scene]) -> None:
    """Unseen shapes → codes → masks in their boxes: what `segment` can reach at best."""
    encoder, decoder = MaskEncoder.load(VQVAE), MaskDecoder.load(VQVAE)
    overlaps = []
    for scene in some_scenes[:10]:
        height, width = scene.image.shape[:2]
        cuts = [cut for shape in scene.shapes if (cut := crop(shape.mask, shape.box)) is not None]
        masks = decoder.decode(encoder.encode(np.stack(cuts)))
        for shape, mask in zip(scene.shapes, masks, strict=True):
            pasted = paste(mask, shape.box, width, height)
            found = {"size": [pasted["height"], pasted["width"]], "counts": pasted["counts"]}
            overlaps.append(rle.iou([found], [coco_rle(shape.mask)], [0])[0, 0])
    assert np.mean(overlaps) > 0.85
