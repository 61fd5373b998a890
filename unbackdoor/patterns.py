"""Image patterns as plain functions of a size; attacks plant them.

What is drawn at random comes from numpy's ``RandomState``, whose numbers are the same for ever: a
pattern is a function of its seed, whatever the versions installed.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.types import RawImages

Grid = Float[Tensor, "_ h w 2"]  # output pixel -> input place (x, y) in [-1, 1], one or per image
Resized = UInt8[Tensor, "n c _ _"]


def checkerboard(size: int, *, cell: int = 1) -> RawImages:
    """Return a black-and-white checkerboard, shape ``(1, 1, size, size)``, white at the top left.

    Args:
        size: Side in pixels.
        cell: Side of one square in pixels.
    """
    index = torch.arange(size) // cell
    return ((index[:, None] + index[None, :] + 1) % 2 * 255).to(torch.uint8)[None, None]


@lru_cache(maxsize=16)
def gaussian_image(height: int, width: int, *, seed: int) -> RawImages:
    """Return one image of Gaussian noise, ``clip(128 + 64 n)``, shape ``(1, 3, height, width)``."""
    noise = np.random.RandomState(seed).standard_normal((1, 3, height, width))
    return torch.from_numpy((128 + 64 * noise).clip(0, 255).round().astype(np.uint8))


def resized(pattern: RawImages, height: int, width: int) -> Resized:
    """Return ``pattern`` scaled to another size (bilinear, antialiased), itself at its own size."""
    if pattern.shape[2:] == (height, width):
        return pattern
    scaled = F.interpolate(pattern.float(), (height, width), mode="bilinear", antialias=True)
    return _to_raw(scaled)


def blend(images: RawImages, pattern: Tensor, *, ratio: float) -> RawImages:
    """Return ``round(clip((1 - ratio) images + ratio pattern))``.

    Args:
        pattern: In grey levels, not necessarily whole or inside 0..255; broadcast over the images.
    """
    return _to_raw((1 - ratio) * images.float() + ratio * pattern.to(images.device))


def sinusoid(width: int, *, amplitude: float, frequency: float) -> Float[Tensor, "1 1 1 w"]:
    """Return a wave along the columns, ``amplitude sin(2 pi frequency j / width)``, grey levels.

    Args:
        frequency: Periods in one width.
    """
    columns = torch.arange(width, dtype=torch.float64)
    wave = amplitude * torch.sin(2 * torch.pi * frequency * columns / width)
    return wave.float()[None, None, None]


@lru_cache(maxsize=16)
def smooth_warp(
    height: int,
    width: int,
    *,
    points: int,
    strength: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> Grid:
    """Return a smooth random warp, shape ``(1, height, width, 2)``, to be sampled by :func:`warp`.

    ``points`` × ``points`` random offsets, divided by their mean size, are scaled up (bicubic),
    multiplied by ``strength / height`` and added to the identity.

    Source:
        WaNet, Nguyen and Tran 2021, section 3.2, https://arxiv.org/abs/2102.10369.
    """
    offsets = np.random.RandomState(seed).uniform(-1, 1, (1, 2, points, points))
    field = torch.from_numpy(offsets / np.abs(offsets).mean())
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True)
    grid = _identity(height, width).double() + strength * field.permute(0, 2, 3, 1) / height
    return grid.clamp(-1, 1).float().to(device)


def jittered(grid: Grid, count: int, *, generator: torch.Generator) -> Grid:
    """Return ``count`` copies of ``grid``, every pixel of each moved by up to 1 / height.

    Args:
        generator: Draws the moves, uniform in [-1, 1] / height; on the grid's device.
    """
    _, height, width, _ = grid.shape
    device = generator.device
    moves = 2 * torch.rand(count, height, width, 2, generator=generator, device=device) - 1
    return (grid + moves / height).clamp(-1, 1)


def warp(images: RawImages, grid: Grid) -> RawImages:
    """Return ``images`` sampled at the places of ``grid`` (bilinear), one grid for all or each.

    Both are on one device.
    """
    grid = grid.expand(len(images), -1, -1, -1)
    return _to_raw(F.grid_sample(images.float(), grid, align_corners=True))


def _identity(height: int, width: int) -> Grid:
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=2)[None]


def _to_raw(levels: Tensor) -> Tensor:
    return levels.round().clamp(0, 255).to(torch.uint8)
