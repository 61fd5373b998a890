"""Random views of a batch: every image draws its own, all are computed at once on its device."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from unbackdoor.ranks import ALONE, Ranks, draw
from unbackdoor.settings import ViewSettings
from unbackdoor.types import Images, RawImages

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as torchvision's and PIL's grey
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def random_views(
    images: Images, settings: ViewSettings, *, generator: torch.Generator, ranks: Ranks = ALONE
) -> Images:
    """Return one random view of every image: crop and flip, colours, grey, blur.

    Args:
        images: Values in [0, 1], shape ``(n, c, h, w)``; colours are left alone unless c is 3.
        generator: On the device of ``images``.
        ranks: Each has an equal part of a batch; the views are those of the whole batch.

    Returns:
        Views in [0, 1], of the shape of ``images``.

    Source:
        SimCLR, appendix A, https://arxiv.org/abs/2002.05709.

    Differs from the paper: brightness, contrast, saturation and hue come in this fixed order, and
    hue is a rotation in YIQ, so that all of them are one linear map of an image's colours.
    """
    views = crop_and_flip(images, settings, generator=generator, ranks=ranks)
    if images.shape[1] == 3 and (settings.jitter > 0 or settings.grey > 0):
        views = recolour(views, settings, generator=generator, ranks=ranks)
    if settings.blur > 0:
        views = blur(views, settings, generator=generator, ranks=ranks)
    return views


def crop_and_flip(
    images: Images, settings: ViewSettings, *, generator: torch.Generator, ranks: Ranks = ALONE
) -> Images:
    """Cut a random part out of every image, scale it to full size, mirror some.

    The part's area is uniform in [``min_area``, 1] of the image's, its aspect ratio log-uniform in
    [3/4, 4/3], its place uniform.
    """
    n = len(images)
    uniform = _uniform(images, generator, ranks)

    area, log_ratio = uniform(settings.min_area, 1), uniform(math.log(3 / 4), math.log(4 / 3))
    width = (area * log_ratio.exp()).sqrt().clamp(max=1)
    height = (area / log_ratio.exp()).sqrt().clamp(max=1)
    mirror = torch.where(uniform(0, 1) < settings.flip, -1.0, 1.0)

    affine = torch.zeros(n, 2, 3, device=images.device)  # output pixel -> input pixel, in [-1, 1]
    affine[:, 0, 0], affine[:, 0, 2] = width * mirror, uniform(-1, 1) * (1 - width)
    affine[:, 1, 1], affine[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def recolour(
    images: Images, settings: ViewSettings, *, generator: torch.Generator, ranks: Ranks = ALONE
) -> Images:
    """Jitter brightness, contrast, saturation and hue, and turn some images grey.

    Every image's change is one affine map of its colours, a 3×3 matrix and an offset.
    """
    n, device = len(images), images.device
    uniform = _uniform(images, generator, ranks)

    luma, yiq, from_yiq = _colour_spaces(device)
    to_grey = luma.expand(3, 3)
    identity = torch.eye(3, device=device)

    strength = 0.8 * settings.jitter  # SimCLR's factors, at its strength s
    brightness, contrast, saturation = (
        uniform(max(0.0, 1 - strength), 1 + strength) for _ in range(3)
    )
    angle = 2 * torch.pi * uniform(-0.2 * settings.jitter, 0.2 * settings.jitter)
    rotation = torch.eye(3, device=device).repeat(n, 1, 1)
    rotation[:, 1, 1], rotation[:, 1, 2] = angle.cos(), -angle.sin()
    rotation[:, 2, 1], rotation[:, 2, 2] = angle.sin(), angle.cos()
    saturate = torch.lerp(to_grey, identity, saturation[:, None, None])
    matrix = (from_yiq @ rotation @ yiq) @ saturate

    gain = contrast * brightness
    mean_grey = (images.mean((2, 3)) @ luma) * brightness
    offset = matrix @ ((1 - contrast) * mean_grey)[:, None, None].expand(n, 3, 1)
    matrix = matrix * gain[:, None, None]

    jittered = (uniform(0, 1) < settings.jitter_probability)[:, None, None]
    matrix, offset = torch.where(jittered, matrix, identity), torch.where(jittered, offset, 0.0)
    greyed = (uniform(0, 1) < settings.grey)[:, None, None]
    matrix = torch.where(greyed, to_grey @ matrix, matrix)
    offset = torch.where(greyed, to_grey @ offset, offset)
    return torch.baddbmm(offset, matrix, images.flatten(2)).clamp(0, 1).view_as(images)


def blur(
    images: Images, settings: ViewSettings, *, generator: torch.Generator, ranks: Ranks = ALONE
) -> Images:
    """Blur some images with a Gaussian of 0.1 to 2 pixels at 224, in proportion at other sizes.

    Below 56 pixels it is as at 56: smaller ones would change nothing. Differs from SimCLR, whose
    sigma is in pixels at every size: 2 pixels would erase a trigger of 3×3.
    """
    n, channels, height, width = images.shape
    radius = max(1, round(0.05 * min(height, width)))  # SimCLR: a kernel of a tenth of the side
    scale = min(height, width) / 224
    uniform = _uniform(images, generator, ranks)
    sigma = uniform(0.1, 2)
    chosen = uniform(0, 1) < settings.blur

    distance = torch.arange(-radius, radius + 1, device=images.device)
    kernel = (-0.5 * (distance / (sigma[:, None] * max(scale, 0.25))) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, dim=0)
    flat = images.reshape(1, n * channels, height, width)
    for shape, pad in (
        ((-1, 1, 2 * radius + 1, 1), (0, 0, radius, radius)),
        ((-1, 1, 1, 2 * radius + 1), (radius, radius, 0, 0)),
    ):
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), kernel.view(shape), groups=n * channels)
    return torch.where(chosen[:, None, None, None], flat.view_as(images), images)


def shift_and_flip(images: RawImages, *, margin: int, generator: torch.Generator) -> RawImages:
    """Pad by ``margin`` black pixels, cut the old size out at a random place, mirror half of them.

    The standard augmentation of supervised training on CIFAR-10 (margin 4). The images may be on
    another device than the generator.
    """
    n, channels, height, width = images.shape
    device = images.device

    def integers(high: int) -> Tensor:
        drawn = torch.randint(high, (n, 1), generator=generator, device=generator.device)
        return drawn.to(device)

    padded = F.pad(images, (margin, margin, margin, margin))
    rows = integers(2 * margin + 1) + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(n, width)
    columns = torch.where(integers(2) == 1, columns.flip(1), columns) + integers(2 * margin + 1)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@cache
def _colour_spaces(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of grey, and the matrices to YIQ and back; copied to a device once."""
    yiq = torch.tensor(YIQ)
    return torch.tensor(LUMA).to(device), yiq.to(device), yiq.inverse().to(device)


def _uniform(
    images: Images, generator: torch.Generator, ranks: Ranks
) -> Callable[[float, float], Tensor]:
    """Return what draws a number between two others for every image."""

    def uniform(low: float, high: float) -> Tensor:
        share = draw(
            torch.rand, (len(images),), generator=generator, device=images.device, ranks=ranks
        )
        return low + (high - low) * share

    return uniform
