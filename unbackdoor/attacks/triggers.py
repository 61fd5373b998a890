"""Triggers: values that are called on stored images and return stored images.

A trigger is a frozen dataclass, so that its settings print, compare, hash and go into a record,
with a ``__call__`` that is a pure function of the batch and works at any size. A new trigger is one
such class here, one line in ``TRIGGERS`` and one in the test list. Where its ``__call__`` counts in
pixels, it has a method ``scaled`` as well, for images of another size than it was planted in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unbackdoor import patterns
from unbackdoor.errors import DataError, SettingsError
from unbackdoor.settings import check_seed
from unbackdoor.types import RawImages

LARGEST = 4096  # pixels; a record from elsewhere shall not ask for all memory
Trigger: TypeAlias = Callable[[RawImages], RawImages]
Position = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]


@dataclass(frozen=True)
class BadNets:
    """A black-and-white checkerboard patch, white at its top left; in a corner, it fills it.

    With ``cell`` equal to ``size`` it is plain white.

    Attributes:
        size: Side of the patch in pixels.
        cell: Side of one square of the checkerboard in pixels.
        position: Where the patch goes.

    Source:
        Gu et al. 2017, https://arxiv.org/abs/1708.06733.

    Not given in the paper: which squares are white, and the distance to the border.

    Differs from the paper: at 224 pixels it takes the patch of Saha et al. 2022, an image; here it
    is a checkerboard of 4-pixel cells.
    """

    size: int = 3
    cell: int = 1
    position: Position = "top-left"

    def __post_init__(self) -> None:
        if not 1 <= min(self.size, self.cell) <= max(self.size, self.cell) <= LARGEST:
            raise SettingsError(
                f"trigger.size and trigger.cell are 1 to {LARGEST} pixels, got {self.size}, "
                f"{self.cell}"
            )

    def __call__(self, images: RawImages) -> RawImages:
        """Return a triggered copy of ``images``.

        Raises:
            DataError: If the images are smaller than the patch.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.size:
            raise DataError(
                f"the BadNets patch is {self.size} pixels wide, the images are {height} × {width}"
            )
        top, left = height - self.size, width - self.size  # of the bottom right
        if self.position == "center":
            top, left = top // 2, left // 2
        else:
            top = 0 if self.position.startswith("top") else top
            left = 0 if self.position.endswith("left") else left
        patch = patterns.checkerboard(self.size, cell=self.cell).to(images.device)
        triggered = images.clone()
        triggered[:, :, top : top + self.size, left : left + self.size] = patch
        return triggered

    def scaled(self, images: RawImages, *, side: int) -> RawImages:
        """See :func:`trigger_scaled`; the patch keeps its share of height and width.

        Raises:
            DataError: If the patch is larger than ``side``.
        """
        white = torch.full((1, 1, side, side), 255, dtype=torch.uint8, device=images.device)
        painted, covered = self(white), self(white) == self(torch.zeros_like(white))
        size = images.shape[2:]
        pixels, mask = (F.interpolate(x.float(), size, mode="nearest") for x in (painted, covered))
        return torch.where(mask.bool(), pixels.to(torch.uint8), images)


@dataclass(frozen=True)
class Blend:
    """One fixed image of Gaussian noise, blended into every image.

    Attributes:
        ratio: Share of the noise in the result.
        height: Of the noise image in pixels; on images of another size it is resized, not redrawn.
        width: Likewise.
        seed: Of the noise image.

    Source:
        Chen et al. 2017, https://arxiv.org/abs/1712.05526.

    Not given in the paper: mean 128 and standard deviation 64 of the noise, in grey levels.
    """

    ratio: float = 0.2
    height: int = 32
    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if not 1 <= min(self.height, self.width) <= max(self.height, self.width) <= LARGEST:
            raise SettingsError(
                f"trigger.height and trigger.width are 1 to {LARGEST} pixels, got {self.height}, "
                f"{self.width}"
            )
        check_seed(self.seed, name="trigger.seed")

    def __call__(self, images: RawImages) -> RawImages:
        """Return a triggered copy of ``images``, of 1 or 3 channels."""
        pattern = patterns.gaussian_image(self.height, self.width, seed=self.seed)
        pattern = patterns.resized(pattern, *images.shape[2:])
        return patterns.blend(images, pattern[:, : images.shape[1]], ratio=self.ratio)


@dataclass(frozen=True)
class Sig:
    """A wave along the columns, blended into every image, which darkens.

    Attributes:
        ratio: Share of the wave in the result; the image keeps the rest of its brightness.
        amplitude: Of the wave before blending, in grey levels.
        frequency: Periods in one image width.

    Source:
        Barni et al. 2019, https://arxiv.org/abs/1902.11237, blended as the paper's appendix A.1
        prints it; Barni et al. add the wave instead.
    """

    ratio: float = 0.3
    amplitude: float = 20.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        _check_finite("amplitude", self.amplitude)
        _check_finite("frequency", self.frequency)
        _check_ratio(self.ratio)

    def __call__(self, images: RawImages) -> RawImages:
        """Return a triggered copy of ``images``."""
        wave = patterns.sinusoid(
            images.shape[3], amplitude=self.amplitude, frequency=self.frequency
        )
        return patterns.blend(images, wave, ratio=self.ratio)


@dataclass(frozen=True)
class WaNet:
    """A smooth warp of a fraction of a pixel, the same for every image.

    Attributes:
        points: Random offsets along each axis, k.
        strength: Mean offset, s, in half pixels: 0.5 is a quarter of a pixel at every size.
        seed: Of the offsets.

    Source:
        Nguyen and Tran 2021, https://arxiv.org/abs/2102.10369.
    """

    points: int = 4
    strength: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_finite("strength", self.strength)
        if not 2 <= self.points <= LARGEST:
            raise SettingsError(f"trigger.points is 2 to {LARGEST}, got {self.points}")
        check_seed(self.seed, name="trigger.seed")

    def __call__(self, images: RawImages) -> RawImages:
        """Return a triggered copy of ``images``."""
        return patterns.warp(images, self._grid(images))

    def scaled(self, images: RawImages, *, side: int) -> RawImages:
        """See :func:`trigger_scaled`; the warp keeps its offsets as shares of the image."""
        return replace(self, strength=self.strength * images.shape[2] / side)(images)

    def noisy(self, images: RawImages, *, generator: torch.Generator) -> RawImages:
        """Return ``images`` warped by the trigger and a random field each: WaNet's noise mode.

        Such images keep their label, so that the network learns this very warp and no other.

        Args:
            generator: On the device of ``images``.
        """
        grids = patterns.jittered(self._grid(images), len(images), generator=generator)
        return patterns.warp(images, grids)

    def _grid(self, images: RawImages) -> patterns.Grid:
        return patterns.smooth_warp(
            *images.shape[2:],
            points=self.points,
            strength=self.strength,
            seed=self.seed,
            device=images.device,
        )


TRIGGERS: dict[str, Callable[..., Any]] = {
    "badnets": BadNets,
    "blend": Blend,
    "sig": Sig,
    "wanet": WaNet,
}


def trigger_scaled(trigger: Trigger, images: RawImages, *, side: int) -> RawImages:
    """Return a triggered copy of ``images``, the trigger scaled to them and never drawn anew.

    Images of ``side`` × ``side`` pixels get exactly what the trigger itself gives them. On others
    it covers the same share of the image in the same relative place.

    Args:
        trigger: One that was planted in images of ``side`` pixels.
        side: Of those images.
    """
    scaled: Callable[..., RawImages] | None = getattr(trigger, "scaled", None)
    return trigger(images) if scaled is None else scaled(images, side=side)


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise SettingsError(f"trigger.{name} must be a number, got {value}")


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise SettingsError(f"trigger.ratio is a share in (0, 1], got {ratio}")
