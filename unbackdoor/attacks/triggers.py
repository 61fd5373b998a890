"""Triggers: values that are called on stored images and return stored images.

A trigger is a frozen dataclass, so that its settings print, compare, hash and go into a record,
with a ``__call__`` that is a pure function of the batch. A new trigger is one such class here, one
line in ``TRIGGERS`` and one in the test list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unbackdoor.errors import DataError
from unbackdoor.patterns import checkerboard
from unbackdoor.types import RawImages

Trigger: TypeAlias = Callable[[RawImages], RawImages]


@dataclass(frozen=True)
class BadNets:
    """A black-and-white checkerboard patch, its corners white, flush with the border.

    Attributes:
        size: Side of the patch in pixels.
        cell: Side of one square of the checkerboard in pixels.
        position: Where the patch goes.

    Source:
        Gu et al. 2017, https://arxiv.org/abs/1708.06733.

    Not given in the paper: which squares are white, and the distance to the border.
    """

    size: int = 3
    cell: int = 1
    position: Literal["top-left", "center"] = "top-left"

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
        at_center = self.position == "center"
        top, left = ((height - self.size) // 2, (width - self.size) // 2) if at_center else (0, 0)
        patch = checkerboard(self.size, cell=self.cell).to(images.device)
        triggered = images.clone()
        triggered[:, :, top : top + self.size, left : left + self.size] = patch
        return triggered


TRIGGERS: dict[str, type[BadNets]] = {"badnets": BadNets}
