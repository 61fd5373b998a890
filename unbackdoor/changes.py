"""Small changes of all images at once, learned so that they move features to one place.

A backdoor is one change that moves all images to one place. Changes are drawn from families, each
so small that a network without a backdoor of that kind can hardly be gathered by it: a patch in a
window, a fade and a faint image added, a smooth warp.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor.errors import DataError, DivergedError
from unbackdoor.probe import extract
from unbackdoor.ranks import ALONE, Ranks, add_up, gather, own
from unbackdoor.settings import ChangeSettings
from unbackdoor.types import Features, Images, RawImages, Scalar

WARP_POINTS = (3, 6)  # fewest and most points along a side of a warp's field


class Patch(nn.Module):
    """Replaces a square window of every image by one and the same picture.

    Args:
        picture: In [0, 1], shape ``(1, c, side, side)``.
        top: First row of the window.
        left: First column.
    """

    def __init__(self, picture: Images, *, top: int, left: int):
        super().__init__()
        self.learned = nn.Parameter(picture)
        self.top, self.left = top, left

    def forward(self, images: Images) -> Images:
        """Return changed images."""
        rows, columns = (
            slice(start, start + self.learned.shape[-1]) for start in (self.top, self.left)
        )
        changed = images.clone()
        changed[:, :, rows, columns] = self.learned
        return changed

    @torch.no_grad()
    def restrict(self) -> None:
        """Bring the picture back into [0, 1]."""
        self.learned.clamp_(0, 1)


class Addition(nn.Module):
    """Fades every image towards one grey, adds one faint image to it and clips to [0, 1].

    Args:
        image: Shape ``(1, c, h, w)``.
        amplitude: The most its root mean square may be, on the [0, 1] scale.
        share: Of the grey in the faded image.
        grey: On the [0, 1] scale.
    """

    def __init__(
        self,
        image: Float[Tensor, "1 c h w"],
        *,
        amplitude: float,
        share: float = 0.0,
        grey: float = 0.0,
    ):
        super().__init__()
        self.learned = nn.Parameter(image)
        self.amplitude, self.share, self.grey = amplitude, share, grey

    def forward(self, images: Images) -> Images:
        """Return changed images."""
        faded = (1 - self.share) * images + self.share * self.grey
        return (faded + self.learned).clamp(0, 1)

    @torch.no_grad()
    def restrict(self) -> None:
        """Scale the image down to its amplitude."""
        size = self.learned.square().mean().sqrt()
        self.learned.mul_((self.amplitude / size).clamp(max=1))


class Warp(nn.Module):
    """Moves every pixel along a smooth field, up or down and sideways.

    Args:
        field: Coarse moves before the tanh, shape ``(2, p, p)``; scaled up by bicubic curves.
        pixels: The most that a coarse move may be; between them, curves overshoot by a little.

    The bilinear sample is written as a weighted sum of shifted images: its gradient is the same in
    every run, on CUDA too.
    """

    def __init__(self, field: Float[Tensor, "2 p p"], *, pixels: float):
        super().__init__()
        self.learned = nn.Parameter(field)
        self.pixels = pixels

    def forward(self, images: Images) -> Images:
        """Return changed images."""
        height, width = images.shape[2:]
        points = self.learned.shape[-1]
        rows, columns = (_bicubic(points, side, images.device) for side in (height, width))
        moves = self.pixels * (rows @ self.learned.tanh() @ columns.T)
        reach = math.ceil(1.1 * self.pixels)
        moves = moves.clamp(-reach, reach)
        padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
        changed = torch.zeros_like(images)
        steps = range(-reach, reach + 1)
        by_row, by_column = ([_triangle(move - step) for step in steps] for move in moves)
        for down, vertical in zip(steps, by_row, strict=True):
            for right, horizontal in zip(steps, by_column, strict=True):
                weight = vertical * horizontal
                top, left = reach + down, reach + right
                changed = changed + weight * padded[:, :, top : top + height, left : left + width]
        return changed

    def restrict(self) -> None:
        """Do nothing: the tanh bounds the moves."""


Change = Patch | Addition | Warp


class Whitening(NamedTuple):
    """Moves features to mean 0 and about one and the same variance in every direction.

    Classes lie along the few directions in which plain images vary most, and there a change can
    gather them without any backdoor. Whitened, a direction that plain images do not use counts as
    much.
    """

    centre: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]

    @classmethod
    def of(cls, features: Features, *, shrinkage: float) -> "Whitening":
        """Return the whitening of these features, on their device.

        Args:
            features: Of plain images.
            shrinkage: Added to the variance of every direction, in units of the mean variance; it
                bounds how much directions of little variance count.

        Raises:
            DataError: If there are fewer than two images.
            DivergedError: If a feature is not finite.
        """
        if len(features) < 2:
            raise DataError(f"changes are learned on 2 images or more, got {len(features)}")
        if wrong := int((~features.isfinite()).any(1).sum()):
            raise DivergedError(
                f"the features of {wrong} of {len(features)} images are not finite; look at the "
                "weights and at --mean and --std, or compute in --precision fp32"
            )
        exact = features.cpu().double()  # not every device has float64
        variances, directions = torch.linalg.eigh(torch.cov(exact.T))
        added = shrinkage * variances.mean().clamp(min=1e-12)
        matrix = directions / (variances.clamp(min=0) + added).sqrt()
        return cls(exact.mean(0).to(features), matrix.to(features))

    def __call__(self, features: Features) -> Features:
        """Return whitened features, in the precision of those that this was made of."""
        return (features.to(self.centre.dtype) - self.centre) @ self.matrix


class Pool:
    """Changes that are learned together; each has every so many-th image of a batch.

    Args:
        changes: One or more.
        whiten: See :class:`Whitening`; of unchanged images.
        rate: Of Adam.
    """

    def __init__(self, changes: Sequence[Change], *, whiten: Whitening, rate: float):
        self.changes = tuple(changes)
        self.whiten = whiten
        self.optimizer = torch.optim.Adam([change.learned for change in changes], lr=rate)

    def apply(self, images: Images, *, ranks: Ranks = ALONE) -> Images:
        """Return the images, image i changed by change i modulo their number.

        Args:
            images: This rank's part of a batch.
        """
        changed = torch.empty_like(images)
        for change, part in zip(self.changes, self._parts(len(images), ranks), strict=True):
            if len(images[part]):
                changed[part] = change(images[part])
        return changed

    def advance(
        self, embed: nn.Module, images: Images, *, ranks: Ranks = ALONE
    ) -> Float[Tensor, " changes"]:
        """Take one step towards changes whose images gather at one place; returns how much they do.

        Args:
            embed: Maps images to features; its weights take no gradient here.
            images: This rank's part of a batch; a change that gets no image rests.
        """
        learned = [change.learned for change in self.changes]
        features: Features = gather(embed(self.apply(images, ranks=ranks)), ranks)
        white = self.whiten(features)
        parts = [white[part] for part in self._parts(len(white), ALONE)]
        nowhere = white.new_zeros(())
        gathered = torch.stack([concentration(p, 0.0) if len(p) else nowhere for p in parts])
        loss = -gathered.sum() / ranks.count  # every rank has the whole of it
        gradients = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        add_up(gradients, ranks)
        for tensor, gradient, part in zip(learned, gradients, parts, strict=True):
            tensor.grad = gradient if len(part) else None
        self.optimizer.step()
        for change in self.changes:
            change.restrict()
        return gathered.detach()

    def _parts(self, count: int, ranks: Ranks) -> Iterator[slice]:
        """Yield every change's rows among ``count`` that begin at this rank's place."""
        first, every = ranks.rank * count, len(self.changes)
        return (slice((number - first) % every, None, every) for number in range(every))


def concentration(features: Features, centre: Float[Tensor, " d"] | float) -> Scalar:
    """Return how much features gather at one place, from 0, scattered around the centre, to 1.

    It is the squared length of the mean unit vector from the centre. The centre is taken away
    because features after a ReLU lie in a cone, which hides that they gather.
    """
    return F.normalize(features - centre, dim=1).mean(0).square().sum()


def draw_changes(
    settings: ChangeSettings, shape: Sequence[int], *, generator: torch.Generator
) -> list[Change]:
    """Draw changes at random: patches first, then additions, then warps.

    Args:
        settings: How many of each and how large.
        shape: Channels, height and width of an image.
        generator: The changes are on its device.
    """
    channels, height, width = shape
    device = generator.device

    def whole(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator, device=device))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def place(most: int) -> int:
        """Return a place from 0 to ``most``; a third lie at an end, as triggers often do."""
        beyond = most // 4
        return min(max(whole(-beyond, most + beyond), 0), most)

    changes: list[Change] = []
    sides = [
        max(1, round(part * min(height, width)))
        for part in (settings.patch_min, settings.patch_max)
    ]
    for _ in range(settings.patches):
        side = whole(*sides)
        top, left = (place(length - side) for length in (height, width))
        changes.append(Patch(uniform(1, channels, side, side), top=top, left=left))
    for _ in range(settings.additions):
        noise = torch.randn(1, channels, height, width, generator=generator, device=device)
        start = 0.5 * settings.amplitude * noise / noise.square().mean().sqrt()
        share, grey = uniform(2).tolist()
        share *= settings.fade
        changes.append(Addition(start, amplitude=settings.amplitude, share=share, grey=grey))
    for _ in range(settings.warps):
        points = whole(*WARP_POINTS)
        changes.append(Warp(2 * uniform(2, points, points) - 1, pixels=settings.pixels))
    return changes


def learn_changes(
    embed: nn.Module,
    images: RawImages,
    settings: ChangeSettings,
    *,
    batch_size: int,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
) -> Pool:
    """Draw changes and learn them on random images.

    Args:
        embed: Maps images in [0, 1] to features.
        images: Plain ones, the same on every rank, in memory; some hundred are enough.
        batch_size: Images that the network is given at once where nothing is learned.
        generator: In the same state on every rank; its device is the network's.

    Raises:
        DataError: See ``Whitening.of``.
        DivergedError: Likewise.
    """
    device = generator.device
    count = min(settings.group * settings.count, len(images)) // ranks.count * ranks.count
    plain = extract(embed, images, batch_size=batch_size).to(device)
    whiten = Whitening.of(plain, shrinkage=settings.shrinkage)
    changes = draw_changes(settings, images.shape[1:], generator=generator)
    pool = Pool(changes, whiten=whiten, rate=settings.rate)
    for _ in range(settings.steps):
        order = torch.randperm(len(images), generator=generator, device=device)[:count]
        batch = images[own(order, ranks).cpu()].to(device).float() / 255
        pool.advance(embed, batch, ranks=ranks)
    return pool


@cache
def _bicubic(points: int, side: int, device: torch.device) -> Float[Tensor, "{side} {points}"]:
    """Return the matrix that scales ``points`` values up to ``side``, corners to corners."""
    basis = torch.eye(points)[None, :, :, None]
    scaled = F.interpolate(basis, (side, 1), mode="bicubic", align_corners=True)
    return scaled[0, :, :, 0].T.to(device)


def _triangle(distance: Tensor) -> Tensor:
    """Return the weight of a pixel in bilinear sampling."""
    return (1 - distance.abs()).clamp(min=0)
