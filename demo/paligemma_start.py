"""A start for SigLIP's tower that saves it days: what its layers are to look for, written into their weights.

A tower that starts at random still guesses the kinds of shapes after 28,000 pictures, and hardly learns them faster if
it is handed each patch's outline and colour: what is hard to find is whom to look at. So each patch is taught, after
READ layers, to hold its shape's colour, its own piece of the outline and of what is printed, in places of its vector
that are set apart. The layer after them starts with heads on the eight neighbours, from which it collects those pieces;
and the next two with heads on the patches of the same colour, which are those of the same shape, as no two in a scene
are alike: the uppermost, lowest, leftmost, rightmost, and all. Everything remains to be trained.

Heads on neighbours are convolutions, as in Cordonnier et al., arXiv 1911.03584.
"""

import math

import torch
from torch.nn import functional as F
from transformers import SiglipVisionModel

from demo.paligemma_tower import CELLS, CLASSES, GRID, INK_CELLS, PATCH, Probe
from demo.scenes import COLOURS

READ = 2  # layers that read pixels, before those that gather what was read
# Where what is in a patch's vector.
COLOUR = slice(0, len(COLOURS) + 1)  # of its shape; the last: of none
DOWN, ACROSS = COLOUR.stop, COLOUR.stop + 1  # where it lies, -2 to 2
OUTLINE = slice(ACROSS + 1, ACROSS + 1 + CELLS * CELLS)  # which of its cells are its shape's
INK = slice(OUTLINE.stop, OUTLINE.stop + INK_CELLS * INK_CELLS)  # which have print in them
_WAVES = 8  # half the numbers that say a place along an axis: as many as places, so that each is unlike all others
POSITION = slice(INK.stop, INK.stop + 4 * _WAVES)
PIXELS = POSITION.stop  # and all after it
_CHROMA = 56  # of the pixels' numbers
_NEIGHBOURS = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if down or across]
GAIN = 1.5


def start_tower(tower: SiglipVisionModel, patches: torch.Tensor) -> None:
    """patches: pixels of some, (n, 3 · PATCH²) as F.unfold gives them."""
    with torch.no_grad():
        _start_embeddings(tower.embeddings, patches)
        layers = tower.encoder.layers
        for layer in layers:
            layer.self_attn.out_proj.weight *= 0.5
            layer.mlp.fc2.weight *= 0.5
        width = tower.config.hidden_size
        for number, step in enumerate(_NEIGHBOURS):
            beside = 16 if step[0] == 0 else 4  # as words go on there
            _look_aside(layers[0].self_attn, number, step, 0.5, [(slice(PIXELS, width), 8 + beside)])
            _look_aside(layers[READ].self_attn, number, step, 1.0, [(OUTLINE, 10), (INK, 6 + beside)])
        for number, across in enumerate((-2, 2), len(_NEIGHBOURS)):
            _look_aside(layers[READ].self_attn, number, (0, across), 1.0, [(INK, 22)])
        for layer in layers[READ + 1 : READ + 3]:
            _look_at_the_same_colour(layer.self_attn)


def _start_embeddings(embeddings: torch.nn.Module, patches: torch.Tensor) -> None:
    convolution = embeddings.patch_embedding
    kept = convolution.out_channels - PIXELS
    weight, bias = torch.zeros(convolution.out_channels, patches.shape[1]), torch.zeros(convolution.out_channels)
    red, green, blue = torch.eye(3)
    grey = (red + green + blue) / 3
    one = torch.eye(PATCH * PATCH)
    # Apart, as in the first components of both together the colours drown what is fine: small words.
    luminance = torch.einsum("c,pq->pcq", grey, one).flatten(1)
    chroma = torch.cat([torch.einsum("c,pq->pcq", tint - grey, one).flatten(1) for tint in (red, blue)])
    weight[PIXELS:] = 0.5 * torch.cat(
        [_components(luminance, patches, kept - _CHROMA), _components(chroma, patches, _CHROMA)]
    )
    bias[PIXELS:] = -weight[PIXELS:] @ patches.mean(0)
    convolution.weight.copy_(weight.reshape(convolution.weight.shape))
    convolution.bias.copy_(bias)
    places = torch.zeros_like(embeddings.position_embedding.weight)
    line = torch.linspace(-2, 2, GRID)
    places[:, DOWN], places[:, ACROSS] = line.repeat_interleave(GRID), line.repeat(GRID)
    angles = torch.arange(GRID)[:, None] * _frequencies()
    code = 2.0 * torch.cat([angles.cos(), angles.sin()], 1)
    places[:, POSITION] = torch.cat([code.repeat_interleave(GRID, 0), code.repeat(GRID, 1)], 1)
    embeddings.position_embedding.weight.copy_(places)


def _components(view: torch.Tensor, patches: torch.Tensor, count: int) -> torch.Tensor:
    """The first principal components of what a view (m, 3 · PATCH²) sees of patches, each of variance 1."""
    values, vectors = torch.linalg.eigh(torch.cov(view @ patches.T))
    return (vectors[:, -count:] / values[-count:].sqrt()).T @ view


def _frequencies() -> torch.Tensor:
    return math.pi * (torch.arange(_WAVES) + 0.5) / _WAVES


def _look_aside(
    attention: torch.nn.Module, number: int, steps: tuple[int, int], strength: float, copied: list[tuple[slice, int]]
) -> None:
    """Let that head look at the patch so many steps down and across, and add mixtures of what is in those parts of its
    vector, so many each, to the pixels' part of ours."""
    head = attention.head_dim
    first = number * head
    rows = slice(first, first + head)
    attention.q_proj.weight[rows] *= 0.1
    attention.k_proj.weight[rows] *= 0.1
    for axis, step in enumerate(steps):
        # cos and sin of an angle turned by a step's: most like what lies a step further.
        turn = _frequencies() * step
        for wave in range(_WAVES):
            row = first + 2 * _WAVES * axis + wave
            column = POSITION.start + 2 * _WAVES * axis + wave
            cos, sin = GAIN * turn[wave].cos(), GAIN * turn[wave].sin()
            attention.q_proj.weight[row, column] += cos
            attention.q_proj.weight[row, column + _WAVES] -= sin
            attention.q_proj.weight[row + _WAVES, column] += sin
            attention.q_proj.weight[row + _WAVES, column + _WAVES] += cos
            attention.k_proj.weight[row, column] += 1
            attention.k_proj.weight[row + _WAVES, column + _WAVES] += 1
    width = attention.embed_dim
    attention.v_proj.weight[rows] *= 0.3
    attention.out_proj.weight[:, rows] *= 0.3
    for read, count in copied:
        mixtures = torch.linalg.qr(torch.randn(read.stop - read.start, count))[0].T
        attention.v_proj.weight[first : first + count, read] += mixtures
        places = PIXELS + torch.randperm(width - PIXELS)[:count]
        attention.out_proj.weight[places, torch.arange(first, first + count)] += strength
        first += count


def _look_at_the_same_colour(attention: torch.nn.Module) -> None:
    """Heads on the uppermost, lowest, leftmost and rightmost patches of a patch's colour, the rest on all of them."""
    head = attention.head_dim
    directions = [(-3, 0), (3, 0), (0, -3), (0, 3)]
    directions += [(0, 0)] * (attention.num_heads - len(directions))
    for number, (down, across) in enumerate(directions):
        rows = slice(number * head, (number + 1) * head)
        attention.q_proj.weight[rows] *= 0.2
        attention.k_proj.weight[rows] *= 0.2
        for colour in range(COLOUR.start, COLOUR.stop):
            attention.q_proj.weight[rows.start + colour, colour] += 2 * head**0.5
            attention.k_proj.weight[rows.start + colour, colour] += 1
        place = rows.start + COLOUR.stop
        attention.q_proj.bias[place] = head**0.5
        attention.k_proj.weight[place, DOWN] += down
        attention.k_proj.weight[place, ACROSS] += across


def start_projector(projector: torch.nn.Module, probe: Probe, features: torch.Tensor) -> None:
    """Hand the decoder what the probe answers, from features (n, width) of some patches.

    Each answer is as loud as any other: what takes up little of a feature, as its colour does, is learnt late or never.
    """
    linear, projected = projector.linear, projector.linear.out_features
    with torch.no_grad():
        sizes = [*CLASSES.values(), probe.linear.out_features - sum(CLASSES.values())]
        parts = probe.linear.weight.split(sizes)
        answers = torch.cat([*(part - part.mean(0) for part in parts[:-1]), parts[-1]])
        boxes = torch.pca_lowrank(features @ probe.bins.weight.T, projected - len(answers), niter=4)[2]
        answers = torch.cat([answers, boxes.T @ probe.bins.weight])
        loud = answers / (features @ answers.T).std(0)[:, None]
        linear.weight.copy_(torch.linalg.qr(torch.randn(projected, projected))[0] @ loud)
        linear.bias.copy_(-linear.weight @ features.mean(0))


def told(stream: torch.Tensor, targets: dict[str, torch.Tensor], which: torch.Tensor) -> torch.Tensor:
    """The vectors after READ layers, (n, GRID², width), with the truth in them for some of the pictures, bool (n,).

    So those that gather learn from the first step, while those that read do not read well yet.
    """
    size = stream.detach().std(-1, keepdim=True)
    true = stream.clone()
    true[..., COLOUR] = 2.5 * size * F.one_hot(targets["colour"], len(COLOURS) + 1)
    true[..., OUTLINE] = size * (2 * targets["outline"] - 1)
    true[..., INK] = size * (2 * targets["ink"] - 1)
    return torch.where(which[:, None, None], true, stream)


def reading_losses(stream: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How far what was read is from the truth. Factors make it as large as `told` does, and no larger: what outgrows
    the rest of the vector drowns it."""
    read = F.layer_norm(stream.float(), stream.shape[-1:])
    outline, ink = (
        F.binary_cross_entropy_with_logits(4 * read[..., where], targets[name], pos_weight=torch.tensor(more))
        for name, where, more in (("outline", OUTLINE, 3.0), ("ink", INK, 6.0))
    )
    colour = F.cross_entropy(3 * read[..., COLOUR].flatten(0, 1), targets["colour"].flatten())
    return {"outline": 3 * outline, "ink": 5 * ink, "colour read": colour}
